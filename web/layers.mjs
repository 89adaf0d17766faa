// The table of a model's layers, which can be sorted and searched.

import { h, remembered } from "./dom.mjs";
import { number, percent, precise, t } from "./tools.mjs";

const TEXTS = ["layer", "kind", "weights", "why"];
const COLUMNS = ["layer", "weights", "sensitivity", "relative_error", "amax", "kind", "shape", "why"];

const tableBody = remembered(({ rows }, plan, query, sort) =>
  h("tbody", null, sorted(found(rows.map((row) => withPlan(row, plan)), query), sort).map(rowView)));

export function layersTable({ detail, plan, sort, query }, actions) {
  const body = tableBody(detail, plan, query, sort);
  const counts = { shown: number(body.children.length), total: number(detail.rows.length) };
  const oninput = ({ target }) => actions.change({ query: target.value });
  return [
    h("label", { class: "hswq-field" }, h("span", null, t("find")),
      h("input", { type: "search", value: query, placeholder: "attn2.to_v", oninput })),
    h("p", { class: "hswq-line", role: "status" }, t("layersShown", counts)),
    h("div", { class: "hswq-scroll", tabindex: 0, role: "region", "aria-label": t("layers") },
      h("table", null, h("thead", null, h("tr", null,
        COLUMNS.map((column) => heading(column, sort, actions)))), body)),
  ];
}

function heading(column, sort, { change }) {
  const mine = sort.column === column;
  const order = !mine ? "none" : sort.ascending ? "ascending" : "descending";
  const icon = { none: "sort-alt", ascending: "sort-up", descending: "sort-down" }[order];
  const ascending = mine ? !sort.ascending : TEXTS.includes(column);
  return h("th", { scope: "col", "aria-sort": order },
    h("button", { type: "button", onclick: () => change({ sort: { column, ascending } }) },
      t(`column ${column}`), h("i", { class: `pi pi-${icon}`, "aria-hidden": "true" })));
}

function withPlan(row, plan) {
  const { kept, amax = null, relative_error = null, reason = "" } = plan.layers[row.layer] ?? {};
  const why = reason && t(`reason ${reason}`);
  return { ...row, amax, relative_error, kept, weights: kept ? t("16 bit") : "FP8", why };
}

function found(rows, query) {
  const words = query.toLowerCase().split(/\s+/);
  const text = (row) => TEXTS.map((column) => row[column]).join(" ").toLowerCase();
  return rows.filter((row) => words.every((word) => text(row).includes(word)));
}

function sorted(rows, { column, ascending }) {
  const key = column === "shape" ? "parameters" : column;
  const order = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b) * (ascending ? 1 : -1);
  const unknown = (a, b) => (a === null) - (b === null); // always last
  return rows.sort(({ [key]: a }, { [key]: b }) => unknown(a, b) || (a !== null && order(a, b)));
}

const rowView = (row) => h("tr", null, h("th", { scope: "row" }, row.layer),
  h("td", { "data-kept": String(row.kept) }, row.weights),
  [precise(row.sensitivity), percent(row.relative_error), precise(row.amax), row.kind ?? "–",
    row.shape?.join("×") ?? "–", row.why].map((value) => h("td", null, value)));
