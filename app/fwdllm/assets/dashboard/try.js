// One prompt, answered by the base model and a tuned one side by side.
import { eventsOf, getJson, request } from "./api.js";
import { $, option, setText, show } from "./dom.js";

export class TryBox {
  #base = null;
  #running = null;

  constructor() {
    $("try-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#running) this.#running.abort();
      else this.#send();
    });
    $("try-prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.#running) $("try-form").requestSubmit();
    });
  }

  async refresh(server) {
    this.#base = server.model;
    show($("try"), !server.encoder);
    if (server.encoder) return;
    const tuned = (await getJson("v1/models")).data.map((model) => model.id).filter((id) => id !== this.#base);
    const chosen = $("try-model").value;
    $("try-model").replaceChildren(...tuned.map((id) => option(id, id.replace(/^ft:/, ""))));
    if (!tuned.length) $("try-model").append(option("", "none yet"));
    $("try-model").disabled = !tuned.length;
    this.choose(chosen);
  }

  choose(model) {
    if ([...$("try-model").options].some((o) => o.value === model)) $("try-model").value = model;
  }

  async #send() {
    this.#running = new AbortController();
    setText($("try-send"), "Stop");
    const tuned = $("try-model").value;
    setText($("try-tuned"), "");
    setText($("try-tuned-note"), tuned ? "" : "No tuned model yet.");
    const asked = [this.#answer(this.#base, "try-base")];
    if (tuned) asked.push(this.#answer(tuned, "try-tuned"));
    await Promise.all(asked);
    this.#running = null;
    setText($("try-send"), "Send");
  }

  async #answer(model, id) {
    const output = $(id);
    const note = $(`${id}-note`);
    setText(output, "");
    setText(note, "");
    note.classList.remove("error");
    output.setAttribute("aria-busy", "true"); // read out when whole, not token by token
    try {
      const end = await this.#stream(model, (text) => output.append(text));
      if (end === "length") setText(note, `Cut at ${$("try-tokens").value} tokens.`);
    } catch (error) {
      if (error.name !== "AbortError") note.classList.add("error");
      setText(note, error.name === "AbortError" ? "Stopped." : error.message);
    }
    output.setAttribute("aria-busy", "false");
  }

  async #stream(model, onText) {
    const body = {
      model,
      messages: [{ role: "user", content: $("try-prompt").value }],
      max_tokens: $("try-tokens").valueAsNumber,
      temperature: 0,
      stream: true,
    };
    const response = await request("v1/chat/completions", { method: "POST", body, signal: this.#running.signal });
    let end = null;
    for await (const { data } of eventsOf(response)) {
      if (data === "[DONE]") return end;
      const { error, choices } = JSON.parse(data);
      if (error) throw new Error(error.message);
      onText(choices?.[0]?.delta?.content ?? "");
      end = choices?.[0]?.finish_reason ?? end;
    }
    throw new Error("The answer was cut off.");
  }
}
