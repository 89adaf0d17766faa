// The layers by sensitivity, the most sensitive first, as bars on a logarithmic scale.

import { h, remembered } from "../common/dom.mjs";
import { precise } from "../common/numbers.mjs";
import { t } from "../common/texts.mjs";

// In units of the SVG, which is stretched to the panel's width.
const WIDTH = 600;
const HEIGHT = 140;
const MOST_GRID_LINES = 5;

/** Describe the chart of a model's rows; null where no layer was measured. */
export const chart = remembered(({ rows }, plan, title) => {
  const measured = rows.filter((row) => row.sensitivity > 0);
  if (!measured.length) return null;
  const ranked = measured.sort((a, b) => b.sensitivity - a.sensitivity);
  const isKept = ({ layer }) => plan.layers[layer]?.kept;
  const scale = scaleOf(ranked);
  return h(
    "figure",
    { class: "hswq-chart" },
    h("div", null, drawing(ranked, isKept, scale), scale.powers.map(powerLabel(scale))),
    legend(title),
  );
});

/** Return whole powers of ten that span the sensitivities, and where each lies. */
function scaleOf(ranked) {
  const top = Math.ceil(Math.log10(ranked[0].sensitivity));
  const bottom = Math.floor(Math.log10(ranked.at(-1).sensitivity));
  const decades = Math.max(1, top - bottom);
  const apart = Math.ceil(decades / (MOST_GRID_LINES - 1));
  const count = Math.floor(decades / apart) + 1;
  return {
    powers: Array.from({ length: count }, (_, index) => top - index * apart),
    fromTop: (power) => (top - power) / decades, // 0 at the top, 1 at the bottom
  };
}

function drawing(ranked, isKept, { powers, fromTop }) {
  const step = WIDTH / ranked.length;
  const keptCount = ranked.filter(isKept).length;
  const props = {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": summary(ranked, keptCount),
  };
  const bar = (row, index) => {
    const y = HEIGHT * fromTop(Math.log10(row.sensitivity));
    return `M${index * step} ${HEIGHT}V${y}h${step}V${HEIGHT}`;
  };
  const bars = (kept) =>
    ranked.map((row, index) => (isKept(row) === kept ? bar(row, index) : "")).join("");
  const path = (name, d) => h("path", { class: name, d });
  return h(
    "svg",
    props,
    powers.map((power) => path("hswq-grid", `M0 ${HEIGHT * fromTop(power)}H${WIDTH}`)),
    path("hswq-quantized", bars(false)),
    path("hswq-kept", bars(true)),
    path("hswq-limit", `M${keptCount * step} 0V${HEIGHT}`),
  );
}

function summary(ranked, kept) {
  const most = precise(ranked[0].sensitivity);
  const least = precise(ranked.at(-1).sensitivity);
  return t("chartSummary", { layers: ranked.length, kept, most, least });
}

/** Text beside the SVG: inside it would be stretched. */
const powerLabel =
  ({ fromTop }) =>
  (power) =>
    h(
      "span",
      {
        class: "hswq-power",
        "aria-hidden": "true",
        style: `top: ${100 * fromTop(power)}%`,
      },
      `1e${power}`,
    );

const legend = (title) =>
  h(
    "figcaption",
    null,
    ["legendKept", "legendQuantized", "legendAxis"].map((name) =>
      h("span", { class: name }, t(name, { title })),
    ),
  );
