// The whole panel, from its state.

import { h } from "../common/dom.mjs";
import { t } from "../common/texts.mjs";
import { headerView } from "./header.mjs";
import { jobView } from "./job.mjs";
import { modelsView } from "./models.mjs";
import { button, notice, problem } from "./parts.mjs";
import { settingsView } from "./settings.mjs";

/** Describe the panel. `model` is the selected one, as the status has it. */
export function panelView(state, model, actions) {
  return [
    headerView(state, actions),
    state.open.settings && settingsView(state, actions),
    noticesView(state, actions),
    state.status && modelsView(state, model, actions),
  ].filter(Boolean);
}

function noticesView({ problem: wrong, notice: right, isGone, job }, actions) {
  const dismiss = () => actions.change({ problem: null, notice: null });
  const close = button(t("dismiss"), "times", dismiss, { class: "hswq-quiet" });
  return h(
    "div",
    { key: "notices", class: "hswq-notices" },
    isGone && problem(t("serverGone")),
    wrong && !isGone && problem(wrong, close),
    right && notice(right, close),
    job && jobView(job, isGone, actions),
  );
}
