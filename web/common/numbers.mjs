// Numbers and times as text. What is not known (null) is a dash.

import { language } from "./texts.mjs";

const MIB = 2 ** 20;
const GIB = 2 ** 30;
const UNKNOWN = "–";

/** Return a count as the user's language writes it. */
export const number = (value) => value.toLocaleString(language());

/** Return a number with three digits that count. */
export const precise = (value) => (value === null ? UNKNOWN : String(Number(value.toPrecision(3))));

/** Return a share as a percentage. */
export const percent = (value) => (value === null ? UNKNOWN : `${precise(100 * value)} %`);

/** Return a number of bytes in MiB or GiB. */
export function size(bytes) {
  if (bytes === null) return UNKNOWN;
  if (bytes < GIB) return `${precise(bytes / MIB)} MiB`;
  return `${(bytes / GIB).toFixed(2)} GiB`;
}

/** Return an ISO time as the user's language writes it. */
export const time = (iso) =>
  new Date(iso).toLocaleString(language(), { dateStyle: "short", timeStyle: "short" });
