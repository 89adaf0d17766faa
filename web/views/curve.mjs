// Bytes against expected error: a line for each format and selection, and a point to drag.

import { h, remembered } from "../common/dom.mjs";
import { percent, size } from "../common/numbers.mjs";
import { sentence } from "../common/sentence.mjs";
import { t } from "../common/texts.mjs";
import { chosenLine, chosenPoint } from "../panel/state.mjs";

// In units of the SVG, which is stretched to the panel's width.
const WIDTH = 600;
const HEIGHT = 200;
const STEPS = {
  ArrowRight: 1,
  ArrowUp: 1,
  ArrowLeft: -1,
  ArrowDown: -1,
  PageUp: 10,
  PageDown: -10,
};
const ENDS = { Home: 0, End: Infinity };

export function curveView(state, actions) {
  const { curves } = state;
  const scale = scaleOf(curves);
  const line = chosenLine(state);
  const plot = {
    class: "hswq-plot",
    onpointerdown: (event) => begin(event, state, actions),
    onpointermove: (event) => {
      if (event.currentTarget.hasPointerCapture(event.pointerId)) {
        actions.choose({ share: nearest(line, scale, placeOf(event)) });
      }
    },
  };
  return h(
    "figure",
    { class: "hswq-curve" },
    h("div", plot, drawing(curves, line), fitsView(curves, scale), handle(state, scale, actions)),
    labels(scale),
    h("figcaption", null, t("curveAxes")),
  );
}

/** Return where bytes and errors lie, as shares of the drawing from its left and its top. */
const scaleOf = remembered(({ before, lines }) => {
  const points = lines.flatMap((line) => line.points);
  const least = Math.min(...points.map(({ after }) => after));
  const most = Math.max(...points.map(({ error }) => error ?? 0)) || 0.03;
  return {
    least,
    before,
    most,
    x: ({ after }) => (after - least) / (before - least),
    y: ({ error }) => 1 - (error ?? 0) / most,
  };
});

const drawing = remembered((curves, chosen) => {
  const scale = scaleOf(curves);
  const place = (point) =>
    `${(WIDTH * scale.x(point)).toFixed(1)} ${(HEIGHT * scale.y(point)).toFixed(1)}`;
  const path = (line, index) => {
    const known = line.points.filter(({ error }) => error !== null);
    return h("path", {
      class: "hswq-curve-line",
      "data-chosen": String(line === chosen),
      "data-exact": String(known.every(({ exact }) => exact)),
      style: `--hswq-color: var(--hswq-line-${index})`,
      d: known.map((point, step) => `${step ? "L" : "M"}${place(point)}`).join(""),
    });
  };
  const props = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" };
  const grid = [0, 0.5, 1].map((share) =>
    h("path", { class: "hswq-grid", d: `M0 ${HEIGHT * share}H${WIDTH}` }),
  );
  return h("svg", { ...props, "aria-hidden": "true" }, grid, curves.lines.map(path));
});

/** A line at the size that fits this card, where it is within the drawing. */
function fitsView({ before, fits }, { x }) {
  const place = x({ after: fits });
  if (before === null || place < 0 || place > 1) return null;
  const props = {
    class: "hswq-fits",
    "data-side": place > 0.5 ? "left" : "right",
    style: `left: ${100 * place}%`,
    title: t("help fits"),
  };
  return h("span", props, t("fits", { size: size(fits) }));
}

function handle(state, scale, actions) {
  const point = chosenPoint(state);
  const last = chosenLine(state).points.length - 1;
  const index = state.curves.lines.indexOf(chosenLine(state));
  return h("div", {
    class: "hswq-handle",
    role: "slider",
    tabindex: 0,
    "aria-label": t("point"),
    "aria-valuemin": 0,
    "aria-valuemax": last,
    "aria-valuenow": state.share,
    "aria-valuetext": sentence(point),
    style: `left: ${100 * scale.x(point)}%; top: ${100 * scale.y(point)}%; --hswq-color: var(--hswq-line-${index})`,
    onkeydown: (event) => {
      const to = event.key in ENDS ? ENDS[event.key] : state.share + STEPS[event.key];
      if (Number.isNaN(to)) return;
      event.preventDefault();
      event.stopPropagation(); // ComfyUI moves its canvas by arrows
      actions.choose({ share: Math.max(0, Math.min(last, to)) });
    },
  });
}

/** Text beside the SVG: inside it would be stretched. */
const labels = ({ least, before, most }) => [
  h("span", { class: "hswq-most" }, percent(most)),
  h("span", { class: "hswq-zero" }, "0"),
  h("div", { class: "hswq-range" }, h("span", null, size(least)), h("span", null, size(before))),
];

/** Begin to drag the point, on the line that is nearest. */
function begin(event, state, actions) {
  event.preventDefault(); // or the text around would be selected
  const plot = event.currentTarget;
  plot.setPointerCapture(event.pointerId);
  plot.querySelector(".hswq-handle").focus({ preventScroll: true });
  const scale = scaleOf(state.curves);
  const place = placeOf(event);
  const line = nearestLine(state, scale, place);
  const { mode, selection } = line;
  actions.choose({ mode, selection, share: nearest(line, scale, place) });
}

/** Return where on the drawing a pointer is, as shares of it. */
function placeOf({ currentTarget, clientX, clientY }) {
  const { left, top, width, height } = currentTarget.getBoundingClientRect();
  return { x: (clientX - left) / width, y: (clientY - top) / height };
}

/** Return the point of a line that is nearest from left to right, by its number. */
function nearest({ points }, scale, { x }) {
  const away = points.map((point) => Math.abs(scale.x(point) - x));
  return away.indexOf(Math.min(...away));
}

/** Return the line that is nearest from top to bottom; the chosen one if none is any nearer. */
function nearestLine(state, scale, place) {
  const away = (line) => {
    const point = line.points[nearest(line, scale, place)];
    return point.error === null ? Infinity : Math.abs(scale.y(point) - place.y);
  };
  const chosen = chosenLine(state);
  return state.curves.lines.reduce(
    (best, line) => (away(line) < away(best) - 0.02 ? line : best),
    chosen,
  );
}
