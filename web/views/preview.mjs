// What quantizing the selected model would give, for settings that can be moved.

import { h } from "../common/dom.mjs";
import { number, percent, size } from "../common/numbers.mjs";
import { t } from "../common/texts.mjs";
import { isActive } from "../panel/queue.mjs";
import { chart } from "./chart.mjs";
import { button, field, row, select } from "./parts.mjs";

export function previewView(state, model, actions) {
  const { plan, detail, isStale } = state;
  const total = number(plan.kept + plan.quantized);
  const kept = t("keptOf", { kept: number(plan.kept), total });
  const facts = {
    kept16: kept,
    unet: `${size(plan.bytes_before)} → ${size(plan.bytes_after)}`,
    expectedError: expectedError(state, model, actions),
  };
  return [
    row(select("mode", state, actions.choose), keepRatioSlider(state.keepRatio, kept, actions)),
    h("dl", { "aria-busy": String(isStale) }, Object.entries(facts).map(fact)),
    chart(detail, plan),
  ];
}

const fact = ([name, value]) =>
  h("div", null, h("dt", null, t(name)), h("dd", { "data-fact": name }, value));

function keepRatioSlider(keepRatio, kept, actions) {
  const props = {
    type: "range",
    min: 0,
    max: 1,
    step: 0.01,
    value: String(keepRatio),
    "aria-valuetext": `${keepRatio}: ${kept}`,
    oninput: ({ target }) => actions.choose({ keepRatio: Number(target.value) }),
  };
  const shown = h("output", null, keepRatio.toFixed(2));
  return field(t("keepRatio"), h("span", null, h("input", props), shown));
}

/** The error, or a button that finds it. */
function expectedError({ plan, job }, model, actions) {
  if (plan.expected_error !== null) return percent(plan.expected_error);
  const counts = { searched: number(plan.searched), total: number(plan.quantized) };
  const disabled = isActive(job) || !model.source;
  return [t("notSearched", counts), button(t("search"), "search", actions.search, { disabled })];
}
