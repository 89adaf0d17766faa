// What is shown is a function of the state. It is described with h(), and patch() changes only what
// is different from before, so that focus, scrolling and a slider that is being moved stay.

const SVG = "http://www.w3.org/2000/svg";
const LIVE = ["value", "checked", "disabled"]; // users change these, attributes do not tell

export function h(tag, props, ...children) {
  const isShown = (child) => (child ?? false) !== false;
  return { tag, props: props ?? {}, children: children.flat(Infinity).filter(isShown) };
}

/** Return a function that makes a node again only when it is asked with something else. */
export function remembered(make) {
  let [known, node] = [[], null];
  return (...given) => {
    if (given.some((value, i) => value !== known[i])) [known, node] = [given, make(...given)];
    return node;
  };
}

/** Make `nodes` the children of `parent`. The very same node as before is not looked into. */
export function patch(parent, nodes) {
  nodes.forEach((node, index) => {
    const place = parent.childNodes[index] ?? null;
    const isMine = (child) => fits(child, node);
    const known = isMine(place) ? place : node.props?.key && [...parent.childNodes].find(isMine);
    const element = known || (typeof node !== "object" ? document.createTextNode("")
      : document.createElementNS(node.tag === "svg" ? SVG : parent.namespaceURI, node.tag));
    if (element !== place) parent.insertBefore(element, place);
    if (typeof node === "object") update(element, node);
    else if (element.data !== String(node)) element.data = node;
  });
  while (parent.childNodes.length > nodes.length) parent.lastChild.remove();
}

function fits(element, node) {
  if (typeof node !== "object") return element?.nodeType === Node.TEXT_NODE;
  return element?.shown?.tag === node.tag && element.shown.props.key === node.props.key;
}

function update(element, node) {
  const { shown } = element;
  if (shown === node) return;
  element.shown = node;
  patch(element, node.children);
  for (const name of Object.keys({ ...shown?.props, ...node.props })) {
    const value = node.props[name];
    if (LIVE.includes(name)) {
      if (element[name] !== value) element[name] = value;
    } else if (name.startsWith("on")) element[name] = value;
    else if (name === "key" || shown?.props[name] === value) continue;
    else if ((value ?? false) === false) element.removeAttribute(name);
    else element.setAttribute(name, value);
  }
}
