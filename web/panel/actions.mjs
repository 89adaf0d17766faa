// What a user can do in the panel. The views are given these functions.

import { app } from "../../../scripts/app.js";
import { counted } from "../common/numbers.mjs";
import { request } from "../common/request.mjs";
import { sentence } from "../common/sentence.mjs";
import { t } from "../common/texts.mjs";
import { openFirstExample } from "../examples.mjs";
import { applyToLoader, loaderOf, partsOf, showNode } from "./graph.mjs";
import { cancelJob, dismissJob, startJob, startNode } from "./jobs.mjs";
import { askModel, askPoint, refresh, selectModel } from "./questions.mjs";
import { effectPrompt, verifyPrompt } from "./sampling_jobs.mjs";
import { attempt, change, chosenInputs, chosenLine, chosenPoint } from "./state.mjs";
import { selectedModel, state } from "./state.mjs";
import { lastSampling } from "./workflow.mjs";

const FIRST_FORMATS = ["scaled", "compatible", "int8"]; // offered first for a mode of the same name

export const actions = {
  change,
  select: toggleModel,
  choose: choosePoint,
  want: wantFile,
  fold: toggleFold,
  set: (name, value) => app.extensionManager.setting.set(`HSWQ.${name}`, value),
  close: () => app.extensionManager.command.execute("Workspace.ToggleSidebarTab.hswq"),
  example: () => attempt(openFirstExample),
  search: () => startNode("HSWQPlan", { mode: state.mode }),
  look: lookAtTask,
  begin: beginTask,
  export: exportModel,
  apply: applyPoint,
  showLoader: () => showNode(loaderOf(selectedModel().source)),
  cancel: () => attempt(cancelJob),
  dismiss: dismissJob,
  reset: resetSession,
  remove: removeModel,
  upload: uploadFile,
};

/** Show a model's details, or hide them; what is shown begins at the top. */
function toggleModel(id, place) {
  change({ problem: null, notice: null });
  selectModel(id === state.selected ? null : id);
  place?.scrollIntoView({ block: "nearest" });
}

function toggleFold(name, isOpen) {
  if (Boolean(state.open[name]) === isOpen) return;
  change({ open: { ...state.open, [name]: isOpen } });
  if (name === "layers" && isOpen) askModel();
}

/** Choose a point of the curves, by its line or how far along it. */
function choosePoint(values) {
  const isOther = Object.entries(values).some(([name, value]) => state[name] !== value);
  if (!isOther) return;
  change({ ...values, notice: null });
  const { formats } = chosenLine(state) ?? {};
  if (formats && !formats.includes(state.wanted.format)) {
    const format = formats.find((one) => FIRST_FORMATS.includes(one)) ?? formats[0];
    change({ wanted: { ...state.wanted, format } });
  }
  askPoint();
}

function wantFile(values) {
  change({ wanted: { ...state.wanted, ...values } });
  if ("format" in values || "what" in values) askPoint();
}

function exportModel(event) {
  event.preventDefault(); // the browser would send the form and leave the page
  const { inputs } = chosenPoint(state);
  const others = { without_statistics: "fail", keep_ratio: 0.25 }; // which the node insists on
  startNode("HSWQExport", { ...others, ...inputs, ...state.wanted });
}

/** Show what a job that samples will do; null hides it. */
function lookAtTask(node) {
  return attempt(async () => {
    change({ task: null });
    if (!node) return;
    const { source, name } = selectedModel();
    const sampling = await lastSampling(partsOf(source).name);
    if (!sampling) throw new Error(t("notSampled", { name }));
    if (selectedModel()?.source === source) change({ task: { node, sampling } });
  });
}

/** Queue what is shown. */
function beginTask(event) {
  event.preventDefault();
  const { node, sampling } = state.task;
  const { mode, seeds } = state;
  const inputs = { keep_ratio: 0.25, ...chosenInputs(state), without_statistics: "fail" };
  change({ task: null });
  startJob(node, (source) =>
    node === "HSWQVerify"
      ? verifyPrompt(source, sampling, inputs, seeds)
      : effectPrompt(source, sampling, mode),
  );
}

/** Set the loader in the graph to the chosen point. */
function applyPoint() {
  return attempt(async () => {
    const point = chosenPoint(state);
    const { source, name } = selectedModel();
    const { node, isNew } = applyToLoader(source, chosenInputs(state));
    const values = { node: node.title, name, outcome: sentence(point) };
    change({ notice: t(isNew ? "addedLoader" : "applied", values) });
  });
}

function resetSession({ id, name }, { session, samples }) {
  const options = { method: "POST", body: JSON.stringify({ session }) };
  const values = { name, session, images: counted("images", samples) };
  return askAndForget("reset", `statistics/${id}/reset`, options, values);
}

function removeModel({ id, name }) {
  return askAndForget("delete", `statistics/${id}`, { method: "DELETE" }, { name });
}

/** Ask whether to forget something, then send a request that does it. */
async function askAndForget(what, path, options, values) {
  const title = t(`${what}Title`);
  const message = t(`${what}Message`, values);
  const isMeant = await app.extensionManager.dialog.confirm({ title, message, type: "delete" });
  if (!isMeant) return;
  await attempt(async () => {
    await request(path, { headers: { "Content-Type": "application/json" }, ...options });
    await refresh();
  });
}

/** Upload the first of some files, show the model that it belongs to, and say what it brought. */
function uploadFile([file]) {
  return attempt(async () => {
    const known = state.status?.models; // as of before: the server tells of it before it answers
    const model = await request(`statistics/upload?name=${encodeURIComponent(file.name)}`, {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream" },
      body: file,
    });
    const before = known?.find(({ id }) => id === model.id);
    const isNew = JSON.stringify(before?.sessions) !== JSON.stringify(model.sessions);
    await refresh();
    if (state.selected !== model.id) selectModel(model.id);
    const values = { file: file.name, name: model.name, images: counted("images", model.samples) };
    change({ notice: t(isNew ? "uploaded" : "uploadedBefore", values) });
  });
}
