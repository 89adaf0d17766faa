// The models that were sampled with, one line each, and the details of the selected one in place.

import { h } from "../common/dom.mjs";
import { counted, number, time } from "../common/numbers.mjs";
import { sentence } from "../common/sentence.mjs";
import { t } from "../common/texts.mjs";
import { detailView } from "./detail.mjs";
import { button, fold, icon, line, searchInput } from "./parts.mjs";

const SUFFIX = /\.(safetensors|ckpt|sft)$/; // every name has one: the room is scarce
const FEW = 5; // so many are seen at once: no need to search them
const ORDERS = {
  last_run: (a, b) => (b.last_run ?? "").localeCompare(a.last_run ?? ""),
  name: (a, b) => a.name.localeCompare(b.name),
  samples: (a, b) => b.samples - a.samples,
};

export function modelsView(state, selected, actions) {
  const { models, reading } = state.status;
  const isShown = (model) => model.id && (model.sessions.length > 0 || isRecording(model));
  const shown = models.filter(isShown);
  const others = models.filter((model) => !isShown(model));
  const found = ordered(matching(shown, state.list.query, selected), state.list.order);
  const items = found.map((model) => item(model, state, selected, actions));
  return h(
    "div",
    { key: "models", class: "hswq-models" },
    shown.length > FEW && toolsView(state.list, actions),
    items.length
      ? h("ul", { "aria-label": t("models") }, items)
      : noneView(shown, reading, actions),
    reading > 0 && line(t("readingMore", { count: reading })),
    others.length > 0 && othersView(others, state, !shown.length, actions),
  );
}

function noneView(shown, reading, actions) {
  if (reading) return null;
  return shown.length ? line(t("noneFound")) : emptyView(actions);
}

const isRecording = ({ state }) => ["recording", "failed"].includes(state);

function matching(models, query, selected) {
  const words = query.toLowerCase().split(/\s+/);
  const has = ({ name }) => words.every((word) => name.toLowerCase().includes(word));
  return models.filter((model) => model === selected || has(model));
}

const ordered = (models, order) => models.toSorted(ORDERS[order]);

function toolsView(list, actions) {
  const set = (values) => actions.change({ list: { ...list, ...values } });
  const words = { placeholder: t("findModel"), "aria-label": t("findModel") };
  const search = searchInput(list.query, (query) => set({ query }), words);
  const options = Object.keys(ORDERS).map((order) =>
    h("option", { value: order }, t(`order ${order}`)),
  );
  const order = {
    value: list.order,
    "aria-label": t("order"),
    onchange: ({ target }) => set({ order: target.value }),
  };
  return h("div", { class: "hswq-list-tools" }, search, h("select", order, options));
}

const emptyView = (actions) =>
  h(
    "div",
    { class: "hswq-empty" },
    icon("images"),
    h("p", null, t("empty")),
    h("p", null, t("emptyNext")),
    button(t("example"), "file", actions.example, { class: "hswq-primary" }),
    line(t("exampleNext")),
  );

function item(model, state, selected, actions) {
  const isOpen = model === selected;
  const live = state.isGone ? null : state.status.live?.find(({ id }) => id === model.id);
  const props = {
    type: "button",
    class: "hswq-model",
    "aria-expanded": String(isOpen),
    title: titleOf(model),
    onclick: ({ currentTarget }) => actions.select(model.id, currentTarget.parentNode),
  };
  return h(
    "li",
    { key: model.id, "data-open": String(isOpen) },
    h("button", props, ...rowView(model, live, state)),
    isOpen && detailView(state, model, live, actions),
  );
}

/** The parts of a model's line. */
function rowView(model, live, { status }) {
  return [
    icon(iconOf(model, live)),
    h("span", { class: "hswq-name" }, model.name.replace(SUFFIX, "")),
    model.loaded && h("span", { class: "hswq-chip" }, model.loaded.outcome.title),
    h("span", { class: "hswq-fact" }, factOf(model, live, status)),
  ];
}

function iconOf(model, live) {
  if (live) return "spinner pi-spin";
  if (model.state === "failed") return "exclamation-triangle";
  if (!model.source) return "question-circle";
  if (model.state === "complete") return "verified";
  return model.usable ? "check-circle" : "circle";
}

function factOf(model, live, { usable }) {
  if (live) return live.steps ? t("stepOf", live) : t("recordingNow");
  if (model.samples < usable) {
    return t("imagesOf", { samples: number(model.samples), needed: number(usable) });
  }
  return counted("images", model.samples);
}

function titleOf({ name, loaded, last_run: last }) {
  return [name, loaded && sentence(loaded.outcome), last && time(last)].filter(Boolean).join("\n");
}

/** Models that are not recorded, such as FP8 files: folded away, where there are others. */
function othersView(models, { open }, isAlone, actions) {
  const items = () =>
    h(
      "ul",
      null,
      models.map((model) =>
        h(
          "li",
          { key: model.id ?? model.name, class: "hswq-other" },
          h("span", { class: "hswq-name" }, model.name),
          line(t(model.reason ?? "state not recorded")),
        ),
      ),
    );
  const isOpen = open.others ?? isAlone;
  return fold("others", isOpen, actions, counted("others", models.length), items);
}
