// The job that the panel shows: an export or a search.

import { askModel } from "./questions.mjs";
import { cancel, findJob, forget, isActive, queueNode, refreshed } from "./queue.mjs";
import { attempt, change, selectedModel, state } from "./state.mjs";

/** Queue a node for the selected model's file. */
export async function startJob(node, inputs) {
  change({ problem: null, job: { node, state: "pending" } }); // disables the button at once
  await attempt(async () => {
    const { source } = selectedModel();
    change({ job: await queueNode(node, { source, statistics: "auto", ...inputs }) });
    await refreshJob(); // it may have ended before its id was known here
  });
  const wasNotQueued = state.job.state === "pending" && !state.job.id;
  if (wasNotQueued) change({ job: null });
}

/** Ask for the job's state, while it may change. */
export async function refreshJob() {
  const asked = state.job;
  if (!asked?.id || !isActive(asked)) return;
  const answer = await refreshed(asked);
  const isOutdated = state.job?.id !== asked.id || !isActive(state.job);
  if (isOutdated) return;
  const { state: now, file, error } = answer;
  change({ job: { ...state.job, state: now, file, error } });
  if (now === "done") askModel(); // more layers are searched now
}

/** Show the job of before a reload of the page. */
export async function resumeJob() {
  change({ job: state.job ?? (await findJob()) });
  await refreshJob();
}

/** Take ComfyUI's event of a prompt's progress. */
export function takeProgress({ detail: { prompt_id, value, max } }) {
  if (prompt_id !== state.job?.id) return;
  change({ job: { ...state.job, state: "running", value, max } });
}

export async function cancelJob() {
  await cancel(state.job);
  await refreshJob();
}

export function dismissJob() {
  forget();
  change({ job: null });
}
