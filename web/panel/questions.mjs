// What the panel asks the server about models, and when it asks again. Nothing is asked that is
// not shown.

import { request } from "../common/request.mjs";
import { canQuantize, change, chosenPoint, isOpen, selectedModel, state, tried } from "./state.mjs";

const REST_MILLISECONDS = 150; // a point that is being dragged is asked about when it rests

let timer = null;
let latest = 0; // the number of the last question; answers to earlier ones are not shown
const unanswered = new Set(); // names of PATHS
let failed = null; // what the panel says of a question that failed, until the next one

const PATHS = {
  detail: () => "",
  curves: () => "/curves",
  plan: () => `/plan?${keptBy({ mode: state.mode })}`,
  file: () => {
    const { format, what } = state.wanted;
    return `/export?${keptBy({ format, what })}`;
  },
};

/** Return a query with what the chosen point keeps. Before the curves are there, it is a ratio. */
function keptBy(values) {
  const { keep_ratio = state.share / 100, keep_mb } = chosenPoint(state)?.inputs ?? {};
  return new URLSearchParams({
    ...values,
    ...(keep_mb === undefined ? { keep_ratio } : { keep_mb }),
  });
}

/** Ask for the status of all models. */
export const refresh = async () => takeStatus(await request("status"));

/** Take a new status; ask about the selected model again where the answer may be different now. */
export function takeStatus(status) {
  const before = versionOf(selectedModel());
  const hadNone = state.status !== null && !firstRecorded();
  change({ status, isGone: false });
  if (!isOpen()) return;
  if (!selectedModel()) selectAnother(hadNone);
  else if (versionOf(selectedModel()) !== before || mayBeSearched()) askModel();
}

/** Show the first model that there is; or none, where the one that was shown is gone. */
function selectAnother(hadNone) {
  if (state.status.reading) return; // it may be among those that are yet to come
  const first = hadNone ? firstRecorded() : null;
  if (first || state.selected) selectModel(first?.id ?? null);
}

const mayBeSearched = () => state.curves && !chosenPoint(state)?.exact;

/** Return the model sampled last of those that have statistics. */
export const firstRecorded = () => state.status?.models.find(({ sessions }) => sessions.length);

/** Take how far samplings are. */
export const takeProgress = ({ live }) =>
  state.status && change({ status: { ...state.status, live } });

/** Return a text that changes when the answers about a model may change. */
const versionOf = (model) =>
  JSON.stringify([model?.source, model?.sessions, model?.loaded, model?.effects]);

/** Show a model; null for none. Of most models no effects are measured, so none go by effect. */
export function selectModel(id) {
  unanswered.clear(); // of the other model, which may have a file where this one has none
  const unknown = { detail: null, curves: null, plan: null, file: null };
  change({ selected: id, selection: "sensitivity", task: null, ...unknown });
  askModel();
}

/** Ask all that is shown of the selected model. */
export const askModel = () => ask(0, ["curves", ...ofLayers(["detail", "plan"]), ...ofFile()]);

/** Ask about the point that the user has just chosen. */
export function askPoint() {
  change({ isStale: true });
  ask(REST_MILLISECONDS, [...ofLayers(["plan"]), ...ofFile()]);
}

/** Ask nothing any more that has not been asked yet. */
export const stopAsking = () => clearTimeout(timer);

const ofLayers = (names) => (state.open.layers ? names : []);

function ofFile() {
  const model = selectedModel();
  return canQuantize(model) && model.source ? ["file"] : [];
}

/** Ask, and show each answer as it comes. What is asked meanwhile asks for those to come again. */
function ask(milliseconds, names) {
  clearTimeout(timer);
  if (failed !== null && state.problem === failed) change({ problem: null });
  failed = null;
  latest += 1;
  const mine = latest;
  for (const name of names) unanswered.add(name);
  const show = async (name) => {
    const isLatest = () => mine === latest; // else it may be about a model that is gone by now
    const found = await answer(name).catch((error) => {
      if (!isLatest()) return;
      failed = error.message;
      throw error;
    });
    if (!isLatest()) return;
    unanswered.delete(name);
    change({ [name]: found, isStale: state.isStale && unanswered.size > 0 });
  };
  const begin = async () => {
    if (!selectedModel()?.sessions.length) {
      unanswered.clear();
      change({ isStale: false });
    }
    await Promise.all([...unanswered].map(show));
  };
  timer = setTimeout(() => tried(begin), milliseconds);
}

/** Ask one of PATHS. What keeps a file from being exported is its answer. */
async function answer(name) {
  try {
    return await request(`statistics/${state.selected}${PATHS[name]()}`);
  } catch (error) {
    if (name !== "file" || error instanceof TypeError) throw error;
    return { refused: error.message };
  }
}
