// Numbers with their units, and labels as words.
export const shown = (label) => label.replaceAll("_", " ");
export const percent = (x) => `${(100 * x).toFixed(1)} %`;
export const number = (x) => Math.round(x).toLocaleString("en");

// In the unit that the most of several has.
export function size(bytes, most = bytes) {
  if (most < 10_000) return `${number(bytes)} B`;
  const [of, unit] = most < 1e6 ? [1e3, "KB"] : [1e6, "MB"];
  return `${(bytes / of).toLocaleString("en", { maximumSignificantDigits: 3 })} ${unit}`;
}
