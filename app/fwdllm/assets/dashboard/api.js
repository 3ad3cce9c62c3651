// Calls to the server: the key, errors in the server's words, and server-sent events.
// Paths are relative, so that the page also works behind a proxy's prefix.
import { $, show } from "./dom.js";

const KEY = "fwdllm-api-key";
const SILENCE_MS = 20_000; // the server says something every 2 s
const LONGEST_WAIT_MS = 15_000;

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export async function request(path, { body, ...options } = {}) {
  const headers = {};
  if (body !== undefined && !(body instanceof FormData)) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    if (key) headers.Authorization = `Bearer ${key}`;
    const response = await reach(path, { ...options, body, headers });
    if (response.ok) return response;
    if (response.status !== 401) throw await errorOf(response);
    // Another call may have been given a key while this one was on its way.
    if (sessionStorage.getItem(KEY) === key) await askForKey(key !== null);
  }
}

export const getJson = async (path, options) => (await request(path, options)).json();
export const post = (path, body, options) => getJson(path, { method: "POST", body, ...options });

async function reach(path, options) {
  try {
    return await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", 0);
  }
}

async function errorOf(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered ${response.status} ${response.statusText}`;
  const wait = response.status === 429 && response.headers.get("Retry-After");
  return new ApiError(wait ? `${message} (try again in ${wait} s)` : message, response.status);
}

let asking = null;

function askForKey(refused) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = $("key-dialog");
    show($("key-error"), refused);
    $("key-form").onsubmit = () => {
      sessionStorage.setItem(KEY, $("key").value.trim());
      resolve();
    };
    dialog.onclose = () => {
      $("key").value = "";
      asking = null;
      reject(new ApiError("The server asks for an API key.", 401)); // nothing happens after resolve()
    };
    dialog.showModal();
  });
  return asking;
}

// EventSource cannot send a key, hence a parser. Feed it text in any pieces.
export class EventParser {
  #rest = "";
  #name = "";
  #data = [];

  *push(text) {
    // A carriage return at the end may be the first half of CRLF.
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) yield { name: this.#name || "message", data: this.#data.join("\n") };
        this.#name = "";
        this.#data = [];
      } else {
        const [, field, value] = /^([^:]*):? ?([^]*)$/.exec(line);
        if (field === "event") this.#name = value;
        else if (field === "data") this.#data.push(value);
      }
    }
  }
}

export async function* eventsOf(response, onChunk = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const parser = new EventParser();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      onChunk();
      yield* parser.push(value);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// The server's news, for ever: reconnects with growing waits, and at once for another run.
export class Stream {
  #run = null;
  #controller = null;
  #wake = () => {};

  constructor({ onOpen, onEvent, onLost }) {
    Object.assign(this, { onOpen, onEvent, onLost });
    addEventListener("online", () => this.#wake());
  }

  watch(run) {
    this.#run = run;
    this.#controller?.abort("switch");
    this.#wake();
  }

  async follow() {
    for (let wait = 500; ; wait = Math.min(wait * 2, LONGEST_WAIT_MS)) {
      const controller = (this.#controller = new AbortController());
      let reason = null;
      try {
        await this.#listen(controller, () => (wait = 500));
      } catch (error) {
        reason = error;
      }
      if (controller.signal.reason === "switch") continue;
      this.onLost(reason);
      await new Promise((resolve) => {
        this.#wake = resolve;
        setTimeout(resolve, wait * (0.75 + Math.random() / 2)); // not all pages at the same moment
      });
    }
  }

  async #listen(controller, onAlive) {
    const query = this.#run ? `?run=${encodeURIComponent(this.#run)}` : "";
    const response = await request(`v1/stream${query}`, { signal: controller.signal });
    this.onOpen();
    let watchdog;
    const heard = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => controller.abort("silence"), SILENCE_MS);
    };
    heard();
    try {
      for await (const { name, data } of eventsOf(response, heard)) {
        if (controller.signal.aborted) return;
        onAlive();
        this.onEvent(name, JSON.parse(data));
      }
    } finally {
      clearTimeout(watchdog);
    }
  }
}
