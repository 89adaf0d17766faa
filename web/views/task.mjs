// Jobs that sample the model as the user did last: what they will do, before they are queued.

import { h } from "../common/dom.mjs";
import { duration, number, size } from "../common/numbers.mjs";
import { t } from "../common/texts.mjs";
import { isActive } from "../panel/queue.mjs";
import { canQuantize } from "../panel/state.mjs";
import { actionsRow, button, field, icon, line } from "./parts.mjs";

const TASKS = { HSWQMeasureEffect: "bolt", HSWQVerify: "images" };
const MOST_SEEDS = 64;
const MOST_LETTERS = 60; // of a prompt
const FIRST_STEPS = 4; // of a measuring, before it begins with the layers

/** A button for each, and what the chosen one will do. */
export function tasksView(state, model, actions) {
  const { task, job, isGone } = state;
  const disabled = isActive(job) || isGone || !model.source || !canQuantize(model);
  const buttons = Object.entries(TASKS).map(([node, iconName]) => {
    const isOpen = task?.node === node;
    const props = { disabled, "aria-expanded": String(isOpen), title: t(`about ${node}`) };
    const toggle = () => actions.look(isOpen ? null : node);
    return button(t(`start ${node}`), iconName, toggle, props);
  });
  return [actionsRow(buttons), task && !disabled && taskView(state, model, actions)];
}

function taskView(state, model, actions) {
  const { node, sampling } = state.task;
  const name = t(node);
  const { before } = state.curves;
  return h(
    "form",
    { key: "task", class: "hswq-task", "aria-label": name, onsubmit: actions.begin },
    h("p", null, t(`about ${node}`)),
    line(t("samplesWith", whatOf(sampling))),
    node === "HSWQVerify" && seedsField(state, actions),
    line(timeOf(state, model)),
    before !== null && line(t(`memory ${node}`, { size: size(before) })),
    actionsRow(
      h("button", { type: "submit", class: "hswq-primary" }, icon("play"), t("begin")),
      button(t("close"), "times", () => actions.look(null), { class: "hswq-quiet" }),
    ),
  );
}

function whatOf({ text, width, height, steps, cfg }) {
  const short = text.length > MOST_LETTERS ? `${text.slice(0, MOST_LETTERS)}…` : text;
  const isKnown = Number.isInteger(width) && Number.isInteger(height);
  const its = isKnown ? `${width}×${height}` : t("sizeUnknown");
  return { text: short || "–", size: its, steps: number(steps), cfg: number(cfg) };
}

function seedsField({ seeds }, actions) {
  const onchange = ({ target }) => {
    if (target.checkValidity()) actions.change({ seeds: target.valueAsNumber });
  };
  const range = { min: 1, max: MOST_SEEDS, step: 1, required: true };
  const input = h("input", { type: "number", ...range, value: String(seeds), onchange });
  return field(t("seeds"), input, "seeds");
}

/** How long it will take at most, by the user's last run; or how many steps that is. */
function timeOf({ task: { node, sampling }, seeds }, { total_layers: layers }) {
  const { steps, batch, runSeconds } = sampling;
  const needed = node === "HSWQVerify" ? 2 * seeds * steps : FIRST_STEPS + layers / 2;
  if (runSeconds === null) return t("timeInSteps", { steps: number(Math.ceil(needed)) });
  const time = duration((needed * runSeconds) / (steps * batch));
  return t("timeAtMost", { time, run: duration(runSeconds) });
}
