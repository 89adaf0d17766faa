// The job that the panel shows: an export or a search.

import { app } from "../../../scripts/app.js";
import { t } from "../common/texts.mjs";
import { askModel, refresh } from "./questions.mjs";
import {
  NoSuchFileError,
  cancel,
  findJob,
  forget,
  isActive,
  queueNode,
  refreshed,
} from "./queue.mjs";
import { attempt, change, selectedModel, state } from "./state.mjs";

/** Queue a node for the selected model's file. */
export async function startJob(node, inputs) {
  change({ job: { node, state: "pending" } }); // disables the button at once
  await attempt(async () => {
    change({ job: await queued(node, inputs) });
    await refreshJob(); // it may have ended before its id was known here
  });
  const wasNotQueued = state.job.state === "pending" && !state.job.id;
  if (wasNotQueued) change({ job: null });
}

/** Queue it by the file's name, which may be another one by now. */
async function queued(node, inputs) {
  const queue = () => {
    const { source, name } = selectedModel();
    if (!source) throw new Error(t("goneNow", { name }));
    return queueNode(node, { source, statistics: "auto", ...inputs }, state.status.server);
  };
  try {
    return await queue();
  } catch (error) {
    if (!(error instanceof NoSuchFileError)) throw error;
    await refresh();
    return queue();
  }
}

/** Ask for the job's state, while it may change. */
export async function refreshJob() {
  const asked = state.job;
  if (!isWaitedFor(asked)) return;
  const answer = await refreshed(asked);
  if (!isWaitedFor(state.job) || state.job.id !== asked.id) return; // meanwhile it is another one
  const { state: now, file, error } = answer;
  change({ job: { ...state.job, state: now, file, error } });
  if (now === "done") await takeResult(file);
}

const isWaitedFor = (job) => job?.id && isActive(job);

async function takeResult(file) {
  askModel(); // more layers are searched now
  if (file) await app.reloadNodeDefs(); // stock loaders offer the new file, too
}

/** Show the job of before a reload of the page. */
export async function resumeJob() {
  change({ job: state.job ?? (await findJob()) });
  await refreshJob();
}

/** Take ComfyUI's event of a prompt's progress. */
export function takeJobProgress({ detail: { prompt_id, value, max } }) {
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
