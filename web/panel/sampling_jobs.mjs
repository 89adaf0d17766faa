// Jobs that sample the selected model as the user's last workflow did: measuring the effect of each
// layer, and verifying that the pictures stay the same. Each is a prompt for ComfyUI's queue.

import { ORIGINAL, SHEET, idOf } from "./queue.mjs";
import { partsOf } from "./graph.mjs";

const MADE = ["nodes", "positive", "negative", "latent", "vae"];

/** Return the prompt that measures the effects of a model's layers in a number format. */
export function effectPrompt(source, sampling, mode) {
  const { nodes, links } = repeated(source, sampling);
  const { cfg, seed } = sampling;
  const inputs = { ...inputsOf(links), model: [idOf(ORIGINAL), 0], cfg, seed };
  return { ...nodes, ...own("HSWQMeasureEffect", { ...inputs, statistics: "auto", mode }) };
}

/** Return the prompt that compares `seeds` pictures of a model in 16 bit and with some inputs. */
export function verifyPrompt(source, sampling, loaderInputs, seeds) {
  const { nodes, links } = repeated(source, sampling);
  const { type, file, name } = partsOf(source);
  const { cfg, seed, steps, sampler_name, scheduler } = sampling;
  return {
    ...nodes,
    ...own(type, { ...loaderInputs, [file]: name, statistics: "auto" }),
    ...own("HSWQVerify", {
      ...inputsOf(links),
      original: [idOf(ORIGINAL), 0],
      quantized: [idOf(type), 0],
      vae: links.vae ?? [idOf(ORIGINAL), 2],
      ...{ cfg, seed, seeds, steps, sampler_name, scheduler },
    }),
    [idOf(SHEET)]: { class_type: "PreviewImage", inputs: { images: [idOf("HSWQVerify"), 0] } },
  };
}

const own = (type, inputs) => ({ [idOf(type)]: { class_type: type, inputs } });
const inputsOf = ({ positive, negative, latent }) => ({ positive, negative, latent_image: latent });

/**
 * Repeat a sampling's nodes under ids of our own, with the 16-bit model in place of its loader, so
 * that the model is in memory once.
 */
function repeated(source, sampling) {
  const { type, file, stock, name } = partsOf(source);
  const { nodes, ...given } = Object.fromEntries(MADE.map((key) => [key, sampling[key]]));
  const isLoader = ({ class_type: its, inputs }) =>
    [type, stock].includes(its) && inputs[file] === name;
  const moved = ([id, output]) => [isLoader(nodes[id]) ? idOf(ORIGINAL) : idOf(id), output];
  const ofOwn = (values) =>
    Object.fromEntries(
      Object.entries(values).map(([key, value]) => [
        key,
        Array.isArray(value) && value[0] in nodes ? moved(value) : value,
      ]),
    );
  const kept = Object.entries(nodes)
    .filter(([, node]) => !isLoader(node))
    .map(([id, node]) => [idOf(id), { ...node, inputs: ofOwn(node.inputs) }]);
  const dtype = stock === "UNETLoader" ? { weight_dtype: "default" } : {};
  const original = { class_type: stock, inputs: { [file]: name, ...dtype } };
  return {
    nodes: { ...Object.fromEntries(kept), [idOf(ORIGINAL)]: original },
    links: ofOwn(given),
  };
}
