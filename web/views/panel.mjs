// The whole panel, from its state.

import { h } from "../common/dom.mjs";
import { t } from "../common/texts.mjs";
import { exportView } from "./export.mjs";
import { filesView } from "./files.mjs";
import { headerView } from "./header.mjs";
import { jobView } from "./job.mjs";
import { layersView } from "./layers.mjs";
import { modelsView } from "./models.mjs";
import { button, line, problem, section } from "./parts.mjs";
import { previewView } from "./preview.mjs";

/** Describe the panel. `model` is the selected one, as the status has it. */
export function panelView(state, model, actions) {
  return [
    headerView(state, actions),
    noticesView(state, actions),
    state.status && modelsView(state, actions),
    ...modelSections(state, model, actions),
  ].filter(Boolean);
}

function noticesView({ problem: text, job }, actions) {
  const dismiss = button(t("dismiss"), "times", () => actions.change({ problem: null }));
  return h(
    "div",
    { class: "hswq-notices" },
    text && problem(text, dismiss),
    job && jobView(job, actions),
  );
}

function modelSections(state, model, actions) {
  const isKnown = model && state.detail && state.plan;
  const isRecorded = model?.sessions.length > 0;
  return [
    isKnown && section(t("plan"), line(t("planHint")), previewView(state, model, actions)),
    isKnown && section(t("export"), exportView(state, model, actions)),
    isKnown && section(t("layers"), layersView(state, actions)),
    isRecorded && section(t("files"), filesView(model, actions)),
  ];
}
