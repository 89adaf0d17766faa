// The small parts that all views are made of.

import { h } from "../common/dom.mjs";
import { partsOf } from "../common/sentence.mjs";
import { t } from "../common/texts.mjs";

export const icon = (name) => h("i", { class: `pi pi-${name}`, "aria-hidden": "true" });

/** A line of small text. */
export const line = (...content) => h("p", { class: "hswq-line" }, content);

/** A long name, which may break after some signs (a regular expression's match) and nowhere else. */
export const breakable = (name, signs) =>
  name.split(signs).map((part, index) => (index ? [h("wbr"), part] : part));

/** The sentence about an outcome; where it is long, it breaks between its parts. */
export function outcomeLine(outcome, { seconds, ...props } = {}) {
  const [comma, space] = t("comma").split(/(?= )/);
  const parts = partsOf(outcome, seconds).map((part, index, { length }) => {
    const isLast = index === length - 1;
    return [h("span", null, part, !isLast && comma), !isLast && space];
  });
  return h("p", { class: "hswq-sentence", ...props }, parts);
}

/** Parts side by side, as far as there is room. */
export const row = (...content) => h("div", { class: "hswq-row" }, content);

/** Buttons side by side. */
export const actionsRow = (...content) => h("div", { class: "hswq-row hswq-actions" }, content);

/** A sign beside a term; pointing at it, or focus, shows what the term means. */
export function help(name) {
  const text = t(`help ${name}`);
  const props = { class: "hswq-help", tabindex: 0, role: "note", "aria-label": text };
  return h("span", { ...props, "data-help": text }, icon("question-circle"));
}

/** A term with its help; `name` is both texts' key. */
export const term = (name) => h("span", { class: "hswq-term" }, t(name), help(name));

export const section = (name, ...content) =>
  h("section", { key: name, "aria-label": t(name) }, heading(name), content);

/** The help stands beside the heading: a screen reader would read it as part of its name. */
const heading = (name) => h("div", { class: "hswq-term" }, h("h3", null, t(name)), help(name));

/** A section that can be folded; what is in a folded one is not made. */
export function fold(name, isOpen, actions, title, content) {
  const ontoggle = ({ target }) => actions.fold(name, target.open);
  return h(
    "details",
    { key: name, open: Boolean(isOpen), ontoggle },
    h("summary", null, title),
    isOpen && content(),
  );
}

export const button = (label, iconName, onclick, props) =>
  h("button", { type: "button", onclick, ...props }, icon(iconName), h("span", null, label));

/** A label above its input. With a `term` its help is beside the label. */
export const field = (label, input, termName) =>
  h(
    "div",
    { class: "hswq-field" },
    h("label", null, h("span", null, label), input),
    termName && help(termName),
  );

/** A field for searching; `search` is given the new words. */
export function searchInput(query, search, props) {
  const oninput = ({ target }) => search(target.value);
  const input = h("input", { type: "search", value: query, oninput, ...props });
  return h("span", { class: "hswq-search" }, icon("search"), input);
}

/** A choice among options; `choose` is given the new value by that name. */
export function select(name, options, values, choose) {
  const onchange = ({ target }) => choose({ [name]: target.value });
  const shown = options.map((option) => h("option", { value: option }, t(option)));
  return field(t(name), h("select", { value: values[name], onchange }, shown), name);
}

export function checkbox(label, checked, choose, props) {
  const onchange = ({ target }) => choose(target.checked);
  const input = h("input", { type: "checkbox", checked, onchange, ...props });
  return h("label", { class: "hswq-switch" }, input, h("span", null, label));
}

/**
 * A bar of value out of max; `text` says it to screen readers where a percentage would not do, and
 * a mark shows what part of it is enough.
 */
export function progressBar(label, value, max, text, enough) {
  const props = {
    class: "hswq-bar",
    role: "progressbar",
    "aria-label": label,
    "aria-valuemin": 0,
    "aria-valuemax": max,
    "aria-valuenow": Math.min(value, max),
    "aria-valuetext": text,
  };
  const share = (part) => `${Math.min(100, (100 * part) / max)}%`;
  return h(
    "div",
    props,
    h("div", { class: "hswq-done", style: `width: ${share(value)}` }),
    enough < max && h("div", { class: "hswq-mark", style: `left: ${share(enough)}` }),
  );
}

/** A sentence about what did not work, with what can be done about it. */
export const problem = (text, ...more) =>
  h(
    "div",
    { key: "problem", class: "hswq-problem", role: "alert" },
    icon("exclamation-triangle"),
    h("span", null, text),
    more,
  );

/** A sentence about what has worked. */
export const notice = (text, ...more) =>
  h(
    "div",
    { key: "notice", class: "hswq-problem hswq-notice", role: "status" },
    icon("check-circle"),
    h("span", null, text),
    more,
  );
