// Numbers with their units, and labels as words.
export const shown = (label) => label.replaceAll("_", " ");
export const percent = (x) => `${(100 * x).toFixed(1)} %`;
export const number = (x) => Math.round(x).toLocaleString("en");

export function size(bytes) {
  if (bytes < 10_000) return `${number(bytes)} B`;
  return bytes < 1e6 ? `${(bytes / 1e3).toFixed(0)} KB` : `${(bytes / 1e6).toFixed(1)} MB`;
}
