// What is shown is a function of the state. h() describes it, and patch() changes only what is
// different from before. So focus, scroll positions and a slider that is being moved survive.

const SVG = "http://www.w3.org/2000/svg";
// Properties that a user changes: the attributes of the same name do not follow.
const LIVE = ["value", "checked", "disabled"];

/**
 * Describe an element. Children may be nested arrays; null, undefined and false are left out.
 * A `key` among the properties lets an element keep its identity when it moves.
 */
export function h(tag, props, ...children) {
  const isShown = (child) => (child ?? false) !== false;
  return { tag, props: props ?? {}, children: children.flat(Infinity).filter(isShown) };
}

/** Return a function that repeats its last result until one of its arguments is a different one. */
export function remembered(make) {
  let known = [];
  let result = null;
  return (...given) => {
    if (given.some((value, index) => value !== known[index])) {
      known = given;
      result = make(...given);
    }
    return result;
  };
}

/** Make `nodes` the children of `parent`. A node that is the same object as before is skipped. */
export function patch(parent, nodes) {
  nodes.forEach((node, index) => {
    const place = parent.childNodes[index] ?? null;
    const element = findExisting(parent, place, node) ?? create(parent, node);
    if (element !== place) parent.insertBefore(element, place);
    if (isText(node)) updateText(element, String(node));
    else updateElement(element, node);
  });
  while (parent.childNodes.length > nodes.length) parent.lastChild.remove();
}

const isText = (node) => typeof node !== "object";

/** Return the element that shows this node already: at its place, or by its key anywhere. */
function findExisting(parent, place, node) {
  if (fits(place, node)) return place;
  if (!node.props?.key) return null;
  return [...parent.childNodes].find((child) => fits(child, node));
}

function fits(element, node) {
  if (isText(node)) return element?.nodeType === Node.TEXT_NODE;
  return element?.shown?.tag === node.tag && element.shown.props.key === node.props.key;
}

function create(parent, node) {
  if (isText(node)) return document.createTextNode("");
  const namespace = node.tag === "svg" ? SVG : parent.namespaceURI;
  return document.createElementNS(namespace, node.tag);
}

function updateText(element, text) {
  if (element.data !== text) element.data = text;
}

function updateElement(element, node) {
  const before = element.shown;
  if (before === node) return;
  element.shown = node;
  patch(element, node.children); // first: a select takes a value only if it has the option
  for (const name of Object.keys({ ...before?.props, ...node.props })) {
    setProperty(element, name, node.props[name], before?.props[name]);
  }
}

function setProperty(element, name, value, before) {
  if (name === "key") return;
  if (LIVE.includes(name)) {
    if (element[name] !== value) element[name] = value;
  } else if (name.startsWith("on")) {
    element[name] = value;
  } else if (value !== before) {
    setAttribute(element, name, value);
  }
}

function setAttribute(element, name, value) {
  if ((value ?? false) === false) element.removeAttribute(name);
  else element.setAttribute(name, value);
}
