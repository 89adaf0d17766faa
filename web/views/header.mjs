// The panel's head: whether samplings are recorded, uploading, the settings, and closing it.

import { h } from "../common/dom.mjs";
import { t } from "../common/texts.mjs";
import { checkbox, icon } from "./parts.mjs";

export function headerView({ settings, open }, actions) {
  const isOn = settings.Record ?? true;
  const label = t(isOn ? "recordingOn" : "recordingOff");
  const record = (value) => actions.set("Record", value);
  return h(
    "header",
    null,
    h("h2", null, "HSWQ"),
    checkbox(label, isOn, record, { role: "switch", title: t("recordingHint") }),
    h(
      "span",
      { class: "hswq-tools" },
      uploadButton(actions),
      iconButton("settings", "cog", () => actions.fold("settings", !open.settings), {
        "aria-expanded": String(Boolean(open.settings)),
      }),
      iconButton("closePanel", "times", actions.close),
    ),
  );
}

function uploadButton(actions) {
  async function onchange({ target }) {
    await actions.upload(target.files);
    target.value = ""; // else choosing the same file again would change nothing
  }
  const label = t("upload");
  return h(
    "label",
    { class: "hswq-button", title: t("uploadHint") },
    icon("upload"),
    h("input", {
      type: "file",
      accept: ".pt",
      class: "hswq-hidden",
      onchange,
      "aria-label": label,
    }),
  );
}

function iconButton(name, iconName, onclick, more) {
  const label = t(name);
  const props = { type: "button", title: label, "aria-label": label, onclick, ...more };
  return h("button", props, icon(iconName));
}
