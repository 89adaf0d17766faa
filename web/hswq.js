import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { change, mount, state, takeStatus, unmount } from "./panel.mjs";
import { nodeLines } from "./lines.mjs";
import { loadTexts, number, request, t } from "./tools.mjs";

const TAB = { id: "hswq", title: "HSWQ", tooltip: "HSWQ Panel", icon: "pi pi-chart-bar" };
const toggle = () => app.extensionManager.command.execute(`Workspace.ToggleSidebarTab.${TAB.id}`);
const COMMAND = { id: "HSWQ.TogglePanel", label: "HSWQ Panel", icon: TAB.icon, function: toggle };

// At the top level, so that ComfyUI knows the event before the first one comes.
api.addEventListener("hswq.status", ({ detail }) => {
  const before = state.status?.models;
  takeStatus(detail);
  const isNews = ({ id, state: now }) => ["ready", "complete"].includes(now)
    && (before.find((model) => model.id === id)?.state ?? "recording") === "recording";
  if (before) detail.models.filter(isNews).forEach(announce);
});

async function announce({ name, samples }) {
  await loadTexts();
  const detail = t("readyDetail", { name, samples: number(samples) });
  app.extensionManager.toast.add({ severity: "success", summary: t("ready"), detail, life: 10000 });
}

// ComfyUI keeps the values; loader/host/settings.py reads them, with the same defaults, where each
// sampling starts.
const setting = (id, name, type, defaultValue, tooltip, more) => ({
  id: `HSWQ.${id}`, category: ["HSWQ", "Recording", id], name, type, defaultValue, tooltip, ...more });

app.registerExtension({
  name: "HSWQ",
  ...nodeLines,
  settings: [
    setting("Budget", "Budget (% of a step)", "slider", 2,
      "How much longer a sampling step may take for recording, about.",
      { attrs: { min: 0.5, max: 20, step: 0.5 } }),
    setting("Target", "Images to record of each model", "number", 256,
      "When so many were recorded, recording of the model ends by itself.",
      { attrs: { min: 32, max: 4096, step: 1 } }),
    setting("Record", "Record while I sample", "boolean", true,
      "Statistics of 16-bit models, which the HSWQ loader quantizes them by.",
      { onChange: (recording) => change({ recording }) }),
  ],
  commands: [COMMAND],
  keybindings: [{ commandId: COMMAND.id, combo: { key: "q", shift: true } }],
  menuCommands: [{ path: ["Extensions"], commands: [COMMAND.id] }],
  actionBarButtons: [{ ...TAB, label: TAB.title, tooltip: "HSWQ Panel (Shift+Q)", onClick: toggle }],
  async setup() {
    const href = new URL("hswq.css", import.meta.url).href;
    document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
    app.extensionManager.registerSidebarTab({ ...TAB, type: "custom", render: mount, destroy: unmount });
    takeStatus(await request("status")); // what is ready already is no news
  },
});
