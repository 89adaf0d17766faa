// What the panel shows, from its state.

import { api } from "../../scripts/api.js";
import { chart } from "./chart.mjs";
import { h } from "./dom.mjs";
import { isActive } from "./job.mjs";
import { layersTable } from "./layers.mjs";
import { number, percent, size, t, time } from "./tools.mjs";

const ICONS = {
  recording: "circle", paused: "pause", ready: "check-circle", complete: "verified",
  "not recorded": "ban", failed: "exclamation-triangle", sampling: "spinner pi-spin",
  pending: "clock", running: "spinner pi-spin", done: "check-circle", cancelled: "ban",
};
const CHOICES = {
  mode: ["scaled", "compatible"],
  format: ["scaled", "scaled, convs too", "compatible", "original V2"],
  what: ["full checkpoint", "diffusion model only"],
};

const icon = (name) => h("i", { class: `pi pi-${name}`, "aria-hidden": "true" });
const line = (...content) => h("span", { class: "hswq-line" }, content);
const row = (...content) => h("div", { class: "hswq-row" }, content);
const button = (label, name, onclick, props) =>
  h("button", { type: "button", onclick, ...props }, icon(name), h("span", null, label));
const bar = (label, value, max, text) =>
  h("div", { class: "hswq-bar", role: "progressbar", "aria-label": label, "aria-valuemin": 0,
    "aria-valuemax": max, "aria-valuenow": Math.min(value, max), "aria-valuetext": text },
  h("div", { style: `width: ${Math.min(100, (100 * value) / max)}%` }));
const field = (label, ...content) =>
  h("label", { class: "hswq-field" }, h("span", null, label), content);
const select = (name, { [name]: value }, choose) =>
  field(t(name), h("select", { value, onchange: ({ target }) => choose({ [name]: target.value }) },
    CHOICES[name].map((option) => h("option", { value: option }, t(option)))));
const checkbox = (label, checked, choose, props) => h("label", { class: "hswq-switch" },
  h("input", { type: "checkbox", checked, onchange: ({ target }) => choose(target.checked), ...props }),
  h("span", null, label));
const problem = (text, ...more) => h("div", { key: "problem", class: "hswq-problem", role: "alert" },
  icon("exclamation-triangle"), h("span", null, text), more);
const section = (title, ...content) =>
  h("section", { key: title, "aria-label": title }, h("h3", null, title), content);

export function panelView(state, model, actions) {
  const { status, detail, plan } = state;
  const shown = model && detail && plan;
  const dismiss = () => actions.change({ problem: null });
  return [
    header(state, actions),
    h("div", { class: "hswq-notices" },
      state.problem && problem(state.problem, button(t("dismiss"), "times", dismiss)),
      state.job && jobView(state.job, actions)),
    status && h("ul", { "aria-label": t("models") }, status.models.length ?
      status.models.map((one) => modelView(one, state, actions)) : h("li", { class: "hswq-empty" },
        icon("images"), h("p", null, t("empty")), h("p", null, t("emptyNext")))),
    shown && section(t("plan"), line(t("planHint")), planView(state, model, actions)),
    shown && section(t("export"), exportView(state, model, actions)),
    shown && section(t("layers"), layersTable(state, actions)),
    model?.sessions.length > 0 && section(t("files"), filesView(model, actions)),
  ].filter(Boolean);
}

const header = ({ recording }, actions) => h("header", null, h("h2", null, "HSWQ"),
  checkbox(t(recording ? "recordingOn" : "recordingOff"), recording, actions.record, { role: "switch" }),
  h("label", { class: "hswq-button", title: t("uploadHint") }, icon("upload"), t("upload"),
    h("input", { type: "file", accept: ".pt", class: "hswq-hidden", // emptied, to be used again
      onchange: ({ target }) => actions.upload(target.files).then(() => (target.value = "")) })));

function modelView(model, { status: { target }, selected, recording }, actions) {
  const paused = !recording && ["recording", "ready"].includes(model.state);
  const state = paused ? "paused" : model.sampling ? "sampling" : model.state;
  const samples = t("samples", { samples: number(model.samples), target: number(target) });
  const total = number(model.total_layers ?? model.layers);
  return h("li", { key: model.id ?? model.name }, h("button", {
    type: "button", class: "hswq-model", "aria-pressed": String(model.id === selected),
    disabled: !model.id, onclick: () => actions.select(model.id),
  },
  h("span", { class: "hswq-name" }, model.name),
  h("span", { class: "hswq-state" }, icon(ICONS[state]), t(`state ${state}`)),
  line(model.last_run && time(model.last_run)),
  bar(t("samplesOf", { name: model.name }), model.samples, target, samples),
  line(samples), line(model.layers > 0 && t("covered", { layers: number(model.layers), total })),
  model.missing && line(t(`missing ${model.missing.what}`, model.missing)),
  model.reason && line(t(model.reason)),
  model.loaded && line(icon("bolt"), t("loaded", model.loaded)),
  model.id && !model.source && line(icon("question-circle"), t("gone"))));
}

function planView(state, model, actions) {
  const { plan, keepRatio, stale } = state;
  const kept = t("keptOf", { kept: number(plan.kept), total: number(plan.kept + plan.quantized) });
  const facts = {
    kept16: kept,
    unet: `${size(plan.bytes_before)} → ${size(plan.bytes_after)}`,
    expectedError: plan.expected_error !== null ? percent(plan.expected_error) : [
      t("notSearched", { searched: number(plan.searched), total: number(plan.quantized) }),
      button(t("search"), "search", actions.search, { disabled: isActive(state.job) || !model.source }),
    ],
  };
  return [
    row(select("mode", state, actions.choose),
      field(t("keepRatio"), h("span", null, h("input", {
        type: "range", min: 0, max: 1, step: 0.01, value: String(keepRatio),
        "aria-valuetext": `${keepRatio}: ${kept}`,
        oninput: ({ target }) => actions.choose({ keepRatio: Number(target.value) }),
      }), h("output", null, keepRatio.toFixed(2))))),
    h("dl", { "aria-busy": String(stale) }, Object.entries(facts).map(([name, value]) =>
      h("div", null, h("dt", null, t(name)), h("dd", { "data-fact": name }, value)))),
    chart(state.detail, plan),
  ];
}

function exportView({ wanted, job }, model, actions) {
  const set = (values) => actions.change({ wanted: { ...wanted, ...values } });
  return h("form", { onsubmit: actions.export },
    row(select("format", wanted, set), select("what", wanted, set)),
    line(t(`about ${wanted.format}`)),
    field(t("filename"), h("input", { type: "text", value: wanted.filename,
      placeholder: t("filenameHint"), oninput: ({ target }) => set({ filename: target.value }) })),
    row(checkbox(t("overwrite"), wanted.overwrite, (overwrite) => set({ overwrite })),
      h("button", { type: "submit", class: "hswq-primary", disabled: isActive(job) || !model.source },
        icon("save"), t("exportButton"))));
}

function jobView(job, actions) {
  const what = t(job.node);
  const file = job.file && `output/${job.file.subfolder}/${job.file.filename}`;
  return h("section", { key: "job", "aria-label": what, "data-state": job.state },
    row(h("strong", { role: "status" }, icon(ICONS[job.state]), ` ${what}: ${t(`job ${job.state}`)}`),
      isActive(job) ? button(t("cancel"), "times", actions.cancel, { key: "cancel", disabled: !job.id })
        : button(t("dismiss"), "times", actions.dismiss, { key: "dismiss" })),
    isActive(job) && bar(what, Math.round((100 * job.value) / (job.max || 1)) || 0, 100),
    line(job.file?.existed ? t("existed", { file }) : file ?? job.source), job.error && problem(job.error));
}

function filesView(model, actions) {
  const address = api.apiURL(`/hswq/statistics/${model.id}/file?session=`);
  return [h("ul", null, model.sessions.map((file) => h("li", { key: file.session },
    h("span", { class: "hswq-name" }, file.session),
    line(t("images", { samples: number(file.samples) }), ` · ${size(file.bytes)}`,
      file.last_run && ` · ${time(file.last_run)}`),
    row(h("a", { class: "hswq-button", href: address + file.session, download: file.file },
      icon("download"), t("download")),
    button(t("reset"), "refresh", () => actions.reset(model, file)))))),
  button(t("delete"), "trash", () => actions.remove(model))];
}
