// One line chart: lines over the document's bytes, drawn by uPlot, a script of its own.
const { uPlot } = window;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = (name) => `rgb(${colour(name)})`;

export class Chart {
  constructor(element) {
    this.element = element;
    this.plot = null;
  }

  // `x`: bytes; `lines`: one or two lists of values at them. `most`: of values; `threshold`: of the
  // first line, if it has one. `value` and `size` write values and bytes.
  draw(shown) {
    this.shown = shown;
    if (!this.element.clientWidth) return;
    this.plot ??= this.made();
    this.plot.setSize(this.box());
    const x = shown.x.length ? shown.x : [0]; // without any there are no axes
    const level = (value = null) => x.map(() => value);
    const line = (n) => (shown.x.length && shown.lines[n]) || level();
    this.plot.setData([x, line(0), line(1), level(shown.threshold)]);
  }

  box() {
    return { width: this.element.clientWidth, height: this.element.clientHeight };
  }

  made() {
    const axis = { stroke: () => colour("--quiet"), grid: { stroke: () => colour("--line"), width: 1 }, ticks: { show: false } };
    const points = { show: (_, line, first, last) => last - first < 1 }; // a line of one point
    const options = {
      ...this.box(),
      cursor: { show: false },
      legend: { show: false },
      scales: {
        x: { time: false, range: () => [0, this.shown.bytes] },
        y: { range: () => [0, this.shown.most] },
      },
      axes: [
        { ...axis, size: 24, values: (_, at) => at.map((byte) => this.shown.size(byte, this.shown.bytes)) },
        { ...axis, size: 64, values: (_, at) => at.map((amount) => this.shown.value(amount)) },
      ],
      series: [
        {},
        { stroke: () => rgb("--for"), width: 2, points },
        { stroke: () => rgb("--against"), width: 2, dash: [6, 3], points },
        { stroke: () => colour("--quiet"), width: 1, dash: [4, 4], points: { show: false } },
      ],
    };
    return new uPlot(options, [[], [], [], []], this.element);
  }
}
