// An export or a search in ComfyUI's queue.

import { h } from "../common/dom.mjs";
import { t } from "../common/texts.mjs";
import { isActive } from "../panel/queue.mjs";
import { button, icon, line, problem, progressBar, row } from "./parts.mjs";

const ICONS = {
  pending: "clock",
  running: "spinner pi-spin",
  done: "check-circle",
  failed: "exclamation-triangle",
  cancelled: "ban",
};

export function jobView(job, actions) {
  const name = t(job.node);
  const heading = ` ${name}: ${t(`job ${job.state}`)}`;
  return h(
    "section",
    { key: "job", "aria-label": name, "data-state": job.state },
    row(h("strong", { role: "status" }, icon(ICONS[job.state]), heading), endButton(job, actions)),
    isActive(job) && progressBar(name, percentDone(job), 100),
    line(result(job)),
    job.error && problem(job.error),
  );
}

function endButton(job, actions) {
  if (!isActive(job)) return button(t("dismiss"), "times", actions.dismiss, { key: "dismiss" });
  return button(t("cancel"), "times", actions.cancel, { key: "cancel", disabled: !job.id });
}

/** Return a whole percentage; 0 before the first event of progress. */
const percentDone = ({ value, max }) => Math.round((100 * value) / (max || 1)) || 0;

/** Return the file that was written, or what the job reads until then. */
function result({ file, source }) {
  if (!file) return source;
  const path = `output/${file.subfolder}/${file.filename}`;
  return file.existed ? t("existed", { file: path }) : path;
}
