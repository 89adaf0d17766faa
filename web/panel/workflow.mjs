// What the user has sampled a model with: in his last run of it, or else in the open workflow.
// Jobs that sample the model do it with the same prompts, size and sampler.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { isOwn } from "./queue.mjs";

const RUNS = 20; // so many are looked through at most: each brings its whole workflow
const TEXTS = ["text", "text_g", "t5xxl", "clip_l", "prompt"]; // inputs that hold a prompt
// Of ComfyUI's samplers, custom ones too, and what is taken where a workflow computes it.
const DEFAULTS = { cfg: 1, seed: 0, steps: 20, sampler_name: "euler", scheduler: "normal" };

/**
 * Return how the model of a file was last sampled; null where nobody knows. `nodes` are what the
 * links `positive`, `negative`, `latent` and `vae` (or null) need, as ComfyUI's prompts have them.
 * `runSeconds` is how long that run took, null if it is not known.
 */
export async function lastSampling(file) {
  const response = await api.fetchApi(`/history?max_items=${RUNS}`);
  const runs = Object.values(await response.json()).reverse();
  for (const { prompt, status } of runs) {
    const found = samplingIn(prompt[2], file);
    if (found) return { ...found, runSeconds: secondsOf(status?.messages ?? [], found.id) };
  }
  const found = samplingIn((await app.graphToPrompt()).output, file);
  return found && { ...found, runSeconds: null };
}

/** Return the first sampler of a prompt that begins with a file's model. */
function samplingIn(nodes, file) {
  if (Object.keys(nodes).some(isOwn)) return null;
  for (const [id, { inputs }] of Object.entries(nodes)) {
    const { model, latent, ...sampling } = partsOf(nodes, inputs);
    const hasModel = Object.values(behind(nodes, [model])).some((one) =>
      Object.values(one.inputs).includes(file),
    );
    if (!hasModel || !isLink(sampling.positive) || !isLink(latent)) continue;
    if (isSampled(behind(nodes, [latent]))) continue; // a second pass over a picture
    const links = [sampling.positive, sampling.negative, latent, sampling.vae];
    const needed = onePicture(behind(nodes, links), latent);
    return { id, latent, ...sampling, ...sizeOf(nodes, latent), nodes: needed };
  }
  return null;
}

/** Return a sampler's inputs, also where its guider, noise, sampler or sigmas have them. */
function partsOf(nodes, inputs) {
  const parts = [inputs, ...["guider", "noise", "sampler", "sigmas"].map((name) => inputs[name])];
  const all = parts.map((part) => (isLink(part) ? nodes[part[0]]?.inputs : part) ?? {});
  const find = (names, fits) =>
    all.flatMap((one) => names.map((name) => one[name])).find((value) => fits(value));
  const entries = Object.entries(DEFAULTS).map(([name, value]) => {
    const names = name === "seed" ? ["seed", "noise_seed"] : [name];
    return [name, find(names, (one) => typeof one === typeof value) ?? value];
  });
  const positive = find(["positive", "conditioning"], isLink);
  return {
    ...Object.fromEntries(entries),
    positive,
    negative: find(["negative"], isLink) ?? positive,
    model: find(["model"], isLink),
    latent: find(["latent_image"], isLink),
    vae: decodersOf(nodes)[0] ?? null,
    text: textOf(behind(nodes, [positive])),
  };
}

const isLink = (value) => Array.isArray(value) && value.length === 2;
const isSampled = (nodes) => Object.values(nodes).some(({ inputs }) => "latent_image" in inputs);
const decodersOf = (nodes) =>
  Object.values(nodes)
    .filter(({ inputs }) => isLink(inputs.vae) && isLink(inputs.samples))
    .map(({ inputs }) => inputs.vae);

/** Return the nodes of a prompt that some links need, by id. */
function behind(nodes, links, found = {}) {
  for (const [id] of links.filter(isLink)) {
    if (id in found || !nodes[id]) continue;
    found[id] = nodes[id];
    behind(nodes, Object.values(nodes[id].inputs), found);
  }
  return found;
}

const textOf = (nodes) =>
  Object.values(nodes)
    .flatMap(({ inputs }) => TEXTS.map((name) => inputs[name]))
    .find((text) => typeof text === "string" && text.trim()) ?? "";

function sizeOf(nodes, latent) {
  const { width, height, batch_size: batch = 1 } = nodes[latent[0]]?.inputs ?? {};
  return { width, height, batch: Number.isInteger(batch) ? batch : 1 };
}

/** Ask for one picture a seed, where the empty latent has a batch of them. */
function onePicture(nodes, [id]) {
  const { inputs, ...rest } = nodes[id] ?? {};
  if (!inputs?.batch_size) return nodes;
  return { ...nodes, [id]: { ...rest, inputs: { ...inputs, batch_size: 1 } } };
}

/** Return the length of a run that has sampled, by what ComfyUI noted of it; null otherwise. */
function secondsOf(messages, sampler) {
  const {
    execution_start: began,
    execution_success: ended,
    ...others
  } = Object.fromEntries(messages);
  const wasCached = others.execution_cached?.nodes?.includes(sampler);
  return began && ended && !wasCached ? (ended.timestamp - began.timestamp) / 1000 : null;
}
