// What ComfyUI's settings dialog offers. ComfyUI keeps the values; loader/host/settings.py reads
// them, with the same defaults, when they are needed.

import { change, state } from "./panel/state.mjs";

const setting = (id, name, type, defaultValue, tooltip, more) => ({
  id: `HSWQ.${id}`,
  category: ["HSWQ", "Recording", id],
  name,
  type,
  defaultValue,
  tooltip,
  onChange: (value) => change({ settings: { ...state.settings, [id]: value } }),
  ...more,
});

/** The settings, the last one shown first. */
export const SETTINGS = [
  setting(
    "Names",
    "Other names of this server",
    "text",
    "",
    "Under which you open ComfyUI, such as a tunnel's. Without --listen, HSWQ answers under no others than localhost and addresses.",
    { category: ["HSWQ", "Panel", "Names"] },
  ),
  setting(
    "CompensateLoras",
    "Compensate rounding with LoRAs too",
    "boolean",
    true,
    "Closer to the original; a LoRA's new strength takes some seconds more. Off: to the nearest.",
    { category: ["HSWQ", "Loading", "CompensateLoras"] },
  ),
  setting(
    "RefinedGB",
    "Quantized models on disk (GiB)",
    "number",
    20,
    "Kept in models/hswq/refined, so that a model loads faster. Those not used for longest go first; 0 keeps none.",
    { category: ["HSWQ", "Loading", "RefinedGB"], attrs: { min: 0, max: 4096, step: 1 } },
  ),
  setting(
    "Budget",
    "Budget (% of a step)",
    "slider",
    2,
    "About how much longer a sampling step may take because it is recorded.",
    { attrs: { min: 0.5, max: 20, step: 0.5 } },
  ),
  setting(
    "Target",
    "Images to record of each model",
    "number",
    256,
    "When so many images of a model are recorded, its recording ends by itself.",
    { attrs: { min: 32, max: 4096, step: 1 } },
  ),
  setting(
    "Record",
    "Record while I sample",
    "boolean",
    true,
    "Statistics of 16-bit models. The HSWQ loader quantizes a model by them.",
  ),
];
