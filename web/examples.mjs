// The order of the example workflows. ComfyUI offers them as the disk lists their files, which on
// many disks is no order; by their names, the one to use first comes first.

import { api } from "../../scripts/api.js";

const isOurs = (name) => name.startsWith("hswq_");

/** Let ComfyUI's page offer ours by their names; those of other extensions stay as they are. */
export function orderExamples() {
  const ask = api.getWorkflowTemplates;
  api.getWorkflowTemplates = async function () {
    const offered = await ask.call(this); // names by extension
    for (const names of Object.values(offered)) if (names.every(isOurs)) names.sort();
    return offered;
  };
}
