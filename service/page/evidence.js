// An answer's spans as numbers: for each label, what each span contributes.
const softplus = (x) => (x > 30 ? x : Math.log1p(Math.exp(x)));

export class Evidence {
  constructor(answer, info) {
    this.labels = answer.scores.map((score) => score.label);
    this.pooling = info.pooling;
    this.spans = answer.evidence.map(({ start, end, tokens, label, labels }) => ({
      start, end, tokens, said: labels ?? (label ? [label] : []),
    }));
    this.scores = new Map(this.labels.map((label) => [label, new Float64Array(this.spans.length)]));
    this.shares = new Map(this.labels.map((label) => [label, new Float64Array(this.spans.length)]));
    // Where labels exclude each other only differences of logits tell anything.
    const relative = info.pooling === "mean" && !info.multi_label;
    answer.evidence.forEach((span, n) => {
      const mean = relative ? span.scores.reduce((sum, x) => sum + x.logit, 0) / span.scores.length : 0;
      for (const { label, score, logit } of span.scores) {
        this.scores.get(label)[n] = score;
        this.shares.get(label)[n] =
          info.pooling === "any" ? softplus(logit) : span.weight * (logit - mean);
      }
    });
    this.most = new Map(
      this.labels.map((label) => [label, this.shares.get(label).reduce((most, x) => Math.max(most, Math.abs(x)), 0)]),
    );
    this.sum = new Map(this.labels.map((label) => [label, this.shares.get(label).reduce((sum, x) => sum + x, 0)]));
  }

  // From -1, most against, to 1, most for.
  heat(label, n) {
    const most = this.most.get(label);
    return most ? this.shares.get(label)[n] / most : 0;
  }

  // What spans first to last contribute.
  between(label, first, last) {
    return this.shares.get(label).subarray(first, last + 1).reduce((sum, x) => sum + x, 0);
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
    let sum = 0;
    return [[0, 0], ...this.spans.map(({ end }, n) => [end, -Math.expm1(-(sum += this.shares.get(label)[n]))])];
  }
}
