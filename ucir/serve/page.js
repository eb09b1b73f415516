"use strict";
const $ = (id) => document.getElementById(id);
const canvas = $("canvas"), pen = canvas.getContext("2d");

let strokes = [];          // each {width, points: [[x, y], ...]}
let current = null;        // the stroke that is being drawn
let question = null;       // {blob, name} or {like, name}
let asked = 0;             // number of the last request: answers to earlier ones come too late
let indexes = [];
let drawTimer = 0;

// ---- choices
async function start() {
  clean();
  indexes = await (await fetch("api/indexes")).json();
  $("index").replaceChildren(...indexes.map((i) => new Option(`${i.name} (${i.pictures.toLocaleString()} pictures, ${i.model})`, i.name)));
  fillFolders();
  fromAddress();
}
function fillFolders() {
  const chosen = indexes.find((i) => i.name === $("index").value);
  const folders = chosen ? chosen.folders : [];
  $("folder").replaceChildren(new Option("all", ""), ...folders.map((f) => new Option(f, f)));
  $("folder-label").hidden = folders.length < 2;
}
$("index").addEventListener("change", () => { fillFolders(); if (question && question.like) forget(); else ask(); });
for (const id of ["folder", "count", "hide"]) $(id).addEventListener("change", () => ask());

function forget() {
  question = null;
  show({ hits: [], accepted: null, reason: "Draw something or choose a picture." });
}

// ---- asking
async function ask(anyway = false) {
  if (!question) return;
  const number = ++asked;
  const parameters = new URLSearchParams({ index: $("index").value, k: $("count").value, hide_duplicates: $("hide").checked });
  if ($("folder").value) parameters.set("folder", $("folder").value);
  $("hits").classList.add("waiting");
  $("from").hidden = !question.name;
  $("from-name").textContent = question.name || "";
  try {
    let response;
    if (question.like) {
      parameters.set("id", question.like);
      response = await fetch(`api/like?${parameters}`);
    } else {
      const form = new FormData();
      form.append("picture", question.blob, "query");
      response = await fetch(`api/search?${parameters}`, { method: "POST", body: form });
    }
    const answer = await response.json();
    if (number !== asked) return;
    if (response.ok) show(answer, anyway);
    else fail(typeof answer.detail === "string" ? answer.detail : "The request was not understood.");
  } catch {
    if (number === asked) fail("The server does not answer.");
  } finally {
    if (number === asked) $("hits").classList.remove("waiting");
  }
}
function fail(reason) {
  $("verdict").className = "no";
  $("verdict").textContent = reason;
  $("anyway").hidden = true;
  $("hits").replaceChildren();
}
function show(answer, anyway = false) {
  const hidden = answer.accepted === false && !anyway;
  $("verdict").className = answer.accepted === false ? "no" : "";
  const words = answer.hits.length && !hidden ? `${answer.hits.length} pictures; ` : "";
  $("verdict").textContent = question && !question.like ? words + answer.reason : question ? `${answer.hits.length} pictures like this one` : answer.reason;
  $("anyway").hidden = !hidden;
  $("anyway").onclick = () => show(answer, true);
  $("hits").replaceChildren(...(hidden ? [] : answer.hits.map(hitOf)));
}
function hitOf(hit) {
  const item = document.createElement("li"), button = document.createElement("button");
  button.className = "hit";
  const image = document.createElement("img");
  image.loading = "lazy";
  image.alt = "";
  image.src = `api/picture?${new URLSearchParams({ index: $("index").value, id: hit.id })}`;
  const name = text("", hit.name.split("/").slice(-2).join("/"));
  const folded = hit.duplicates ? `, ${hit.duplicates} near duplicates folded` : "";
  button.append(image, name, text("score", hit.score.toFixed(3)));
  if (hit.duplicates) button.append(text("more", `+${hit.duplicates}`));
  button.title = hit.name;
  button.setAttribute("aria-label", `${hit.rank}. ${hit.name}, score ${hit.score.toFixed(3)}${folded}. Search with it`);
  button.addEventListener("click", () => {
    history.pushState(null, "", "#" + new URLSearchParams({ index: $("index").value, like: hit.id, name: hit.name }));
    fromAddress();
    scrollTo({ top: 0 });
  });
  item.append(button);
  return item;
}
function text(kind, words) {
  const span = document.createElement("span");
  span.className = kind;
  span.textContent = words;
  return span;
}
function fromAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  if (!parts.get("like")) return;
  if (indexes.some((i) => i.name === parts.get("index"))) { $("index").value = parts.get("index"); fillFolders(); }
  question = { like: parts.get("like"), name: parts.get("name"), before: question && !question.like ? question : question && question.before };
  ask();
}
addEventListener("popstate", () => {
  if (location.hash) fromAddress();
  else if (question && question.before) { question = question.before; ask(); }
  else forget();
});
function search(blob, name) {
  if (location.hash) history.pushState(null, "", location.pathname);
  question = { blob, name };
  ask();
}

// ---- drawing
function clean() {
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.strokeStyle = pen.fillStyle = "#000";
  pen.lineCap = pen.lineJoin = "round";
}
function paint() {
  clean();
  for (const stroke of strokes) line(stroke, 0);
  for (const id of ["undo", "clear", "go"]) $(id).disabled = !strokes.length;
}
function line(stroke, from) {
  const points = stroke.points;
  pen.lineWidth = stroke.width;
  pen.beginPath();
  pen.moveTo(...points[Math.max(0, from - 1)]);
  if (points.length === 1) pen.lineTo(points[0][0] + 0.01, points[0][1]);
  for (const point of points.slice(from)) pen.lineTo(...point);
  pen.stroke();
}
function place(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
}
canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  clearTimeout(drawTimer);
  canvas.setPointerCapture(event.pointerId);
  const pressure = event.pointerType === "pen" && event.pressure ? 0.5 + event.pressure : 1;
  current = { width: $("width").value * pressure, points: [place(event)], pointer: event.pointerId };
  strokes.push(current);
  line(current, 0);
});
canvas.addEventListener("pointermove", (event) => {
  if (!current || event.pointerId !== current.pointer) return;
  const before = current.points.length;
  for (const one of event.getCoalescedEvents ? event.getCoalescedEvents() : [event]) current.points.push(place(one));
  line(current, before);
});
for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => {
  if (!current || event.pointerId !== current.pointer) return;
  current = null;
  paint();
  drawTimer = setTimeout(searchDrawing, 700);
});
function searchDrawing() {
  clearTimeout(drawTimer);
  if (strokes.length) framed().toBlob((blob) => search(blob, ""), "image/png");
}
function framed() {  // the square around the drawing: how large it is and where it stands do not matter
  const wide = Math.max(...strokes.map((s) => s.width));
  const all = strokes.flatMap((s) => s.points);
  const xs = all.map((p) => p[0]), ys = all.map((p) => p[1]);
  const low = [Math.min(...xs), Math.min(...ys)], high = [Math.max(...xs), Math.max(...ys)];
  const side = Math.max(high[0] - low[0], high[1] - low[1], 64) * 1.15 + 2 * wide;
  const out = document.createElement("canvas");
  out.width = out.height = 384;
  const to = out.getContext("2d");
  to.fillStyle = "#fff";
  to.fillRect(0, 0, 384, 384);
  const x = (low[0] + high[0] - side) / 2, y = (low[1] + high[1] - side) / 2;
  to.drawImage(canvas, x, y, side, side, 0, 0, 384, 384);
  return out;
}
function undo() { strokes.pop(); paint(); if (strokes.length) drawTimer = setTimeout(searchDrawing, 700); else forget(); }
$("undo").addEventListener("click", undo);
$("clear").addEventListener("click", () => { strokes = []; paint(); forget(); });
$("go").addEventListener("click", searchDrawing);
canvas.addEventListener("keydown", (event) => {
  if (event.key === "Enter") searchDrawing();
  if (event.key === "z" && (event.ctrlKey || event.metaKey) && strokes.length) { event.preventDefault(); undo(); }
});

// ---- pictures
function usePicture(file) {
  if (!file) return;
  open_("file");
  URL.revokeObjectURL($("preview").src);
  $("preview").src = URL.createObjectURL(file);
  $("preview").hidden = false;
  $("hint").hidden = true;
  $("preview").onerror = () => { $("preview").hidden = true; $("hint").hidden = false; };
  search(file, file.name || "the pasted picture");
}
$("choose").addEventListener("change", (event) => { usePicture(event.target.files[0]); event.target.value = ""; });
addEventListener("paste", (event) => {
  const file = [...(event.clipboardData || {}).files || []][0];
  if (file) { event.preventDefault(); usePicture(file); }
});
addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
addEventListener("dragleave", () => document.body.classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  usePicture(event.dataTransfer.files[0]);
});

// ---- the two kinds of question
function open_(kind) {
  for (const one of ["draw", "file"]) {
    const chosen = one === kind;
    $(one).hidden = !chosen;
    $("tab-" + one).setAttribute("aria-selected", chosen);
    $("tab-" + one).tabIndex = chosen ? 0 : -1;
  }
}
for (const one of ["draw", "file"]) {
  $("tab-" + one).addEventListener("click", () => open_(one));
  $("tab-" + one).addEventListener("keydown", (event) => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const other = one === "draw" ? "file" : "draw";
    open_(other);
    $("tab-" + other).focus();
  });
}
start().catch(() => fail("The server does not answer."));
