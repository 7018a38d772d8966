// The voting page. An answer shows the next pair at once; the vote itself waits in an outbox until the server has it on disk.
"use strict";

const $ = (id) => document.getElementById(id);
const ASK = {
  overall: ["Which picture do you prefer?", null],
  appeal: ["Which picture is more appealing?", "The words behind it are hidden: judge by looks alone."],
  following: ["Which picture follows the words better?", null],
};
const SAID = { tie: "Tie.", bad: "Both bad.", skip: "Skipped." };
const REST_PAIRS = 40, REST_MINUTES = 20;
const EARLY = 180; // an answer sooner than so many milliseconds is a slip of the key
const OPENING = 600; // and a click on a picture so soon after the ballot has come is the second of a double click

let form = "", questions = [];
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
  const count = ["", "One question", "Two quick questions", "Three quick questions"][state.questions.length];
  const until = state.until ? ` The page is open until ${state.until}.` : "";
  $("invitation").textContent =
    `You will see two pictures at a time, made for the same words. ${count} a pair; arrow keys or a tap answer.${until}`;
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
  const wanted = new Set([...open.flatMap((pair) => [pair.left, pair.right]), ...soon]);
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
    const judged = done ? `You have judged ${done} ${done === 1 ? "pair" : "pairs"}. ` : "";
    $("finished-text").textContent = judged + (ended ? "Voting is closed." : "That was all there is for you.");
    $("finished-soft").textContent = ended ? "" : "Should pairs be added, they appear here by themselves.";
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
  const [title, instead] = ASK[asked];
  $("question").textContent = title;
  $("prompt").textContent = instead ?? pair.prompt;
  $("prompt").className = instead ? "" : "said";
  for (const side of ["left", "right"]) $(side).classList.remove("chosen", "other");
  if (anew) {
    place("left", pair.left);
    place("right", pair.right);
    zoom(false);
    seen = new Set();
    flip(false);
  }
  say(`${said} Pair ${done + 1}. ${title} ${instead ?? pair.prompt}`.trim());
  said = "";
}

function place(side, name) {
  const picture = $(`${side}-picture`);
  const fit = (from) => $(side).style.setProperty("--ratio", from.naturalWidth / from.naturalHeight);
  const known = fetched.get(name);
  if (known?.naturalWidth) fit(known);
  picture.onload = () => fit(picture);
  picture.onerror = () => missing(picture, name);
  picture.dataset.name = name;
  picture.src = `/picture/${name}`;
}

async function missing(picture, name) {
  const status = await fetch(`/picture/${name}`).then((answer) => answer.status, () => 0);
  if (picture.dataset.name !== name || !open.length || ![open[0].left, open[0].right].includes(name)) return;
  if (status === 404 || status === 410) {
    notice("A picture of that pair is gone: it was skipped.");
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
  $("pause-text").textContent = `${done} ${done === 1 ? "pair" : "pairs"} judged, ${left} to go${remaining}.`;
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
  if (!forced && single() && choice !== "skip" && seen.size < 2) {
    flip(true);
    notice("This is the second picture: now you have seen both, and can choose.");
    return;
  }
  const pair = open[0], vote = freshName();
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
  if (choice === "left" || choice === "right") {
    $(choice).classList.add("chosen");
    $(choice === "left" ? "right" : "left").classList.add("other");
  }
  said = SAID[choice] ?? `${word(choice)} is better.`;
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

let at = [50, 50];
function pan(x, y) {
  at = [x, y].map((value) => Math.min(100, Math.max(0, value)));
  $("stage").style.setProperty("--x", `${at[0]}%`);
  $("stage").style.setProperty("--y", `${at[1]}%`);
}

// In a narrow window the left picture stands above.
const stacked = () => $("stage").clientWidth <= $("stage").clientHeight;
const WORDS = { one: { left: "First", right: "Second" }, above: { left: "Upper", right: "Lower" }, beside: { left: "Left", right: "Right" } };
const word = (side) => WORDS[single() ? "one" : stacked() ? "above" : "beside"][side];

function words() {
  for (const side of ["left", "right"]) {
    for (const place of document.querySelectorAll(`.${side}-word`)) place.textContent = word(side);
    $(side).setAttribute("aria-label", `The ${word(side).toLowerCase()} picture is better`);
  }
}

const single = () => $("stage").dataset.view === "one";

function flicker(on) {
  $("stage").dataset.view = on ? "one" : "side";
  $("flicker").setAttribute("aria-pressed", on);
  $("flip").hidden = !on;
  words();
  flip(false);
}

function flip(right) {
  seen.add(right ? "right" : "left");
  $("left").classList.toggle("under", single() && right);
  $("right").classList.toggle("under", single() && !right);
  if (single()) say(`${word(right ? "right" : "left")} picture`);
}

// Events -----------------------------------------------------------------------------------------------------------------

const zoomed = () => $("stage").dataset.zoom === "on";
const flipOver = () => { notice(""); flip(!$("left").classList.contains("under")); };
const KEYS = {
  ArrowLeft: () => answer("left"), ArrowRight: () => answer("right"), ArrowDown: () => answer("tie"),
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
    pan(at[0] + 10 * ((key === "ArrowRight") - (key === "ArrowLeft")), at[1] + 10 * ((key === "ArrowDown") - (key === "ArrowUp")));
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
for (const frame of document.querySelectorAll(".frame")) {
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
new ResizeObserver(words).observe($("stage"));
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
