// Nothing moves while something is pressed. An answer that comes then may move what is below it,
// and the browser drops a click whose press and release are on different elements.

const PRESSED = "a, button, label, summary"; // not a slider, which is to be followed
// The last one, without a button, ends a press whose release the page was not told.
const ENDS = ["pointerup", "pointercancel", "pointermove"];

/** Return a function that renders; while something in `root` is pressed, only once that ends. */
export function heldByPress(root, render) {
  let isPressed = false;
  const end = () => {
    isPressed = false;
    render();
  };
  root.onpointerdown = ({ target, button }) => {
    if (button || isPressed || !target.closest(PRESSED)) return;
    isPressed = true;
    const ended = new AbortController();
    const release = ({ buttons }) => {
      if (buttons) return;
      ended.abort();
      setTimeout(end); // the click comes right after the release
    };
    for (const name of ENDS) window.addEventListener(name, release, { signal: ended.signal });
  };
  // What the click itself changes is shown at once: it may be scrolled to.
  root.addEventListener("click", () => (isPressed = false), { capture: true });
  return () => isPressed || render();
}
