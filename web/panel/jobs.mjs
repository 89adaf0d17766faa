// The job that the panel shows: an export, a search, or one that samples.

import { app } from "../../../scripts/app.js";
import { t } from "../common/texts.mjs";
import { askModel, refresh } from "./questions.mjs";
import {
  NoSuchFileError,
  cancel,
  findJob,
  forget,
  idOf,
  isActive,
  queuePrompt,
  refreshed,
  tellTabs,
} from "./queue.mjs";
import { attempt, change, isOpen, selectedModel, state, tried } from "./state.mjs";

/** Queue a prompt whose result is a node's. `promptOf` makes it for the selected model's file. */
export async function startJob(node, promptOf) {
  change({ job: { node, state: "pending" } }); // disables the button at once
  await attempt(async () => {
    change({ job: await queued(node, promptOf) });
    await refreshJob(); // it may have ended before its id was known here
  });
  const wasNotQueued = state.job.state === "pending" && !state.job.id;
  if (wasNotQueued) change({ job: null });
}

/** Queue one node of ours. */
export const startNode = (node, inputs) =>
  startJob(node, (source) => ({
    [idOf(node)]: { class_type: node, inputs: { source, statistics: "auto", ...inputs } },
  }));

/** Queue it by the file's name, which may be another one by now. */
async function queued(node, promptOf) {
  const queue = () => {
    const { source, name } = selectedModel();
    if (!source) throw new Error(t("goneNow", { name }));
    return queuePrompt(node, promptOf(source), { source, server: state.status.server });
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
  const { value, max, began } = state.job; // newer than when it was asked
  change({ job: { ...answer, value, max, began } });
  if (answer.state === "done") await takeResult(answer.file);
}

const isWaitedFor = (job) => job?.id && isActive(job);

async function takeResult(file) {
  askModel(); // more layers are searched or measured now
  if (file) await app.reloadNodeDefs(); // stock loaders offer the new file, too
}

/** Show the job of before a reload of the page. */
export async function resumeJob() {
  change({ job: state.job ?? (await findJob()) });
  await refreshJob();
}

/** Take ComfyUI's event of a prompt's progress. */
export function takeJobProgress({ prompt_id: id, value, max }) {
  if (id !== state.job?.id) return;
  tellTabs({ progress: { id, value, max } });
  showProgress({ id, value, max });
}

/** Take what another tab tells. A job of this tab is shown until its end. */
export function takeFromTab({ job, progress }) {
  if (progress) return showProgress(progress);
  if (isActive(state.job)) return;
  change({ job });
  if (isOpen()) tried(refreshJob); // it may have begun, or ended, before this tab was told
}

function showProgress({ id, value, max }) {
  if (id !== state.job?.id || !isActive(state.job)) return; // it may come after the job's end
  const isNew = max !== state.job.max; // another node of it has begun
  const began = isNew ? { value, at: Date.now() } : state.job.began;
  change({ job: { ...state.job, state: "running", value, max, began } });
}

export async function cancelJob() {
  await cancel(state.job);
  await refreshJob();
}

export function dismissJob() {
  forget();
  change({ job: null });
}
