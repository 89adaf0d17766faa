// Layers by sensitivity, the most sensitive first, on a logarithmic scale.

import { h, remembered } from "./dom.mjs";
import { precise, t } from "./tools.mjs";

const [WIDTH, HEIGHT] = [600, 140];

export const chart = remembered(({ rows }, plan) => {
  const measured = rows.filter((row) => row.sensitivity > 0);
  if (!measured.length) return null;
  const ranked = measured.sort((a, b) => b.sensitivity - a.sensitivity);
  const isKept = ({ layer }) => plan.layers[layer]?.kept;
  const logs = ranked.map((row) => Math.log10(row.sensitivity));
  const [top, bottom] = [Math.ceil(logs[0]), Math.floor(logs.at(-1))];
  const decades = Math.max(1, top - bottom);
  const y = (log) => (HEIGHT * (top - log)) / decades;
  const step = WIDTH / ranked.length;
  const bars = (kept) => logs.map((log, i) => isKept(ranked[i]) === kept
    ? `M${i * step} ${HEIGHT}V${y(log)}h${step}V${HEIGHT}` : "").join("");
  const kept = ranked.filter(isKept).length;
  const apart = Math.ceil(decades / 4);
  const powers = Array.from({ length: Math.floor(decades / apart) + 1 }, (_, i) => top - i * apart);
  const [most, least] = [ranked[0], ranked.at(-1)].map((row) => precise(row.sensitivity));
  const label = t("chartSummary", { layers: ranked.length, kept, most, least });
  const svg = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" };
  return h("figure", { class: "hswq-chart" },
    h("div", null, h("svg", { ...svg, role: "img", "aria-label": label },
      powers.map((power) => h("path", { class: "hswq-grid", d: `M0 ${y(power)}H${WIDTH}` })),
      h("path", { class: "hswq-quantized", d: bars(false) }),
      h("path", { class: "hswq-kept", d: bars(true) }),
      h("path", { class: "hswq-limit", d: `M${kept * step} 0V${HEIGHT}` })),
    powers.map((power) => h("span", { class: "hswq-power", "aria-hidden": "true",
      style: `top: ${(100 * (top - power)) / decades}%` }, `1e${power}`))),
    h("figcaption", null, ["legendKept", "legendQuantized", "legendAxis"].map((name) =>
      h("span", { class: name }, t(name)))));
});
