// The dashboard: a list of runs, the chosen one, and forms to start and to try.
import { getJson, Stream } from "./api.js";
import { $, setText, show } from "./dom.js";
import * as format from "./format.js";
import { JobForm } from "./job.js";
import { isLive, progressText, RunView } from "./run.js";
import { TryBox } from "./try.js";

const view = new RunView();
const tryBox = new TryBox();
const jobForm = new JobForm((id) => {
  location.hash = encodeURIComponent(id);
  $("runs").scrollIntoView({ block: "nearest" }); // on a phone the form is far below
});

let runs = [];
let chosen = null;
let models = "";
let server = null;
let fresh = true; // no points have come since the stream was opened

const stream = new Stream({
  onOpen() {
    fresh = true;
    if (live()) return; // another run, the same connection
    connection("live", "Live");
    refresh();
  },
  onLost(error) {
    connection("offline", error?.status === 401 ? "Locked" : "Offline, reconnecting");
  },
  onEvent(name, data) {
    ({ runs: onRuns, points: onPoints, server: onServer })[name]?.(data);
  },
});

const live = () => $("connection").dataset.state === "live";

function connection(state, text) {
  $("connection").dataset.state = state;
  setText($("connection"), text);
}

async function refresh() {
  try {
    server = await getJson("v1/server");
    setText($("model"), server.model);
    await Promise.all([jobForm.refresh(server), tryBox.refresh(server)]);
    chooseModel();
  } catch {
    if (live()) setTimeout(refresh, 5000); // else the stream opens again
  }
}

function onServer({ resident_bytes, queue }) {
  setText($("server-memory"), format.bytes(resident_bytes));
  setText($("server-queue"), format.count(queue));
}

function onPoints({ run, reset, points }) {
  if (run !== chosen) return;
  view.setPoints(points, reset || fresh);
  fresh = false;
}

function onRuns({ data }) {
  runs = data;
  const tuned = runs.map((run) => run.fine_tuned_model).join(" ");
  if (server && tuned !== models) tryBox.refresh(server).then(chooseModel, () => {});
  models = tuned;
  choose();
}

// The run in the address, else the one shown, else the newest that is running, else the newest.
function choose() {
  const named = runs.find((run) => `#${encodeURIComponent(run.id)}` === location.hash);
  const newest = [...runs].sort((a, b) => b.created_at - a.created_at);
  const shown = runs.find((run) => run.id === chosen);
  const run = named ?? shown ?? newest.find((r) => r.status === "running") ?? newest[0] ?? null;
  if (run !== (shown ?? null)) {
    chosen = run?.id ?? null;
    stream.watch(chosen);
    chooseModel();
  }
  view.show(run);
  show($("welcome"), !run);
  listRuns(newest);
  document.title = run ? `${progressOf(run)}${run.name} · fwdllm` : "fwdllm";
}

function chooseModel() {
  const model = runs.find((run) => run.id === chosen)?.fine_tuned_model;
  if (model) tryBox.choose(model);
}

const progressOf = (run) => (isLive(run) && run.steps ? `${Math.floor((100 * run.step) / run.steps)}% · ` : "");

// Kept elements are updated in place, so that the focus stays where it is.
function listRuns(newest) {
  const list = $("runs");
  const kept = new Map([...list.children].map((item) => [item.dataset.run, item]));
  const items = newest.map((run) => showItem(kept.get(run.id) ?? newItem(run.id), run));
  const same = items.length === kept.size && items.every((item, i) => item === list.children[i]);
  if (!same) list.replaceChildren(...items);
}

function newItem(id) {
  const item = $("run-item").content.firstElementChild.cloneNode(true);
  item.dataset.run = id;
  item.firstElementChild.href = `#${encodeURIComponent(id)}`;
  return item;
}

function showItem(item, run) {
  const link = item.firstElementChild;
  const [name, loss, status, steps, progress] = link.children;
  item.dataset.status = status.dataset.status = run.status;
  link.ariaCurrent = run.id === chosen ? "true" : null;
  setText(name, run.name);
  setText(loss, Number.isFinite(run.loss) ? format.loss(run.loss) : "");
  setText(status, run.status);
  setText(steps, progressText(run));
  show(progress, isLive(run));
  progress.value = run.steps ? run.step / run.steps : 0;
  progress.ariaLabel = `Progress of ${run.name}`;
  return item;
}

addEventListener("hashchange", choose);
$("go-to-form").addEventListener("click", () => {
  $("job-form").scrollIntoView({ block: "center" });
  $("job-file").focus({ preventScroll: true });
});
stream.follow();
