// Talks to the server: JSON requests, and completions as a stream of tokens.

export class ServerError extends Error {
  constructor(message, status, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter; // seconds, or null
  }
}

const KEY = "api-key"; // in the tab's session storage, so that it ends with the tab

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { headers: headers(), ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is serve.py still running?", 0, null);
  }
  if (response.ok) return response;
  const text = await response.text();
  const seconds = Number(response.headers.get("Retry-After")) || null;
  throw new ServerError(messageIn(text) || `The server answered ${response.status}.`, response.status, seconds);
}

function messageIn(text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return "";
  }
}

export async function get(path) {
  return (await request(path, {})).json();
}

export async function post(path, body, signal) {
  return (await request(path, { method: "POST", body: JSON.stringify(body), signal })).json();
}

// Yields {tokens, finish} for each event of a streamed completion. If the server is busy, waits as long as it asks
// for, up to `patience` times; onWait(seconds) is called before each wait.
export async function* complete(body, signal, onWait, patience = 5) {
  const options = { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal };
  let response;
  for (let tries = 0; !response; tries++) {
    try {
      response = await request("v1/completions", options);
    } catch (error) {
      if (error.status !== 429 || tries >= patience) throw error;
      onWait(error.retryAfter ?? 1);
      await sleep(1000 * (error.retryAfter ?? 1), signal);
    }
  }
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(event.error.message, 200, null);
    const choice = event.choices?.[0];
    if (choice) yield { tokens: choice.recursion?.tokens ?? [], finish: choice.finish_reason ?? null };
  }
  throw new ServerError("The server ended the stream early: write on, or again.", 200, null);
}

// Yields the data of each server-sent event. The stream may be cut anywhere, also inside a character.
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {}); // the server then frees the row
  }
}

function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    });
  });
}
