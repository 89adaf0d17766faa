// The statistics files of the selected model.

import { api } from "../../../scripts/api.js";
import { h } from "../common/dom.mjs";
import { counted, size, time } from "../common/numbers.mjs";
import { t } from "../common/texts.mjs";
import { button, icon, line, row } from "./parts.mjs";

export function filesView(model, actions) {
  const items = model.sessions.map((file) => fileView(model, file, actions));
  return [h("ul", null, items), row(button(t("delete"), "trash", () => actions.remove(model)))];
}

function fileView(model, file, actions) {
  return h(
    "li",
    { key: file.session },
    h("span", { class: "hswq-name" }, file.session),
    line(
      counted("images", file.samples),
      ` · ${size(file.bytes)}`,
      file.last_run && ` · ${time(file.last_run)}`,
    ),
    row(
      downloadLink(model, file),
      button(t("reset"), "refresh", () => actions.reset(model, file), { title: t("resetHint") }),
    ),
  );
}

function downloadLink(model, { session, file }) {
  const href = api.apiURL(`/hswq/statistics/${model.id}/file?session=${session}`);
  const props = { class: "hswq-button", href, download: file };
  return h("a", props, icon("download"), t("download"));
}
