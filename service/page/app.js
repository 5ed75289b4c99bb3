import * as api from "./api.js";
import * as chart from "./chart.js";
import { Evidence } from "./evidence.js";
import * as mixtures from "./mixtures.js";
import { Reader } from "./reader.js";
import { Strip, paint } from "./strip.js";
import { Text } from "./text.js";

const PASTE_CHARACTERS = 100_000; // a larger paste is read at once: a text field would freeze
const QUOTE_BYTES = 180;

const find = (id) => document.getElementById(id);
const shown = (label) => label.replaceAll("_", " ");
const percent = (x) => `${(100 * x).toFixed(1)} %`;
const number = (x) => Math.round(x).toLocaleString("en");

function size(bytes) {
  if (bytes < 10_000) return `${number(bytes)} B`;
  return bytes < 1e6 ? `${(bytes / 1e3).toFixed(0)} KB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

let info = null;
let running = null; // the AbortController of what is being read
let read = null; // what was read last: {text, evidence, answer, points}
let label = "";
let other = "";
let chosen = [0, 0];

const strip = new Strip(find("strip"), choose);
const otherStrip = new Strip(find("other-strip"), choose);
const reader = new Reader(find("reader"));

async function start() {
  try {
    info = await api.info(find("choice").value);
    if (!info.model) info = await api.info(info.models[0]);
  } catch (error) {
    if (error.status !== 401) {
      fail(error);
      return;
    }
    if (!find("key-form").hidden) fail(error);
    find("model").textContent = "This service asks for an API key.";
    find("key-form").hidden = false;
    find("key").focus();
    return;
  }
  find("key-form").hidden = true;
  find("error").hidden = true;
  find("models").hidden = info.models.length < 2;
  find("choice").replaceChildren(...info.models.map((name) => new Option(name, name, false, name === info.model)));
  const kind = info.multi_label ? "tells which of" : "chooses one of";
  const limit = size(info.limits.max_document_bytes);
  find("model").textContent =
    `The model ${info.model} ${kind} ${info.labels.length} labels, in documents of up to ${limit}.`;
}

function fail(error) {
  find("error").textContent = `It did not work: ${error.message}`;
  find("error").hidden = false;
  find("status").textContent = "";
}

async function take(blob, name) {
  find("error").hidden = true;
  if (!info) await start();
  if (!info) return;
  if (!blob.size) {
    fail(new Error(`${name} is empty: give some text`));
    return;
  }
  if (blob.size > info.limits.max_document_bytes) {
    const most = size(info.limits.max_document_bytes);
    fail(new Error(`${name} has ${size(blob.size)}, and this service takes ${most}: send a part of it`));
    return;
  }
  running?.abort();
  const mine = (running = new AbortController());
  const began = performance.now();
  const points = [];
  let latest = null;
  let due = false;
  const redraw = () => {
    due = false;
    if (mine === running) drawProgress(blob.size, latest, points, began);
  };

  read = null;
  find("result").hidden = true;
  find("reading").hidden = false;
  find("stop").hidden = false;
  find("status").textContent = `Reading ${name}, ${size(blob.size)}.`;
  find("done").value = find("sent").value = 0;
  find("done-text").textContent = find("sent-text").textContent = find("so-far").textContent = "";
  drawProgress(blob.size, null, points, began);
  try {
    const whole = blob.arrayBuffer();
    const answer = await api.classify(blob, {
      model: info.models.length > 1 ? info.model : "",
      components: info.components,
      signal: mine.signal,
      onSent(bytes) {
        find("sent").value = bytes / blob.size;
        find("sent-text").textContent = `${size(bytes)} of ${size(blob.size)}`;
      },
      onProgress(event) {
        latest = event;
        const value = info.multi_label ? event.labels?.length : event.score;
        if (value !== undefined) points.push([event.bytes, value]);
        if (!due) requestAnimationFrame(redraw);
        due = true;
      },
    });
    const bytes = new Uint8Array(await whole);
    if (mine !== running) return;
    running = null;
    find("sent").value = 1;
    find("sent-text").textContent = `${size(blob.size)} of ${size(blob.size)}`;
    finish(answer, bytes, points, performance.now() - began);
  } catch (error) {
    if (mine !== running) return;
    running = null;
    if (error.name === "AbortError") find("status").textContent = "Stopped: the service reads no further.";
    else if (error.name === "NotReadableError") fail(new Error(`${name} can't be read: choose the file again`));
    else fail(error);
  } finally {
    if (!running) find("stop").hidden = true;
  }
}

function said(event) {
  if (event.labels) return event.labels.map(shown).join(", ") || "none of the labels";
  return event.label ? shown(event.label) : "nothing sure";
}

function drawProgress(bytes, event, points, began) {
  const what = info.multi_label ? "how many labels are there" : "the best label's score";
  find("chart-title").textContent = `So far: ${what}, over the document`;
  chart.draw(find("chart"), progressLine(points, bytes));
  if (!event) return;
  const rate = (1000 * event.tokens) / (performance.now() - began);
  find("done").value = event.bytes / bytes;
  find("done-text").textContent = `${number(event.tokens)} tokens, ${number(rate)} tokens/s`;
  if (info.causal) find("so-far").textContent = `So far: ${said(event)}`;
}

function progressLine(points, bytes) {
  const most = info.multi_label ? Math.max(2, ...points.map((point) => point[1])) : 1;
  const value = info.multi_label ? (x) => (Number.isInteger(x) ? x : "") : percent;
  return { lines: [points], bytes, most, value, size };
}

function finish(answer, bytes, points, ms) {
  const text = new Text(bytes);
  const evidence = new Evidence(answer, info);
  if (!info.multi_label) points.push([answer.usage.bytes, answer.scores[0].score]);
  else points.push([answer.usage.bytes, answer.labels.length]);
  read = { text, evidence, answer, points };
  const { tokens } = answer.usage;
  find("done").value = 1;
  find("done-text").textContent = `${number(tokens)} tokens, ${number((1000 * tokens) / ms)} tokens/s`;
  find("so-far").textContent = "";
  find("status").textContent = `Read ${size(answer.usage.bytes)} in ${(ms / 1000).toFixed(1)} s: ${said(answer)}.`;
  find("result").hidden = false;

  const there = answer.labels ?? (answer.label ? [answer.label] : []);
  label = there[0] ?? evidence.labels[0];
  other = "";
  fill(find("label"), evidence.labels, label);
  fill(find("other"), ["", ...evidence.labels], "");
  listLabels(there.length ? there : [label], there.length > 0);
  listScores(answer.scores);
  find("mixtures").hidden = false;
  if (answer.usage.components) {
    find("mixtures-help").textContent =
      "Each head of each layer shares the tokens out among its components. The number is how many there would be if all took as much; the bars are what each takes, largest first.";
    mixtures.show(find("mixtures").querySelector("table"), answer.usage.components);
  } else find("mixtures").hidden = true;
  const best = evidence.best(label);
  choose(best, best);
}

function fill(select, labels, value) {
  select.replaceChildren(...labels.map((each) => new Option(each ? shown(each) : "none", each)));
  select.value = value;
}

function listLabels(labels, there) {
  const { evidence, text, answer } = read;
  const scores = new Map(answer.scores.map((each) => [each.label, each.score]));
  find("labels").replaceChildren(
    ...labels.map((each) => {
      const { start, end } = evidence.spans[evidence.best(each)];
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.label = each;
      button.textContent = `${shown(each)}: ${percent(scores.get(each))}${there ? "" : ", which is not enough"}`;
      const quote = document.createElement("q");
      const cut = Math.min(end, start + QUOTE_BYTES);
      const passage = text.slice(start, cut).trim() + (cut < end ? " …" : "");
      quote.textContent = start ? passage.replace(/^\S{0,20}\s/, "… ") : passage; // from a whole word
      quote.dir = "auto";
      const canvas = document.createElement("canvas");
      canvas.setAttribute("aria-hidden", "true");
      button.append(canvas, quote);
      button.addEventListener("click", () => {
        label = each;
        find("label").value = each;
        const best = evidence.best(each);
        choose(best, best);
      });
      const item = document.createElement("li");
      item.append(button);
      return item;
    }),
  );
  paintLabels();
}

function paintLabels() {
  for (const button of find("labels").querySelectorAll("button")) {
    paint(button.querySelector("canvas"), read.evidence, button.dataset.label);
  }
}

function listScores(scores) {
  const rows = [["Label", "Score", "Needs"], ...scores.map((x) => [shown(x.label), percent(x.score), x.threshold ? percent(x.threshold) : "–"])];
  find("scores").replaceChildren(
    ...rows.map((cells, n) => {
      const row = document.createElement("tr");
      row.append(
        ...cells.map((text, column) => {
          const cell = document.createElement(n && column ? "td" : "th");
          cell.scope = n ? "row" : "col";
          cell.textContent = text;
          return cell;
        }),
      );
      return row;
    }),
  );
}

// What spans first to last say for a label.
function described(name, first, last) {
  const { evidence } = read;
  const sum = evidence.between(name, first, last);
  if (evidence.pooling === "any") {
    const share = evidence.sum.get(name) ? sum / evidence.sum.get(name) : 0;
    return `${percent(share)} of the evidence for ${shown(name)}, by itself a score of ${percent(-Math.expm1(-sum))}`;
  }
  const sign = sum < 0 ? "−" : "+";
  return `${sign}${Math.abs(sum).toPrecision(3)} of the ${evidence.sum.get(name).toPrecision(3)} logits for ${shown(name)}`;
}

function choose(first, last) {
  const { evidence } = read;
  const moved = chosen[0] !== first || chosen[1] !== last || reader.text !== read.text;
  chosen = [first, last];
  const [start, end] = [evidence.spans[first].start, evidence.spans[last].end];
  const tokens = evidence.spans.slice(first, last + 1).reduce((sum, span) => sum + span.tokens, 0);
  const name = first === last ? `Span ${number(first + 1)}` : `Spans ${number(first + 1)} to ${number(last + 1)}`;
  const alone = first === last && evidence.spans[first].said.length ? ` Alone it says: ${evidence.spans[first].said.map(shown).join(", ")}.` : "";
  const compared = other ? `; ${described(other, first, last)}` : "";
  const place = `${name} of ${number(evidence.spans.length)}`;
  const what = `${place}, bytes ${number(start)} to ${number(end)}, ${number(tokens)} tokens: ${described(label, first, last)}${compared}.${alone}`;
  find("passage").textContent = what;
  strip.show(evidence, label, chosen, place); // the passage, which is live, says the rest
  find("strip-label").textContent = `${shown(label)}: ${key(evidence)}`;
  find("other-strip").hidden = find("other-label").hidden = !other;
  if (other) {
    find("other-label").textContent = shown(other);
    otherStrip.show(evidence, other, chosen, "");
  }
  for (const button of find("labels").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.label === label));
  }
  reader.show(read.text, evidence, (span) => evidence.heat(label, span), chosen);
  if (moved) reader.goTo(start);
  drawResult();
}

const key = (evidence) =>
  evidence.pooling === "any"
    ? "the taller and darker, the more of its evidence is there"
    : "tall where the text speaks for it, low and of the other colour where it speaks against";

function drawResult() {
  const { evidence, answer, points } = read;
  const bytes = answer.usage.bytes;
  if (evidence.pooling !== "any") {
    find("chart-title").textContent = "The best label's score, over the document as it was read";
    if (info.multi_label) find("chart-title").textContent = "How many labels were there, over the document as it was read";
    chart.draw(find("chart"), progressLine(points, bytes));
    return;
  }
  const compared = other ? `, and of ${shown(other)} (dashed)` : "";
  find("chart-title").textContent = `Score of ${shown(label)}${compared} for all of the document up to there; the level line is what it needs`;
  const { threshold } = answer.scores.find((score) => score.label === label);
  const lines = [label, other].filter(Boolean).map((each) => evidence.soFar(each));
  chart.draw(find("chart"), { lines, bytes, most: 1, threshold, value: percent, size });
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.useKey(find("key").value);
  start();
});
find("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) take(file, file.name);
  event.target.value = "";
});
find("read").addEventListener("click", () => take(new Blob([find("text").value]), "the text"));
find("text").addEventListener("paste", (event) => {
  const text = event.clipboardData.getData("text/plain");
  if (text.length <= PASTE_CHARACTERS) return;
  event.preventDefault();
  take(new Blob([text]), "the pasted text");
});
for (const button of document.querySelectorAll("[data-excerpt]")) {
  button.addEventListener("click", async () => {
    try {
      take(await api.excerpt(button.dataset.excerpt), button.textContent);
    } catch (error) {
      fail(error);
    }
  });
}
find("stop").addEventListener("click", () => running?.abort());
find("choice").addEventListener("change", start);
find("label").addEventListener("change", (event) => {
  label = event.target.value;
  choose(...chosen);
});
find("other").addEventListener("change", (event) => {
  other = event.target.value;
  choose(...chosen);
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const [file] = event.dataTransfer.files;
  if (file) take(file, file.name);
  else {
    const text = event.dataTransfer.getData("text/plain");
    if (text) take(new Blob([text]), "the dropped text");
  }
});
function repaint() {
  if (!read) return;
  drawResult();
  paintLabels();
}
addEventListener("resize", repaint);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

start();
