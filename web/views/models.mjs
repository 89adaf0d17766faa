// The list of models that were sampled with.

import { h } from "../common/dom.mjs";
import { number, time } from "../common/numbers.mjs";
import { t } from "../common/texts.mjs";
import { icon, line, progressBar } from "./parts.mjs";

const ICONS = {
  recording: "circle",
  paused: "pause",
  sampling: "spinner pi-spin",
  ready: "check-circle",
  complete: "verified",
  "not recorded": "ban",
  failed: "exclamation-triangle",
};

export function modelsView(state, actions) {
  const { models, reading } = state.status;
  const items = models.map((model) => item(model, state, actions));
  if (reading) items.push(h("li", { class: "hswq-empty" }, t("readingMore", { count: reading })));
  else if (!models.length) items.push(emptyView());
  return h("ul", { "aria-label": t("models") }, items);
}

const emptyView = () =>
  h(
    "li",
    { class: "hswq-empty" },
    icon("images"),
    h("p", null, t("empty")),
    h("p", null, t("emptyNext")),
  );

function item(model, state, actions) {
  const props = {
    type: "button",
    class: "hswq-model",
    "aria-pressed": String(model.id === state.selected),
    disabled: !model.id,
    onclick: () => actions.select(model.id),
  };
  const content = card(model, state);
  return h("li", { key: model.id ?? model.name }, h("button", props, content));
}

/** The lines of a model's card. The style sheet places them by their order. */
function card(model, { recording, status: { target } }) {
  const state = shownState(model, recording);
  const samples = t("samples", { samples: number(model.samples), target: number(target) });
  return [
    h("span", { class: "hswq-name" }, model.name),
    h("span", { class: "hswq-state" }, icon(ICONS[state]), t(`state ${state}`)),
    line(model.last_run && time(model.last_run)),
    progressBar(t("samplesOf", { name: model.name }), model.samples, target, samples),
    line(samples),
    line(coverage(model)),
    ...remarks(model),
  ];
}

function shownState(model, recording) {
  const wouldRecord = ["recording", "ready"].includes(model.state);
  if (wouldRecord && !recording) return "paused";
  return model.sampling ? "sampling" : model.state;
}

function coverage({ layers, total_layers }) {
  if (layers === 0) return null;
  return t("covered", { layers: number(layers), total: number(total_layers ?? layers) });
}

function remarks(model) {
  const isGone = model.id && !model.source;
  return [
    model.missing && line(t(`missing ${model.missing.what}`, model.missing)),
    model.reason && line(t(model.reason)),
    model.loaded && line(icon("bolt"), t("loaded", model.loaded)),
    isGone && line(icon("question-circle"), t("gone")),
  ];
}
