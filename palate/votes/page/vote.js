// The voting page. An answer shows the next pair at once; the vote itself waits in an outbox until the server has it on disk.
"use strict";

const $ = (id) => document.getElementById(id);
const HIDDEN = "The words behind it are hidden: judge by looks alone.";
const ASK = { // of two pictures, and of more
  overall: ["Which picture do you prefer?", "Which picture do you like best?", null],
  appeal: ["Which picture is more appealing?", "Which picture is most appealing?", HIDDEN],
  following: ["Which picture follows the words better?", "Which picture follows the words best?", null],
};
const SAID = { tie: "Tie.", bad: "All bad.", skip: "Skipped." };
const COUNTS = ["", "", "two", "three", "four"];
const FRAMES = [...document.querySelectorAll(".frame")];
const REST_PAIRS = 40, REST_MINUTES = 20;
const EARLY = 180; // an answer sooner than so many milliseconds is a slip of the key
const OPENING = 600; // and a click on a picture so soon after the ballot has come is the second of a double click

let form = "", questions = [], atOnce = 2;
let open = [], soon = [], past = [], done = 0, left = 0;
let shownAt = 0, shown = "", said = "", sending = false, retry = null;
let restedAt = Date.now(), sinceRest = 0, times = [];
let openedAt = 0, pointer = null, seen = new Set(), ended = false;
const outbox = load(), fetched = new Map();

// Talking to the server --------------------------------------------------------------------------------------------------

function load() {
  try { return JSON.parse(sessionStorage.getItem("palate-outbox") || "[]"); } catch { return []; }
}

function save() {
  try { sessionStorage.setItem("palate-outbox", JSON.stringify(outbox)); } catch { /* kept in memory alone */ }
}

async function ask(path, body) {
  const headers = { "Content-Type": "application/json", "X-Palate": form };
  const request = body === undefined ? {} : { method: "POST", body: JSON.stringify(body), headers };
  const answer = await fetch(path, { ...request, cache: "no-store" });
  const found = await answer.json().catch(() => ({}));
  if (answer.ok) return found;
  const wait = Number(answer.headers.get("Retry-After"));
  throw Object.assign(new Error(found.error || `the server answers ${answer.status}`), { status: answer.status, wait });
}

async function refresh() {
  const state = await ask("/api/state");
  form = state.form;
  if (state.join) invite(state);
  else if (!outbox.length) apply(state);
}

const own = (pair) => ({ ...pair, answered: new Set(pair.answered) });

function apply(state) {
  ({ questions, soon, done, left } = state);
  atOnce = state.at_once;
  ended = state.ended;
  gratitude(state);
  open = state.open.map(own);
  if (state.closed) { // a skipped pair that others have filled meanwhile stays skipped
    past = past.filter((vote) => vote.pair.id !== state.closed);
    notice("Enough people have judged that pair meanwhile. Undo again for the one before.");
  }
  // After a reload the server remembers what undo would take back.
  if (!past.length && state.last) past.push({ ...state.last, pair: own(state.last.showing) });
  show();
}

function post(kind, body) {
  outbox.push({ kind, body });
  save();
  send();
}

async function send() {
  if (sending) return;
  sending = true;
  clearTimeout(retry);
  while (outbox.length) {
    const { kind, body } = outbox[0];
    try {
      const state = await ask(`/api/${kind}`, body);
      outbox.shift();
      save();
      notice("");
      if (!outbox.length) apply(state);
    } catch (error) {
      if (error.status === undefined || error.status === 429 || error.status >= 500) {
        const why = error.status === undefined ? "The page’s server does not answer" : error.message;
        const kept = outbox.length === 1 ? "Your vote is" : `${outbox.length} votes are`;
        if (error.status !== 429) notice(`${why}. ${kept} kept here and sent again.`);
        retry = setTimeout(send, 1000 * (error.wait || 2));
        break;
      }
      outbox.shift(); // refused for good: the server knows better, so see what it says
      save();
      notice(error.message);
      past = [];
      await refresh().catch(() => {});
    }
  }
  sending = false;
}

// Showing ----------------------------------------------------------------------------------------------------------------

function only(id) {
  if (id === "ballot" && $("ballot").hidden) openedAt = performance.now();
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== id;
}

function notice(text) {
  if ($("notice").textContent !== text) $("notice").textContent = text;
  $("notice").hidden = !text;
}

function say(text) {
  $("live").textContent = text;
}

function invite(state) {
  if (state.ended || state.personal) {
    $("thanks").textContent = state.ended ? "Voting is closed" : "This page is by invitation";
    $("finished-text").textContent = state.ended ? "Thank you for coming by." : "Whoever votes here has a link of their own: ask whoever invited you.";
    $("finished-undo").hidden = true;
    only("finished");
    return;
  }
  if (state.at_once > 2) $("welcome-title").textContent = "Which picture is best?";
  const count = ["", "One question", "Two quick questions", "Three quick questions"][state.questions.length];
  const until = state.until ? ` The page is open until ${state.until}.` : "";
  $("invitation").textContent =
    state.at_once === 2
      ? `You will see two pictures at a time, made for the same words. ${count} a pair; arrow keys or a tap answer.${until}`
      : `You will see up to ${COUNTS[state.at_once]} pictures at a time, made for the same words. ${count} a set; a number key or a tap chooses the best.${until}`;
  only("welcome");
}

function gratitude(state) {
  $("finished-undo").hidden = state.ended;
  $("thanks").textContent = state.name ? `Thank you, ${state.name}` : "Thank you";
  $("owner-text").textContent = state.thanks;
  $("owner-text").hidden = !state.thanks;
  const liked = $("liked").querySelector(".liked");
  const names = state.liked.join();
  if (liked.dataset.names === names) return;
  liked.dataset.names = names;
  liked.replaceChildren(...state.liked.map((name) => Object.assign(new Image(), { src: `/picture/${name}`, alt: "" })));
  $("liked").hidden = !names;
}

const question = () => (open.length ? questions.find((name) => !open[0].answered.has(name)) : undefined);

function fetchAhead() {
  const wanted = new Set([...open.flatMap((pair) => pair.pictures), ...soon]);
  for (const name of fetched.keys()) if (!wanted.has(name)) fetched.delete(name);
  for (const name of wanted) {
    if (fetched.has(name)) continue;
    const picture = new Image();
    picture.src = `/picture/${name}`;
    picture.decode().catch(() => {}); // the one that is shown tells of errors
    fetched.set(name, picture);
  }
}

function show() {
  progress();
  const asked = question();
  $("undo").disabled = $("finished-undo").disabled = !past.length;
  if (!asked) {
    shown = "";
    if (outbox.length) return; // the server says in a moment what comes next
    const judged = done ? `You have judged ${plural(done)}. ` : "";
    $("finished-text").textContent = judged + (ended ? "Voting is closed." : "That was all there is for you.");
    $("finished-soft").textContent = ended ? "" : "Should pictures be added, they appear here by themselves.";
    if ($("finished").hidden) say(`Thank you. ${$("finished-text").textContent}`);
    only("finished");
    return;
  }
  if (resting()) return;
  fetchAhead();
  only("ballot");
  const pair = open[0], now = `${pair.id} ${asked}`;
  if (shown === now) return;
  document.body.classList.remove("pointing");
  const turn = questions.length > 1 ? `Question ${questions.indexOf(asked) + 1} of ${questions.length}` : "";
  $("turn").textContent = turn;
  const anew = !shown.startsWith(`${pair.id} `);
  shown = now;
  shownAt = performance.now();
  const [two, more, instead] = ASK[asked], title = pair.pictures.length > 2 ? more : two;
  $("question").textContent = title;
  $("prompt").textContent = instead ?? pair.prompt;
  $("prompt").className = instead ? "" : "said";
  for (const frame of FRAMES) frame.classList.remove("chosen", "other");
  if (anew) {
    $("stage").dataset.count = $("answers").dataset.count = pair.pictures.length;
    FRAMES.forEach((frame, i) => place(frame, pair.pictures[i]));
    for (const button of document.querySelectorAll(".answer.more")) button.hidden = button.dataset.choice > pair.pictures.length;
    zoom(false);
    seen = new Set();
    flip(0);
    arrange();
  }
  say(`${said} ${atOnce > 2 ? "Set" : "Pair"} ${done + 1}. ${title} ${instead ?? pair.prompt}`.trim());
  said = "";
}

function place(frame, name) {
  const picture = frame.querySelector("img");
  frame.hidden = name === undefined;
  picture.dataset.name = name ?? "";
  if (name === undefined) return picture.removeAttribute("src");
  const fit = (from) => {
    frame.style.setProperty("--ratio", from.naturalWidth / from.naturalHeight);
    frame.dataset.ratio = from.naturalWidth / from.naturalHeight;
    arrange();
  };
  const known = fetched.get(name);
  if (known?.naturalWidth) fit(known);
  picture.onload = () => fit(picture);
  picture.onerror = () => missing(picture, name);
  picture.src = `/picture/${name}`;
}

// As many columns as make the pictures largest; of four none is left alone, and the third of three stands in the middle.
function arrange() {
  const count = open[0]?.pictures.length ?? 2, { clientWidth, clientHeight } = $("stage");
  const ratio = Math.max(...FRAMES.slice(0, count).map((frame) => Number(frame.dataset.ratio) || 1));
  const rows = (columns) => Math.ceil(count / columns);
  const width = (columns) => Math.min(clientWidth / columns, (clientHeight / rows(columns)) * ratio);
  const columns = [1, 2, 3, 4].filter((n) => n <= count && (count < 4 || n !== 3)).reduce((best, next) => (width(next) >= width(best) ? next : best));
  $("stage").style.setProperty("--columns", columns);
  $("stage").style.setProperty("--rows", rows(columns));
  $("stage").dataset.odd = count === 3 && columns === 2;
  words(columns);
}

async function missing(picture, name) {
  const status = await fetch(`/picture/${name}`).then((answer) => answer.status, () => 0);
  if (picture.dataset.name !== name || !open.length || !open[0].pictures.includes(name)) return;
  if (status === 404 || status === 410) {
    notice("A picture of those is gone: they were skipped.");
    answer("skip", true);
  } else {
    setTimeout(() => { if (picture.dataset.name === name) picture.src = `/picture/${name}?again=${Date.now()}`; }, 2000);
  }
}

function progress() {
  const total = done + left, now = Date.now(), recent = times.filter((at) => now - at < 300000);
  $("progress").hidden = !total;
  $("progress").setAttribute("aria-valuemax", total);
  $("progress").setAttribute("aria-valuenow", done);
  const part = open.length && questions.length ? open[0].answered.size / questions.length : 0;
  for (const bar of document.querySelectorAll(".progress i")) {
    bar.style.transform = `scaleX(${total ? (done + part) / total : 0})`;
  }
  const pace = Math.max(1, Math.round(recent.length / Math.max(0.25, (now - recent[0]) / 60000)));
  $("count").textContent = total ? `${done} of ${total}${recent.length > 3 && innerWidth > 560 ? ` · ${pace} a minute` : ""}` : "";
}

function resting() {
  if (!$("pause").hidden) return true;
  const minutes = (Date.now() - restedAt) / 60000;
  if (sinceRest < REST_PAIRS && (sinceRest < 5 || minutes < REST_MINUTES)) return false;
  rest();
  return true;
}

function rest() {
  const pace = sinceRest ? (Date.now() - restedAt) / 60000 / sinceRest : 0;
  const remaining = pace && left ? `, about ${Math.max(1, Math.round(pace * left))} minutes at this pace` : "";
  $("pause-text").textContent = `${plural(done)} judged, ${left} to go${remaining}.`;
  only("pause");
  $("go-on").focus();
}

// Answering --------------------------------------------------------------------------------------------------------------

function freshName() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function answer(choice, forced = false) {
  const asked = question(), taken = performance.now() - shownAt;
  if (!asked || $("ballot").hidden || shown !== `${open[0].id} ${asked}` || (!forced && taken < EARLY)) return;
  const pair = open[0], vote = freshName(), count = pair.pictures.length;
  if (choice > count) return;
  if (!forced && single() && choice !== "skip" && seen.size < count) {
    flip(pair.pictures.findIndex((_, i) => !seen.has(i)));
    const all = count === 2 ? "now you have seen both, and can choose" : "now you have seen all, and can choose";
    notice(`This is picture ${at + 1} of ${count}: ${seen.size === count ? all : "look at the others, too"}.`);
    return;
  }
  if (!forced) notice("");
  pair.answered.add(asked);
  past.push({ vote, question: asked, pair });
  if (choice === "skip" || !question()) {
    open.shift();
    done += 1;
    left = Math.max(open.length, left - 1);
    sinceRest += 1;
    times.push(Date.now());
  }
  if (!SAID[choice]) FRAMES.forEach((frame) => frame.classList.add(frame.dataset.choice === choice ? "chosen" : "other"));
  said = SAID[choice] ?? (count > 2 ? `Picture ${choice} is the best.` : `${word(choice - 1)} is better.`);
  const seconds = Math.round(taken) / 1000;
  setTimeout(show, 90); // long enough to see what was chosen
  post("vote", { vote, showing: pair.id, question: asked, choice, seconds });
}

function undo() {
  const last = past.pop();
  if (!last) return;
  const current = open[0]?.id === last.pair.id ? open[0] : last.pair;
  if (current !== open[0]) {
    open.unshift(current);
    done = Math.max(0, done - 1);
    left += 1;
    sinceRest = Math.max(0, sinceRest - 1);
  }
  current.answered.delete(last.question);
  shown = "";
  said = "Undone.";
  $("pause").hidden = true;
  post("undo", { vote: last.vote });
  show();
}

function zoom(on) {
  $("stage").dataset.zoom = on ? "on" : "off";
  $("zoom").setAttribute("aria-pressed", on);
}

let aim = [50, 50];
function pan(x, y) {
  aim = [x, y].map((value) => Math.min(100, Math.max(0, value)));
  $("stage").style.setProperty("--x", `${aim[0]}%`);
  $("stage").style.setProperty("--y", `${aim[1]}%`);
}

// In a narrow window the left picture stands above.
const WORDS = { one: ["First", "Second"], above: ["Upper", "Lower"], beside: ["Left", "Right"] };
let stood = "beside";
const word = (i) => WORDS[single() ? "one" : stood][i];
const plural = (count) => `${count} ${atOnce > 2 ? "set" : "pair"}${count === 1 ? "" : "s"}`;

function words(columns) {
  stood = columns === 1 ? "above" : "beside";
  const many = open[0]?.pictures.length > 2;
  FRAMES.forEach((frame, i) => {
    const name = many ? String(i + 1) : word(i) ?? "";
    for (const place of document.querySelectorAll(`.word-${i + 1}`)) place.textContent = name;
    frame.setAttribute("aria-label", many ? `Picture ${name} is the best` : `The ${name.toLowerCase()} picture is better`);
  });
  for (const place of document.querySelectorAll(".bad-word")) place.textContent = many ? "All bad" : "Both bad";
  for (const place of document.querySelectorAll(".tie-word")) place.textContent = many ? "All alike" : "Tie";
}

const single = () => $("stage").dataset.view === "one";

function flicker(on) {
  $("stage").dataset.view = on ? "one" : "side";
  $("flicker").setAttribute("aria-pressed", on);
  $("flip").hidden = !on;
  arrange();
  flip(0);
}

let at = 0; // the picture that is seen, where it is one at a time

function flip(to) {
  at = to;
  if (single()) seen.add(at);
  FRAMES.forEach((frame, i) => frame.classList.toggle("under", single() && i !== at));
  if (single()) say(open[0]?.pictures.length > 2 ? `Picture ${at + 1}` : `${word(at)} picture`);
}

// Events -----------------------------------------------------------------------------------------------------------------

const zoomed = () => $("stage").dataset.zoom === "on";
const flipOver = () => { notice(""); flip((at + 1) % (open[0]?.pictures.length ?? 2)); };
const ofTwo = (choice) => { if (open[0]?.pictures.length === 2) answer(choice); };
const KEYS = {
  ArrowLeft: () => ofTwo("1"), ArrowRight: () => ofTwo("2"), 1: () => answer("1"), 2: () => answer("2"), 3: () => answer("3"),
  4: () => answer("4"), ArrowDown: () => answer("tie"),
  ArrowUp: () => answer("bad"), t: () => answer("tie"), b: () => answer("bad"), s: () => answer("skip"), u: undo,
  Backspace: undo, z: () => zoom(!zoomed()), f: () => flicker(!single()),
};

document.addEventListener("keydown", (event) => {
  if ($("help").open || event.target instanceof HTMLInputElement) return;
  if (event.ctrlKey || event.metaKey || event.altKey) {
    if (event.key === "z" && !event.altKey) undo();
    return;
  }
  if (event.key === "?") { $("help").showModal(); return; }
  if ($("ballot").hidden) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const onButton = event.target instanceof HTMLButtonElement && !event.target.classList.contains("frame");
  if (event.shiftKey && zoomed() && key.startsWith("Arrow")) {
    pan(aim[0] + 10 * ((key === "ArrowRight") - (key === "ArrowLeft")), aim[1] + 10 * ((key === "ArrowDown") - (key === "ArrowUp")));
  } else if (key === " " && single() && !onButton) {
    if (!event.repeat) flipOver();
  } else if (KEYS[key] && !event.shiftKey) {
    if (!event.repeat) KEYS[key]();
  } else {
    return;
  }
  event.preventDefault();
});

for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => {
    const picture = button.classList.contains("frame");
    if (picture && performance.now() - openedAt < OPENING) return;
    if (picture && zoomed()) zoom(false);
    else if (picture && single()) flipOver();
    else answer(button.dataset.choice);
  });
}
for (const frame of FRAMES) {
  let from = null;
  frame.addEventListener("pointerdown", (event) => { from = [event.clientX, event.clientY]; });
  frame.addEventListener("pointermove", (event) => {
    const box = frame.getBoundingClientRect();
    if (zoomed()) pan(100 * (event.clientX - box.left) / box.width, 100 * (event.clientY - box.top) / box.height);
  });
  frame.addEventListener("click", (event) => { // the end of a drag is no click
    const far = from && event.detail && Math.hypot(event.clientX - from[0], event.clientY - from[1]) > 12;
    if (far) event.stopImmediatePropagation();
  }, true);
}
document.addEventListener("pointermove", (event) => {
  const moved = pointer && Math.hypot(event.clientX - pointer[0], event.clientY - pointer[1]) > 3;
  if (moved && event.pointerType === "mouse") document.body.classList.add("pointing");
  if (moved || !pointer) pointer = [event.clientX, event.clientY];
});
document.addEventListener("keydown", () => document.body.classList.remove("pointing"), true);
$("undo").addEventListener("click", undo);
$("rest").addEventListener("click", rest);
$("finished-undo").addEventListener("click", undo);
$("zoom").addEventListener("click", () => zoom(!zoomed()));
$("flicker").addEventListener("click", () => flicker(!single()));
if (innerWidth <= 560 && innerHeight > innerWidth) flicker(true); // two pictures in a hand's width are too small to judge
$("flip").addEventListener("click", flipOver);
$("help-open").addEventListener("click", () => $("help").showModal());
$("help-close").addEventListener("click", () => $("help").close());
$("go-on").addEventListener("click", () => {
  restedAt = Date.now();
  sinceRest = 0;
  times = [];
  $("pause").hidden = true;
  show();
  $("question").focus();
});
$("join").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await ask("/api/join", { name: $("name").value });
    restedAt = Date.now();
    await refresh();
    $("question").focus();
  } catch (error) {
    notice(error.status ? error.message : "The page’s server does not answer; try again in a moment.");
  }
});
addEventListener("beforeunload", (event) => { if (outbox.length) event.preventDefault(); });
addEventListener("online", send);
new ResizeObserver(arrange).observe($("stage"));
setInterval(() => { if (!$("finished").hidden) refresh().catch(() => {}); }, 15000);

(async function start() {
  try {
    await refresh();
    notice("");
    send();
  } catch (error) {
    notice(error.status ? error.message : "The page’s server does not answer; this page tries again.");
    setTimeout(start, 3000);
  }
})();
