// The table of the selected model's layers, which can be sorted and searched. Where the panel is
// narrow, the style sheet makes a small block of each row, and the sorting is a choice above.

import { h, remembered } from "../common/dom.mjs";
import { number, percent, precise } from "../common/numbers.mjs";
import { t } from "../common/texts.mjs";
import { chosenPoint } from "../panel/state.mjs";
import { chart } from "./chart.mjs";
import { breakable, field, icon, line, searchInput } from "./parts.mjs";

// These are searched, and sorted from A to Z first. The others are numbers, the largest first.
const TEXT_COLUMNS = ["layer", "weights"];
const COLUMNS = ["layer", "weights", "sensitivity", "error", "amax", "shape"];
const SORT_ICONS = { none: "sort-alt", ascending: "sort-up", descending: "sort-down" };
const NOT_PLANNED = { kept: false, amax: null, error: null, reason: "" };
const EXAMPLE = "attn2.to_v";

export function layersView(state, actions) {
  const { curves, detail, plan, sort, query } = state;
  if (!curves || !detail || !plan) return line(t("asking"));
  const title = chosenPoint(state).title;
  const body = tableBody(detail, plan, title, query, sort);
  const counts = { shown: number(body.children.length), total: number(detail.rows.length) };
  const headings = COLUMNS.map((column) => heading(column, sort, actions));
  return [
    chart(detail, plan, title),
    h("div", { class: "hswq-list-tools" }, searchField(query, actions), sortField(sort, actions)),
    h("p", { class: "hswq-line", role: "status" }, t("layersShown", counts)),
    h(
      "div",
      { class: "hswq-scroll", tabindex: 0, role: "region", "aria-label": t("layers") },
      h("table", null, h("thead", null, h("tr", null, headings)), body),
    ),
  ];
}

function searchField(query, { change }) {
  const search = (words) => change({ query: words });
  return field(t("find"), searchInput(query, search, { placeholder: EXAMPLE }));
}

function sortField(sort, { change }) {
  const onchange = ({ target: { value: column } }) =>
    change({ sort: { column, ascending: TEXT_COLUMNS.includes(column) } });
  const options = COLUMNS.map((column) => h("option", { value: column }, t(`column ${column}`)));
  const sorting = field(t("sortBy"), h("select", { value: sort.column, onchange }, options));
  return h("div", { class: "hswq-sort" }, sorting);
}

function heading(column, sort, { change }) {
  const order = orderOf(column, sort);
  const isText = TEXT_COLUMNS.includes(column);
  const ascending = order === "none" ? isText : !sort.ascending;
  const onclick = () => change({ sort: { column, ascending } });
  const title = t(`help column ${column}`);
  return h(
    "th",
    { scope: "col", "aria-sort": order },
    h("button", { type: "button", onclick, title }, t(`column ${column}`), icon(SORT_ICONS[order])),
  );
}

function orderOf(column, sort) {
  if (sort.column !== column) return "none";
  return sort.ascending ? "ascending" : "descending";
}

const tableBody = remembered(({ rows }, plan, title, query, sort) => {
  const complete = rows.map((row) => withPlan(row, plan, title));
  const shown = sorted(matching(complete, query), sort);
  return h("tbody", null, shown.map(rowView));
});

/** Add to a row what the plan says of its layer. */
function withPlan(row, plan, title) {
  const { kept, amax, error, reason } = plan.layers[row.layer] ?? NOT_PLANNED;
  const why = reason && t(`reason ${reason}`);
  if (!kept) return { ...row, amax, error, kept, weights: title, short: "", why };
  const short = t(`why ${reason}`);
  return { ...row, amax, error: 0, kept, weights: t("16 bit"), short, why };
}

/** Return the rows whose texts hold every word of the query. */
function matching(rows, query) {
  const words = query.toLowerCase().split(/\s+/);
  const textOf = ({ layer, kind, weights, short }) =>
    `${layer} ${kind} ${weights} ${short}`.toLowerCase();
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
  const facts = {
    sensitivity: precise(row.sensitivity),
    error: percent(row.error),
    amax: precise(row.amax),
    shape: row.shape?.join("×") ?? "–",
  };
  return h(
    "tr",
    null,
    h("th", { scope: "row" }, breakable(row.layer, /(?<=\.)/)),
    h(
      "td",
      { "data-kept": String(row.kept), title: row.why },
      row.weights,
      row.short && h("span", { class: "hswq-line" }, ` ${row.short}`),
    ),
    Object.entries(facts).map(([column, text]) =>
      h("td", { "data-label": t(`column ${column}`) }, text),
    ),
  );
}
