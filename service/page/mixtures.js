// How much of a document each component of each mixture takes.
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

function bars(taken) {
  const canvas = document.createElement("canvas");
  canvas.setAttribute("aria-hidden", "true");
  [canvas.width, canvas.height] = [256, 64];
  const context = canvas.getContext("2d");
  const most = Math.max(...taken) || 1;
  const width = canvas.width / taken.length;
  context.fillStyle = `rgb(${getComputedStyle(document.documentElement).getPropertyValue("--for")})`;
  [...taken].sort((a, b) => b - a).forEach((x, n) => {
    const height = (canvas.height * x) / most;
    context.fillRect(n * width, canvas.height - height, Math.max(1, width - 1), height);
  });
  return canvas;
}

export function show(table, components) {
  const head = cell("tr");
  head.append(cell("th", "Layer"), ...components[0].map((_, n) => cell("th", `Head ${n + 1}`)));
  const rows = components.map((heads, n) => {
    const row = cell("tr");
    row.append(cell("th", n + 1));
    for (const taken of heads) {
      const data = cell("td", `${inUse(taken).toFixed(1)} of ${taken.length}`);
      data.append(bars(taken));
      row.append(data);
    }
    return row;
  });
  for (const name of head.children) name.scope = "col";
  for (const row of rows) row.firstChild.scope = "row";
  const [top, body] = [cell("thead"), cell("tbody")];
  top.append(head);
  body.append(...rows);
  table.replaceChildren(top, body);
}
