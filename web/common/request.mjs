// Talking to the routes of loader/panel.

import { api } from "../../../scripts/api.js";

/** Ask a route below /hswq and return its JSON. An error has the server's sentence, and status. */
export async function request(path, options) {
  const response = await api.fetchApi(`/hswq/${path}`, options);
  const answer = await response.json().catch(() => ({})); // a proxy may answer with a page
  const { ok, status, statusText } = response;
  if (!ok) throw Object.assign(new Error(answer.error ?? `${status} ${statusText}`), { status });
  return answer;
}
