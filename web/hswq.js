import { app } from "../../scripts/app.js";

// ComfyUI keeps the values; loader/settings.py reads them, with the same defaults, where each
// sampling starts.
app.registerExtension({
  name: "HSWQ",
  settings: [
    {
      id: "HSWQ.Budget",
      category: ["HSWQ", "Recording", "Budget"],
      name: "Budget (% of a step)",
      tooltip: "How much longer a sampling step may take for recording, about.",
      type: "slider",
      defaultValue: 2,
      attrs: { min: 0.5, max: 20, step: 0.5 },
    },
    {
      id: "HSWQ.Target",
      category: ["HSWQ", "Recording", "Target"],
      name: "Images to record of each model",
      tooltip: "When so many were recorded, recording of the model ends by itself.",
      type: "number",
      defaultValue: 256,
      attrs: { min: 32, max: 4096, step: 1 },
    },
    {
      id: "HSWQ.Record",
      category: ["HSWQ", "Recording", "Record"],
      name: "Record while I sample",
      tooltip: "Statistics of 16-bit models, which the HSWQ loader quantizes them by.",
      type: "boolean",
      defaultValue: true,
    },
  ],
});
