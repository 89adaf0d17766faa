// What a user can do in the panel. The views are given these functions.

import { app } from "../../../scripts/app.js";
import { request } from "../common/request.mjs";
import { t } from "../common/texts.mjs";
import { cancelJob, dismissJob, startJob } from "./jobs.mjs";
import { askPlan, refresh, selectModel } from "./questions.mjs";
import { attempt, change, state } from "./state.mjs";

export const actions = {
  change,
  select: selectModel,
  choose: chooseSettings,
  record: (isOn) => app.extensionManager.setting.set("HSWQ.Record", isOn),
  search: () => startJob("HSWQPlan", { mode: state.mode }),
  export: exportModel,
  cancel: () => attempt(cancelJob),
  dismiss: dismissJob,
  reset: resetSession,
  remove: removeModel,
  upload: uploadFile,
};

/** Choose mode or keep ratio: the plan that is shown is stale until the new one is there. */
function chooseSettings(values) {
  change({ ...values, isStale: true });
  askPlan();
}

function exportModel(event) {
  event.preventDefault(); // the browser would send the form and leave the page
  const { keepRatio, wanted } = state;
  startJob("HSWQExport", { keep_ratio: keepRatio, without_statistics: "fail", ...wanted });
}

function resetSession({ id, name }, { session, samples }) {
  const options = { method: "POST", body: JSON.stringify({ session }) };
  return askAndForget("reset", `statistics/${id}/reset`, options, { name, session, samples });
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
  change({ problem: null });
  await attempt(async () => {
    await request(path, { headers: { "Content-Type": "application/json" }, ...options });
    await refresh();
  });
}

/** Upload the first of some files and show the model that it belongs to. */
function uploadFile([file]) {
  change({ problem: null });
  return attempt(async () => {
    const model = await request(`statistics/upload?name=${encodeURIComponent(file.name)}`, {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream" },
      body: file,
    });
    await refresh();
    selectModel(model.id);
  });
}
