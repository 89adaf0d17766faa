// Layers by sensitivity, the most sensitive first, on a logarithmic scale.

import { h } from "./dom.mjs";
import { precise, t } from "./tools.mjs";

const WIDTH = 600;
const HEIGHT = 140;

let drawn = {};

/** Return the chart; the same one while its data is the same. */
export function chart(detail, plan) {
  if (drawn.detail !== detail || drawn.plan !== plan) drawn = { detail, plan, node: draw(detail, plan) };
  return drawn.node;
}

function draw({ rows }, plan) {
  const measured = rows.filter((row) => row.sensitivity > 0);
  if (!measured.length) return null;
  const ranked = measured.sort((a, b) => b.sensitivity - a.sensitivity);
  const [most, least] = [ranked[0].sensitivity, ranked.at(-1).sensitivity];
  const [top, bottom] = [Math.ceil(Math.log10(most)), Math.floor(Math.log10(least))];
  const decades = Math.max(1, top - bottom);
  const y = (value) => (HEIGHT * (top - Math.log10(value))) / decades;
  const step = WIDTH / ranked.length;
  const bars = (kept) => ranked
    .map((row, i) => plan.layers[row.layer]?.kept === kept &&
      `M${(i * step).toFixed(2)} ${HEIGHT}V${y(row.sensitivity).toFixed(1)}h${step.toFixed(2)}V${HEIGHT}`)
    .filter(Boolean).join("");
  const kept = ranked.filter((row) => plan.layers[row.layer]?.kept).length;
  const powers = [...new Set([0, 1, 2, 3].map((i) => top - Math.round((i * decades) / 3)))];
  const about = t("chartSummary", {
    layers: ranked.length, kept, most: precise(most), least: precise(least) });
  return h("figure", { class: "hswq-chart" },
    h("div", null,
      h("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
        "aria-label": about },
      powers.map((power) => h("path", { class: "hswq-grid", d: `M0 ${y(10 ** power)}H${WIDTH}` })),
      h("path", { class: "hswq-quantized", d: bars(false) }),
      h("path", { class: "hswq-kept", d: bars(true) }),
      h("path", { class: "hswq-limit", d: `M${kept * step} 0V${HEIGHT}` })),
      powers.map((power) => h("span", { class: "hswq-power", "aria-hidden": "true",
        style: `top: ${(100 * (top - power)) / decades}%` }, `1e${power}`))),
    h("figcaption", null, h("span", { class: "hswq-legend-kept" }, t("legendKept")),
      h("span", { class: "hswq-legend-quantized" }, t("legendQuantized")),
      h("span", null, t("legendAxis"))));
}
