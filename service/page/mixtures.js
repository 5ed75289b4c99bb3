// How much of a document, and of a passage of it, each component of each mixture takes.
const MOST = 3; // components that are told by number

const cell = (name, text = "") => {
  const element = document.createElement(name);
  element.textContent = text;
  return element;
};

// As many components as would be, if all that are in use took as much: the exponential of the entropy.
export function inUse(taken) {
  const sum = taken.reduce((a, b) => a + b, 0) || 1;
  return Math.exp(-taken.reduce((total, x) => (x > 0 ? total + (x / sum) * Math.log(x / sum) : total), 0));
}

const ranked = (taken) => taken.map((_, n) => n).sort((a, b) => taken[b] - taken[a]);

// The first few, each with its number, from 1 on, and its share.
function first(taken) {
  const sum = taken.reduce((a, b) => a + b, 0) || 1;
  return ranked(taken).slice(0, MOST).map((n) => `${n + 1} (${Math.round((100 * taken[n]) / sum)} %)`).join(", ");
}

function bars(taken, order, colour) {
  const canvas = document.createElement("canvas");
  canvas.setAttribute("aria-hidden", "true");
  [canvas.width, canvas.height] = [256, 64];
  const context = canvas.getContext("2d");
  const most = Math.max(...taken) || 1;
  const width = canvas.width / taken.length;
  context.fillStyle = `rgb(${getComputedStyle(document.documentElement).getPropertyValue(colour)})`;
  order.forEach((n, place) => {
    const height = (canvas.height * taken[n]) / most;
    context.fillRect(place * width, canvas.height - height, Math.max(1, width - 1), height);
  });
  return canvas;
}

// `components`: of the document; `passage`: of a part of it, if that was asked for, whose bars stand
// in the document's order.
export function show(table, components, passage = null) {
  const head = cell("tr");
  head.append(cell("th", "Layer"), ...components[0].map((_, n) => cell("th", `Head ${n + 1}`)));
  const rows = components.map((heads, layer) => {
    const row = cell("tr");
    row.append(cell("th", layer + 1));
    heads.forEach((taken, n) => {
      const order = ranked(taken);
      const data = cell("td");
      data.append(cell("p", `${inUse(taken).toFixed(1)} of ${taken.length}: ${first(taken)}`), bars(taken, order, "--for"));
      if (passage) {
        const own = passage[layer][n];
        data.append(cell("p", `Passage ${inUse(own).toFixed(1)}: ${first(own)}`), bars(own, order, "--against"));
      }
      row.append(data);
    });
    return row;
  });
  for (const name of head.children) name.scope = "col";
  for (const row of rows) row.firstChild.scope = "row";
  const [top, body] = [cell("thead"), cell("tbody")];
  top.append(head);
  body.append(...rows);
  table.replaceChildren(top, body);
}
