// The whole document as a strip: a bar a span, darker the more evidence it has.
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

// Draw a label's bars on a canvas as large as it is shown; returns where a byte is, in its pixels.
export function paint(canvas, evidence, label) {
  const width = (canvas.width = Math.round(canvas.clientWidth * devicePixelRatio));
  const height = (canvas.height = Math.round(canvas.clientHeight * devicePixelRatio));
  const context = canvas.getContext("2d");
  const [pro, con] = [colour("--for"), colour("--against")];
  const x = (byte) => Math.round((byte / evidence.spans.at(-1).end) * width);
  const heats = new Float32Array(width); // of the spans of a pixel the one that says most
  evidence.spans.forEach(({ start, end }, n) => {
    const heat = evidence.heat(label, n);
    const from = Math.min(x(start), width - 1);
    for (let at = from; at < Math.max(from + 1, x(end)); at++) {
      if (Math.abs(heat) > Math.abs(heats[at])) heats[at] = heat;
    }
  });
  for (let at = 0, to; at < width; at = to) {
    const heat = heats[at];
    for (to = at + 1; to < width && heats[to] === heat; ) to++;
    const tall = heat > 0 ? height * (0.25 + 0.75 * heat) : height * 0.25;
    context.fillStyle = `rgba(${heat > 0 ? pro : con}, ${Math.abs(heat) ** 0.7})`;
    context.fillRect(at, height - tall, to - at, tall);
  }
  return x;
}

export class Strip {
  // `onChoose(first, last)`: spans that were clicked, dragged over, or reached by keys.
  constructor(element, onChoose) {
    this.element = element;
    this.canvas = element.querySelector("canvas");
    this.evidence = null;
    this.onChoose = onChoose;
    new ResizeObserver(() => this.draw()).observe(element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    element.addEventListener("pointerdown", (event) => {
      element.setPointerCapture(event.pointerId);
      this.from = this.spanAt(event);
      onChoose(this.from, this.from);
    });
    element.addEventListener("pointermove", (event) => {
      if (!element.hasPointerCapture(event.pointerId)) return;
      const to = this.spanAt(event);
      onChoose(Math.min(this.from, to), Math.max(this.from, to));
    });
    element.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return; // the browser's own
    const most = this.evidence.spans.length - 1;
    const at = this.focus ?? 0;
    const to = {
      ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1,
      PageUp: at - 10, PageDown: at + 10, Home: 0, End: most,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.focus = Math.max(0, Math.min(most, to));
    if (!event.shiftKey) this.from = this.focus;
    this.onChoose(Math.min(this.from, this.focus), Math.max(this.from, this.focus));
  }

  spanAt(event) {
    const box = this.element.getBoundingClientRect();
    const part = Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
    this.focus = this.evidence.at(part * this.bytes);
    return this.focus;
  }

  show(evidence, label, chosen, described) {
    if (chosen[0] === chosen[1]) this.from = this.focus = chosen[0];
    Object.assign(this, { evidence, label, chosen });
    this.bytes = evidence.spans.at(-1).end;
    this.element.setAttribute("aria-valuemin", 1);
    this.element.setAttribute("aria-valuemax", evidence.spans.length);
    this.element.setAttribute("aria-valuenow", (this.focus ?? chosen[0]) + 1);
    this.element.setAttribute("aria-valuetext", described);
    this.draw();
  }

  draw() {
    if (!this.evidence || !this.element.clientWidth) return;
    const x = paint(this.canvas, this.evidence, this.label);
    const [{ start }, { end }] = this.chosen.map((n) => this.evidence.spans[n]);
    const context = this.canvas.getContext("2d");
    const line = 2 * devicePixelRatio;
    context.strokeStyle = colour("--link");
    context.lineWidth = line;
    const wide = Math.max(2, x(end) - x(start) - line);
    context.strokeRect(x(start) + line / 2, line / 2, wide, this.canvas.height - line);
  }
}
