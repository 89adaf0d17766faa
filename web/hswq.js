// What ComfyUI's page loads: the settings, the sidebar tab, its command, and a notice.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { number } from "./common/numbers.mjs";
import { request } from "./common/request.mjs";
import { loadTexts, t } from "./common/texts.mjs";
import { takeStatus } from "./panel/questions.mjs";
import { mount, unmount } from "./panel/sidebar.mjs";
import { state } from "./panel/state.mjs";
import { nodeLines } from "./nodes/lines.mjs";
import { SETTINGS } from "./settings.mjs";

const TITLE = "HSWQ Panel";
const TAB = { id: "hswq", title: "HSWQ", tooltip: TITLE, icon: "pi pi-chart-bar" };
const STYLES = ["controls.css", "views.css", "nodes.css"];
const NOTICE_MILLISECONDS = 10000;

const toggle = () => app.extensionManager.command.execute(`Workspace.ToggleSidebarTab.${TAB.id}`);
const COMMAND = { id: "HSWQ.TogglePanel", label: TITLE, icon: TAB.icon, function: toggle };

// At the top level, so that ComfyUI knows the event before the first one comes.
api.addEventListener("hswq.status", ({ detail }) => {
  const before = state.status?.models;
  takeStatus(detail);
  if (before) newlyReady(before, detail.models).forEach(announce);
});

/** Return the models that can be quantized now and could not before. */
function newlyReady(before, models) {
  const isReady = (model) => ["ready", "complete"].includes(model.state);
  const wasRecording = ({ id }) => {
    const known = before.find((model) => model.id === id);
    return !known || known.state === "recording";
  };
  return models.filter((model) => isReady(model) && wasRecording(model));
}

async function announce({ name, samples }) {
  await loadTexts();
  const detail = t("readyDetail", { name, samples: number(samples) });
  const life = NOTICE_MILLISECONDS;
  app.extensionManager.toast.add({ severity: "success", summary: t("ready"), detail, life });
}

function loadStyles() {
  for (const name of STYLES) {
    const { href } = new URL(`styles/${name}`, import.meta.url);
    const link = Object.assign(document.createElement("link"), { rel: "stylesheet", href });
    document.head.append(link);
  }
}

app.registerExtension({
  name: "HSWQ",
  ...nodeLines,
  settings: SETTINGS,
  commands: [COMMAND],
  keybindings: [{ commandId: COMMAND.id, combo: { key: "q", shift: true } }],
  menuCommands: [{ path: ["Extensions"], commands: [COMMAND.id] }],
  actionBarButtons: [{ ...TAB, label: TAB.title, tooltip: `${TITLE} (Shift+Q)`, onClick: toggle }],
  async setup() {
    loadStyles();
    app.extensionManager.registerSidebarTab({
      ...TAB,
      type: "custom",
      render: mount,
      destroy: unmount,
    });
    takeStatus(await request("status")); // models that are ready already are no news
  },
});
