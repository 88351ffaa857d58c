"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const length = data.text.length;
const longest = Math.max(...data.lanes.map((lane) => lane.depth + lane.end - lane.start));
// Turns that pass through each token, as numbers from 1.
const turnsOf = Array.from({ length }, () => []);
data.turns.forEach((turn, index) => turn.path.forEach(([start, end]) => {
  for (let i = start; i < end; i++) turnsOf[i].push(index + 1);
}));
// Of a preference pair: the trajectory that a trained token belongs to, nothing if it is both.
const sideOf = (position) => {
  const sides = new Set(turnsOf[position].map((turn) => data.turns[turn - 1].side));
  return sides.size === 1 ? [...sides][0] || "" : "";
};
const laneOf = (position) => data.lanes.findIndex((lane) => lane.start <= position && position < lane.end);
const lastOf = (turn) => turn.path[turn.path.length - 1][1] - 1;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function draw(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// Tree ----------------------------------------------------------------------------------------------------------------
// The whole tree fits into the window: in a narrow one, with less text, and numbers for turns.
function drawTree() {
  const width = Math.max(byId("tree").clientWidth, 240), narrow = width < 600, lane = 26;
  const scale = (width - (narrow ? 30 : 60)) / longest;
  const firstTurn = data.lanes.map((run) => {
    const own = new Set();
    for (let i = run.start; i < run.end; i++) turnsOf[i].forEach((turn) => own.add(turn));
    return Math.min(...own);
  });
  const order = data.lanes.map((_, i) => i).sort((a, b) => (a > 0) - (b > 0) || firstTurn[a] - firstTurn[b]);
  const row = order.reduce((rows, index, place) => { rows[index] = place; return rows; }, []);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${data.lanes.length * lane + 22}`, role: "img", "aria-label": "Prefix tree" });
  data.lanes.forEach((run, index) => {
    const y = row[index] * lane + 3;
    const group = draw("g", { "data-lane": index });
    if (run.fork >= 0) {
      const x = run.depth * scale, parent = row[laneOf(run.fork)] * lane + 12;
      svg.append(draw("line", { x1: x, x2: x, y1: parent, y2: y + 9, class: "fork" }));
    }
    let start = run.start;
    for (let i = run.start + 1; i <= run.end; i++) {
      if (i < run.end && (data.weight[i] > 0) === (data.weight[start] > 0) && sideOf(i) === sideOf(start)) continue;
      const x = (run.depth + start - run.start) * scale, w = (i - start) * scale;
      const bar = draw("rect", { x, y, width: Math.max(w, 0.5), height: 18, class: data.weight[start] > 0 ? `trained ${sideOf(start)}` : "context" });
      const text = data.text.slice(start, i).join("").replace(/\s+/g, " ");
      bar.append(draw("title", {}, text.slice(0, 400)));
      group.append(bar);
      const labelled = data.turns.some((turn) => start <= lastOf(turn) && lastOf(turn) < i && lastOf(turn) + 1 < run.end);
      const room = Math.floor(w / 6.8) - (labelled ? (narrow ? 4 : 9) : 1);
      if (room > 3) group.append(draw("text", { x: x + 3, y: y + 13, "pointer-events": "none" }, text.length > room ? text.slice(0, room - 1) + "…" : text));
      start = i;
    }
    svg.append(group);
  });
  data.turns.forEach((turn, index) => {
    const last = lastOf(turn), run = data.lanes[laneOf(last)], y = row[laneOf(last)] * lane + 3;
    const x = (run.depth + last + 1 - run.start) * scale;
    svg.append(draw("line", { x1: x, x2: x, y1: y - 2, y2: y + 20, class: "stop" }));
    const inside = last + 1 < run.end;
    svg.append(draw("text", { x: x + (inside ? -3 : 4), y: y + 13, class: "label", "text-anchor": inside ? "end" : "start" }, `${narrow ? "" : "turn "}${index + 1}`));
  });
  svg.append(draw("text", { x: 0, y: data.lanes.length * lane + 16 }, "depth 0"));
  svg.append(draw("text", { x: longest * scale, y: data.lanes.length * lane + 16, "text-anchor": "end" }, `${longest} tokens`));
  byId("tree").replaceChildren(svg);
}

function markPath(turn) {
  const lanes = new Set(turn.path.map(([start]) => laneOf(start)));
  document.querySelectorAll("#tree [data-lane]").forEach((lane) => lane.classList.toggle("on-path", lanes.has(Number(lane.dataset.lane))));
}

// Mask ----------------------------------------------------------------------------------------------------------------
let maskImage = null;
function paintMask() {
  const canvas = byId("mask"), size = Math.min(960, Math.max(240, length));
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d"), image = context.createImageData(size, size);
  const at = Array.from({ length: size }, (_, pixel) => Math.min(length - 1, Math.floor(((pixel + 0.5) * length) / size)));
  for (let y = 0; y < size; y++) {
    const query = at[y], colour = data.weight[query] > 0 ? [242, 166, 90] : [201, 211, 223];
    for (let x = 0; x < size; x++) {
      const key = at[x], attends = key <= query && query < data.end[key], offset = 4 * (y * size + x);
      image.data.set(attends ? [...colour, 255] : [255, 255, 255, 255], offset);
    }
  }
  context.putImageData(image, 0, 0);
  maskImage = image;
}

function markInMask(position) {
  const canvas = byId("mask"), context = canvas.getContext("2d"), place = ((position + 0.5) * canvas.width) / length;
  context.putImageData(maskImage, 0, 0);
  context.fillStyle = "#b3541e";
  context.fillRect(0, place - 1, place, 2);
}

// Tokens --------------------------------------------------------------------------------------------------------------
const imageOf = (position) => (data.image ? data.image[position] : -1);

// An image stands where its first token is; a small square stands for each of the others.
function content(position) {
  const image = imageOf(position);
  if (image < 0) return [data.text[position]];
  if (data.text[position] === "") return ["▪"];
  return [make("img", { src: data.images[image], alt: data.text[position], title: data.text[position] })];
}

function tokenSpan(position, trained) {
  const kind = `token ${data.roles[data.role[position]]}${trained ? " trained" : ""}`;
  return make("span", { class: kind, "data-position": position }, ...content(position));
}

function numbers(list) {
  return list.length > 12 ? `${list.slice(0, 12).join(", ")}, … (${list.length})` : list.join(", ");
}

function fillTokens() {
  data.lanes.forEach((run, index) => {
    const block = make("div", { class: "lane" });
    const title = index === 0 ? "root" : run.fork < 0 ? "another root" : `branch after token ${run.fork}`;
    block.append(make("h3", {}, `${title}: tokens ${run.start}–${run.end - 1}, depth ${run.depth}; turns ${numbers(turnsOf[run.start])}`));
    for (let i = run.start; i < run.end; i++) block.append(tokenSpan(i, data.weight[i] > 0));
    byId("tokens").append(block);
  });
}

let current = -1;
function choose(position, scroll) {
  document.body.classList.add("chosen");
  show(position, scroll);
}

function show(position, scroll) {
  if (position < 0 || position >= length) return;
  const tokens = byId("tokens");
  tokens.querySelector(".now")?.classList.remove("now");
  const span = tokens.querySelector(`[data-position="${position}"]`);
  span.classList.add("now");
  if (scroll) span.scrollIntoView({ block: "nearest" });
  current = position;
  const target = data.target[position];
  const lines = [
    imageOf(position) < 0
      ? ["text", JSON.stringify(data.text[position])]
      : ["image", `${imageOf(position) + 1} of ${data.images.length}, ${data.sizes[imageOf(position)]} tokens`],
    ["role", data.roles[data.role[position]]],
    ["position", `${position} of ${length}`],
    ["depth", data.depth[position]],
    ["weight", data.weight[position] > 0 ? `${data.weight[position]} (trained)` : "0 (context)"],
    ["target", target === null ? "none" : JSON.stringify(target)],
    ["turns", numbers(turnsOf[position])],
  ];
  byId("token").replaceChildren(...lines.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));
  markInMask(position);
}

byId("tokens").addEventListener("mouseover", (event) => {
  if (event.target.dataset.position) choose(Number(event.target.dataset.position), false);
});
byId("tokens").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 20, ArrowUp: -20, Home: -length, End: length }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  choose(Math.min(length - 1, Math.max(0, current + step)), true);
});

// Turns ---------------------------------------------------------------------------------------------------------------
let open = -1;
function openTurn(index) {
  if (index < 0 || index >= data.turns.length) return;
  const turn = data.turns[index];
  const positions = turn.path.flatMap(([start, end]) => Array.from({ length: end - start }, (_, i) => start + i));
  const spans = positions.map((position, place) => tokenSpan(position, place >= turn.prompt && data.weight[position] > 0));
  byId("sample-title").textContent = `Turn ${index + 1}: ${turn.prompt} prompt tokens, ${positions.length - turn.prompt} completion tokens` +
    (turn.reasoning ? ` (${turn.reasoning} of reasoning)` : "") + (turn.message === null ? "" : `, message ${turn.message}`);
  byId("sample-text").replaceChildren(...spans);
  document.querySelectorAll("#turns button").forEach((button, i) => button.classList.toggle("current", i === index));
  markPath(turn);
  open = index;
  if (!byId("sample").open) byId("sample").showModal();
  byId("sample-text").scrollTop = 0;
  spans[turn.prompt]?.scrollIntoView({ block: "center" });
}

byId("sample").addEventListener("keydown", (event) => {
  if (event.key === "ArrowRight") openTurn(open + 1);
  if (event.key === "ArrowLeft") openTurn(open - 1);
});
data.turns.forEach((turn, index) => {
  const button = make("button", { type: "button" }, `Turn ${index + 1}${turn.side ? ` (${turn.side})` : ""}`);
  button.addEventListener("click", () => openTurn(index));
  byId("turns").append(button);
});

drawTree();
addEventListener("resize", () => {
  drawTree();
  if (open >= 0) markPath(data.turns[open]);
});
paintMask();
fillTokens();
show(0, false);
if (location.hash.startsWith("#turn-")) openTurn(Number(location.hash.slice(6)) - 1);
