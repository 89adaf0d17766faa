// The panel's words in the user's language.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

let texts = {};

/** Return the language that ComfyUI is set to. */
export const language = () => app.extensionManager.setting.get("Comfy.Locale") ?? "en";

/** Load the words: ComfyUI serves locales/<language>/main.json of all extensions at once. */
export async function loadTexts() {
  const all = await api.getCustomNodesI18n();
  texts = { ...all.en.hswq, ...all[language()]?.hswq };
}

/** Return the words for a key, each {name} in them replaced by a value. Unknown keys stay. */
export function t(key, values) {
  const words = texts[key] ?? key;
  return words.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
