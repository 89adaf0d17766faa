// The form that exports the selected model as the preview shows it.

import { h } from "../common/dom.mjs";
import { t } from "../common/texts.mjs";
import { isActive } from "../panel/queue.mjs";
import { checkbox, field, icon, line, row, select } from "./parts.mjs";

export function exportView({ wanted, job }, model, actions) {
  const set = (values) => actions.change({ wanted: { ...wanted, ...values } });
  const disabled = isActive(job) || !model.source;
  return h(
    "form",
    { onsubmit: actions.export },
    row(select("format", wanted, set), select("what", wanted, set)),
    line(t(`about ${wanted.format}`)),
    filenameField(wanted.filename, set),
    row(
      checkbox(t("overwrite"), wanted.overwrite, (overwrite) => set({ overwrite })),
      submitButton(disabled),
    ),
  );
}

function filenameField(filename, set) {
  const props = {
    type: "text",
    value: filename,
    placeholder: t("filenameHint"),
    oninput: ({ target }) => set({ filename: target.value }),
  };
  return field(t("filename"), h("input", props));
}

const submitButton = (disabled) =>
  h("button", { type: "submit", class: "hswq-primary", disabled }, icon("save"), t("exportButton"));
