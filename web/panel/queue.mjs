// Talking to ComfyUI's queue about one job of ours: a prompt of one node. The user's graph is not
// touched. ComfyUI tells by a status event that its queue has changed, and we then ask for the
// job. (A job that is cancelled while it waits has no event of its own.) Progress comes by event.

import { api } from "../../../scripts/api.js";
import { request } from "../common/request.mjs";

// Begins the id of our node. The ids in the user's graph are numbers.
const NODE = "hswq:";
const REMEMBERED = "HSWQ.job";
// ComfyUI's names of a job's states where ours are different.
const STATES = { in_progress: "running", completed: "done" };
const MOST_LETTERS = 200; // of what ComfyUI says: it lists every model where one is not found

export const isActive = (job) => ["pending", "running"].includes(job?.state);
export const cancel = (job) => api.fetchApi(`/jobs/${job.id}/cancel`, { method: "POST" });
export const forget = () => localStorage.removeItem(REMEMBERED);

/** A prompt that ComfyUI refuses because there is no such model file. */
export class NoSuchFileError extends Error {}

/**
 * Queue a node and return its job, which has failed if ComfyUI does not accept it.
 * `server` tells this start of ComfyUI from the next one.
 */
export async function queueNode(node, inputs, server) {
  const job = { node, source: inputs.source, server, state: "pending", value: 0, max: 0 };
  const prompt = { [NODE + node]: { class_type: node, inputs } };
  const response = await api.fetchApi("/prompt", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ prompt, client_id: api.clientId }),
  });
  const answer = await response.json();
  if (!response.ok) return { ...job, state: "failed", error: refusal(answer) };
  const queued = { ...job, id: answer.prompt_id };
  localStorage.setItem(REMEMBERED, JSON.stringify(queued));
  return queued;
}

/** Return what ComfyUI says of a prompt that it does not accept. */
function refusal({ error, node_errors }) {
  const ofNodes = Object.values(node_errors ?? {}).flatMap(({ errors }) => errors);
  const isGone = ({ type, extra_info }) =>
    type === "value_not_in_list" && extra_info?.input_name === "source";
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
  return { ...job, ...resultOf(await response.json(), NODE + job.node) };
}

function resultOf({ status, execution_error, outputs }, node) {
  const file = outputs?.[node]?.models?.[0];
  const error = execution_error?.exception_message?.trim();
  return { state: STATES[status] ?? status, file, error };
}
