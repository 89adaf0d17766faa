// The panel's state, what changes it, and the sidebar tab that shows it.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { patch } from "./dom.mjs";
import { cancel, findJob, forget, isActive, queueNode, refreshed } from "./job.mjs";
import { loadTexts, request, t } from "./tools.mjs";
import { panelView } from "./views.mjs";

const PLAN_MILLISECONDS = 150; // after the slider's last move

export const state = {
  recording: true, // ComfyUI's setting
  problem: null, // a sentence about what did not work
  selected: null, // a model's id
  status: null, detail: null, plan: null, job: null, // answers, as they came
  mode: "scaled", keepRatio: 0.25, stale: false, // stale: the plan is of other settings
  sort: { column: "sensitivity", ascending: false }, query: "",
  wanted: { format: "scaled", what: "full checkpoint", filename: "", overwrite: false },
};

let [root, timer] = [null, null];
let question = 0; // number of the last one about a model; answers to earlier ones are not shown

const selected = () => state.status?.models.find(({ id }) => id && id === state.selected);
const version = (model) => JSON.stringify([model?.source, model?.sessions, model?.loaded]);

export function change(values) {
  Object.assign(state, values);
  if (root) patch(root, panelView(state, selected(), actions));
}

/** Do something that may fail, and say so; an earlier problem stays until the user does something. */
async function attempt(action) {
  try {
    await action();
  } catch (error) {
    change({ problem: error.message });
  }
}

/** Take a new status; ask for the selected model again if it has changed, or may be searched now. */
export function takeStatus(status) {
  const before = version(selected());
  change({ status });
  if (!root) return;
  if (!selected()) actions.select(status.models.find(({ id }) => id)?.id);
  else if (version(selected()) !== before || state.plan?.expected_error === null) askModel();
}

const refresh = async () => takeStatus(await request("status"));
const planPath = () =>
  `statistics/${state.selected}/plan?mode=${state.mode}&keep_ratio=${state.keepRatio}`;

function askModel() {
  const paths = selected()?.sessions.length ? [`statistics/${state.selected}`, planPath()] : [];
  ask(0, () => Promise.all(paths.map((path) => request(path))));
}

function ask(milliseconds, answers) {
  clearTimeout(timer);
  const mine = ++question;
  timer = setTimeout(() => attempt(async () => {
    const [detail = null, plan = null] = await answers();
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
  if (state.job.state === "pending" && !state.job.id) change({ job: null }); // nothing was queued
}

async function refreshJob() {
  const { job } = state;
  if (!job?.id || !isActive(job)) return;
  const { state: now, file, error } = await refreshed(job);
  if (state.job?.id !== job.id || !isActive(state.job)) return; // a later answer came before
  change({ job: { ...state.job, state: now, file, error } });
  if (now === "done") askModel(); // more layers are searched now
}

/** Ask whether to forget something, then send a request that does it. */
async function forgetStatistics(what, path, options, values) {
  const { confirm } = app.extensionManager.dialog;
  const [title, message] = [t(`${what}Title`), t(`${what}Message`, values)];
  if (!(await confirm({ title, message, type: "delete" }))) return;
  change({ problem: null });
  const headers = { "Content-Type": "application/json" };
  await attempt(() => request(path, { headers, ...options }).then(refresh));
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
  export(event) {
    event.preventDefault();
    queue("HSWQExport", { keep_ratio: state.keepRatio, without_statistics: "fail", ...state.wanted });
  },
  cancel: () => attempt(() => cancel(state.job).then(refreshJob)),
  dismiss() {
    forget();
    change({ job: null });
  },
  reset: ({ id, name }, { session, samples }) =>
    forgetStatistics("reset", `statistics/${id}/reset`,
      { method: "POST", body: JSON.stringify({ session }) }, { name, session, samples }),
  remove: ({ id, name }) =>
    forgetStatistics("delete", `statistics/${id}`, { method: "DELETE" }, { name }),
  upload([file]) {
    change({ problem: null });
    return attempt(async () => {
      const headers = { "Content-Type": "application/octet-stream" };
      const path = `statistics/upload?name=${encodeURIComponent(file.name)}`;
      const model = await request(path, { method: "POST", headers, body: file });
      await refresh();
      actions.select(model.id);
    });
  },
};

const listeners = {
  status: () => attempt(refreshJob), // ComfyUI's queue has changed
  progress({ detail: { prompt_id, value, max } }) {
    if (prompt_id === state.job?.id) change({ job: { ...state.job, state: "running", value, max } });
  },
  reconnected: () => attempt(() => refresh().then(refreshJob)),
};

/** Show the panel in the sidebar's element. ComfyUI may call this again for the same element. */
export function mount(element) {
  if (root?.parentNode === element) return;
  unmount();
  root = element.appendChild(document.createElement("div"));
  root.className = "hswq-panel";
  root.ondragover = root.ondrop = (event) => {
    event.preventDefault();
    event.stopPropagation(); // ComfyUI would open it as a workflow
    if (event.dataTransfer.files.length) actions.upload(event.dataTransfer.files);
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
