// The chosen run: what is known of it, its charts and what can be done with it.
import { post, request } from "./api.js";
import { Chart, lastAt } from "./chart.js";
import { $, setError, setText, show } from "./dom.js";
import * as format from "./format.js";

export const isLive = (run) => ["queued", "running", "paused"].includes(run.status);
const stepWord = (run) => (run.kind === "federation" ? "round" : "step");

export function progressText(run) {
  const end = run.steps ? ` of ${format.count(run.steps)}` : "";
  return `${stepWord(run)} ${format.count(run.step)}${end}`;
}

const FIGURES = [
  { label: "Perturbations", key: "perturbations", format: format.count, zero: true },
  { label: "Gradient variance", key: "gradient_variance", format: format.scientific, log: true },
  { label: "Tokens per second", key: "tokens_per_s", format: format.rate, zero: true },
  { label: "Resident memory", key: "resident_bytes", format: format.bytes, zero: true },
  { label: "Sent by clients", key: "bytes_up", format: format.bytes, zero: true },
  { label: "Received by clients", key: "bytes_down", format: format.bytes, zero: true },
  { label: "Held-out accuracy", key: "accuracy", format: format.percent, evals: true },
];

export class RunView {
  #run = null;
  #steps = [];
  #evals = [];
  #loss = [];
  #cursor = null;
  #frame = 0;

  constructor() {
    const onCursor = (step, byKey) => this.#point(step, byKey);
    this.chart = new Chart($("loss-chart"), { format: String, onCursor });
    this.figures = FIGURES.map((options) => newFigure(options, onCursor));
    addEventListener("pointerdown", (event) => event.target.closest("canvas") || onCursor(null, false));
    for (const verb of ["pause", "resume", "cancel"]) {
      this.#onClick(verb, (run) => post(`v1/fine_tuning/jobs/${encodeURIComponent(run.id)}/${verb}`));
    }
    this.#onClick("download-adapter", (run) => download(run.adapter));
  }

  show(run) {
    const other = run?.id !== this.#run?.id;
    this.#run = run;
    show($("run"), run);
    if (!run) return;
    this.#showFacts(run);
    if (other) {
      setError($("action-error"), null);
      this.setPoints([], true);
      this.#point(null, false);
    }
    this.#schedule();
  }

  setPoints(points, reset) {
    if (reset) {
      this.#steps = [];
      this.#evals = [];
    }
    for (const point of points) {
      const list = point.kind === "eval" ? this.#evals : this.#steps;
      while (list.length && list.at(-1).step >= point.step) list.pop(); // went back to a checkpoint
      list.push(point);
    }
    this.#schedule();
  }

  #showFacts(run) {
    setText($("run-title"), run.name);
    setText($("run-status"), run.status);
    $("run-status").dataset.status = run.status;
    const kind = run.kind === "federation" ? "federation" : "tuning";
    setText($("run-about"), `${kind}, created ${format.moment(run.created_at)}`);
    setText($("run-model"), run.fine_tuned_model ?? run.id);
    setError($("run-error"), run.error);
    $("run-progress").value = run.steps ? run.step / run.steps : isLive(run) ? 0 : 1;
    setText($("run-steps"), progressText(run));
    const timed = isLive(run) && Number.isFinite(run.seconds_left);
    setText($("run-left"), timed ? `${format.duration(run.seconds_left)} left` : "");
    setText($("run-loss"), format.loss(run.loss));
    setText($("run-held-out"), format.loss(run.held_out));
    setText($("run-before"), Number.isFinite(run.held_out_before) ? `from ${format.loss(run.held_out_before)}` : "");
    show($("run-accuracy-stat"), Number.isFinite(run.accuracy));
    setText($("run-accuracy"), format.percent(run.accuracy));
    const job = run.id.startsWith("ftjob-");
    show($("pause"), job && run.status === "running");
    show($("resume"), job && run.status === "paused");
    show($("cancel"), job && isLive(run));
    show($("download-adapter"), run.adapter);
  }

  #schedule() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      if (this.#run) this.#plot();
    });
  }

  #plot() {
    const end = isLive(this.#run) ? this.#run.steps : null;
    const raw = seriesOf(this.#steps, "loss", "raw", "--accent");
    const smooth = { ...raw, ys: smoothed(raw.ys), style: "line" };
    this.#loss = [raw, smooth, seriesOf(this.#evals, "loss", "joined", "--ink")];
    this.chart.set(this.#loss, end);
    const canvas = $("loss-chart");
    canvas.dataset.lastLoss = raw.ys.at(-1) ?? "";
    canvas.ariaLabel = `Loss of ${raw.xs.length} ${stepWord(this.#run)}s, the latest ${format.loss(raw.ys.at(-1))}`;
    for (const figure of this.figures) {
      figure.series = figure.evals
        ? seriesOf(this.#evals, figure.key, "joined", "--ink")
        : seriesOf(this.#steps, figure.key, "line", "--accent", figure.log);
      show(figure.element, figure.series.xs.length);
      figure.chart.set([figure.series], end);
    }
    this.#showValues();
  }

  #point(step, byKey) {
    if (!this.#run) return;
    this.#cursor = step;
    $("loss-legend").setAttribute("aria-live", byKey ? "polite" : "off");
    this.chart.setCursor(step);
    for (const figure of this.figures) figure.chart.setCursor(step);
    this.#showValues();
  }

  #showValues() {
    const step = this.#cursor;
    const word = stepWord(this.#run);
    setText($("at-step"), step === null ? `nats, by ${word}` : `${word} ${format.count(step)}`);
    ["at-raw", "at-line", "at-joined"].forEach((id, i) =>
      setText($(id), step === null ? "" : format.loss(valueAt(this.#loss[i], step))));
    for (const { series, value, canvas, label, format: text } of this.figures) {
      const shown = text(valueAt(series, step ?? Infinity));
      setText(value, shown);
      canvas.ariaLabel = `${label}: ${shown}`;
    }
  }

  #onClick(id, work) {
    $(id).addEventListener("click", async () => {
      $(id).disabled = true;
      setError($("action-error"), null);
      await work(this.#run).catch((error) => setError($("action-error"), error.message));
      $(id).disabled = false;
    });
  }
}

function newFigure(options, onCursor) {
  const element = $("figure").content.firstElementChild.cloneNode(true);
  const canvas = element.querySelector("canvas");
  setText(element.querySelector(".label"), options.label);
  element.hidden = true;
  $("figures").append(element);
  const chart = new Chart(canvas, { ...options, compact: true, onCursor });
  return { ...options, element, canvas, chart, value: element.querySelector(".value"), series: null };
}

function seriesOf(points, key, style, color, positive = false) {
  const known = points.filter((p) => Number.isFinite(p[key]) && (!positive || p[key] > 0));
  return { xs: known.map((p) => p.step), ys: known.map((p) => p[key]), style, color };
}

function valueAt(series, step) {
  return series?.ys[lastAt(series.xs, step)];
}

// The mean of the points around each, which unlike that of those before does not lag behind.
function smoothed(values) {
  const reach = Math.round(Math.max(Math.min(5, values.length / 8), values.length / 80));
  const sums = [0];
  for (const value of values) sums.push(sums.at(-1) + value);
  return values.map((_, i) => {
    const from = Math.max(0, i - reach);
    const to = Math.min(values.length, i + Math.min(reach, i + 1) + 1); // the start is steep
    return (sums[to] - sums[from]) / (to - from);
  });
}

async function download(adapter) {
  const response = await request(`v1/adapters/${encodeURIComponent(adapter)}/content`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = nameIn(response.headers.get("Content-Disposition")) ?? "adapter.gguf";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function nameIn(disposition) {
  const encoded = /filename\*=UTF-8''([^;]+)/i.exec(disposition ?? "");
  if (encoded) return decodeURIComponent(encoded[1]);
  const plain = /filename="?([^";]+)"?/i.exec(disposition ?? "");
  return plain && plain[1];
}
