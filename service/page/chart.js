// One line chart: lines over the document's bytes.
const NS = "http://www.w3.org/2000/svg";
const LEFT = 56;
const BOTTOM = 20;

function add(svg, name, attributes, text = "") {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  svg.append(element);
}

// `lines`: lists of [byte, value]. `most`: of values; `threshold`: of the first line, if it has one.
export function draw(svg, { lines, bytes, most, threshold, value, size }) {
  const [width, height] = [svg.clientWidth, svg.clientHeight];
  if (!width) return;
  const x = (byte) => LEFT + (byte / bytes) * (width - LEFT - 8);
  const y = (amount) => 8 + (1 - amount / most) * (height - BOTTOM - 16);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  for (const amount of [0, most / 2, most]) {
    add(svg, "line", { x1: LEFT, x2: width - 8, y1: y(amount), y2: y(amount) });
    add(svg, "text", { x: LEFT - 6, y: y(amount) + 4, "text-anchor": "end" }, value(amount));
  }
  for (const part of [0, 0.5, 1]) {
    const anchor = ["start", "middle", "end"][2 * part];
    add(svg, "text", { x: x(part * bytes), y: height - 4, "text-anchor": anchor }, size(part * bytes));
  }
  if (threshold) add(svg, "line", { class: "threshold", x1: LEFT, x2: width - 8, y1: y(threshold), y2: y(threshold) });
  lines.forEach((points, n) => {
    const d = points.map(([byte, amount], k) => `${k ? "L" : "M"}${x(byte).toFixed(1)} ${y(amount).toFixed(1)}`);
    if (d.length) add(svg, "path", { class: n ? "other" : "", d: d.join("") });
  });
}
