// Charts: one panel for each metric and hyperparameter, with the curves of all visible runs. Drawn by uPlot.

/* global uPlot */

const HEIGHT = 220;
const SYNC = uPlot.sync("steps");

export function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "boolean") return String(value);
  value = Number(value);
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace("e+", "e").replace(/\.?0+e/, "e");
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

export function steps(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(4))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(4))}k`;
  return Math.round(value).toLocaleString("en");
}

// One curve as the server sends it: [width, start, base64 of float64 rows].
export class Curve {
  constructor() {
    this.width = 1;
    this.x = [];
    this.mean = [];
    this.low = [];
    this.high = [];
  }

  put([width, start, data]) {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const values = new Float64Array(bytes.buffer);
    const rows = width === 1 ? 2 : 4;
    const count = values.length / rows;
    const row = (index) => Array.from(values.subarray(index * count, (index + 1) * count), (value) => (Number.isFinite(value) ? value : null));
    this.width = width;
    this.x = this.x.slice(0, start).concat(row(0));
    this.mean = this.mean.slice(0, start).concat(row(1));
    this.low = width === 1 ? this.mean : this.low.slice(0, start).concat(row(2));
    this.high = width === 1 ? this.mean : this.high.slice(0, start).concat(row(3));
  }

  get last() {
    return this.mean.length ? this.mean[this.mean.length - 1] : null;
  }
}

// Exponential moving average, corrected for its start, as TensorBoard does it. Gaps stay gaps.
export function smoothed(values, weight) {
  if (!weight) return values;
  let average = 0;
  let total = 0;
  return values.map((value) => {
    if (value === null) return null;
    average = average * weight + (1 - weight) * value;
    total = total * weight + (1 - weight);
    return average / total;
  });
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function alpha(colour, share) {
  const value = parseInt(colour.slice(1), 16);
  return `rgb(${value >> 16} ${(value >> 8) & 255} ${value & 255} / ${share})`;
}

export class Panel {
  constructor(name, view) {
    this.name = name;
    this.view = view;
    this.dirty = true;
    this.seen = true;
    this.plot = null;
    this.shape = "";
    this.lines = [];
    this.marks = [];
    this.element = document.createElement("section");
    this.element.className = "card chart";
    this.element.dataset.metric = name;
    const head = document.createElement("div");
    head.className = "chart-head";
    const title = document.createElement("h3");
    title.textContent = name;
    this.legend = document.createElement("div");
    this.legend.className = "legend";
    this.body = document.createElement("div");
    this.body.className = "plot";
    head.append(title, this.legend);
    this.element.append(head, this.body);
    new IntersectionObserver((entries) => {
      this.seen = entries[entries.length - 1].isIntersecting;
      if (this.seen) view.redraw();
    }, { rootMargin: "200px" }).observe(this.element);
    new ResizeObserver(() => {
      if (this.plot && this.body.clientWidth) this.plot.setSize({ width: this.body.clientWidth, height: HEIGHT });
    }).observe(this.body);
  }

  // lines: [{label, colour, dashed, stepped, dots, curve, band}]; marks: [{step, colour, text}]
  draw(lines, marks) {
    const { smoothing, log, band } = this.view;
    this.lines = lines;
    this.marks = marks;
    const tables = [];
    const series = [{}];
    const bands = [];
    for (const line of lines) {
      const { curve } = line;
      const colour = css(line.colour);
      const positive = (values) => (log ? values.map((value) => (value !== null && value > 0 ? value : null)) : values);
      const columns = [curve.x];
      const has_band = band && line.band && curve.width > 1;
      if (has_band) {
        const first = series.length;
        for (const side of [curve.high, curve.low]) {
          columns.push(positive(side));
          series.push({ label: "", stroke: "transparent", width: 0, points: { show: false } });
        }
        bands.push({ series: [first, first + 1], fill: alpha(colour, 0.16) });
      }
      if (smoothing && line.band) {
        columns.push(positive(curve.mean));
        series.push({ label: "", stroke: alpha(colour, 0.28), width: 1, points: { show: false } });
      }
      columns.push(positive(line.band ? smoothed(curve.mean, smoothing) : curve.mean));
      line.index = series.length;
      series.push({
        label: line.label,
        stroke: colour,
        width: 1.75,
        dash: line.dashed ? [6, 4] : undefined,
        points: { show: line.dots && curve.x.length < 80, size: 5, fill: colour },
        paths: line.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
        spanGaps: false,
      });
      tables.push(columns);
    }
    const data = tables.length === 1 ? tables[0] : tables.length ? uPlot.join(tables) : [[]];
    const shape = JSON.stringify([series.map((one) => [one.label, one.stroke, one.dash, one.points?.show]), bands, log, css("--grid")]);
    if (this.plot && shape === this.shape) {
      this.plot.setData(data, this.view.zoom === null);
    } else {
      this.plot?.destroy();
      this.shape = shape;
      this.plot = new uPlot(this.options(series, bands, log), data, this.body);
    }
    this.zoom();
    this.caption(null);
    this.dirty = false;
  }

  zoom() {
    const { zoom } = this.view;
    if (!this.plot) return;
    const x = this.plot.data[0];
    if (zoom) this.plot.setScale("x", { min: zoom[0], max: zoom[1] });
    else if (x.length) this.plot.setScale("x", { min: x[0], max: x.length > 1 ? x[x.length - 1] : x[0] + 1 });
  }

  options(series, bands, log) {
    const axis = { stroke: css("--muted"), grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    return {
      width: this.body.clientWidth || 400,
      height: HEIGHT,
      series,
      bands,
      legend: { show: false },
      padding: [10, 12, 0, 0],
      scales: { x: { time: false }, y: log ? { distr: 3 } : { range: (_, low, high) => padded(low, high) } },
      axes: [
        { ...axis, size: 30, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? steps(tick) : "")), space: 64 },
        { ...axis, size: 58, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : number(tick))), space: 34 },
      ],
      cursor: { sync: { key: SYNC.key }, y: false, points: { size: 6 }, drag: { x: true, y: false, setScale: false }, focus: { prox: -1 } },
      hooks: {
        setCursor: [(plot) => this.caption(plot.cursor.idx)],
        setSelect: [(plot) => {
          if (plot.select.width < 8) return;
          const range = [plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")];
          plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
          this.view.setZoom(range);
        }],
        drawClear: [(plot) => this.drawMarks(plot)],
        ready: [(plot) => plot.over.addEventListener("dblclick", () => this.view.setZoom(null))],
      },
    };
  }

  drawMarks(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
    for (const mark of this.marks) {
      const x = plot.valToPos(mark.step, "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.strokeStyle = alpha(css(mark.colour), this.marks.length > 8 ? 0.28 : 0.6);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  // Values of the newest step, or of the one under the pointer.
  caption(index) {
    const at = index === null || index === undefined ? null : this.plot.data[0][index];
    const parts = [];
    if (at !== null && at !== undefined) {
      const step = document.createElement("span");
      step.textContent = `step ${steps(at)}`;
      parts.push(step);
    }
    for (const line of this.lines) {
      const value = at === null || at === undefined ? line.curve.last : nearest(this.plot.data[0], this.plot.data[line.index], index);
      const part = document.createElement("span");
      const swatch = document.createElement("i");
      swatch.style.borderTopColor = css(line.colour);
      swatch.classList.toggle("dashed", Boolean(line.dashed));
      const text = document.createElement("b");
      text.textContent = number(value);
      part.append(swatch, line.label, text);
      parts.push(part);
    }
    this.legend.replaceChildren(...parts);
  }

  remove() {
    this.plot?.destroy();
    this.element.remove();
  }
}

function padded(low, high) {
  if (low === null || high === null) return [0, 1];
  const room = high > low ? (high - low) * 0.06 : Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

function nearest(x, values, index) {
  for (let i = index; i >= 0; i--) if (values[i] !== undefined && values[i] !== null) return values[i];
  return null;
}

// A small curve without axes, as SVG.
export function sparkline(curve) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  const from = Math.max(0, curve.x.length - 120);
  const points = curve.x.slice(from).map((x, index) => [x, curve.mean[from + index]]).filter(([, y]) => y !== null);
  if (points.length > 1) {
    const low = Math.min(...points.map(([, y]) => y));
    const span = Math.max(...points.map(([, y]) => y)) - low || 1;
    const [first, last] = [points[0][0], points[points.length - 1][0]];
    const place = ([x, y]) => `${(((x - first) / (last - first || 1)) * 100).toFixed(2)} ${(23 - ((y - low) / span) * 20).toFixed(2)}`;
    path.setAttribute("d", `M${points.map(place).join("L")}`);
  }
  svg.setAttribute("viewBox", "0 0 100 26");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.append(path);
  return svg;
}
