// The text, of which only the lines in sight are elements.
const LINE_PX = 20;
const MOST_PX = 8_000_000; // browsers draw no higher elements; beyond, a scrolled pixel is more lines

export class Reader {
  constructor(element) {
    this.element = element;
    this.rows = element.querySelector(".rows");
    this.text = null;
    element.addEventListener("scroll", () => this.text && this.element.scrollTop !== this.drawnPx && this.draw());
    new ResizeObserver(() => this.layout()).observe(element);
  }

  // `heat(span)`: from -1 to 1; `evidence` has the spans. Goes to a byte, if one is given.
  show(text, evidence, heat, chosen, byte) {
    const fresh = text !== this.text;
    Object.assign(this, { text, evidence, heat, chosen });
    if (fresh) {
      this.columns = 0;
      this.element.scrollTop = 0;
      this.layout();
    }
    if (byte === undefined) this.draw();
    else this.goTo(byte);
  }

  layout() {
    if (!this.text || !this.element.clientWidth) return;
    const columns = Math.max(16, Math.floor((this.element.clientWidth - 24) / this.characterPx()));
    if (columns !== this.columns) {
      const byte = this.columns ? this.text.starts[this.top()] : 0;
      this.columns = columns;
      this.text.wrap(columns);
      this.heightPx = Math.min(this.text.lines * LINE_PX + 8, MOST_PX);
      this.rows.style.height = `${this.heightPx}px`;
      this.goTo(byte);
    }
    this.draw();
  }

  characterPx() {
    const probe = document.createElement("span");
    probe.textContent = "0".repeat(100);
    this.rows.append(probe);
    const px = probe.getBoundingClientRect().width / 100;
    probe.remove();
    return px || 8;
  }

  // Lines that the scroll bar's way from top to bottom stands for, a pixel.
  linesPerPx() {
    const way = this.heightPx - this.element.clientHeight;
    const hidden = this.text.lines - this.element.clientHeight / LINE_PX;
    return this.heightPx < MOST_PX || way <= 0 ? 1 / LINE_PX : hidden / way;
  }

  top() {
    return Math.min(this.text.lines - 1, Math.floor(this.element.scrollTop * this.linesPerPx()));
  }

  goTo(byte) {
    this.element.scrollTop = Math.max(0, this.text.lineAt(byte) - 1) / this.linesPerPx();
    this.draw();
  }

  draw() {
    if (!this.text || !this.columns) return;
    const first = Math.max(0, this.top() - 2);
    const most = Math.ceil(this.element.clientHeight / LINE_PX) + 5;
    const exact = this.heightPx < MOST_PX;
    const topPx = exact ? first * LINE_PX : this.element.scrollTop - (this.top() - first) * LINE_PX;
    const lines = [];
    for (let line = first; line < Math.min(first + most, this.text.lines); line++) {
      lines.push(this.line(line, topPx + (line - first) * LINE_PX));
    }
    this.rows.replaceChildren(...lines);
    this.drawnPx = this.element.scrollTop;
  }

  line(number, topPx) {
    const element = document.createElement("div");
    element.className = "line";
    element.dir = "auto";
    element.style.top = `${topPx}px`;
    const end = this.text.end(number);
    let at = this.text.starts[number];
    for (let span = this.evidence.at(at); at < end; span++) {
      const upTo = span + 1 < this.evidence.spans.length ? Math.min(end, this.evidence.spans[span].end) : end;
      const part = document.createElement("span");
      part.textContent = this.text.slice(at, upTo).replace(/[\r\n]+$/, "");
      const heat = this.heat(span);
      const level = Math.ceil(Math.abs(heat) * 4 - 0.2);
      const chosen = span >= this.chosen[0] && span <= this.chosen[1] ? " chosen" : "";
      if (chosen) element.className = "line chosen";
      part.className = (level > 0 ? `${heat > 0 ? "heat" : "cold"}${level}` : "") + chosen;
      element.append(part);
      at = Math.max(upTo, at + 1);
    }
    return element;
  }
}
