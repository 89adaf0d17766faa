// Talking to ComfyUI's queue about one job of ours: a prompt of its own. The user's graph is not
// touched. ComfyUI tells by a status event that its queue has changed, and we then ask for the
// job. (A job that is cancelled while it waits has no event of its own.) Progress comes by event.

import { api } from "../../../scripts/api.js";
import { request } from "../common/request.mjs";

// Begins the ids of our nodes. The ids in the user's graph are numbers.
const PREFIX = "hswq:";
/** Names of nodes in jobs that are not called by their class: the 16-bit model, and a picture. */
export const ORIGINAL = "original";
export const SHEET = "sheet";
// Inputs that name a model's file, in our nodes and in the stock loaders.
const FILES = ["source", "ckpt_name", "unet_name"];
const REMEMBERED = "HSWQ.job";
// ComfyUI's names of a job's states where ours are different.
const STATES = { in_progress: "running", completed: "done" };
const MOST_LETTERS = 200; // of what ComfyUI says: it lists every model where one is not found
const tabs = new BroadcastChannel(REMEMBERED);

export const isActive = (job) => ["pending", "running"].includes(job?.state);
export const cancel = (job) => api.fetchApi(`/jobs/${job.id}/cancel`, { method: "POST" });
export const isOwn = (id) => id.startsWith(PREFIX);
/** Return the id of a node in our prompts. ComfyUI's own ":" stands between subgraphs. */
export const idOf = (name) => PREFIX + name.replaceAll(":", ".");

/**
 * Tell the other tabs of this browser of a new `job` (null where it was dismissed), or of a job's
 * `progress`, which ComfyUI tells only the tab that has queued it.
 */
export const tellTabs = (message) => tabs.postMessage(message);
/** Call a function with what other tabs tell. */
export const listenToTabs = (take) => (tabs.onmessage = ({ data }) => take(data));

/** A prompt that ComfyUI refuses because there is no such model file. */
export class NoSuchFileError extends Error {}

/**
 * Queue a prompt whose result is a node's, and return its job, which has failed if ComfyUI does not
 * accept it. `server` tells this start of ComfyUI from the next one.
 */
export async function queuePrompt(node, prompt, { source, server }) {
  const job = { node, source, server, state: "pending", value: 0, max: 0 };
  const response = await api.fetchApi("/prompt", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ prompt, client_id: api.clientId }),
  });
  const answer = await response.json();
  if (!response.ok) return { ...job, state: "failed", error: refusal(answer) };
  const queued = { ...job, id: answer.prompt_id };
  localStorage.setItem(REMEMBERED, JSON.stringify(queued));
  tellTabs({ job: queued });
  return queued;
}

/** Forget the job that was queued last. */
export function forget() {
  localStorage.removeItem(REMEMBERED);
  tellTabs({ job: null });
}

/** Return what ComfyUI says of a prompt that it does not accept. */
function refusal({ error, node_errors }) {
  const ofNodes = Object.values(node_errors ?? {}).flatMap(({ errors }) => errors);
  const isGone = ({ type, extra_info }) =>
    type === "value_not_in_list" && FILES.includes(extra_info?.input_name);
  if (ofNodes.some(isGone)) throw new NoSuchFileError();
  const told = ofNodes.length ? ofNodes : [error];
  return told.map(sentenceOf).join("; ");
}

function sentenceOf({ message, details }) {
  return details?.length < MOST_LETTERS ? `${message}: ${details}` : message;
}

/** Find the job that this browser queued last, also after a reload; null where there is none. */
export async function findJob() {
  const known = JSON.parse(localStorage.getItem(REMEMBERED));
  if (!known) return null;
  const job = await refreshed(known);
  return job.state === "cancelled" ? null : job;
}

/**
 * Return a job with its present state. One that ComfyUI does not know was cancelled, or was lost
 * when ComfyUI was started anew: which of them is asked now, as the panel's status may be older.
 */
export async function refreshed(job) {
  const response = await api.fetchApi(`/jobs/${job.id}`);
  if (response.status === 404) {
    const { server } = await request("status");
    return { ...job, state: job.server === server ? "cancelled" : "lost" };
  }
  return { ...job, ...resultOf(await response.json(), idOf(job.node)) };
}

function resultOf({ status, execution_error, outputs = {}, ...times }, node) {
  const { execution_start_time: began = NaN, execution_end_time: ended = NaN } = times;
  const first = (id, kind) => outputs[id]?.[kind]?.[0];
  return {
    state: STATES[status] ?? status,
    file: first(node, "models"),
    verdict: first(node, "verdict"),
    sheet: first(idOf(SHEET), "images"),
    seconds: (ended - began) / 1000, // NaN before the end
    error: execution_error?.exception_message?.trim(),
  };
}
