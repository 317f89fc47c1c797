"use strict";
// The page of a tree. All text from files goes into the page by textContent, or, in figures, through
// `plain`, because plotly reads a little markup.
const facts = JSON.parse(document.getElementById("facts").textContent);
const ROW = 26;
const $ = (id) => document.getElementById(id);
const nodes = new Map(facts.nodes.map((node) => [node.path, node]));
const alikeAt = new Map((facts.likeness ? facts.likeness.names : []).map((name, i) => [name, i]));

// ------------------------------------------------------------------ small helpers
// An attribute that is null is left out; ARIA wants the text "false".
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}
const plain = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const digits = (number) => (number === null || number === undefined ? "–" : Number(number.toPrecision(4)).toLocaleString("en"));
function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (bytes >= 1024 && at < units.length - 1) { bytes /= 1024; at += 1; }
  return `${at ? bytes.toFixed(1) : bytes} ${units[at]}`;
}
const weightWords = (weight) => (typeof weight === "number" ? digits(weight) : "by module");
const parentOf = (path) => path.slice(0, Math.max(path.lastIndexOf("/"), 0));
function lineage(path) {
  const names = path.split("/");
  return names.map((_, i) => names.slice(0, i + 1).join("/"));
}
function table(headings, rows, numbers = []) {
  const isNumber = (i) => (numbers.includes(i) ? "number" : null);
  const head = headings.map((text, i) => make("th", { text, class: isNumber(i), scope: "col" }));
  const body = rows.map((row) =>
    make("tr", {}, ...row.map((cell, i) => {
      const td = make("td", { class: isNumber(i) });
      td.append(cell instanceof Node ? cell : String(cell));
      return td;
    })));
  return make("div", { class: "scroll" },
    make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body)));
}
const empty = (text) => make("p", { class: "empty", text });

// ------------------------------------------------------------------ the tree as rows
// A path may stand below one that is no node itself; such names become rows, too.
const children = new Map([["", []]]);
const order = [];
for (const { path } of facts.nodes) {
  for (const part of lineage(path)) {
    if (children.has(part)) continue;
    children.set(part, []);
    children.get(parentOf(part)).push(part);
    order.push(part);
  }
}
order.sort((one, other) => {
  const a = one.split("/"), b = other.split("/");
  for (let i = 0; i < Math.min(a.length, b.length); i += 1) {
    if (a[i] !== b[i]) return a[i] < b[i] ? -1 : 1;
  }
  return a.length - b.length;
});
const lower = new Map(order.map((path) => [path, path.toLowerCase()]));
const closed = new Set();
const chosen = new Set();
let shown = order;          // the rows as they are now
let matches = null;         // the paths that a search found; null: no search
let here = 0;               // the row that has the keyboard
let current = null;         // the path that the panel shows

function depthOf(path) { return path.split("/").length - 1; }

function arrange() {
  const words = $("search").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  matches = null;
  if (words.length) {
    matches = new Set();
    const context = new Set();
    for (const path of order) {
      const text = lower.get(path);
      if (!words.every((word) => text.includes(word))) continue;
      matches.add(path);
      for (const above of lineage(path)) context.add(above);
    }
    // Nodes above a match are shown as well, or the rows would not be a tree.
    shown = order.filter((path) => context.has(path));
    const count = matches.size.toLocaleString("en");
    $("found").textContent = matches.size ? `${count} of ${order.length.toLocaleString("en")} nodes` : "No node has such a name.";
  } else {
    shown = [];
    let hidden = null;
    for (const path of order) {
      if (hidden !== null && path.startsWith(hidden)) continue;
      hidden = closed.has(path) ? `${path}/` : null;
      shown.push(path);
    }
    $("found").textContent = shown.length < order.length ? `${shown.length.toLocaleString("en")} of ${order.length.toLocaleString("en")} rows are open` : "";
  }
  here = Math.min(here, Math.max(shown.length - 1, 0));
  drawRows();
}

// ------------------------------------------------------------------ colours
const COLOURS = {
  "": { label: "nothing", of: () => null },
  bytes: { label: "size", of: (node) => node.bytes, words: size },
  rank: { label: "rank", of: (node) => Math.max(0, ...node.ranks), words: digits },
  norm: { label: "norm", of: (node) => node.norm, words: digits },
  loss: { label: "loss after training", of: (node) => node.loss, words: digits },
  stale: { label: "state", of: (node) => (node.problem || node.kind === "broken" ? 2 : node.stale ? 1 : 0), words: (n) => ["fresh", "stale", "problem"][n] },
};
let colour = "bytes";
let most = 1, least = 0;
function scale() {
  const numbers = facts.nodes.map(COLOURS[colour].of).filter((n) => n !== null && n !== undefined);
  most = numbers.reduce((a, b) => Math.max(a, b), 0) || 1;
  least = colour === "loss" && numbers.length ? numbers.reduce((a, b) => Math.min(a, b)) * 0.98 : 0;
}

function rowOf(path, at) {
  const node = nodes.get(path);
  const below = children.get(path).length;
  const isOpen = matches !== null || !closed.has(path);
  const row = make("div", {
    class: `row${at === here ? " here" : ""}${!node || node.kind === "group" ? " group" : ""}${matches && !matches.has(path) ? " dim" : ""}`,
    role: "treeitem", id: `row-${at}`, "aria-level": depthOf(path) + 1,
    "aria-selected": chosen.has(path), "aria-current": path === current ? "true" : null,
    "aria-expanded": below ? isOpen : null, title: path,
    style: `top:${at * ROW}px;padding-left:${depthOf(path) * 16}px`,
    onclick: () => { here = at; show(path); },
  });
  row.append(make("span", {
    class: "arrow", text: below ? (isOpen ? "▾" : "▸") : "", "aria-hidden": "true",
    onclick: (event) => { if (below) { event.stopPropagation(); toggle(path); } },
  }));
  row.append(make("span", { class: "name", text: path.slice(path.lastIndexOf("/") + 1) }));
  if (chosen.has(path)) row.append(make("span", { class: "tag chosen", text: "chosen" }));
  if (node && (node.problem && node.problem !== "stale" || node.kind === "broken")) row.append(make("span", { class: "tag bad", text: node.problem || "broken" }));
  else if (node && node.stale) row.append(make("span", { class: "tag warn", text: "stale" }));
  if (node && node.kind === "fresh") row.append(make("span", { class: "tag", text: "fresh" }));
  const number = node ? COLOURS[colour].of(node) : null;
  if (number !== null && number !== undefined && node.kind === "adapter") {
    row.append(make("span", { class: "value", text: COLOURS[colour].words(number) }));
    const part = Math.max(0, Math.min(1, (number - least) / (most - least || 1)));
    row.append(make("span", { class: "meter", "aria-hidden": "true" }, make("i", { style: `width:${Math.round(100 * part)}%` })));
  }
  return row;
}

function drawRows() {
  const box = $("tree");
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 8);
  const last = Math.min(shown.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + 8);
  const rows = [];
  for (let at = first; at < last; at += 1) rows.push(rowOf(shown[at], at));
  // A spacer gives the box its height, so that the browser scrolls over rows that are not drawn.
  rows.push(make("div", { style: `height:${shown.length * ROW}px;width:1px`, role: "presentation" }));
  box.replaceChildren(...rows);
  if (shown.length && here >= first && here < last) box.setAttribute("aria-activedescendant", `row-${here}`);
  else box.removeAttribute("aria-activedescendant");
}

function reveal() {
  const box = $("tree");
  const top = here * ROW;
  if (top < box.scrollTop) box.scrollTop = top;
  else if (top + ROW > box.scrollTop + box.clientHeight) box.scrollTop = top + ROW - box.clientHeight;
  drawRows();
}

function toggle(path) {
  if (closed.has(path)) closed.delete(path); else closed.add(path);
  arrange();
}

function choose(path) {
  if (!nodes.has(path)) return;
  if (chosen.has(path)) chosen.delete(path); else chosen.add(path);
  drawRows();
  if (view === "similar") draw();
}

function onTreeKey(event) {
  const path = shown[here];
  if (path === undefined) return;
  const below = children.get(path).length > 0;
  const page = Math.max(1, Math.floor($("tree").clientHeight / ROW) - 1);
  const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  if (event.key in moves) {
    here = Math.max(0, Math.min(shown.length - 1, here + moves[event.key]));
  } else if (event.key === "ArrowRight" && below) {
    if (closed.has(path)) toggle(path); else here += 1;
  } else if (event.key === "ArrowLeft") {
    if (below && !closed.has(path) && matches === null) toggle(path);
    else if (path.includes("/")) here = shown.indexOf(parentOf(path));
  } else if (event.key === "Enter") {
    show(path);
  } else if (event.key === " ") {
    choose(path);
  } else return;
  event.preventDefault();
  reveal();
}

function show(path) {
  current = path;
  view = "node";
  drawRows();
  drawTabs();
  draw();
  // On a narrow page the panel lies below the tree, out of sight.
  if (window.matchMedia("(max-width: 760px)").matches) $("panels").scrollIntoView();
}

// ------------------------------------------------------------------ panels
const VIEWS = {
  node: ["Node", drawNode],
  similar: ["Similar", drawSimilar],
  evaluation: ["Losses", drawEvaluation],
  runs: ["Runs", drawRuns],
  problems: [facts.problems.length ? `Problems (${facts.problems.length})` : "Problems", drawProblems],
};
let view = "node";
let shownRun = facts.runs.length ? facts.runs[facts.runs.length - 1].number : null;

function drawTabs() {
  const names = Object.keys(VIEWS);
  $("tabs").replaceChildren(...names.map((name, at) => make("button", {
    type: "button", role: "tab", id: `tab-${name}`, text: VIEWS[name][0], "aria-controls": "panel",
    "aria-selected": name === view, tabindex: name === view ? 0 : -1,
    onclick: () => { view = name; drawTabs(); draw(); },
    onkeydown: (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      view = names[(at + step + names.length) % names.length];
      drawTabs(); draw(); $(`tab-${view}`).focus();
    },
  })));
  $("panel").setAttribute("aria-labelledby", `tab-${view}`);
}

function draw() {
  for (const old of document.querySelectorAll(".plot")) Plotly.purge(old);
  $("panel").replaceChildren();
  VIEWS[view][1]($("panel"));
}

function colourOf(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

function figure(panel, traces, layout, height, label) {
  const box = make("div", { class: "plot", role: "img", "aria-label": label });
  panel.append(box);
  const axis = { gridcolor: colourOf("--line"), zerolinecolor: colourOf("--line"), automargin: true };
  Plotly.newPlot(box, traces, {
    height, margin: { l: 10, r: 10, t: 10, b: 10 }, paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)", font: { color: colourOf("--ink"), size: 12 },
    ...layout, xaxis: { ...axis, ...(layout.xaxis || {}) }, yaxis: { ...axis, ...(layout.yaxis || {}) },
  }, { displayModeBar: false, responsive: true });
  return box;
}
const shades = () => (document.documentElement.dataset.theme === "dark"
  ? [[0, "#1e2128"], [1, "#86b7ef"]] : [[0, "#ffffff"], [1, "#1f5fa8"]]);

function drawNode(panel) {
  if (current === null) {
    panel.append(empty("Choose a node on the left: its lineage, norms and versions are shown here."));
    overview(panel);
    return;
  }
  const node = nodes.get(current);
  panel.append(make("h2", { text: current }));
  if (!node) { panel.append(empty("A name on the way to nodes below it; it has no adapter of its own.")); return; }
  const ranks = node.ranks.length ? node.ranks.join(", ") : "–";
  const said = [["kind", node.kind], ["rank", ranks], ["modules", String(node.modules)],
    ["size", size(node.bytes)], ["weight", weightWords(node.weight)], ["‖ΔW‖", digits(node.norm)]];
  if (node.loss !== null) said.push(["loss after training", digits(node.loss)]);
  if (node.made) said.push(["made", `${node.made.when || "?"} by ${node.made.by || "?"}`]);
  panel.append(make("div", { class: "figures" }, ...said.map(([name, value]) =>
    make("div", {}, make("span", { text: name }), document.createTextNode(value)))));
  if (node.stale) panel.append(make("p", { class: "notice", text: `Stale: ${node.stale}. Train it again (lora-tree retrain), or accept it as it is (lora-tree lock --accept-stale).` }));
  for (const problem of facts.problems) {
    if (problem.node === current && problem.kind !== "stale") panel.append(make("p", { class: "notice bad", text: `${problem.kind}: ${problem.text}` }));
  }
  if (node.overrides.length) panel.append(make("p", { class: "notice", text: `Replaces ${node.overrides.join(", ")}` }));
  drawLineage(panel);
  drawNorms(panel);
  drawVersions(panel);
}

function overview(panel) {
  const kinds = {};
  for (const node of facts.nodes) kinds[node.kind] = (kinds[node.kind] || 0) + 1;
  const rows = Object.entries(kinds).map(([kind, count]) => [kind, count.toLocaleString("en")]);
  panel.append(make("h3", { text: "Nodes" }), table(["kind", "nodes"], rows, [1]));
  for (const note of facts.notes) panel.append(make("p", { class: "notice", text: note }));
}

function drawLineage(panel) {
  const path = lineage(current).map((name) => nodes.get(name)).filter(Boolean);
  const squares = path.reduce((sum, node) => sum + (node.norm || 0) ** 2, 0);
  panel.append(make("h3", { text: "Lineage: what each node adds" }));
  const rows = path.map((node) => {
    const share = squares ? (node.norm || 0) ** 2 / squares : 0;
    const bar = make("span", { style: "white-space:nowrap" }, make("span", { class: "part", style: `width:${Math.round(120 * share)}px` }), ` ${Math.round(100 * share)} %`);
    const name = make("a", { href: "#", text: node.path, onclick: (event) => { event.preventDefault(); show(node.path); } });
    return [name, weightWords(node.weight), node.ranks.join(", ") || "–", size(node.bytes), digits(node.norm), node.norm === null ? "–" : bar];
  });
  const ranks = path.map((node) => Math.max(0, ...node.ranks)).reduce((a, b) => a + b, 0);
  panel.append(table(["node", "weight", "rank", "size", "‖weight·ΔW‖", "share"], rows, [1, 2, 3, 4]));
  panel.append(empty(`Share: a node's part of the sum of squared norms. The path as one adapter: rank at most ${ranks}, ${size(path.reduce((sum, node) => sum + node.bytes, 0))} in all.`));
}

// model.layers.3.self_attn.q_proj → layer 3, kind self_attn.q_proj
function place(module) {
  const found = module.match(/^(.*?)\.?(\d+)\.(.+)$/);
  return found ? [found[2], found[3]] : ["", module];
}

function drawNorms(panel) {
  const norms = facts.norms[current];
  if (!norms) { panel.append(empty("Norms were not measured.")); return; }
  panel.append(make("h3", { text: "Norm of the increment by layer and module" }));
  const layers = [], kinds = [], cells = new Map();
  facts.modules.forEach((module, i) => {
    if (norms[i] === null) return;
    const [layer, kind] = place(module);
    if (!layers.includes(layer)) layers.push(layer);
    if (!kinds.includes(kind)) kinds.push(kind);
    const key = `${layer}\n${kind}`;
    cells.set(key, Math.hypot(cells.get(key) || 0, norms[i]));
  });
  layers.sort((a, b) => Number(a) - Number(b));
  const z = kinds.map((kind) => layers.map((layer) => cells.get(`${layer}\n${kind}`) ?? null));
  figure(panel, [{
    type: "heatmap", z, x: layers.map((layer) => (layer === "" ? "–" : layer)), y: kinds.map(plain), colorscale: shades(),
    zmin: 0, xgap: 1, ygap: 1, colorbar: { thickness: 10, outlinewidth: 0 },
    hovertemplate: "layer %{x}<br>%{y}<br>%{z:.4g}<extra></extra>",
  }], { xaxis: { type: "category", title: { text: "layer" } }, yaxis: { type: "category", autorange: "reversed" } },
    Math.max(170, 90 + 24 * kinds.length), `Norms of ${current} by layer and module`);
}

function drawVersions(panel) {
  const versions = facts.versions[current];
  if (!versions) return;
  panel.append(make("h3", { text: "Versions, the oldest first" }));
  const rows = versions.map((version, i) => [
    `${current}@${i + 1}`, make("code", { text: version.content }), version.when || "?", version.by || "?",
    version.losses ? version.losses.map(digits).join(" → ") : "–", size(version.bytes),
    version.until ? `${version.until} by ${version.ended_by}` : "now",
  ]);
  panel.append(table(["version", "content", "made", "by", "loss", "size", "replaced"], rows, [5]));
  panel.append(make("p", { class: "empty" }, "Bring one back: ", make("code", { text: `lora-tree restore ${facts.folder} ${current}@1` })));
}

function drawSimilar(panel) {
  panel.append(make("h2", { text: "Which nodes are alike" }));
  const likeness = facts.likeness;
  if (!likeness) {
    panel.append(empty("Nothing was compared: there are fewer than two adapters, or too many for all pairs. Name some: lora-tree explore FOLDER --similar 'fr/*'."));
    for (const note of facts.notes) panel.append(make("p", { class: "notice", text: note }));
    return;
  }
  let names = likeness.order;
  const some = names.filter((name) => chosen.has(name));
  if (some.length >= 2) names = some;
  const missing = [...chosen].filter((name) => !alikeAt.has(name));
  panel.append(empty(some.length >= 2 ? `${some.length} chosen nodes.` : "All compared nodes. Choose two or more in the tree (Space, or the button below) to see only these."));
  if (missing.length) panel.append(make("p", { class: "notice", text: `Not compared: ${missing.join(", ")}` }));
  panel.append(make("p", {},
    make("button", { type: "button", text: current ? `Choose ${current}` : "Choose a node", onclick: () => current && choose(current) }), " ",
    make("button", { type: "button", text: "Choose none", onclick: () => { chosen.clear(); drawRows(); draw(); } })));
  const z = names.map((one) => names.map((other) => likeness.cosines[alikeAt.get(one)][alikeAt.get(other)]));
  const labels = names.map(plain);
  const dark = document.documentElement.dataset.theme === "dark";
  figure(panel, [{
    type: "heatmap", z, x: labels, y: labels, zmin: -1, zmax: 1, colorbar: { thickness: 10, outlinewidth: 0 },
    colorscale: [[0, dark ? "#e8b45a" : "#b8741a"], [0.5, dark ? "#1e2128" : "#ffffff"], [1, dark ? "#86b7ef" : "#1f5fa8"]],
    hovertemplate: "%{y}<br>%{x}<br>cosine %{z:.3f}<extra></extra>",
  }], { xaxis: { type: "category", tickangle: -45 }, yaxis: { type: "category", autorange: "reversed" } },
    Math.min(900, 240 + 18 * names.length), "Cosines of increments");
  const pairs = [];
  names.forEach((one, i) => names.slice(i + 1).forEach((other) => pairs.push([one, other, likeness.cosines[alikeAt.get(one)][alikeAt.get(other)]])));
  pairs.sort((a, b) => b[2] - a[2]);
  panel.append(make("h3", { text: "Most alike" }));
  panel.append(table(["", "", "cosine"], pairs.slice(0, 12).map(([one, other, value]) => [one, other, value.toFixed(3)]), [2]));
  if (likeness.error) panel.append(empty(`Sketched: each cosine ± ${digits(likeness.error)}.`));
}

function drawEvaluation(panel) {
  panel.append(make("h2", { text: "Losses by path" }));
  const found = facts.evaluation;
  if (!found) {
    panel.append(empty("No losses were given. Measure them, and show them here:"));
    panel.append(make("pre", { class: "mono scroll", text: `lora-tree eval ${facts.folder} --data rows.jsonl --base MODEL --json > losses.json\nlora-tree explore ${facts.folder} --eval losses.json` }));
    return;
  }
  const paths = Object.keys(found.losses);
  const domains = [...new Set(paths.flatMap((path) => Object.keys(found.losses[path])))];
  const z = paths.map((path) => domains.map((domain) => found.losses[path][domain] ?? null));
  const label = (name) => plain(name || "the base");
  figure(panel, [{
    type: "heatmap", z, x: domains.map(label), y: paths.map(label), colorscale: shades(), reversescale: true,
    xgap: 1, ygap: 1, colorbar: { thickness: 10, outlinewidth: 0, title: { text: plain(found.unit) } },
    text: z.map((row) => row.map((loss) => (loss === null ? "" : loss.toFixed(3)))), texttemplate: paths.length * domains.length <= 400 ? "%{text}" : "",
    hovertemplate: "active path %{y}<br>rows of %{x}<br>%{z:.4f}<extra></extra>",
  }], { xaxis: { type: "category", title: { text: "rows of" }, tickangle: -45 }, yaxis: { type: "category", autorange: "reversed" } },
    Math.min(1200, 200 + 26 * paths.length), "Losses of every path on every domain");
}

function drawRuns(panel) {
  panel.append(make("h2", { text: "Runs" }));
  if (!facts.runs.length) { panel.append(empty("No run of this tree is kept. lora-tree train keeps one for each training.")); return; }
  const rows = [...facts.runs].reverse().map((run) => [
    make("button", { type: "button", text: String(run.number), "aria-pressed": run.number === shownRun, onclick: () => { shownRun = run.number; draw(); } }),
    run.began, run.by, run.state, `${run.done} of ${run.steps}`, run.nodes.slice(0, 4).join(", ") + (run.nodes.length > 4 ? `, and ${run.nodes.length - 4} more` : ""),
  ]);
  panel.append(table(["run", "began", "by", "state", "steps", "nodes"], rows));
  const run = facts.runs.find((each) => each.number === shownRun);
  if (!run) return;
  panel.append(make("h3", { text: `Run ${run.number}: loss by step (${run.unit})` }));
  const traces = [];
  for (const [name, curve] of Object.entries(run.curves)) traces.push({ type: "scatter", mode: "lines", name: plain(name), x: curve.step, y: curve.loss });
  for (const [name, curve] of Object.entries(run.evaluations)) traces.push({ type: "scatter", mode: "lines+markers", line: { dash: "dot" }, name: `${plain(name)}, held out`, x: curve.step, y: curve.loss });
  if (traces.length) figure(panel, traces, { xaxis: { title: { text: "step" } }, yaxis: { title: { text: plain(run.unit) } }, legend: { orientation: "h", y: -0.25 } }, 380, `Losses of run ${run.number}`);
  else panel.append(empty("It took no step."));
  const outcomes = Object.entries(run.outcomes);
  if (outcomes.length) {
    panel.append(table(["node", "held out before", "after", "best step", "stopped at"], outcomes.map(([name, own]) => [name, digits(own.before), digits(own.after), own.best_step ?? "–", own.stopped_at ?? "–"]), [1, 2, 3, 4]));
  }
  if (run.stale.length) panel.append(make("p", { class: "notice", text: `It made stale: ${run.stale.join(", ")}` }));
  panel.append(make("h3", { text: "Settings" }), table(["setting", "value"], Object.entries(run.settings)));
}

function drawProblems(panel) {
  panel.append(make("h2", { text: "Problems" }));
  for (const note of facts.notes) panel.append(make("p", { class: "notice", text: note }));
  if (!facts.problems.length) { panel.append(empty("None was found: every file is whole and fits the lock.")); return; }
  for (const problem of facts.problems.slice(0, 500)) {
    panel.append(make("p", { class: problem.kind === "stale" ? "notice" : "notice bad", text: `${problem.kind}: ${problem.text}` }));
  }
  if (facts.problems.length > 500) panel.append(empty(`And ${facts.problems.length - 500} more: lora-tree check ${facts.folder}`));
}

// ------------------------------------------------------------------ start
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  draw();
}

function start() {
  document.title = `${facts.folder} · lora_tree`;
  $("title").textContent = facts.folder;
  const total = facts.nodes.reduce((sum, node) => sum + node.bytes, 0);
  $("summary").textContent = `${facts.nodes.length.toLocaleString("en")} nodes, ${size(total)}, over ${facts.base || "an unnamed base"}`;
  if (facts.playground) { $("playground").href = facts.playground; $("playground").hidden = false; }
  for (const [name, { label }] of Object.entries(COLOURS)) {
    if (name && !facts.nodes.some((node) => COLOURS[name].of(node) !== null && COLOURS[name].of(node) !== undefined)) continue;
    $("colour").append(make("option", { value: name, text: label, selected: name === colour ? "" : null }));
  }
  $("colour").addEventListener("change", () => { colour = $("colour").value; scale(); drawRows(); });
  $("search").addEventListener("input", () => { $("tree").scrollTop = 0; here = 0; arrange(); });
  $("search").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "Enter") { event.preventDefault(); $("tree").focus(); reveal(); }
  });
  $("fold").addEventListener("click", () => {
    const parents = order.filter((path) => children.get(path).length);
    if (closed.size) closed.clear(); else parents.forEach((path) => closed.add(path));
    $("fold").textContent = closed.size ? "Open all" : "Collapse all";
    arrange();
  });
  $("tree").addEventListener("scroll", () => requestAnimationFrame(drawRows));
  $("tree").addEventListener("keydown", onTreeKey);
  window.addEventListener("resize", drawRows);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  $("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
  document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
  // Thousands of open rows are no overview: only the top of a large tree is open at first.
  if (order.length > 400) order.filter((path) => children.get(path).length).forEach((path) => closed.add(path));
  $("fold").textContent = closed.size ? "Open all" : "Collapse all";
  scale();
  arrange();
  drawTabs();
  draw();
}
start();
