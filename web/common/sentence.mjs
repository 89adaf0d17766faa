// The one sentence that says what quantizing gives. loader/jobs/outcome.py says it on nodes.

import { counted, duration, sizes } from "./numbers.mjs";
import { t } from "./texts.mjs";

/** Return a sentence such as "4.78 → 3.06 GiB, error 0.5%, 64 images, FP8". */
export const sentence = (outcome) => partsOf(outcome).join(t("comma"));

/** Return the parts of that sentence; with the `seconds` that it took, they come last. */
export function partsOf({ before, after, error, exact, samples, title }, seconds = null) {
  return [
    before !== null && sizes(before, after),
    error !== null && errorText(error, exact),
    samples > 0 && counted("images", samples),
    title,
    seconds !== null && duration(seconds),
  ].filter(Boolean);
}

function errorText(error, exact) {
  const share = 100 * error;
  if (share > 0 && share < 0.1) return t("errorBelow", { error: "0.1%" });
  return t(exact ? "error" : "errorAbout", { error: `${share.toFixed(1)}%` });
}
