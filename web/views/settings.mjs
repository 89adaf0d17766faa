// HSWQ's settings in place; they are the same as in ComfyUI's dialog.

import { h } from "../common/dom.mjs";
import { t } from "../common/texts.mjs";
import { field } from "./parts.mjs";

const NUMBERS = [
  ["Target", { min: 32, max: 4096, step: 1 }],
  ["Budget", { min: 0.5, max: 20, step: 0.5 }],
  ["RefinedGB", { min: 0, max: 4096, step: 1 }],
];

export function settingsView({ settings }, actions) {
  return h(
    "section",
    { key: "settings", class: "hswq-settings", "aria-label": t("settings") },
    NUMBERS.map(([name, range]) => numberField(name, range, settings[name], actions)),
  );
}

function numberField(name, range, value, actions) {
  const onchange = ({ target }) => {
    if (target.checkValidity() && target.value !== "") actions.set(name, target.valueAsNumber);
  };
  const input = h("input", { type: "number", ...range, value: String(value ?? ""), onchange });
  return field(t(`set ${name}`), input, `set ${name}`);
}
