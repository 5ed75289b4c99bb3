// What this page asks of the service. The key is kept here alone.
let key = "";

export function useKey(given) {
  key = given.trim();
}

export class Refused extends Error {
  constructor(status, answer, retryAfter) {
    const again = retryAfter ? ` Try again in ${retryAfter} s.` : "";
    super((answer.error ?? `the service answered with status ${status}`) + again);
    this.status = status;
  }
}

const headers = () => (key ? { authorization: `Bearer ${key}` } : {});

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return {};
  }
}

const query = (parameters) => new URLSearchParams(Object.entries(parameters).filter(([, value]) => value));

// Of several models without a name, no more than their names.
export async function info(model) {
  const response = await fetch(`info?${query({ model })}`, { headers: headers() });
  const answer = parsed(await response.text());
  if (!response.ok) throw new Refused(response.status, answer, response.headers.get("retry-after"));
  return answer;
}

export async function excerpt(name) {
  const response = await fetch(`page/${name}`);
  if (!response.ok) throw new Refused(response.status, {}, null);
  return response.blob();
}

// Resolves to the answer. XMLHttpRequest, for fetch does not tell how much has been sent.
export function classify(blob, { model, components, onSent, onProgress, signal }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    let seen = 0;
    let result;

    const take = (last) => {
      if (request.status !== 200) return;
      const text = request.responseText;
      for (let end; (end = text.indexOf("\n", seen)) >= 0; seen = end + 1) {
        const event = parsed(text.slice(seen, end));
        if (event.event === "progress") onProgress(event);
        else if (event.event === "result") result = event;
        else if (event.event === "error") reject(new Refused(200, event, null));
      }
      if (last && result) resolve(result);
      else if (last) reject(new Error("the answer ended too early: send the document again"));
    };
    request.addEventListener("progress", () => take(false));
    request.addEventListener("load", () => {
      if (request.status === 200) take(true);
      else {
        const again = request.getResponseHeader("retry-after");
        reject(new Refused(request.status, parsed(request.responseText), again));
      }
    });
    request.addEventListener("error", () =>
      reject(new Error("the service does not answer: see whether it runs, then send the document again")),
    );
    request.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
    request.upload.addEventListener("progress", (event) => onSent(event.loaded));
    request.upload.addEventListener("load", (event) => onSent(event.loaded));
    signal.addEventListener("abort", () => request.abort());

    request.open("POST", `v1/documents?${query({ model, evidence: true, components })}`);
    request.setRequestHeader("content-type", "text/plain");
    request.setRequestHeader("accept", "application/x-ndjson");
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.send(blob);
  });
}
