// Numbers and times as text. What is not known (null) is a dash.

import { language, t } from "./texts.mjs";

const KIB = 2 ** 10;
const MIB = 2 ** 20;
const GIB = 2 ** 30;
const UNKNOWN = "–";
const NBSP = "\u00a0"; // no line breaks between a number and its unit

// Making one of these takes longer than all else of a line.
const made = {};
const inLanguage = (kind, make) => (made[`${kind} ${language()}`] ??= make(language()));

/** Return a count as the user's language writes it. */
export const number = (value) =>
  inLanguage("number", (its) => new Intl.NumberFormat(its)).format(value);

/** Return the words for so many: the texts have a form for each that the language has. */
export function counted(key, count) {
  const form = inLanguage("plural", (its) => new Intl.PluralRules(its)).select(count);
  return t(`${key} ${form}`, { count: number(count) });
}

/** Return a number with three digits that count. */
export const precise = (value) =>
  (value ?? null) === null ? UNKNOWN : String(Number(value.toPrecision(3)));

/** Return a share as a percentage. */
export function percent(value) {
  if ((value ?? null) === null) return UNKNOWN;
  const digits = value < 0.01 ? 2 : 1;
  return `${value === 0 ? 0 : (100 * value).toFixed(digits)}%`;
}

/** Return a number of bytes. */
export function size(bytes) {
  if ((bytes ?? null) === null) return UNKNOWN;
  if (bytes >= 1000 * MIB) return `${(bytes / GIB).toFixed(2)}${NBSP}GiB`;
  return bytes >= MIB
    ? `${(bytes / MIB).toFixed(1)}${NBSP}MiB`
    : `${Math.ceil(bytes / KIB)}${NBSP}KiB`;
}

/** Return two numbers of bytes in one unit; loader/jobs/outcome.py writes the same. */
export function sizes(before, after) {
  const [unit, name] = before >= 1000 * MIB ? [GIB, "GiB"] : [MIB, "MiB"];
  return `${(before / unit).toFixed(2)} → ${(after / unit).toFixed(2)}${NBSP}${name}`;
}

/** Return an ISO time as the user's language writes it. */
export const time = (iso) => inLanguage("time", timeFormat).format(new Date(iso));

const timeFormat = (its) =>
  new Intl.DateTimeFormat(its, { dateStyle: "short", timeStyle: "short" });

/** Return a length of time: seconds, minutes or hours, by what is near. */
export function duration(seconds) {
  const [count, unit] = seconds < 100 ? [seconds, "second"] : inMinutes(seconds);
  return inLanguage(unit, (its) => unitFormat(its, unit)).format(Math.max(1, Math.round(count)));
}

const inMinutes = (seconds) =>
  seconds < 100 * 60 ? [seconds / 60, "minute"] : [seconds / 3600, "hour"];

const unitFormat = (its, unit) =>
  new Intl.NumberFormat(its, { style: "unit", unit, unitDisplay: "short" });
