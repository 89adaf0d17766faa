// The panel's state, what changes it, and the sidebar tab that shows it.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { patch } from "./dom.mjs";
import { cancel, findJob, forget, isActive, progressed, queueNode, refreshed } from "./job.mjs";
import { loadTexts, request, t } from "./tools.mjs";
import { panelView } from "./views.mjs";

const PLAN_MILLISECONDS = 150; // after the slider's last move

export const state = {
  status: null, // as GET /hswq/status has it
  recording: true, // ComfyUI's setting
  problem: null, // a sentence about what did not work
  selected: null, // a model's id
  detail: null, // as GET /hswq/statistics/{id} has it
  plan: null,
  mode: "scaled",
  keepRatio: 0.25,
  stale: false, // the plan is of other settings than those chosen
  sort: { column: "sensitivity", ascending: false },
  query: "",
  wanted: { format: "scaled", what: "full checkpoint", filename: "", overwrite: false },
  job: null,
};

let root = null;
let timer = null;
let question = 0; // number of the last one about a model; answers to earlier ones are not shown

const selected = () => state.status?.models.find(({ id }) => id && id === state.selected);
const version = (model) => JSON.stringify([model?.source, model?.sessions, model?.loaded]);

export function change(values) {
  Object.assign(state, values);
  if (root) patch(root, panelView(state, actions));
}

/** Do something that may fail, and say so; an earlier problem stays until the user does something. */
async function attempt(action) {
  try {
    await action();
  } catch (error) {
    change({ problem: error.message });
  }
}

/** Take a new status; ask for the selected model again if something about it has changed. */
export function takeStatus(status) {
  const before = version(selected());
  change({ status });
  if (!root) return;
  if (!selected()) actions.select(status.models.find(({ id }) => id)?.id);
  else if (version(selected()) !== before) askModel();
}

const refresh = async () => takeStatus(await request("status"));

function planPath() {
  return `statistics/${state.selected}/plan?mode=${state.mode}&keep_ratio=${state.keepRatio}`;
}

function askModel() {
  if (!selected()?.sessions.length) return change({ detail: null, plan: null });
  ask(0, () => Promise.all([request(`statistics/${state.selected}`), request(planPath())]));
}

function ask(milliseconds, answers) {
  const mine = ++question;
  clearTimeout(timer);
  timer = setTimeout(() => attempt(async () => {
    const [detail, plan] = await answers();
    if (mine === question) change({ detail, plan, stale: false });
  }), milliseconds);
}

async function queue(node, inputs) {
  change({ problem: null, job: { node, state: "pending" } }); // a second click finds it disabled
  await attempt(async () => {
    const job = await queueNode(node, { source: selected().source, statistics: "auto", ...inputs });
    change({ job });
    await refreshJob(); // it may have ended already
  });
  if (!state.job.id) change({ job: null });
}

async function refreshJob() {
  const { job } = state;
  if (!job?.id || !isActive(job)) return;
  const { state: now, file, error } = await refreshed(job);
  if (state.job?.id !== job.id) return;
  change({ job: { ...state.job, state: now, file, error } });
  if (now === "done") askModel(); // more layers are searched now
}

async function confirmed(title, message) {
  const { dialog } = app.extensionManager;
  return dialog?.confirm ? dialog.confirm({ title, message, type: "delete" }) : confirm(message);
}

async function confirmAndDo(title, message, path, options) {
  if (!(await confirmed(title, message))) return;
  change({ problem: null });
  await attempt(() => request(path, options).then(refresh));
}

const actions = {
  change,
  select(id = null) {
    change({ selected: id, detail: null, plan: null });
    askModel();
  },
  choose(values) {
    change({ ...values, stale: true });
    ask(PLAN_MILLISECONDS, async () => [state.detail, await request(planPath())]);
  },
  record: (on) => app.extensionManager.setting.set("HSWQ.Record", on),
  search: () => queue("HSWQPlan", { mode: state.mode }),
  export() {
    const inputs = { keep_ratio: state.keepRatio, without_statistics: "fail", ...state.wanted };
    return queue("HSWQExport", inputs);
  },
  cancel: () => attempt(() => cancel(state.job).then(refreshJob)),
  dismiss() {
    forget();
    change({ job: null });
  },
  reset({ id, name }, { session, samples }) {
    const headers = { "Content-Type": "application/json" };
    const options = { method: "POST", headers, body: JSON.stringify({ session }) };
    const message = t("resetMessage", { name, session, samples });
    return confirmAndDo(t("resetTitle"), message, `statistics/${id}/reset`, options);
  },
  remove({ id, name }) {
    const message = t("deleteMessage", { name });
    return confirmAndDo(t("deleteTitle"), message, `statistics/${id}`, { method: "DELETE" });
  },
  async upload([file]) {
    if (!file) return;
    change({ problem: null });
    const headers = { "Content-Type": "application/octet-stream" };
    const path = `statistics/upload?name=${encodeURIComponent(file.name)}`;
    await attempt(async () => {
      const model = await request(path, { method: "POST", headers, body: file });
      await refresh();
      actions.select(model.id);
    });
  },
};

const listeners = {
  status: () => attempt(refreshJob), // ComfyUI's queue has changed
  progress: ({ detail }) => change({ job: progressed(state.job, detail) }),
  reconnected: () => attempt(() => refresh().then(refreshJob)),
};

/** Show the panel in the sidebar's element. ComfyUI may call this again for the same element. */
export function mount(element) {
  if (root?.parentNode === element) return;
  unmount();
  root = element.appendChild(document.createElement("div"));
  root.className = "hswq-panel";
  root.ondragover = (event) => event.preventDefault();
  root.ondrop = (event) => {
    event.preventDefault();
    event.stopPropagation(); // ComfyUI would open it as a workflow
    actions.upload(event.dataTransfer.files);
  };
  for (const [event, listen] of Object.entries(listeners)) api.addEventListener(event, listen);
  attempt(async () => {
    await loadTexts();
    await refresh();
    askModel();
    change({ job: state.job ?? (await findJob()) });
    await refreshJob();
  });
}

/** Leave nothing behind: no element, no listener, no timer. */
export function unmount() {
  for (const [event, listen] of Object.entries(listeners)) api.removeEventListener(event, listen);
  clearTimeout(timer);
  root?.remove();
  root = null;
}
