// The small parts that all views are made of.

import { h } from "../common/dom.mjs";
import { t } from "../common/texts.mjs";
import { CHOICES } from "../panel/choices.mjs";

export const icon = (name) => h("i", { class: `pi pi-${name}`, "aria-hidden": "true" });

/** A line of small text. */
export const line = (...content) => h("span", { class: "hswq-line" }, content);

/** Parts side by side, as far as there is room. */
export const row = (...content) => h("div", { class: "hswq-row" }, content);

export const section = (title, ...content) =>
  h("section", { key: title, "aria-label": title }, h("h3", null, title), content);

export const button = (label, iconName, onclick, props) =>
  h("button", { type: "button", onclick, ...props }, icon(iconName), h("span", null, label));

/** A label above its input. */
export const field = (label, ...content) =>
  h("label", { class: "hswq-field" }, h("span", null, label), content);

/** A choice among CHOICES[name]; `choose` is given the new value by that name. */
export function select(name, values, choose) {
  const onchange = ({ target }) => choose({ [name]: target.value });
  const options = CHOICES[name].map((option) => h("option", { value: option }, t(option)));
  return field(t(name), h("select", { value: values[name], onchange }, options));
}

export function checkbox(label, checked, choose, props) {
  const onchange = ({ target }) => choose(target.checked);
  const input = h("input", { type: "checkbox", checked, onchange, ...props });
  return h("label", { class: "hswq-switch" }, input, h("span", null, label));
}

/** A bar of value out of max; `text` says it to screen readers where a percentage would not do. */
export function progressBar(label, value, max, text) {
  const props = {
    class: "hswq-bar",
    role: "progressbar",
    "aria-label": label,
    "aria-valuemin": 0,
    "aria-valuemax": max,
    "aria-valuenow": Math.min(value, max),
    "aria-valuetext": text,
  };
  const width = Math.min(100, (100 * value) / max);
  return h("div", props, h("div", { style: `width: ${width}%` }));
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
