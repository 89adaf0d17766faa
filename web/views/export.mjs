// The form that exports exactly the chosen point, and what it will write.

import { h } from "../common/dom.mjs";
import { number, size } from "../common/numbers.mjs";
import { t } from "../common/texts.mjs";
import { isActive } from "../panel/queue.mjs";
import { chosenLine } from "../panel/state.mjs";
import { checkbox, field, icon, line, outcomeLine, row, select } from "./parts.mjs";

const WHAT = ["full checkpoint", "diffusion model only"];

export function exportView(state, model, actions) {
  const { wanted, job, file, isStale, isGone } = state;
  const isKnown = file && !file.refused;
  const disabled = isActive(job) || !isKnown || isGone;
  return h(
    "form",
    { onsubmit: actions.export },
    row(
      select("format", chosenLine(state).formats, wanted, actions.want),
      select("what", WHAT, wanted, actions.want),
    ),
    line(t(`about ${wanted.format}`)),
    h("div", { "aria-busy": String(isStale), class: "hswq-file" }, fileView(file, model)),
    filenameField(wanted.filename, actions.want),
    row(
      checkbox(t("overwrite"), wanted.overwrite, (overwrite) => actions.want({ overwrite })),
      submitButton(disabled),
    ),
  );
}

/** What will be written, to the byte; or why nothing can be. */
function fileView(file, model) {
  if (!model.source) return line(t("gone"));
  if (file?.refused) return line(file.refused);
  if (!file) return line(t(model.usable ? "asking" : "exportLater"));
  const layers = {
    quantized: number(file.quantized),
    kept: number(file.kept),
    title: file.outcome.title,
  };
  return [
    outcomeLine(file.outcome, { "data-fact": "file" }),
    line(t("fileHas", { ...layers, size: size(file.bytes) })),
  ];
}

function filenameField(filename, want) {
  const props = {
    type: "text",
    value: filename,
    placeholder: t("filenameHint"),
    oninput: ({ target }) => want({ filename: target.value }),
  };
  return field(t("filename"), h("input", props), "filename");
}

const submitButton = (disabled) =>
  h(
    "button",
    { type: "submit", class: "hswq-primary", disabled },
    icon("save"),
    h("span", null, t("exportButton")),
  );
