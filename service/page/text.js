// A document's bytes, cut into lines for a screen. Offsets are bytes of UTF-8 everywhere.
const NEWLINE = 10;
const SPACE = 32;
const TAB = 9;
const TAB_COLUMNS = 4; // at most: as style.css has it
const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
const inside = (byte) => (byte & 0xc0) === 0x80;

export class Text {
  // `from`: where in the document the bytes begin.
  constructor(bytes, from = 0) {
    this.bytes = bytes;
    this.from = from;
    this.starts = new Uint32Array([from]);
  }

  // Where in the bytes the first character from an offset on begins.
  boundary(offset) {
    let at = Math.max(0, Math.min(offset - this.from, this.bytes.length));
    for (let n = 0; n < 3 && at < this.bytes.length && inside(this.bytes[at]); n++) at++;
    return at;
  }

  between(start, end) {
    return this.bytes.subarray(this.boundary(start), this.boundary(end));
  }

  slice(start, end) {
    return decoder.decode(this.between(start, end));
  }

  // Cut lines of at most so many columns, at spaces where there are any. One pass over the bytes.
  wrap(columns) {
    const { bytes } = this;
    let starts = new Uint32Array(1024).fill(this.from, 0, 1);
    let count = 1;
    const cut = (at) => {
      if (count === starts.length) {
        const more = new Uint32Array(2 * count);
        more.set(starts);
        starts = more;
      }
      starts[count++] = this.from + at;
    };
    let width = 0;
    let space = 0; // where the last space of this line ends
    let widthAtSpace = 0;
    for (let at = 0; at < bytes.length; at++) {
      const byte = bytes[at];
      if (byte === NEWLINE) {
        if (at + 1 < bytes.length) cut(at + 1);
        width = space = widthAtSpace = 0;
        continue;
      }
      if (inside(byte)) continue;
      const wide = byte === TAB ? TAB_COLUMNS : byte >= 0xe3 ? 2 : 1; // as East Asian characters and emoji are
      if (width + wide > columns) {
        cut(space || at);
        width = space ? width - widthAtSpace : 0;
        space = widthAtSpace = 0;
      }
      width += wide;
      if (byte === SPACE || byte === TAB) {
        space = at + 1;
        widthAtSpace = width;
      }
    }
    this.starts = starts.slice(0, count);
  }

  get lines() {
    return this.starts.length;
  }

  end(line) {
    return line + 1 < this.starts.length ? this.starts[line + 1] : this.from + this.bytes.length;
  }

  // The line that has a byte.
  lineAt(byte) {
    let low = 0;
    let high = this.starts.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.starts[middle] <= byte) low = middle;
      else high = middle - 1;
    }
    return low;
  }
}
