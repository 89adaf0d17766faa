// Talking to the routes of loader/panel.

import { api } from "../../../scripts/api.js";

/** Ask a route below /hswq and return its JSON. An error carries the server's sentence. */
export async function request(path, options) {
  const response = await api.fetchApi(`/hswq/${path}`, options);
  const answer = await response.json().catch(() => ({})); // a proxy may answer with a page
  if (!response.ok) throw new Error(answer.error ?? `${response.status} ${response.statusText}`);
  return answer;
}
