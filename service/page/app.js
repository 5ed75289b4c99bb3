import * as api from "./api.js";
import { Chart } from "./chart.js";
import { Evidence } from "./evidence.js";
import { number, percent, shown, size } from "./format.js";
import * as mixtures from "./mixtures.js";
import { Reader } from "./reader.js";
import { Session, named } from "./session.js";
import { Strip, paint } from "./strip.js";
import { Text } from "./text.js";

const PASTE_CHARACTERS = 100_000; // a larger paste is read at once: a text field would freeze
const QUOTE_BYTES = 180;

const find = (id) => document.getElementById(id);

let info = null;
let running = null; // the AbortController of what is being read
let read = null; // what was read last: {text, evidence, answer, points}; a session may be without the first two
let session = null; // the document that is open, if one is
let label = "";
let other = "";
let chosen = [0, 0];

const chart = new Chart(find("chart"));
const strip = new Strip(find("strip"), choose);
const otherStrip = new Strip(find("other-strip"), choose);
const reader = new Reader(find("reader"));

async function start() {
  try {
    await ask(find("choice").value);
  } catch (error) {
    if (error.status !== 401) {
      fail(error);
      return;
    }
    if (find("key-form").hidden) askForKey();
    else fail(error);
    return;
  }
  find("key-form").hidden = true;
  find("error").hidden = true;
  showSession();
  await openNamed();
}

// Which model reads from now on: that of the name, or the first.
async function ask(model) {
  let told = await api.info(model);
  if (!told.model) told = await api.info(told.models[0]);
  info = told;
  find("models").hidden = info.models.length < 2;
  find("choice").replaceChildren(...info.models.map((name) => new Option(name, name, false, name === info.model)));
  const kind = info.multi_label ? "tells which of" : "chooses one of";
  const limit = size(info.limits.max_document_bytes);
  find("model").textContent =
    `The model ${info.model} ${kind} ${info.labels.length} labels, in documents of up to ${limit}.`;
}

// How it is named in requests: one alone needs no name.
const wanted = () => (info.models.length > 1 ? info.model : null);

function askForKey() {
  find("model").textContent = "This service asks for an API key.";
  find("key-form").hidden = false;
  find("key").focus();
}

function fail(error) {
  if (error.status === 401) askForKey(); // one that was taken may be taken no longer
  find("error").textContent = `It did not work: ${error.message}`;
  find("error").hidden = false;
  find("status").textContent = "";
}

// Show the session that the page's address names.
async function openNamed() {
  const id = named();
  if (!info || !id || id === session?.id) return;
  stop();
  find("error").hidden = true;
  try {
    session = await Session.open(id);
    if (session.answer.model !== info.model) await ask(session.answer.model);
  } catch (error) {
    if (isGone(error)) close();
    else {
      session = null; // its address stays, for it may be there again
      showSession();
    }
    const next = isGone(error) ? "What you give next is a document of its own" : "Load this page again to come back to the document";
    fail(new Error(`${error.message.replace(/\.$/, "")}. ${next}`));
    return;
  }
  showSession();
  showAnswer();
}

const isGone = (error) => [404, 410, 501].includes(error.status);

// What an open document says, of which this page may have no text.
async function showAnswer() {
  const { answer, evidence, points } = session;
  find("reading").hidden = find("result").hidden = !answer.scores.length;
  read = null;
  find("status").textContent = "";
  if (!answer.scores.length) return;
  addPoint(points, soFar(answer));
  find("done").value = find("sent").value = 1;
  find("done-text").textContent = `${number(answer.usage.tokens)} tokens`;
  find("sent-text").textContent = size(session.offset);
  find("status").textContent = `The open document of ${size(session.offset)}: ${said(answer)}.`;
  show({ answer, evidence, points, text: evidence && (await session.text()) });
}

function showSession() {
  find("keep-row").hidden = !info?.sessions || session !== null;
  find("session").hidden = !session;
  find("read").textContent = session ? "Append the text" : "Read the text";
  if (!session) return;
  const address = `#session=${session.id}`;
  if (location.hash !== address) history.replaceState(null, "", address);
  find("session-text").textContent =
    `This document is open, ${size(session.offset)} so far: what you give next is appended to it. The page's address ` +
    `leads back here until ${session.expires.toLocaleString()}. The service keeps the model's state, and of the text ` +
    "what has not filled a chunk yet.";
}

// Stop without a word: what comes next says more.
function stop() {
  running?.abort();
  running = null;
  find("stop").hidden = true;
}

// Go on without the session, which the service still has.
function close() {
  session = null;
  history.replaceState(null, "", location.pathname + location.search);
  showSession();
}

// `typed`: what the text field had, if it is from there.
async function take(blob, name, typed = null) {
  find("error").hidden = true;
  if (!info) await start();
  if (!info) return;
  if (!blob.size) {
    fail(new Error(`${name} is empty: give some text`));
    return;
  }
  if (!session && !find("keep").checked && blob.size > info.limits.max_document_bytes) {
    const most = size(info.limits.max_document_bytes);
    fail(new Error(`${name} has ${size(blob.size)}, and this service takes ${most}: send a part of it`));
    return;
  }
  running?.abort();
  const mine = (running = new AbortController());
  const began = performance.now();
  try {
    if (!session && find("keep").checked) {
      const begun = await Session.begin(wanted());
      if (mine !== running) {
        api.end(begun.id).catch(() => {}); // nobody knows of it; it would expire
        return;
      }
      session = begun;
    }
  } catch (error) {
    if (mine !== running) return;
    running = null;
    fail(error);
    return;
  }
  showSession();
  const open = session;
  const before = open?.answer.usage?.tokens ?? 0;
  const bytes = (open?.offset ?? 0) + blob.size;
  const points = open?.points ?? [];
  let latest = null;
  let due = false;
  const redraw = () => {
    due = false;
    if (mine === running) drawProgress(bytes, latest, points, before, began);
  };
  const onSent = (sent) => {
    if (mine !== running) return;
    find("sent").value = sent / blob.size;
    find("sent-text").textContent = `${size(sent)} of ${size(blob.size)}`;
  };
  const onProgress = (event) => {
    latest = event;
    addPoint(points, event);
    if (!due) requestAnimationFrame(redraw);
    due = true;
  };

  read = null;
  find("result").hidden = true;
  find("reading").hidden = false;
  find("stop").hidden = false;
  find("status").textContent = `Reading ${name}, ${size(blob.size)}.`;
  find("done").value = find("sent").value = 0;
  find("done-text").textContent = find("sent-text").textContent = find("so-far").textContent = "";
  redraw();
  try {
    const { signal } = mine;
    if (open) await open.append(blob, { info, onSent, onProgress: (answer) => onProgress(soFar(answer)), signal });
    const answer = open
      ? open.answer
      : await api.classify(blob, { model: wanted(), components: info.components, onSent, onProgress, signal });
    const text = open ? await open.text() : new Text(new Uint8Array(await blob.arrayBuffer()));
    if (mine !== running) return;
    running = null;
    onSentAll(blob.size);
    const ms = performance.now() - began;
    const tokens = answer.usage.tokens - before;
    find("done").value = 1;
    find("done-text").textContent = `${number(answer.usage.tokens)} tokens, ${number((1000 * tokens) / ms)} tokens/s`;
    find("status").textContent = `Read ${size(blob.size)} in ${(ms / 1000).toFixed(1)} s: ${said(answer)}.`;
    if (open && find("text").value === typed) find("text").value = "";
    showSession();
    if (open && !open.evidence) return;
    addPoint(points, soFar(answer));
    show({ answer, text, points, evidence: open ? open.evidence : new Evidence(answer, info) });
  } catch (error) {
    if (mine !== running) return;
    running = null;
    if (error.name === "AbortError") find("status").textContent = "Stopped: the service reads no further.";
    else if (error.name === "NotReadableError") fail(new Error(`${name} can't be read: choose the file again`));
    else fail(error);
    if (open) await lookAgain(open);
  } finally {
    if (!running) find("stop").hidden = true;
  }
}

function onSentAll(bytes) {
  find("sent").value = 1;
  find("sent-text").textContent = `${size(bytes)} of ${size(bytes)}`;
}

// After an append that did not end well: some of it may have been appended.
async function lookAgain(open) {
  try {
    await open.refresh();
  } catch (error) {
    if (open === session && isGone(error)) close();
    return;
  }
  if (open !== session || running) return;
  const { textContent } = find("status");
  showSession();
  await showAnswer();
  if (textContent) find("status").textContent = `${textContent} The document has ${size(open.offset)} now.`;
}

function said(event) {
  if (event.labels) return event.labels.map(shown).join(", ") || "none of the labels";
  return event.label ? shown(event.label) : "nothing sure";
}

// The running answer as a number: how many labels are there, or the best one's score.
function addPoint(points, event) {
  const value = info.multi_label ? event.labels?.length : event.score;
  if (value !== undefined && points.at(-1)?.[0] !== event.bytes) points.push([event.bytes, value]);
}

// An answer as the progress event that it might have been.
const soFar = (answer) => ({ ...answer, ...answer.usage, score: answer.scores[0].score });

// `before`: tokens that had been read before this began.
function drawProgress(bytes, event, points, before, began) {
  const what = info.multi_label ? "how many labels are there" : "the best label's score";
  find("chart-title").textContent = `So far: ${what}, over the document`;
  chart.draw(progressLine(points, bytes));
  if (!event) return;
  const rate = (1000 * (event.tokens - before)) / (performance.now() - began);
  find("done").value = event.bytes / bytes;
  find("done-text").textContent = `${number(event.tokens)} tokens, ${number(rate)} tokens/s`;
  if (info.causal) find("so-far").textContent = `So far: ${said(event)}`;
}

function progressLine(points, bytes) {
  const values = points.map((point) => point[1]);
  const most = info.multi_label ? Math.max(2, ...values) : 1;
  const value = info.multi_label ? (x) => (Number.isInteger(x) ? x : "") : percent;
  return { x: points.map((point) => point[0]), lines: [values], bytes, most, value, size };
}

function show(result) {
  read = result;
  const { answer, evidence } = read;
  find("so-far").textContent = "";
  find("result").hidden = false;
  find("where").hidden = find("passages").hidden = !evidence;
  find("mixtures").hidden = !answer.usage.components;
  const there = answer.labels ?? (answer.label ? [answer.label] : []);
  const labels = answer.scores.map((score) => score.label);
  label = there[0] ?? labels[0];
  other = "";
  fill(find("label"), labels, label);
  fill(find("other"), ["", ...labels], "");
  listLabels(there.length ? there : [label], there.length > 0);
  listScores(answer.scores);
  showMixtures();
  if (!evidence) {
    drawResult();
    return;
  }
  const best = evidence.best(label);
  choose(best, best);
  drawResult();
}

function showMixtures(passage = null) {
  const { components } = read.answer.usage;
  if (components) mixtures.show(find("mixtures").querySelector("table"), components, passage);
}

function fill(select, labels, value) {
  select.replaceChildren(...labels.map((each) => new Option(each ? shown(each) : "none", each)));
  select.value = value;
}

function listLabels(labels, there) {
  const { evidence, answer } = read;
  const scores = new Map(answer.scores.map((each) => [each.label, each.score]));
  find("labels").replaceChildren(
    ...labels.map((each) => {
      const item = document.createElement("li");
      const told = `${shown(each)}: ${percent(scores.get(each))}${there ? "" : ", which is not enough"}`;
      item.append(evidence ? passageButton(each, told) : told);
      return item;
    }),
  );
  if (evidence) paintLabels();
}

// A label with its strip and its best passage, which a click shows.
function passageButton(name, told) {
  const { evidence } = read;
  const best = evidence.best(name);
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.label = name;
  button.textContent = told;
  const quote = document.createElement("q");
  quote.textContent = quoteOf(evidence.spans[best]);
  quote.dir = "auto";
  const canvas = document.createElement("canvas");
  canvas.setAttribute("aria-hidden", "true");
  button.append(canvas, quote);
  button.addEventListener("click", () => {
    label = name;
    find("label").value = name;
    choose(best, best);
    drawResult();
  });
  return button;
}

function quoteOf({ start, end }) {
  const { text } = read;
  if (end <= text.from) return "(its text is not on this page)";
  const first = Math.max(start, text.from);
  const cut = Math.min(end, first + QUOTE_BYTES);
  const passage = text.slice(first, cut).trim() + (cut < end ? " …" : "");
  return start ? passage.replace(/^\S{0,20}\s/, "… ") : passage; // from a whole word
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
          if (cell.tagName === "TH") cell.scope = n ? "row" : "col";
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
  const gone = start < read.text.from ? ` The first ${size(read.text.from)} are not on this page.` : "";
  const what = `${place}, bytes ${number(start)} to ${number(end)}, ${number(tokens)} tokens: ${described(label, first, last)}${compared}.${alone}${gone}`;
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
  reader.show(read.text, evidence, (span) => evidence.heat(label, span), chosen, moved ? start : undefined);
  if (!moved) return;
  if (find("route-text").textContent) showMixtures();
  find("route-text").textContent = "";
}

const key = (evidence) =>
  evidence.pooling === "any"
    ? "the taller and darker, the more of its evidence is there"
    : "tall where the text speaks for it, low and of the other colour where it speaks against";

function drawResult() {
  const { evidence, answer, points } = read;
  const { bytes } = answer.usage;
  if (evidence?.pooling !== "any") {
    find("chart-title").textContent = "The best label's score, over the document as it was read";
    if (info.multi_label) find("chart-title").textContent = "How many labels were there, over the document as it was read";
    chart.draw(progressLine(points, bytes));
    return;
  }
  const compared = other ? `, and of ${shown(other)} (dashed)` : "";
  find("chart-title").textContent = `Score of ${shown(label)}${compared} for all of the document up to there; the level line is what it needs`;
  const { threshold } = answer.scores.find((score) => score.label === label);
  const x = [0, ...evidence.spans.map((span) => span.end)];
  const lines = [label, other].filter(Boolean).map((each) => evidence.soFar(each));
  chart.draw({ x, lines, bytes, most: 1, threshold, value: percent, size });
}

// What the passage's tokens go to, if it is read by itself.
async function route() {
  const { text, evidence } = read;
  const [first, last] = chosen;
  const passage = text.between(evidence.spans[first].start, evidence.spans[last].end);
  const asked = read;
  try {
    const answer = await api.classify(new Blob([passage]), { model: wanted(), components: true });
    if (asked !== read || chosen[0] !== first || chosen[1] !== last) return;
    showMixtures(answer.usage.components);
    find("route-text").textContent = `The passage read by itself, ${number(answer.usage.tokens)} tokens, in the document's order of components.`;
  } catch (error) {
    fail(error);
  }
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  try {
    api.useKey(find("key").value);
  } catch (error) {
    fail(error);
    return;
  }
  start();
});
find("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) take(file, file.name);
  event.target.value = "";
});
find("read").addEventListener("click", () => {
  const { value } = find("text");
  take(new Blob([value]), "the text", value);
});
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
// What was read is the other model's.
find("choice").addEventListener("change", () => {
  running?.abort();
  read = null;
  find("reading").hidden = find("result").hidden = true;
  if (session) close();
  start();
});
find("label").addEventListener("change", (event) => {
  label = event.target.value;
  choose(...chosen);
  drawResult();
});
find("other").addEventListener("change", (event) => {
  other = event.target.value;
  choose(...chosen);
  drawResult();
});
find("route").addEventListener("click", route);
find("leave").addEventListener("click", () => {
  stop();
  close();
  find("status").textContent = "What you give next is a document of its own.";
  find("text").focus();
});
find("end").addEventListener("click", async () => {
  stop();
  try {
    await api.end(session.id);
  } catch (error) {
    if (!isGone(error)) {
      fail(error);
      return;
    }
  }
  close();
  find("status").textContent = "The document is closed: the service has nothing of it any more.";
  find("text").focus();
});
addEventListener("hashchange", openNamed);
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
  const { files } = event.dataTransfer;
  if (files.length > 1) fail(new Error(`${files.length} files were dropped: drop one at a time`));
  else if (files.length) take(files[0], files[0].name);
  else {
    const text = event.dataTransfer.getData("text/plain");
    if (text) take(new Blob([text]), "the dropped text");
  }
});
function repaint() {
  if (!read) return;
  drawResult();
  if (read.evidence) paintLabels();
}
addEventListener("resize", repaint);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

start();
