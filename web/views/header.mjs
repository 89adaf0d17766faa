// The panel's head: whether samplings are recorded, and uploading.

import { h } from "../common/dom.mjs";
import { t } from "../common/texts.mjs";
import { checkbox, icon } from "./parts.mjs";

export function headerView({ recording }, actions) {
  const label = t(recording ? "recordingOn" : "recordingOff");
  return h(
    "header",
    null,
    h("h2", null, "HSWQ"),
    checkbox(label, recording, actions.record, { role: "switch" }),
    uploadButton(actions),
  );
}

function uploadButton(actions) {
  async function onchange({ target }) {
    await actions.upload(target.files);
    target.value = ""; // else choosing the same file again would change nothing
  }
  return h(
    "label",
    { class: "hswq-button", title: t("uploadHint") },
    icon("upload"),
    t("upload"),
    h("input", { type: "file", accept: ".pt", class: "hswq-hidden", onchange }),
  );
}
