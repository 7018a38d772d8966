// The owner's page: the numbers come from the server, this draws them. All text goes in as text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const TITLES = { overall: "Overall preference", appeal: "Visual appeal, prompt hidden", following: "Prompt following" };
const percent = (share) => `${Math.round(100 * share)} %`;
const plural = (count, one) => `${count} ${one}${count === 1 ? "" : "s"}`;
let before = "";

function make(tag, name, ...children) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...children.filter((child) => child !== null));
  return made;
}

function scale(low, middle, high, label, half = false) {
  const span = make("i", "span"), dot = make("i", "dot"), made = make("div", half ? "scale half" : "scale", span, dot);
  span.style.left = `${100 * low}%`;
  span.style.width = `${100 * (high - low)}%`;
  dot.style.left = `${100 * middle}%`;
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", label);
  return made;
}

function rate(name, found, small) {
  const between = `${percent(found.low).replace(" %", "")}–${percent(found.high)}`;
  const drawn = scale(found.low, found.rate, found.high, `${percent(found.rate)}, 95 % interval ${between}`, true);
  return make("div", small ? "row small" : "row", make("span", "", name), drawn, make("span", "", make("b", "", percent(found.rate)), ` (${between})`));
}

function chips(entries) {
  return make("p", "chips", ...entries.filter(Boolean).map(([value, what]) => make("span", "", make("b", "", value), ` ${what}`)));
}

function comparison(found) {
  const w = found.win_rate, m = found.majority;
  const rows = [make("h3", "", `${found.b} against ${found.a}`), rate(found.b, w), chips([
    [String(w.wins), "preferred"], [String(w.ties), w.ties === 1 ? "tie" : "ties"], [String(w.losses), "not preferred"], [String(w.prompts), w.prompts === 1 ? "prompt" : "prompts"],
  ]), chips([
    [String(m.b), `${m.b === 1 ? "pair" : "pairs"} for ${found.b} by majority`], [String(m.a), `for ${found.a}`],
    m.ties ? [String(m.ties), "even"] : null,
    m.shared ? [`${m.unanimous} of ${m.shared}`, "pairs unanimous"] : null,
  ])];
  if (found.categories.length > 1) rows.push(...found.categories.map((category) => rate(`${category.name} (${category.n})`, category, true)));
  return rows;
}

function strengths(rows) {
  if (rows.length < 3) return [];
  const low = Math.min(...rows.map((row) => row.low)), wide = Math.max(...rows.map((row) => row.high)) - low || 1;
  return [make("h3", "", "Bradley–Terry strength, on the scale of chess"), ...rows.map((row) => {
    const text = `${Math.round(row.elo)} (${Math.round(row.low)}–${Math.round(row.high)})`;
    return make("div", "row", make("span", "", row.model), scale((row.low - low) / wide, (row.elo - low) / wide, (row.high - low) / wide, text), make("span", "", text));
  })];
}

function panel(name, found) {
  const c = found.choices;
  return make("section", "panel", make("h2", "", TITLES[name]), chips([
    [String(found.votes), found.votes === 1 ? "vote" : "votes"], c.tie ? [String(c.tie), c.tie === 1 ? "tie" : "ties"] : null, c.bad ? [String(c.bad), "all bad"] : null,
    found.alpha === null ? null : [found.alpha.toFixed(2), `Krippendorff’s alpha${found.alpha < 0.2 ? ": little agreement" : ""}`],
  ]), ...found.comparisons.flatMap(comparison), ...strengths(found.strengths));
}

function headline(told) {
  const first = (told.questions.overall ?? Object.values(told.questions)[0])?.comparisons ?? [];
  if (!told.votes) return "No votes yet";
  if (first.length !== 1) return `${plural(told.votes, "vote")} on ${plural(told.judged, told.at_once > 2 ? "set" : "pair")}`;
  const { a, b, win_rate: w } = first[0];
  if (w.low > 0.5) return `${b} is preferred in ${percent(w.rate)} of the votes`;
  if (w.high < 0.5) return `${a} is preferred in ${percent(1 - w.rate)} of the votes`;
  return `No clear difference between ${a} and ${b} so far`;
}

function draw(told) {
  const text = JSON.stringify(told);
  $("fresh").textContent = `live · ${new Date().toLocaleTimeString()}`;
  if (text === before) return;
  before = text;
  if ($("headline").textContent !== headline(told)) $("headline").textContent = headline(told);
  const elsewhere = told.elsewhere ? `; ${plural(told.elsewhere, "vote")} on pairs of another mode or from elsewhere not counted here` : "";
  const gone = told.gone ? `; ${plural(told.gone, "picture")} gone since` : "";
  const what = told.at_once > 2 ? "set" : "pair", best = told.at_once > 2 ? "; the best of a set counts as better than each other" : "";
  $("summary").textContent = `${told.judged} of ${plural(told.pairs, what)} judged, ${plural(told.votes, "vote")} by ${plural(told.raters.length, "rater")}; up to ${plural(told.raters_per_pair, "rater")} a ${what}${best}${gone}${elsewhere}`;
  $("questions").replaceChildren(...Object.entries(told.questions).map(([name, found]) => panel(name, found)));
  $("raters").hidden = !told.raters.length;
  const share = (value) => (value === null ? "–" : percent(value));
  $("rater-rows").replaceChildren(...told.raters.map((row) => make("tr", "", ...[
    row.name || row.rater, String(row.votes), share(row.agreement), row.repeated ? `${row.same} of ${row.repeated}` : "–",
    row.checked ? `${row.passed} of ${row.checked}` : "–",
    share(row.left), row.seconds === null ? "–" : row.seconds.toFixed(1),
  ].map((cell) => make("td", "", cell)))));
}

(async function look() {
  try {
    const answer = await fetch("/api/results", { cache: "no-store" });
    const told = await answer.json();
    if (answer.ok) draw(told);
    else $("fresh").textContent = told.error;
  } catch {
    $("fresh").textContent = "the server does not answer";
  }
  setTimeout(look, document.hidden ? 30000 : 5000);
})();
