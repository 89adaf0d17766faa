// The sidebar tab that shows the panel.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { patch } from "../common/dom.mjs";
import { language, loadTexts } from "../common/texts.mjs";
import { panelView } from "../views/panel.mjs";
import { actions } from "./actions.mjs";
import { refreshJob, resumeJob } from "./jobs.mjs";
import { heldByPress } from "./press.mjs";
import { askModel, firstRecorded, refresh, selectModel, stopAsking } from "./questions.mjs";
import { selectedModel, showBy, state, tried } from "./state.mjs";

const TAB = "hswq";

let root = null;

// ComfyUI's events while the panel is open. A status event says that its queue has changed.
const listeners = {
  status: ({ detail }) => detail && tried(refreshJob),
  reconnected: () => tried(catchUp),
};

async function catchUp() {
  await refresh();
  await refreshJob();
  askModel();
}

/** Open or close the panel. */
export const toggle = () =>
  app.extensionManager.command.execute(`Workspace.ToggleSidebarTab.${TAB}`);

/** Open the panel with the details of a model file, where something is known of it. */
export async function openModel(source) {
  if (!root) await toggle();
  await refresh();
  const model = state.status.models.find((one) => one.id && one.source === source);
  if (!model) return;
  selectModel(model.id);
  root?.querySelector("[aria-expanded=true]")?.focus();
}

/** Show the panel in the sidebar's element. ComfyUI may call this again for the same element. */
export function mount(element) {
  if (root?.parentNode === element) return;
  unmount();
  root = element.appendChild(document.createElement("div"));
  root.className = "hswq-panel";
  root.lang = language(); // by which the browser chooses glyphs, and where lines break
  root.ondragover = takeDrop;
  root.ondrop = takeDrop;
  for (const [event, listen] of Object.entries(listeners)) api.addEventListener(event, listen);
  showBy(heldByPress(root, render));
  tried(begin);
}

/** The panel may be closed by the very click that ends a press. */
const render = () => root && patch(root, panelView(state, selectedModel(), actions));

async function begin() {
  await loadTexts();
  await refresh();
  if (!selectedModel()) selectModel(firstRecorded()?.id ?? null);
  else askModel();
  await resumeJob();
}

/** Upload what is dropped. ComfyUI must not see it: it would open it as a workflow. */
function takeDrop(event) {
  event.preventDefault();
  event.stopPropagation();
  const { files } = event.dataTransfer; // empty while it is still dragged
  if (files.length) actions.upload(files);
}

/** Leave nothing behind: no element, no listener, no timer. */
export function unmount() {
  for (const [event, listen] of Object.entries(listeners)) api.removeEventListener(event, listen);
  stopAsking();
  showBy(null);
  root?.remove();
  root = null;
}
