// What the panel asks the server about models, and when it asks again.

import { request } from "../common/request.mjs";
import { attempt, change, isOpen, selectedModel, state } from "./state.mjs";

const SLIDER_MILLISECONDS = 150; // a slider that is being moved asks when it rests

let timer = null;
let latest = 0; // the number of the last question; answers to earlier ones are not shown

/** Ask for the status of all models. */
export const refresh = async () => takeStatus(await request("status"));

/** Take a new status; ask about the selected model again where the answer may be different now. */
export function takeStatus(status) {
  const before = versionOf(selectedModel());
  change({ status });
  if (!isOpen()) return;
  const model = selectedModel();
  if (!model) {
    selectModel(status.models.find(({ id }) => id)?.id);
    return;
  }
  const mayBeSearched = state.plan?.expected_error === null;
  if (versionOf(model) !== before || mayBeSearched) askModel();
}

/** Return a text that changes when the answers about a model may change. */
const versionOf = (model) => JSON.stringify([model?.source, model?.sessions, model?.loaded]);

/** Show a model; null or nothing for none. */
export function selectModel(id = null) {
  change({ selected: id, detail: null, plan: null });
  askModel();
}

/** Ask for the selected model's layers and plan. */
export function askModel() {
  const isRecorded = selectedModel()?.sessions.length > 0;
  const paths = isRecorded ? [`statistics/${state.selected}`, planPath()] : [];
  ask(0, () => Promise.all(paths.map((path) => request(path))));
}

/** Ask for a plan by the settings that the user has just chosen. */
export function askPlan() {
  ask(SLIDER_MILLISECONDS, async () => [state.detail, await request(planPath())]);
}

/** Ask nothing any more that has not been asked yet. */
export const stopAsking = () => clearTimeout(timer);

const planPath = () =>
  `statistics/${state.selected}/plan?mode=${state.mode}&keep_ratio=${state.keepRatio}`;

/** Show the answers, layers and plan, unless something else is asked meanwhile. */
function ask(milliseconds, answers) {
  clearTimeout(timer);
  latest += 1;
  const mine = latest;
  const show = async () => {
    const [detail = null, plan = null] = await answers();
    if (mine === latest) change({ detail, plan, isStale: false });
  };
  timer = setTimeout(() => attempt(show), milliseconds);
}
