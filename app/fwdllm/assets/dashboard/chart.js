// A line chart on a canvas. Its colours come from the style sheet, for both themes.
// A series is {xs, ys, style: "raw" | "line" | "joined", color: a custom property's name}, xs ascending.

export class Chart {
  #series = [];
  #x = [0, 1];
  #y = [0, 1];
  #plot = { left: 0, right: 1 };
  #cursor = null;
  #frame = 0;

  constructor(canvas, { format, onCursor, log = false, zero = false, compact = false }) {
    Object.assign(this, { canvas, format, log, zero, compact });
    new ResizeObserver(() => this.#schedule()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#schedule());
    const point = (event) => onCursor(this.#stepAt(event.offsetX), false);
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && onCursor(null, false));
    canvas.addEventListener("blur", () => onCursor(null, false));
    canvas.addEventListener("keydown", (event) => {
      const step = this.#stepFor(event.key);
      if (step === undefined) return;
      event.preventDefault();
      onCursor(step, true);
    });
  }

  set(series, lastStep) {
    this.#series = series;
    const xs = series.flatMap((s) => (s.xs.length ? [s.xs[0], s.xs.at(-1)] : []));
    this.#x = [Math.min(0, ...xs), Math.max(lastStep ?? 0, 1, ...xs)];
    this.#y = rangeOf(series, this);
    this.#schedule();
  }

  setCursor(step) {
    this.#cursor = step;
    this.#schedule();
  }

  #schedule() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  #main() {
    return this.#series.find((s) => s.xs.length);
  }

  #stepAt(pixel) {
    const xs = this.#main()?.xs;
    if (!xs) return null;
    const { left, right } = this.#plot;
    const x = this.#x[0] + ((pixel - left) / (right - left)) * (this.#x[1] - this.#x[0]);
    const i = Math.max(0, lastAt(xs, x));
    return i + 1 < xs.length && xs[i + 1] - x < x - xs[i] ? xs[i + 1] : xs[i];
  }

  #stepFor(key) {
    const xs = this.#main()?.xs;
    if (!xs) return undefined;
    const i = this.#cursor === null ? xs.length - 1 : lastAt(xs, this.#cursor);
    const stride = Math.ceil(xs.length / 100);
    const to = { ArrowLeft: i - stride, ArrowRight: i + stride, Home: 0, End: xs.length - 1 }[key];
    if (to !== undefined) return xs[Math.min(Math.max(to, 0), xs.length - 1)];
    return key === "Escape" ? null : undefined;
  }

  #draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return;
    const ratio = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const g = this.canvas.getContext("2d");
    g.scale(ratio, ratio);
    const style = getComputedStyle(this.canvas);
    const color = (name) => style.getPropertyValue(name);
    g.font = `${this.compact ? 10 : 11.5}px ${style.fontFamily}`;
    this.#drawAxes(g, width, height, color);
    g.beginPath();
    g.rect(this.#plot.left - 4, 0, width, height);
    g.clip();
    for (const s of this.#series) this.#drawSeries(g, s, color);
    if (this.#cursor !== null && this.#main()) this.#drawCursor(g, color);
    this.canvas.dataset.points = this.#series[0]?.xs.length ?? 0;
  }

  #drawAxes(g, width, height, color) {
    const { compact } = this;
    const ticks = this.#main() ? ticksOf(this.#y, compact ? 3 : height / 60, this) : [];
    const margin = compact ? { x: 3, y: 7, label: 5 } : { x: 8, y: 10, label: 8 };
    const left = Math.ceil(Math.max(0, ...ticks.map((t) => g.measureText(t.label).width))) + margin.label + 3;
    const [right, top, bottom] = [width - margin.x, margin.y, height - (compact ? margin.y : 26)];
    const level = this.log ? Math.log10 : (v) => v;
    const x = (v) => left + ((v - this.#x[0]) / (this.#x[1] - this.#x[0])) * (right - left);
    const y = (v) => bottom - ((level(v) - this.#y[0]) / (this.#y[1] - this.#y[0])) * (bottom - top);
    this.#plot = { left, right, top, bottom, x, y };

    const rule = (at) => stroke(g, [[left, Math.round(at) + 0.5], [right, Math.round(at) + 0.5]]);
    g.fillStyle = color("--muted");
    g.textBaseline = "middle";
    g.textAlign = "right";
    g.strokeStyle = color("--line");
    for (const { value, label } of ticks) {
      rule(y(value));
      g.fillText(label, left - margin.label, y(value));
    }
    g.strokeStyle = color("--edge");
    rule(bottom);
    if (compact) return;
    g.textAlign = "center";
    for (const value of niceTicks(...this.#x, width / 90).filter(Number.isInteger)) {
      const label = value.toLocaleString("en");
      g.fillText(label, Math.min(x(value), width - g.measureText(label).width / 2), height - 9);
    }
  }

  #drawSeries(g, series, color) {
    const { xs, ys, style } = series;
    const { left, right, x, y } = this.#plot;
    g.lineJoin = g.lineCap = "round";
    g.strokeStyle = color(series.color);
    g.fillStyle = color("--surface");
    g.lineWidth = style === "line" && !this.compact ? 2 : style === "raw" ? 1 : 1.25;
    g.globalAlpha = style !== "raw" ? 1 : xs.length > right - left ? 0.25 : 0.4;
    stroke(g, thinned(series, x, y));
    g.globalAlpha = 1;
    const dots = xs.length === 1 || (style === "joined" && xs.length * 8 < right - left);
    if (dots) xs.forEach((step, i) => dot(g, x(step), y(ys[i])));
  }

  #drawCursor(g, color) {
    const { top, bottom, x, y } = this.#plot;
    const at = Math.round(x(this.#cursor)) + 0.5;
    g.lineWidth = 1;
    g.strokeStyle = color("--edge");
    stroke(g, [[at, top], [at, bottom]]);
    for (const { xs, ys, style, color: name } of this.#series) {
      const i = lastAt(xs, this.#cursor);
      if (style === "raw" || i < 0) continue;
      g.strokeStyle = g.fillStyle = color(name);
      dot(g, x(xs[i]), y(ys[i]));
    }
  }
}

// The index of the last x that is not above, or -1.
export function lastAt(xs, x) {
  let low = 0;
  let high = xs.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

function stroke(g, points) {
  g.beginPath();
  for (const [x, y] of points) g.lineTo(x, y);
  g.stroke();
}

function dot(g, x, y) {
  g.beginPath();
  g.arc(x, y, 3, 0, 2 * Math.PI);
  g.fill();
  g.stroke();
}

// At most the lowest and the highest point of each pixel column, which look the same as all.
function* thinned({ xs, ys }, x, y) {
  for (let i = 0; i < xs.length; ) {
    const column = Math.floor(x(xs[i]));
    let low = i;
    let high = i;
    for (i++; i < xs.length && Math.floor(x(xs[i])) === column; i++) {
      if (ys[i] < ys[low]) low = i;
      if (ys[i] > ys[high]) high = i;
    }
    for (const k of new Set([Math.min(low, high), Math.max(low, high)])) yield [x(xs[k]), y(ys[k])];
  }
}

// Single batches may be far off: a hundredth of them may leave the picture at either side.
function rangeOf(series, { log, zero }) {
  let low = Infinity;
  let high = -Infinity;
  for (const { ys, style } of series) {
    if (!ys.length) continue;
    const sorted = Float64Array.from(ys).sort();
    const cut = style === "raw" ? Math.floor(sorted.length / 100) : 0;
    low = Math.min(low, sorted[cut]);
    high = Math.max(high, sorted[sorted.length - 1 - cut]);
  }
  if (low > high) return log ? [-1, 0] : [0, 1];
  if (log) {
    const floor = Math.floor(Math.log10(low));
    return [floor, Math.max(Math.ceil(Math.log10(high)), floor + 1)];
  }
  const pad = (zero ? high : high - low) * 0.07 || Math.abs(high) * 0.1 || 1;
  return [zero ? 0 : low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
}

function niceTicks(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
  const ticks = [];
  const last = Math.floor(high / step + 1e-9);
  for (let i = Math.ceil(low / step - 1e-9); i <= last; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function ticksOf([low, high], wanted, { log, format }) {
  const ticks = log
    ? niceTicks(low, high, Math.min(wanted, high - low)).filter(Number.isInteger).map((e) => 10 ** e)
    : niceTicks(low, high, wanted);
  return ticks.map((value) => ({ value, label: format(value) }));
}
