// The example workflows: their order, and opening the first.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const FIRST = "hswq_first_use";

const isOurs = (name) => name.startsWith("hswq_");
const pack = () => new URL(import.meta.url).pathname.match(/\/extensions\/([^/]+)\//)[1];

/** Open the one to use first as a workflow of its own. */
export async function openFirstExample() {
  const response = await api.fetchApi(`/workflow_templates/${pack()}/${FIRST}.json`);
  if (!response.ok) throw new Error(`${response.status} ${response.statusText}`);
  await app.loadGraphData(await response.json(), true, true, FIRST);
}

/**
 * Let ComfyUI's page offer ours by their names, so that the one to use first comes first: it offers
 * them as the disk lists their files. Those of other extensions stay as they are.
 */
export function orderExamples() {
  const ask = api.getWorkflowTemplates;
  api.getWorkflowTemplates = async function () {
    const offered = await ask.call(this); // names by extension
    for (const names of Object.values(offered)) if (names.every(isOurs)) names.sort();
    return offered;
  };
}
