// What ComfyUI's page loads: the settings, the sidebar tab, its command, and a notice.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { request } from "./common/request.mjs";
import { sentence } from "./common/sentence.mjs";
import { loadTexts, t } from "./common/texts.mjs";
import { orderExamples } from "./examples.mjs";
import { takeFromTab, takeJobProgress } from "./panel/jobs.mjs";
import { takeProgress, takeStatus } from "./panel/questions.mjs";
import { listenToTabs } from "./panel/queue.mjs";
import { mount, toggle, unmount } from "./panel/sidebar.mjs";
import { change, state } from "./panel/state.mjs";
import { nodeLines } from "./nodes/lines.mjs";
import { SETTINGS } from "./settings.mjs";

const TITLE = "HSWQ Panel";
const TAB = { id: "hswq", title: "HSWQ", tooltip: TITLE, icon: "pi pi-chart-bar" };
const STYLES = ["controls.css", "views.css", "detail.css", "layers.css", "nodes.css"];
const NOTICE_MILLISECONDS = 10000;

const COMMAND = { id: "HSWQ.TogglePanel", label: TITLE, icon: TAB.icon, function: toggle };

// At the top level, so that ComfyUI knows the events before the first one comes.
api.addEventListener("hswq.status", ({ detail }) => {
  const before = state.status?.models;
  takeStatus(detail);
  if (before) newlyReady(before, detail.models).forEach(announce);
});
api.addEventListener("hswq.progress", ({ detail }) => takeProgress(detail));
api.addEventListener("progress", ({ detail }) => takeJobProgress(detail)); // other tabs show it, too
listenToTabs(takeFromTab);
api.addEventListener("reconnecting", () => change({ isGone: true }));
api.addEventListener("reconnected", () => change({ isGone: false }));

orderExamples(); // before the page asks for them, which it does once

/** Return the models that can be quantized now and could not before. */
const newlyReady = (before, models) =>
  models.filter(({ id, usable }) => usable && !before.find((one) => one.id === id)?.usable);

/** Say that a model is ready, and what the loader will make of it by its defaults. */
async function announce({ id, name }) {
  await loadTexts();
  const asked = request(`statistics/${id}/plan?mode=scaled&keep_ratio=0.25`);
  const plan = await asked.catch((error) => {
    if (error.status !== 404) throw error;
  });
  if (!plan) return; // its statistics were deleted meanwhile
  const detail = t("readyDetail", { name, outcome: sentence(plan.outcome) });
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
