// The form that uploads examples and starts a job.
import { getJson, post } from "./api.js";
import { $, option, setError, setText, show } from "./dom.js";
import { bytes, count } from "./format.js";

const UPLOAD = "upload";

export class JobForm {
  #server = null;

  constructor(onStarted) {
    this.onStarted = onStarted;
    this.training = new FileChoice($("job-uploaded"), $("job-file"), null);
    this.heldOut = new FileChoice($("job-held-out"), $("job-held-out-file"), "a tenth of the examples");
    $("job-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    // A browser cannot point at a wrong number in closed details.
    $("job-advanced").addEventListener("invalid", () => ($("job-advanced").open = true), true);
  }

  async refresh(server) {
    this.#server = server;
    $("job-method").replaceChildren(option("", "default"), ...server.methods.map((name) => option(name, name)));
    await this.#refreshFiles();
  }

  async #refreshFiles() {
    const files = (await getJson("v1/files")).data.filter((file) => file.purpose === "fine-tune");
    this.training.offer(files);
    this.heldOut.offer(files);
    show($("job-uploaded-label"), files.length);
  }

  async #submit() {
    setError($("job-error"), null);
    $("job-start").disabled = true;
    try {
      const job = await this.#start();
      this.onStarted(job.id);
    } catch (error) {
      setError($("job-error"), error.message);
    }
    $("job-start").disabled = false;
    setText($("job-start"), "Start tuning");
  }

  async #start() {
    if (!this.#server) throw new Error("The server cannot be reached.");
    const limit = this.#server.limits?.upload_bytes;
    setText($("job-start"), "Uploading…");
    const training = await this.training.id(limit);
    if (!training) throw new Error("Choose a JSONL file.");
    const heldOut = await this.heldOut.id(limit);
    setText($("job-start"), "Starting…");
    await this.#refreshFiles();
    this.training.choose(training);
    if (heldOut) this.heldOut.choose(heldOut);
    return post("v1/fine_tuning/jobs", {
      model: this.#server.model,
      training_file: training,
      ...(heldOut && { validation_file: heldOut }),
      ...($("job-suffix").value.trim() && { suffix: $("job-suffix").value.trim() }),
      fwdllm: settings(),
    });
  }
}

function settings() {
  const fields = [...$("job-form").querySelectorAll("[name]")].filter((field) => field.value !== "");
  return Object.fromEntries(fields.map((f) => [f.name, f.type === "number" ? f.valueAsNumber : f.value]));
}

// A file uploaded earlier or one to upload now; with a word for neither, that may be chosen too.
class FileChoice {
  constructor(select, input, none) {
    Object.assign(this, { select, input, none });
    this.offer([]);
    select.addEventListener("change", () => this.#showInput());
    input.addEventListener("change", () => this.choose(UPLOAD));
  }

  offer(files) {
    const chosen = this.select.value;
    const fixed = [...(this.none ? [option("", this.none)] : []), option(UPLOAD, "Upload a file…")];
    this.select.replaceChildren(...fixed, ...files.map((file) => option(file.id, describe(file))));
    this.choose(chosen);
  }

  choose(value) {
    const known = [...this.select.options].some((o) => o.value === value);
    this.select.value = known ? value : this.select.options[0].value;
    this.#showInput();
  }

  #showInput() {
    show(this.input.closest("label"), this.select.value === UPLOAD);
  }

  async id(limit) {
    if (this.select.value !== UPLOAD) return this.select.value;
    const file = this.input.files[0];
    if (!file) return "";
    if (file.size > limit) {
      throw new Error(`${file.name} has ${bytes(file.size)}; the server takes at most ${bytes(limit)}.`);
    }
    const body = new FormData();
    body.append("purpose", "fine-tune");
    body.append("file", file);
    const { id } = await post("v1/files", body);
    this.input.value = "";
    return id;
  }
}

function describe(file) {
  const size = Number.isInteger(file.n_examples) ? `${count(file.n_examples)} examples` : bytes(file.bytes);
  return `${file.filename} (${size})`;
}
