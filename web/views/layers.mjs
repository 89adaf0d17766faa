// The table of the selected model's layers, which can be sorted and searched.

import { h, remembered } from "../common/dom.mjs";
import { number, percent, precise } from "../common/numbers.mjs";
import { t } from "../common/texts.mjs";
import { field, icon } from "./parts.mjs";

// These are searched, and sorted from A to Z first. The others are numbers, the largest first.
const TEXT_COLUMNS = ["layer", "kind", "weights", "why"];
const COLUMNS = [
  "layer",
  "weights",
  "sensitivity",
  "relative_error",
  "amax",
  "kind",
  "shape",
  "why",
];
const SORT_ICONS = { none: "sort-alt", ascending: "sort-up", descending: "sort-down" };
const EXAMPLE = "attn2.to_v";

export function layersView({ detail, plan, sort, query }, actions) {
  const body = tableBody(detail, plan, query, sort);
  const counts = { shown: number(body.children.length), total: number(detail.rows.length) };
  const headings = COLUMNS.map((column) => heading(column, sort, actions));
  return [
    searchField(query, actions),
    h("p", { class: "hswq-line", role: "status" }, t("layersShown", counts)),
    h(
      "div",
      { class: "hswq-scroll", tabindex: 0, role: "region", "aria-label": t("layers") },
      h("table", null, h("thead", null, h("tr", null, headings)), body),
    ),
  ];
}

function searchField(query, { change }) {
  const oninput = ({ target }) => change({ query: target.value });
  return field(
    t("find"),
    h("input", { type: "search", value: query, placeholder: EXAMPLE, oninput }),
  );
}

function heading(column, sort, { change }) {
  const order = orderOf(column, sort);
  const isText = TEXT_COLUMNS.includes(column);
  const ascending = order === "none" ? isText : !sort.ascending;
  const onclick = () => change({ sort: { column, ascending } });
  return h(
    "th",
    { scope: "col", "aria-sort": order },
    h("button", { type: "button", onclick }, t(`column ${column}`), icon(SORT_ICONS[order])),
  );
}

function orderOf(column, sort) {
  if (sort.column !== column) return "none";
  return sort.ascending ? "ascending" : "descending";
}

const tableBody = remembered(({ rows }, plan, query, sort) => {
  const complete = rows.map((row) => withPlan(row, plan));
  const shown = sorted(matching(complete, query), sort);
  return h("tbody", null, shown.map(rowView));
});

/** Add to a row what the plan says of its layer. */
function withPlan(row, plan) {
  const { kept, amax = null, relative_error = null, reason = "" } = plan.layers[row.layer] ?? {};
  const weights = kept ? t("16 bit") : "FP8";
  const why = reason && t(`reason ${reason}`);
  return { ...row, amax, relative_error, kept, weights, why };
}

/** Return the rows whose texts hold every word of the query. */
function matching(rows, query) {
  const words = query.toLowerCase().split(/\s+/);
  const textOf = (row) =>
    TEXT_COLUMNS.map((column) => row[column])
      .join(" ")
      .toLowerCase();
  return rows.filter((row) => words.every((word) => textOf(row).includes(word)));
}

/** Sort rows by a column. What is not known (null) comes last in both directions. */
function sorted(rows, { column, ascending }) {
  const key = column === "shape" ? "parameters" : column;
  const direction = ascending ? 1 : -1;
  return rows.sort(({ [key]: a }, { [key]: b }) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return direction * compare(a, b);
  });
}

const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);

function rowView(row) {
  const facts = [
    precise(row.sensitivity),
    percent(row.relative_error),
    precise(row.amax),
    row.kind ?? "–",
    row.shape?.join("×") ?? "–",
    row.why,
  ];
  return h(
    "tr",
    null,
    h("th", { scope: "row" }, row.layer),
    h("td", { "data-kept": String(row.kept) }, row.weights),
    facts.map((text) => h("td", null, text)),
  );
}
