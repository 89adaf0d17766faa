// The sidebar tab that shows the panel.

import { api } from "../../../scripts/api.js";
import { patch } from "../common/dom.mjs";
import { loadTexts } from "../common/texts.mjs";
import { panelView } from "../views/panel.mjs";
import { actions } from "./actions.mjs";
import { refreshJob, resumeJob, takeProgress } from "./jobs.mjs";
import { askModel, refresh, stopAsking } from "./questions.mjs";
import { attempt, selectedModel, showBy, state } from "./state.mjs";

let root = null;

// ComfyUI's events while the panel is open. A status event says that its queue has changed.
const listeners = {
  status: () => attempt(refreshJob),
  progress: takeProgress,
  reconnected: () => attempt(catchUp),
};

async function catchUp() {
  await refresh();
  await refreshJob();
}

/** Show the panel in the sidebar's element. ComfyUI may call this again for the same element. */
export function mount(element) {
  if (root?.parentNode === element) return;
  unmount();
  root = element.appendChild(document.createElement("div"));
  root.className = "hswq-panel";
  root.ondragover = takeDrop;
  root.ondrop = takeDrop;
  for (const [event, listen] of Object.entries(listeners)) api.addEventListener(event, listen);
  showBy(() => patch(root, panelView(state, selectedModel(), actions)));
  attempt(begin);
}

async function begin() {
  await loadTexts();
  await refresh();
  askModel();
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
