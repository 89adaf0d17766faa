// The details of the selected model, below its line: is it on, what was recorded, what one gets.

import { h } from "../common/dom.mjs";
import { number, time } from "../common/numbers.mjs";
import { t } from "../common/texts.mjs";
import { exportView } from "./export.mjs";
import { filesView } from "./files.mjs";
import { layersView } from "./layers.mjs";
import { fold, icon, line, outcomeLine, progressBar, section, term } from "./parts.mjs";
import { pointView } from "./point.mjs";

export function detailView(state, model, live, actions) {
  const isRecorded = model.sessions.length > 0;
  return h(
    "div",
    { class: "hswq-detail" },
    onView(model, state),
    live && liveView(model, live, state.status),
    isRecorded && sections(state, model, actions),
  );
}

/** What one gets comes first, where one can have it; else what it takes until then. */
function sections(state, model, actions) {
  const recorded = recordedView(model, state.status);
  const gets = state.curves && [
    section("result", pointView(state, model, actions)),
    section("export", exportView(state, model, actions)),
  ];
  const folded = (name, content) =>
    fold(name, state.open[name], actions, t(name), () => [line(t(`help ${name}`)), content()]);
  return [
    model.usable ? [gets, recorded] : [recorded, gets],
    folded("layers", () => layersView(state, actions)),
    folded("files", () => filesView(model, actions)),
  ];
}

/** Whether it is on, and if not, why. */
function onView(model, { status }) {
  const { loaded, reason, source } = model;
  return h(
    "div",
    { class: "hswq-on", role: "status", "data-on": String(Boolean(loaded)) },
    h("strong", null, icon(loaded ? "bolt" : "power-off"), t(loaded ? "on" : "off")),
    loaded ? loadedView(loaded) : line(untilOn(model, status)),
    reason && line(icon("exclamation-triangle"), t(reason)),
    !source && line(icon("question-circle"), t("gone")),
  );
}

const loadedView = ({ outcome, mode, keep_ratio: keep }) => [
  outcomeLine(outcome),
  line(t("onHow", { mode: t(mode), keep: keep.toFixed(2) })),
];

function untilOn({ usable, missing, samples }, status) {
  if (usable) return t("readyNext");
  const values = { samples: number(samples), needed: number(status.usable) };
  return t(`missing ${missing?.what ?? "images"}`, { ...missing, ...values });
}

/** What is sampled and recorded right now. */
function liveView(model, live, { usable }) {
  const first = model.samples + 1;
  const last = model.samples + live.images;
  const image = first === last ? number(first) : `${number(first)}–${number(last)}`;
  return h(
    "div",
    { class: "hswq-live", role: "status" },
    icon("spinner pi-spin"),
    h("span", null, live.steps ? t("stepOf", live) : t("recordingNow")),
    h("span", null, t(model.usable ? "liveMore" : "liveUntil", { image, needed: number(usable) })),
    live.steps > 0 && progressBar(t("step"), live.step, live.steps),
  );
}

function recordedView(model, { target, usable, usable_calls: calls, usable_levels: levels }) {
  const { name, samples } = model;
  const text = t("samples", { samples: number(samples), target: number(target) });
  const total = model.total_layers ?? model.layers;
  const facts = {
    imagesTerm: [text, progressBar(t("samplesOf", { name }), samples, target, text, usable)],
    coverage: t("ofTotal", { count: number(model.layers), total: number(total) }),
    calls: t("atLeast", { count: number(model.calls), needed: number(calls) }),
    noise: t("ofNeeded", { count: model.levels, total: 8, needed: levels }),
    last: model.last_run ? time(model.last_run) : "–",
  };
  return section("recorded", h("dl", null, Object.entries(facts).map(fact)), line(t("private")));
}

const fact = ([name, value]) =>
  h("div", null, h("dt", null, term(name)), h("dd", { "data-fact": name }, value));
