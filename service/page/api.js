// What this page asks of the service. The key is kept here alone.
let key = "";

// Raises Error for what no header can have.
export function useKey(given) {
  if (!/^[\x21-\x7e]*$/.test(given.trim())) throw new Error("an API key has Latin letters, digits and signs alone: copy it again");
  key = given.trim();
}

export class Refused extends Error {
  constructor(status, answer, retryAfter) {
    const again = retryAfter ? ` Try again in ${retryAfter} s.` : "";
    super((answer.error ?? `the service answered with status ${status}`) + again);
    this.status = status;
  }
}

const silent = () => new Error("the service does not answer: see whether it runs, then try again");
const query = (parameters) => new URLSearchParams(Object.entries(parameters).filter(([, value]) => value));
const headers = () => (key ? { authorization: `Bearer ${key}` } : {});

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return {};
  }
}

async function answered(path, method = "GET") {
  const response = await fetch(path, { method, headers: headers() }).catch(() => {
    throw silent();
  });
  if (response.ok) return response;
  throw new Refused(response.status, parsed(await response.text()), response.headers.get("retry-after"));
}

const at = (id) => `v1/sessions/${encodeURIComponent(id)}`;

// Of several models without a name, no more than their names.
export const info = async (model) => (await answered(`info?${query({ model })}`)).json();
export const excerpt = async (name) => (await answered(`page/${name}`)).blob();
export const begin = async (model) => (await answered(`v1/sessions?${query({ model })}`, "POST")).json();
export const session = async (id) => (await answered(at(id))).json();
export const end = (id) => answered(at(id), "DELETE");

// Send a text, and resolve to the answer's. XMLHttpRequest, for fetch does not tell how much has been sent.
function send(method, path, blob, more, { onSent, onText, signal }) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const request = new XMLHttpRequest();
    request.addEventListener("progress", () => request.status === 200 && onText?.(request.responseText));
    request.addEventListener("load", () => {
      if (request.status === 200) resolve(request.responseText);
      else {
        const again = request.getResponseHeader("retry-after");
        reject(new Refused(request.status, parsed(request.responseText), again));
      }
    });
    request.addEventListener("error", () => reject(silent()));
    request.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
    request.upload.addEventListener("progress", (event) => onSent?.(event.loaded));
    request.upload.addEventListener("load", (event) => onSent?.(event.loaded));
    signal?.addEventListener("abort", () => request.abort());

    request.open(method, path);
    const all = { "content-type": "text/plain", ...headers(), ...more };
    for (const [name, value] of Object.entries(all)) request.setRequestHeader(name, value);
    request.send(blob);
  });
}

// Resolves to the answer to a whole document.
export async function classify(blob, { model, components, onSent, onProgress, signal }) {
  let seen = 0;
  let last = {};
  const take = (text) => {
    for (let end; (end = text.indexOf("\n", seen)) >= 0; seen = end + 1) {
      last = parsed(text.slice(seen, end));
      if (last.event === "progress") onProgress?.(last);
    }
  };
  const path = `v1/documents?${query({ model, evidence: true, components })}`;
  take(await send("POST", path, blob, { accept: "application/x-ndjson" }, { onSent, onText: take, signal }));
  if (last.event === "error") throw new Refused(200, last, null);
  if (last.event !== "result") throw new Error("the answer ended too early: send the document again");
  return last;
}

// Resolves to the answer to all of a session, of which `offset` bytes have come before.
export async function append(id, offset, blob, { onSent, signal }) {
  const more = { accept: "application/json", "upload-offset": offset };
  return parsed(await send("PATCH", `${at(id)}?evidence=true`, blob, more, { onSent, signal }));
}
