// An answer's spans as numbers: for each label, what each span contributes.
const softplus = (x) => (x > 30 ? x : Math.log1p(Math.exp(x)));
const sum = (numbers) => numbers.reduce((total, x) => total + x, 0);

export class Evidence {
  constructor(answer, info) {
    this.labels = answer.scores.map((score) => score.label);
    this.pooling = info.pooling;
    this.spans = answer.evidence.map(({ start, end, tokens, label, labels }) => ({
      start, end, tokens, said: labels ?? (label ? [label] : []),
    }));
    this.shares = new Map(this.labels.map((label) => [label, new Float64Array(this.spans.length)]));
    // Where labels exclude each other only differences of logits tell anything.
    const relative = info.pooling === "mean" && !info.multi_label;
    answer.evidence.forEach((span, n) => {
      const mean = relative ? sum(span.scores.map((x) => x.logit)) / span.scores.length : 0;
      for (const { label, logit } of span.scores) {
        this.shares.get(label)[n] = info.pooling === "any" ? softplus(logit) : span.weight * (logit - mean);
      }
    });
    this.measure();
  }

  measure() {
    const each = (measured) => new Map(this.labels.map((label) => [label, measured(this.shares.get(label))]));
    this.most = each((shares) => shares.reduce((most, x) => Math.max(most, Math.abs(x)), 0));
    this.sum = each(sum);
  }

  // An append's first span is all that came before it, if that was a chunk at least. The spans that
  // tell it apart take its place, where they end with it; a mean gives each less as it is of more.
  after(earlier) {
    const { end } = this.spans[0];
    const last = earlier?.at(end - 1);
    if (earlier?.spans[last].end !== end) return this;
    const { label, share } = this.labels
      .map((label) => ({ label, share: sum(earlier.shares.get(label).subarray(0, last + 1)) }))
      .reduce((most, each) => (Math.abs(each.share) > Math.abs(most.share) ? each : most));
    const factor = this.pooling === "any" || !share ? 1 : this.shares.get(label)[0] / share;
    for (const each of this.labels) {
      const shares = new Float64Array(last + this.spans.length);
      shares.set(earlier.shares.get(each).subarray(0, last + 1).map((x) => x * factor));
      shares.set(this.shares.get(each).subarray(1), last + 1);
      this.shares.set(each, shares);
    }
    this.spans = [...earlier.spans.slice(0, last + 1), ...this.spans.slice(1)];
    this.measure();
    return this;
  }

  // From -1, most against, to 1, most for.
  heat(label, n) {
    const most = this.most.get(label);
    return most ? this.shares.get(label)[n] / most : 0;
  }

  // What spans first to last contribute.
  between(label, first, last) {
    return sum(this.shares.get(label).subarray(first, last + 1));
  }

  best(label) {
    const shares = this.shares.get(label);
    return shares.reduce((best, x, n) => (x > shares[best] ? n : best), 0);
  }

  // The span that has a byte.
  at(byte) {
    let low = 0;
    let high = this.spans.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.spans[middle].start <= byte) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  // With pooling "any" the score of the document up to each span's end follows from the shares.
  soFar(label) {
    let total = 0;
    return [0, ...Array.from(this.shares.get(label), (share) => -Math.expm1(-(total += share)))];
  }
}
