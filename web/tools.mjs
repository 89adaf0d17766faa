// Talking to the server, in the user's language.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

let texts = {};

const language = () => app.extensionManager.setting.get("Comfy.Locale") ?? "en";

/** Load the panel's words: ComfyUI serves locales/<language>/main.json of all extensions. */
export async function loadTexts() {
  const all = await api.getCustomNodesI18n();
  texts = { ...all.en.hswq, ...all[language()]?.hswq };
}

/** Return the words for a key, with {name} replaced by values; the key where there are none. */
export const t = (key, values) => (texts[key] ?? key).replace(/\{(\w+)\}/g, (_, name) => values[name]);

/** Ask our routes; the answer is JSON. An error's message is the server's sentence. */
export async function request(path, options) {
  const response = await api.fetchApi(`/hswq/${path}`, options);
  const answer = await response.json().catch(() => ({})); // a proxy's page
  if (!response.ok) throw new Error(answer.error ?? `${response.status} ${response.statusText}`);
  return answer;
}

const DATE = { dateStyle: "short", timeStyle: "short" };
export const number = (value) => value.toLocaleString(language());
export const precise = (value) => (value === null ? "–" : String(Number(value.toPrecision(3))));
export const percent = (value) => (value === null ? "–" : `${precise(100 * value)} %`);
export const time = (iso) => new Date(iso).toLocaleString(language(), DATE);
export const size = (bytes) =>
  bytes === null ? "–" : bytes < 2 ** 30 ? `${precise(bytes / 2 ** 20)} MiB` : `${(bytes / 2 ** 30).toFixed(2)} GiB`;
