// The line in which a node tells what its last run did. ComfyUI brings it as the node's text
// output, and keeps that while the page is open; over a reload this browser tab keeps it. It is
// no part of the workflow: a new line makes no change that ComfyUI would save, undo or run for.

import { app } from "../../../scripts/app.js";
import { loadTexts, t } from "../common/texts.mjs";
import { sourceOf } from "../panel/graph.mjs";
import { openModel } from "../panel/sidebar.mjs";

const NAME = "hswq_line";
const KEPT = "HSWQ.lines";
// Pixels, as styles/nodes.css has them: a letter's width in the mean, a row's height, and what is
// around the text, with ComfyUI's margin around any element on a node.
const LETTER = 6.6;
const ROW = 18;
const AROUND = { width: 40, height: 34 };

const isOurs = (type) => type?.startsWith("HSWQ");
const keptLines = () => JSON.parse(sessionStorage.getItem(KEPT) ?? "{}");
const placeOf = (node) => `${node.graph.rootGraph.id}/${node.graph.id}/${node.id}`;

function lineWidget(node) {
  const element = document.createElement("div");
  const told = element.appendChild(document.createElement("span"));
  element.className = "hswq-node-line";
  told.setAttribute("role", "status");
  const hasLink = Boolean(sourceOf(node)); // on a row of its own: it does not break as text does
  if (hasLink) element.append(panelButton(node));
  const height = () => {
    const width = Math.max(node.size[0] - AROUND.width, AROUND.width);
    const rows = Math.ceil((LETTER * told.textContent.length) / width) + hasLink;
    return AROUND.height + ROW * rows;
  };
  const widget = node.addDOMWidget(NAME, NAME, element, {
    serialize: false, // not into the prompt; below: not into the workflow
    hideInPanel: true,
    getValue: () => told.textContent,
    setValue: (text) => (told.textContent = text),
    getMinHeight: height,
    getMaxHeight: height,
  });
  widget.serialize = false;
  return widget;
}

/** A link from a loader's line to its model in the panel. */
function panelButton(node) {
  const button = document.createElement("button");
  button.type = "button";
  button.onclick = () => openModel(sourceOf(node));
  button.append(Object.assign(document.createElement("i"), { className: "pi pi-chart-bar" }));
  loadTexts().then(() => {
    button.title = t("openInPanel");
    button.append(` ${t("panel")}`);
  });
  return button;
}

function show(node, text) {
  const widget = node.widgets?.find(({ name }) => name === NAME) ?? lineWidget(node);
  widget.value = text;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas?.(true, true);
}

/** Show a node's text output, and keep it; an output without text changes nothing. */
function take(node, output) {
  const text = output?.text?.[0];
  if (!text) return;
  sessionStorage.setItem(KEPT, JSON.stringify({ ...keptLines(), [placeOf(node)]: text }));
  show(node, text);
}

/** Return a node by its place in ComfyUI's outputs: its id, in a subgraph after the subgraph's. */
function nodeAt(place) {
  const [id, subgraph] = place.split(":").reverse();
  const graph = subgraph ? app.rootGraph.subgraphs.get(subgraph) : app.rootGraph;
  return graph?.getNodeById(id);
}

/** What ComfyUI asks an extension: see app.registerExtension. */
export const nodeLines = {
  beforeRegisterNodeDef({ prototype }, { name }) {
    if (!isOurs(name)) return;
    const { onExecuted } = prototype;
    prototype.onExecuted = function (output) {
      onExecuted?.call(this, output);
      take(this, output);
    };
  },
  loadedGraphNode(node) {
    const text = isOurs(node.comfyClass) && keptLines()[placeOf(node)];
    if (text) show(node, text);
  },
  // The outputs are those of the workflow that the user has changed to.
  onNodeOutputsUpdated(outputs) {
    for (const [place, output] of Object.entries(outputs)) {
      const node = nodeAt(place);
      if (isOurs(node?.comfyClass)) take(node, output);
    }
  },
};
