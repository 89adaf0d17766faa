// An export or a search in ComfyUI's queue.

import { h } from "../common/dom.mjs";
import { size } from "../common/numbers.mjs";
import { sentence } from "../common/sentence.mjs";
import { t } from "../common/texts.mjs";
import { isActive } from "../panel/queue.mjs";
import { button, icon, line, problem, progressBar, row } from "./parts.mjs";

const ICONS = {
  pending: "clock",
  running: "spinner pi-spin",
  done: "check-circle",
  failed: "exclamation-triangle",
  cancelled: "ban",
  lost: "exclamation-triangle",
};

export function jobView(job, isGone, actions) {
  const name = t(job.node);
  const heading = `${name}: ${t(`job ${isGone && isActive(job) ? "unknown" : job.state}`)}`;
  const sign = icon(isGone ? "question-circle" : ICONS[job.state]);
  return h(
    "section",
    { key: "job", class: "hswq-job", "aria-label": name, "data-state": job.state },
    row(h("strong", { role: "status" }, sign, heading), endButton(job, isGone, actions)),
    isActive(job) && !isGone && progressBar(name, percentDone(job), 100),
    result(job),
    job.error && problem(job.error),
  );
}

function endButton(job, isGone, actions) {
  const props = { class: "hswq-quiet" };
  if (!isActive(job)) {
    return button(t("dismiss"), "times", actions.dismiss, { key: "dismiss", ...props });
  }
  const disabled = !job.id || isGone;
  return button(t("cancel"), "times", actions.cancel, { key: "cancel", disabled, ...props });
}

/** Return a whole percentage; 0 before the first event of progress. */
const percentDone = ({ value, max }) => Math.round((100 * value) / (max || 1)) || 0;

/** What was written and what it is, or what the job reads until then. */
function result({ file, source }) {
  if (!file) return source && line(source);
  const path = `output/${file.subfolder}/${file.filename}`;
  return [
    line(file.existed ? t("existed", { file: path }) : path),
    h("p", { class: "hswq-sentence" }, sentence(file.outcome)),
    line(t("fileSize", { size: size(file.bytes) })),
  ];
}
