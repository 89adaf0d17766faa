// The loader nodes in the user's graph: finding them, setting them, showing them.

import { app } from "../../../scripts/app.js";

// By the folder of a model's file: the node that loads it, and the widget that names the file.
const LOADERS = {
  checkpoints: ["HSWQCheckpointLoader", "ckpt_name", "CheckpointLoaderSimple"],
  diffusion_models: ["HSWQDiffusionModelLoader", "unet_name", "UNETLoader"],
};
const GAP = 40;

const widget = (node, name) => node.widgets?.find((one) => one.name === name);
const nodesOf = (type) =>
  [app.rootGraph, ...app.rootGraph.subgraphs.values()]
    .flatMap(({ nodes }) => nodes)
    .filter(({ comfyClass }) => comfyClass === type);

/** Return the class of the node that loads a file, its widget for it, the stock node, and the file. */
export function partsOf(source) {
  const [folder, ...rest] = source.split("/");
  const [type, file, stock] = LOADERS[folder];
  return { type, file, stock, name: rest.join("/") };
}

/** Return our loader of a file; undefined where the graph has none. */
export function loaderOf(source) {
  const { type, file, name } = partsOf(source);
  return nodesOf(type).find((node) => widget(node, file)?.value === name);
}

/** Return the source that a loader of ours is set to; undefined for other nodes. */
export function sourceOf(node) {
  const found = Object.entries(LOADERS).find(([, [type]]) => type === node.comfyClass);
  return found && `${found[0]}/${widget(node, found[1][1])?.value}`;
}

/** Show a node in the middle of the canvas, and select it. */
export function showNode(node) {
  if (node.graph !== app.canvas.graph) app.canvas.setGraph(node.graph);
  app.canvas.centerOnNode(node);
  app.canvas.selectNode(node);
}

/**
 * Set our loader of a file; without one, the only loader of ours, or else a new one. It is one step
 * to undo. Return the node, and whether it is new.
 */
export function applyToLoader(source, inputs) {
  const { type, file, stock, name } = partsOf(source);
  const ours = nodesOf(type);
  const found = loaderOf(source) ?? (ours.length === 1 ? ours[0] : undefined);
  remember(); // what the user has done before is a step of its own
  const node = found ?? added(type, stock, file, name);
  for (const [input, value] of Object.entries({ [file]: name, ...inputs })) {
    set(node, input, value);
  }
  app.canvas.setDirty(true, true);
  remember();
  return { node, isNew: !found };
}

const remember = () =>
  app.extensionManager.workflow.activeWorkflow?.changeTracker?.captureCanvasState();

function set(node, input, value) {
  const one = widget(node, input);
  if (!one || one.value === value) return;
  one.value = value;
  one.callback?.(value, app.canvas, node);
}

/** Add our loader; it takes over what is linked to a stock loader of the same file. */
function added(type, stock, file, name) {
  const node = window.LiteGraph.createNode(type);
  const other = nodesOf(stock).find((one) => widget(one, file)?.value === name);
  const graph = other?.graph ?? app.canvas.graph;
  graph.add(node);
  if (other) {
    node.pos = [other.pos[0], other.pos[1] + other.size[1] + GAP];
    takeLinks(graph, other, node);
  } else {
    const [x, y, width, height] = app.canvas.visible_area;
    node.pos = [x + (width - node.size[0]) / 2, y + (height - node.size[1]) / 2];
  }
  moveFree(graph, node);
  return node;
}

/** Move a node down, as far as it takes until it lies on no other. */
function moveFree(graph, node) {
  const others = graph.nodes.filter((one) => one !== node).map(boxOf);
  let under = others.find((box) => overlaps(boxOf(node), box));
  while (under) {
    node.pos = [node.pos[0], under.bottom + GAP + window.LiteGraph.NODE_TITLE_HEIGHT];
    under = others.find((box) => overlaps(boxOf(node), box));
  }
}

/** Return where a node lies, with its title, which is above its position. */
function boxOf({ pos: [left, top], size: [width, height], flags }) {
  const title = window.LiteGraph.NODE_TITLE_HEIGHT;
  const bottom = top + (flags?.collapsed ? 0 : height);
  return { left, top: top - title, right: left + width, bottom };
}

const overlaps = (a, b) =>
  a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;

function takeLinks(graph, from, to) {
  from.outputs.forEach(({ links }, slot) => {
    for (const id of [...(links ?? [])]) {
      const link = graph.getLink(id);
      if (link) to.connect(slot, graph.getNodeById(link.target_id), link.target_slot);
    }
  });
}
