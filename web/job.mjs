// One job of ours in ComfyUI's own queue: a one-node prompt, which leaves the user's graph alone.
// Its state is asked whenever the queue changes, as ComfyUI tells by a status event; it sends none
// for a pending job that is cancelled. Only progress comes by event.

import { api } from "../../scripts/api.js";

const NODE = "hswq:"; // a node's id, with the node's type; numbers are those of the user's graph
const REMEMBERED = "HSWQ.job";
const STATES = { in_progress: "running", completed: "done" }; // the others are called as here

export const isActive = (job) => ["pending", "running"].includes(job?.state);
export const cancel = (job) => api.fetchApi(`/jobs/${job.id}/cancel`, { method: "POST" });
export const forget = () => localStorage.removeItem(REMEMBERED);

/** Queue a node; return its job, which has failed if ComfyUI does not accept it. */
export async function queueNode(node, inputs) {
  const job = { node, source: inputs.source, state: "pending", value: 0, max: 0 };
  const prompt = { [NODE + node]: { class_type: node, inputs } };
  const body = JSON.stringify({ prompt, client_id: api.clientId });
  const headers = { "Content-Type": "application/json" };
  const response = await api.fetchApi("/prompt", { method: "POST", headers, body });
  const answer = await response.json();
  if (!response.ok) return { ...job, state: "failed", error: refusal(answer) };
  const queued = { ...job, id: answer.prompt_id };
  localStorage.setItem(REMEMBERED, JSON.stringify(queued));
  return queued;
}

function refusal({ error, node_errors }) {
  const found = Object.values(node_errors ?? {}).flatMap(({ errors }) => errors);
  const sentence = ({ message, details }) => (details ? `${message}: ${details}` : message);
  return (found.length ? found : [error]).map(sentence).join("; ");
}

/** Find what this browser has queued last, also after a reload; null where ComfyUI forgot it. */
export async function findJob() {
  const known = JSON.parse(localStorage.getItem(REMEMBERED));
  const job = known && (await refreshed(known));
  return job?.state === "cancelled" ? null : job;
}

/** Return a job with the state that ComfyUI has for it; one that it does not know was cancelled. */
export async function refreshed(job) {
  const response = await api.fetchApi(`/jobs/${job.id}`);
  if (response.status === 404) return { ...job, state: "cancelled" };
  const { status, execution_error, outputs } = await response.json();
  const file = outputs?.[NODE + job.node]?.models?.[0];
  const error = execution_error?.exception_message?.trim();
  return { ...job, state: STATES[status] ?? status, file, error };
}
