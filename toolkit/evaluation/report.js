// The cases: filtered, sorted and shown a hundred at a time, and one of them opened. The address keeps filters, order and the opened case.
const PAGE = 100;
const find = (id) => document.getElementById(id);
const read = (id) => JSON.parse(find(id)?.textContent ?? "null");

const packed = read("cases"); // {fields, texts, rows, ecgs}: texts are stored once and rows hold their places
const cases = packed.rows.map((values, place) => {
  const row = Object.fromEntries(packed.fields.map((field, i) => [field, values[i]]));
  for (const field of packed.texted) row[field] = row[field] === null ? null : packed.texts[row[field]];
  row.labels = row.labels.map((i) => packed.texts[i]);
  row.controls = row.controls.map(([name, text]) => [packed.texts[name], packed.texts[text]]);
  return { ...row, place: place + 1, drawn: packed.ecgs[row.sample] !== undefined };
});
const { compare: alphabetical } = new Intl.Collator("en", { numeric: true }); // 10 after 2. Of 82,146 cases 0.5 to 0.9 s; localeCompare 4 to 8
const any = (test) => cases.some(test);
const someDrawn = any((row) => row.drawn) && any((row) => !row.drawn);

const shownText = (text) => text || "(empty)";
const number = (value, places) => (value === null ? "–" : value.toFixed(places).replace("-", "−"));
const title = (row) => row.question ?? (row.task === "report" ? "Report" : row.question_type);
const mark = (row) => (row.correct === null
  ? element("span", { className: "mark", textContent: `ROUGE-L ${number(row.score, 2)}` })
  : element("span", { className: `mark ${row.correct ? "right" : "wrong"}`, textContent: row.correct ? "✓ right" : "✗ wrong" }));

const COLUMNS = [
  { name: "place", label: "#", numeric: true, value: (row) => row.place },
  { name: "result", label: "Result", value: (row) => (row.correct === null ? row.score : row.correct ? 2 : -1), cell: mark },
  { name: "question", label: "Question", value: title },
  { name: "reference", label: "Reference", value: (row) => row.reference, cell: (row) => shownText(row.reference) },
  { name: "prediction", label: "Prediction", value: (row) => row.prediction, cell: (row) => shownText(row.prediction) },
  { name: "type", label: "Type", value: (row) => row.question_type },
  { name: "attribute", label: "Attribute", value: (row) => row.attribute_type, shown: any((row) => row.attribute_type) },
  { name: "loglik", label: "log P", numeric: true, value: (row) => row.loglik, cell: (row) => number(row.loglik, 2), shown: any((row) => row.loglik !== null) },
  { name: "site", label: "Site", value: (row) => row.site, shown: any((row) => row.site) },
].filter((column) => column.shown !== false);

const FILTERS = {
  type: (row) => [row.question_type],
  attribute: (row) => [row.attribute_type],
  label: (row) => row.labels,
  result: (row) => [row.correct === null ? null : row.correct ? "right" : "wrong"],
  site: (row) => [row.site],
  ecg: (row) => [someDrawn ? (row.drawn ? "drawn" : "not drawn") : null],
};
const CHOICES = Object.keys(FILTERS);
let state = {}, listed = [], first = 0;

function fill(name) {
  const counts = new Map();
  for (const row of cases) for (const value of FILTERS[name](row)) if (value) counts.set(value, (counts.get(value) ?? 0) + 1);
  const order = [...counts].sort((a, b) => (name === "label" ? b[1] - a[1] : 0) || alphabetical(a[0], b[0]));
  for (const [value, count] of order) find(name).append(element("option", { value, textContent: `${value} (${count.toLocaleString("en")})` }));
  find(name).closest("label").hidden = !order.length;
}

// ---- the address: what is not said there is not chosen

function fromAddress() {
  const said = new URLSearchParams(location.hash.slice(1));
  state = Object.fromEntries(said);
  for (const name of CHOICES) {
    find(name).value = state[name] ?? "";
    if (find(name).value !== (state[name] ?? "")) { find(name).value = ""; delete state[name]; } // of another report
  }
  find("text").value = state.text ?? "";
  list();
  const row = cases.find((one) => one.id === state.case);
  row ? open(row) : find("case").close();
}
function toAddress() {
  for (const name of Object.keys(state)) if (!state[name]) delete state[name];
  history.replaceState(null, "", `#${new URLSearchParams(state)}`);
}
function change(name, value) {
  state[name] = value;
  toAddress();
  list();
}

// ---- the table

const words = (row) => (row.words ??= [row.id, row.question, row.reference, row.prediction].join("\n").toLowerCase());
function list() {
  const chosen = CHOICES.filter((name) => state[name]), text = (state.text ?? "").toLowerCase();
  listed = cases.filter((row) => chosen.every((name) => FILTERS[name](row).includes(state[name])) && (!text || words(row).includes(text)));
  const [, down, by] = /^(-?)(.*)$/.exec(state.sort ?? ""), column = COLUMNS.find(({ name }) => name === by);
  if (column) {
    const compare = (a, b) => (a === null || b === null ? (a === null) - (b === null) : (down ? -1 : 1) * (typeof a === "string" ? alphabetical(a, b) : a - b));
    listed.sort((a, b) => compare(column.value(a), column.value(b)) || a.place - b.place); // what is not known comes last either way
  }
  for (const header of find("heads").children) {
    header.ariaSort = column?.name === header.dataset.name ? (down ? "descending" : "ascending") : "none";
  }
  const asked = listed.filter((row) => row.correct !== null), right = asked.filter((row) => row.correct).length;
  const share = asked.length
    ? `, ${right.toLocaleString("en")} of ${asked.length.toLocaleString("en")} questions right (${((100 * right) / asked.length).toFixed(1)} %)`
    : "";
  find("count").textContent = `${listed.length.toLocaleString("en")} of ${cases.length.toLocaleString("en")} cases${share}`;
  page(0);
}
function page(from) {
  first = Math.max(0, from);
  const last = Math.min(first + PAGE, listed.length);
  find("rows").replaceChildren(...listed.slice(first, last).map((row) => {
    const cells = COLUMNS.map((column) => element("td", { className: `${column.numeric ? "numeric " : ""}c-${column.name}` }));
    COLUMNS.forEach((column, i) => cells[i].append(column.cell ? column.cell(row) : String(column.value(row) ?? "–")));
    const opener = element("button", { type: "button", textContent: row.place, ariaLabel: `open case ${row.place}` });
    cells[0].replaceChildren(opener);
    return element("tr", { onclick: () => show(row), dataset: { id: row.id } }, ...cells);
  }));
  find("range").textContent = listed.length ? `${first + 1} to ${last} of ${listed.length.toLocaleString("en")}` : "no case is like this";
  find("previous").disabled = !first;
  find("next").disabled = last === listed.length;
  find("pager").hidden = listed.length <= PAGE && listed.length > 0;
}

// ---- one case

function show(row) {
  state.case = row.id;
  toAddress();
  open(row);
}
function open(row) {
  const at = listed.indexOf(row), body = find("case-body");
  find("case-title").textContent = `Case ${row.place}`;
  const kind = [row.question_type, row.attribute_type, row.template_id === null ? null : `template ${row.template_id}`, row.site && `site ${row.site}`];
  find("case-kind").textContent = kind.filter(Boolean).join(" · ");
  for (const [id, other] of [["case-previous", listed[at - 1]], ["case-next", at < 0 ? undefined : listed[at + 1]]]) {
    find(id).disabled = !other;
    find(id).onclick = () => show(other);
  }
  const pair = (name, text, kind = "") => element("div", { className: kind }, element("dt", { textContent: name }), element("dd", { textContent: text }));
  const answers = [pair("Reference", shownText(row.reference), "main"), pair("Prediction", shownText(row.prediction), "main")];
  answers.push(...row.controls.map(([name, text]) => pair(name, shownText(text))));
  const facts = [];
  if (row.loglik !== null) facts.push(`Log-likelihood of the answer ${number(row.loglik, 3)} (probability ${Math.exp(row.loglik).toPrecision(3)})`);
  if (row.labels.length) facts.push(`Labels: ${row.labels.join(", ")}`);
  const ecgs = element("div", { className: "ecgs" });
  body.replaceChildren(
    element("div", { className: "ask" }, element("p", { textContent: title(row) }), mark(row)),
    element("dl", {}, ...answers), ...facts.map((fact) => element("p", { className: "soft", textContent: fact })), ecgs, ...others(row));
  body.scrollTop = 0;
  if (!find("case").open) find("case").showModal();
  draw(row, ecgs);
}
function others(row) {
  const same = row.sample === null ? [] : cases.filter((other) => other.sample === row.sample && other !== row);
  if (!same.length) return [];
  const items = same.map((other) => element("li", {}, mark(other), " ",
    element("button", { type: "button", className: "link", textContent: title(other), onclick: () => show(other) }), ` ${shownText(other.prediction)}`));
  const summary = element("summary", { textContent: `The other cases of this ECG (${same.length})` });
  return [element("details", { className: "others" }, summary, element("ul", {}, ...items))];
}
async function draw(row, place) {
  if (!row.drawn) {
    const held = Object.keys(packed.ecgs).length, some = `The ECG of this case is not in this file, which holds ${held.toLocaleString("en")} of them`;
    const said = held ? `${some}; the filter “ECG” lists the cases that have one.` : "This file holds no ECGs.";
    place.append(element("p", { className: "soft", textContent: said }));
    return;
  }
  for (let i = 0; i < packed.ecgs[row.sample]; i++) place.append(ecgFigure(await unpack(read(`ecg-${row.sample}-${i}`))));
}

// ---- start

for (const name of CHOICES) {
  fill(name);
  find(name).onchange = (event) => change(name, event.target.value);
}
find("text").oninput = (event) => change("text", event.target.value);
find("reset").onclick = () => { state = {}; toAddress(); fromAddress(); };
find("previous").onclick = () => page(first - PAGE);
find("next").onclick = () => page(first + PAGE);
find("heads").append(...COLUMNS.map(({ name, label, numeric }) => {
  const next = () => (state.sort === name ? `-${name}` : state.sort === `-${name}` ? "" : name); // up, down, as in the file
  const by = element("button", { type: "button", textContent: label, onclick: () => change("sort", next()) });
  return element("th", { scope: "col", className: `${numeric ? "numeric " : ""}c-${name}`, dataset: { name } }, by);
}));
find("case-close").onclick = () => find("case").close();
find("case").onclose = () => { delete state.case; toAddress(); };
find("case").onclick = (event) => { if (event.target === find("case")) find("case").close(); };
window.onhashchange = fromAddress;
fromAddress();
document.documentElement.dataset.ready = "yes";
