import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { change, mount, state, takeStatus, unmount } from "./panel.mjs";
import { loadTexts, number, request, t } from "./tools.mjs";

const TAB = "hswq";
const USABLE = ["ready", "complete"];

const toggle = () => app.extensionManager.command.execute(`Workspace.ToggleSidebarTab.${TAB}`);

// At the top level, so that ComfyUI knows the event before the first one comes.
api.addEventListener("hswq.status", async ({ detail }) => {
  const before = state.status;
  takeStatus(detail);
  if (before) detail.models.filter((model) => isNews(model, before)).forEach(announce);
});

function isNews(model, before) {
  const known = before.models.find(({ id }) => id === model.id);
  return model.id && USABLE.includes(model.state) && !USABLE.includes(known?.state);
}

async function announce(model) {
  await loadTexts();
  const detail = t("readyDetail", { name: model.name, samples: number(model.samples) });
  app.extensionManager.toast.add({ severity: "success", summary: t("ready"), detail, life: 10000 });
}

// ComfyUI keeps the settings' values; loader/settings.py reads them, with the same defaults, where
// each sampling starts.
const setting = (name, label, tooltip, type, defaultValue, more) => ({
  id: `HSWQ.${name}`, category: ["HSWQ", "Recording", name], name: label, tooltip, type,
  defaultValue, ...more,
});

app.registerExtension({
  name: "HSWQ",
  settings: [
    setting("Budget", "Budget (% of a step)",
      "How much longer a sampling step may take for recording, about.", "slider", 2,
      { attrs: { min: 0.5, max: 20, step: 0.5 } }),
    setting("Target", "Images to record of each model",
      "When so many were recorded, recording of the model ends by itself.", "number", 256,
      { attrs: { min: 32, max: 4096, step: 1 } }),
    setting("Record", "Record while I sample",
      "Statistics of 16-bit models, which the HSWQ loader quantizes them by.", "boolean", true,
      { onChange: (recording) => change({ recording }) }),
  ],
  commands: [{ id: "HSWQ.TogglePanel", label: "HSWQ Panel", icon: "pi pi-chart-bar", function: toggle }],
  keybindings: [{ commandId: "HSWQ.TogglePanel", combo: { key: "q", shift: true } }],
  menuCommands: [{ path: ["Extensions"], commands: ["HSWQ.TogglePanel"] }],
  actionBarButtons: [
    { icon: "pi pi-chart-bar", label: "HSWQ", tooltip: "HSWQ Panel (Shift+Q)", onClick: toggle },
  ],
  async setup() {
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = new URL("hswq.css", import.meta.url);
    document.head.append(link);
    app.extensionManager.registerSidebarTab({
      id: TAB, icon: "pi pi-chart-bar", title: "HSWQ", tooltip: "HSWQ Panel", type: "custom",
      render: mount, destroy: unmount,
    });
    takeStatus(await request("status")); // what is ready already is no news
  },
});
