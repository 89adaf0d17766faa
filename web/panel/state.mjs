// The panel's state. Everything that changes it calls change(), which shows it again.

export const state = {
  settings: {}, // HSWQ's among ComfyUI's, by their ids without "HSWQ."

  // The server's answers, as they came; null before the first.
  status: null, // all models
  isGone: false, // whether ComfyUI does not answer
  detail: null, // the selected model's layers
  curves: null, // what the selected model gives in each format, point by point
  plan: null, // what becomes of each layer at the chosen point
  file: null, // what an export of the chosen point would write
  job: null, // what was queued last

  // What the user has chosen.
  selected: null, // a model's id
  mode: "scaled",
  selection: "sensitivity",
  share: 25, // percent of the way along a line of the curves
  list: { query: "", order: "last_run" },
  sort: { column: "sensitivity", ascending: false },
  query: "", // what the table of layers is searched for
  open: {}, // which folded parts are open, by name
  task: null, // the job that samples and is looked at before it is queued: { node, sampling }
  seeds: 8, // pictures to verify with
  wanted: { format: "scaled", what: "full checkpoint", filename: "", overwrite: false },

  isStale: false, // whether plan and file are of a point that was chosen earlier
  notice: null, // a sentence about what has worked
  problem: null, // a sentence about what has not
};

let show = null;

/** Call a function after every change of the state; null while the panel is closed. */
export function showBy(render) {
  show = render;
}

export const isOpen = () => show !== null;

/** Change some values of the state. */
export function change(values) {
  Object.assign(state, values);
  show?.();
}

/** Return what the status says of the selected model; undefined where none is selected. */
export const selectedModel = () =>
  state.status?.models.find(({ id }) => id && id === state.selected);

/** Return the line of the curves that is chosen; undefined before they are there. */
export const chosenLine = ({ curves, mode, selection }) =>
  curves?.lines.find((line) => line.mode === mode && line.selection === selection) ??
  curves?.lines.find((line) => line.mode === mode);

/** Return the point that is chosen. */
export const chosenPoint = (now) => chosenLine(now)?.points[now.share];

/** Return the inputs of the loader that lead to the chosen point. */
export const chosenInputs = (now) => ({ ...chosenLine(now).inputs, ...chosenPoint(now).inputs });

export const canQuantize = (model) => Boolean(model?.usable);

/** Do something that a user wants and that may fail, and say so. What was said before ends. */
export async function attempt(action) {
  change({ problem: null, notice: null });
  await tried(action);
}

/** Do something that may fail, and say so. That ComfyUI does not answer is said as long as it is. */
export async function tried(action) {
  try {
    await action();
  } catch (error) {
    // A request that gets no answer at all is a TypeError.
    change(error instanceof TypeError ? { isGone: true } : { problem: error.message });
  }
}
