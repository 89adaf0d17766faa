// What one gets at a point of the curves, and what can be done with it.

import { h } from "../common/dom.mjs";
import { number, percent, size } from "../common/numbers.mjs";
import { sentence } from "../common/sentence.mjs";
import { t } from "../common/texts.mjs";
import { loaderOf } from "../panel/graph.mjs";
import { isActive } from "../panel/queue.mjs";
import { canQuantize, chosenLine, chosenPoint } from "../panel/state.mjs";
import { curveView } from "./curve.mjs";
import { actionsRow, button, field, line, outcomeLine, row } from "./parts.mjs";
import { tasksView } from "./task.mjs";

export function pointView(state, model, actions) {
  const point = chosenPoint(state);
  const total = state.curves.lines[0].points.at(-1).kept;
  const kept = t("keptOf", { kept: number(point.kept), total: number(total) });
  return [
    outcomeLine(point, { "data-fact": "sentence" }),
    line(kept),
    point.before === null
      ? line(t("noSizes"))
      : [linesView(state, actions), curveView(state, actions)],
    betterView(state, point, actions),
    slider(state.share, point, actions),
    searchView(state, model, point, actions),
    doView(state, model, actions),
    tasksView(state, model, actions),
  ];
}

/** The lines of the curves to choose from: a number format, and a selection where it has several. */
function linesView(state, actions) {
  const { lines } = state.curves;
  const chosen = chosenLine(state);
  const modes = [...new Set(lines.map(({ mode }) => mode))];
  const ways = lines.filter(({ mode }) => mode === chosen.mode);
  const ofMode = (mode) =>
    chip(chosenLine({ ...state, mode }), state, actions, t(mode), t(`about mode ${mode}`));
  const ofWay = (one) =>
    chip(
      one,
      state,
      actions,
      t(`selection ${one.selection}`),
      t(`help ${shareName(one.points[0])}`),
    );
  return [chips("mode", modes.map(ofMode)), ways.length > 1 && chips("selection", ways.map(ofWay))];
}

const chips = (name, buttons) =>
  h("div", { class: "hswq-lines", role: "group", "aria-label": t(name) }, buttons);

/** A button that chooses a line, in its colour. */
function chip(one, state, actions, words, title) {
  const { mode, selection } = one;
  const props = {
    type: "button",
    "aria-pressed": String(one === chosenLine(state)),
    title,
    style: `--hswq-color: var(--hswq-line-${state.curves.lines.indexOf(one)})`,
    onclick: () => actions.choose({ mode, selection }),
  };
  return h("button", props, words);
}

/** Return the key of what moves a point along its line: a keep ratio or, by effect, MiB. */
const shareName = ({ inputs }) => (inputs.keep_mb === undefined ? "keepRatio" : "keepMb");

/** Which selection is the better at the chosen size, where effects were measured; and a way to it. */
function betterView(state, point, actions) {
  const { mode, selection } = chosenLine(state);
  const { lines } = state.curves;
  const other = lines.find((one) => one.mode === mode && one.selection !== selection);
  if (!other) return null;
  const away = ({ after }) => Math.abs(after - point.after);
  const beside = other.points.reduce((best, one) => (away(one) < away(best) ? one : best));
  const ours = { selection, effect: point.effect };
  const theirs = { selection: other.selection, effect: beside.effect };
  if (ours.effect === theirs.effect) return null;
  const isBetter = ours.effect < theirs.effect;
  const [better, worse] = isBetter ? [ours, theirs] : [theirs, ours];
  const values = {
    better: t(`selection ${better.selection}`),
    worse: t(`selection ${worse.selection}`),
    size: size(point.after),
    share: percent(better.effect / worse.effect),
  };
  const there = { selection: other.selection, share: other.points.indexOf(beside) };
  const offer = () => button(t("takeBetter", values), "check", () => actions.choose(there));
  return row(line(t("betterWay", values)), !isBetter && offer());
}

/** The slider along the line. */
function slider(share, point, actions) {
  const name = shareName(point);
  const text = sentence(point);
  const ratio = name === "keepMb" ? `${point.inputs.keep_mb} MiB` : (share / 100).toFixed(2);
  const props = {
    type: "range",
    min: 0,
    max: 1,
    step: 0.01,
    value: String(share / 100),
    style: `--hswq-done: ${share}%`,
    "aria-valuetext": `${ratio}: ${text}`,
    oninput: ({ target }) => actions.choose({ share: Math.round(100 * target.value) }),
  };
  const both = h("span", { class: "hswq-slider" }, h("input", props), h("output", null, ratio));
  return field(t(name), both, name);
}

/** A button that finds the error, while it is not known or not exactly. */
function searchView({ job }, model, { error, exact }, actions) {
  if (error !== null && exact) return null;
  const disabled = isActive(job) || !model.source || !canQuantize(model);
  return row(
    line(t(error === null ? "notSearched" : "notExact")),
    button(t("search"), "search", actions.search, { disabled, title: t("searchHint") }),
  );
}

function doView({ isGone }, model, actions) {
  const disabled = !model.source || isGone;
  const inGraph = model.source && loaderOf(model.source);
  return actionsRow(
    button(t("apply"), "sliders-h", actions.apply, {
      disabled,
      class: "hswq-primary",
      title: t("applyHint"),
    }),
    inGraph && button(t("showLoader"), "arrow-right", actions.showLoader),
  );
}
