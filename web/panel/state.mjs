// The panel's state. Everything that changes it calls change(), which shows it again.

export const state = {
  // What ComfyUI's settings say.
  recording: true,

  // The server's answers, as they came; null before the first.
  status: null, // all models
  detail: null, // the selected model's layers
  plan: null, // what quantizing the selected model would give
  job: null, // the export or search that was queued last

  // What the user has chosen.
  selected: null, // a model's id
  mode: "scaled",
  keepRatio: 0.25,
  sort: { column: "sensitivity", ascending: false },
  query: "", // what the table of layers is searched for
  wanted: { format: "scaled", what: "full checkpoint", filename: "", overwrite: false },

  isStale: false, // whether the plan is for settings that were chosen earlier
  problem: null, // a sentence about what did not work
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

/** Do something that may fail, and say so. A problem stays until the user does something. */
export async function attempt(action) {
  try {
    await action();
  } catch (error) {
    change({ problem: error.message });
  }
}
