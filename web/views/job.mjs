// A job in ComfyUI's queue: an export, a search, a measuring or a verification.

import { api } from "../../../scripts/api.js";
import { h } from "../common/dom.mjs";
import { duration, number, size } from "../common/numbers.mjs";
import { t } from "../common/texts.mjs";
import { isActive } from "../panel/queue.mjs";
import { breakable, button, icon, line, outcomeLine, problem, progressBar, row } from "./parts.mjs";

const FIRST_SECONDS = 3; // before it is said how long a job takes
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
    isActive(job) && !isGone && [progressBar(name, percentDone(job), 100), leftView(job)],
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

/** How long it will go on, as fast as it went so far. */
function leftView({ began, value, max }) {
  const done = value - began?.value;
  const seconds = (Date.now() - began?.at) / 1000;
  if (!(done > 0 && seconds > FIRST_SECONDS && value < max)) return null;
  return line(t("timeLeft", { time: duration((seconds * (max - value)) / done) }));
}

/** What came of it, or what the job reads until then. */
function result(job) {
  const { state, node, source, file, verdict } = job;
  if (file) return fileView(job);
  if (verdict) return verdictView(job);
  if (state === "done" && node === "HSWQMeasureEffect") return line(t("measured"), took(job));
  if (state === "cancelled" && node === "HSWQMeasureEffect") return line(t("measuredPart"));
  return source && line(source);
}

const took = ({ seconds }) => seconds > 0 && ` ${t("took", { time: duration(seconds) })}`;

function fileView({ file }) {
  const path = `output/${file.subfolder}/${file.filename}`;
  return [
    line(breakable(file.existed ? t("existed", { file: path }) : path, /(?<=[/_])/)),
    outcomeLine(file.outcome, { seconds: file.seconds }),
    line(t("fileSize", { size: size(file.bytes) })),
  ];
}

/** How many pictures are the same, and the pictures; a click shows them large. */
function verdictView({ source, sheet, verdict, ...job }) {
  const { same, pictures, threshold, cosine, psnr, worst } = verdict;
  const said = t("verdict", { same: number(same), pictures: number(pictures) });
  const facts = { cosine: cosine.toFixed(4), psnr: psnr.toFixed(1), threshold };
  const ofWorst = {
    seed: worst.seed,
    worst: worst.cosine.toFixed(4),
    least: worst.psnr.toFixed(1),
  };
  return [
    line(source),
    h("p", { class: "hswq-sentence" }, said),
    line(t("verdictFacts", { ...facts, ...ofWorst }), took(job)),
    sheet && sheetView(sheet, said),
  ];
}

function sheetView(sheet, said) {
  const src = api.apiURL(`/view?${new URLSearchParams(sheet)}`);
  const img = () => h("img", { src, alt: `${said} ${t("sheet")}` });
  const show = ({ currentTarget }) => currentTarget.nextSibling.showModal();
  const hide = ({ currentTarget }) => currentTarget.closest("dialog").close();
  const props = { type: "button", class: "hswq-sheet", title: t("sheetLarge"), onclick: show };
  const dialog = { class: "hswq-large", "aria-label": t("sheet"), onkeydown: keepKey };
  return [
    h("button", props, img()),
    h(
      "dialog",
      dialog,
      button(t("close"), "times", hide),
      h("div", { tabindex: 0, onclick: hide }, img()),
    ),
  ];
}

/** ComfyUI has shortcuts for keys. */
const keepKey = (event) => event.stopPropagation();
