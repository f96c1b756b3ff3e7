// The page: reads the stream of frames, shows the chosen run, and sends commands. Names are only ever text.

import { Curve, Panel, number, sparkline, steps } from "./charts.js";

const $ = (id) => document.getElementById(id);
const COLOURS = ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7", "--c8"];
const ENDED = ["completed", "stopped", "interrupted", "failed"];

const runs = new Map(); // id -> {sections, curves: kind -> name -> Curve, colour, visible}
const panels = new Map();
const store = (key, value) => {
  try {
    if (value === undefined) return sessionStorage.getItem(key);
    sessionStorage.setItem(key, value);
  } catch {
    // storage is off: nothing is remembered
  }
  return null;
};

let chosen = null;
let hello = { control: false, actions: {} };
let token = "";
let offset_s = 0; // clock of the server minus ours

function make(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content.filter((one) => one !== null && one !== undefined));
  return element;
}

// --- the view of the charts ---------------------------------------------------------------------------------

const view = {
  smoothing: Number(store("smoothing") || 0),
  log: store("log") === "true",
  band: store("band") !== "false",
  marks: store("marks") !== "false",
  filter: "",
  zoom: null,
  scheduled: false,
  redraw() {
    if (view.scheduled) return;
    view.scheduled = true;
    requestAnimationFrame(() => {
      view.scheduled = false;
      drawCharts();
    });
  },
  redrawAll() {
    for (const panel of panels.values()) panel.dirty = true;
    view.redraw();
  },
  setZoom(range) {
    view.zoom = range;
    $("unzoom").hidden = range === null;
    view.redrawAll();
  },
};

function visibleRuns() {
  return [...runs.values()].filter((run) => run.visible);
}

function panelNames() {
  const metrics = new Map();
  const hyperparams = new Map();
  for (const run of visibleRuns()) {
    const { steps: step, epochs, evaluations, hyperparams: rates } = run.curves;
    for (const name of [...step.keys(), ...epochs.keys()]) metrics.set(name, "metric");
    for (const name of evaluations.keys()) {
      const plain = name.replace(/^val_/, "");
      if (!metrics.has(plain)) metrics.set(name, "metric");
    }
    // One that never changed needs no chart; its value is in the list.
    for (const [name, curve] of rates) if (curve.mean.some((value) => value !== curve.mean[0])) hyperparams.set(name, "hyperparam");
  }
  const order = ([name]) => (/loss|error/.test(name) ? 0 : /acc|score|f1|auc/.test(name) ? 1 : 2);
  const sorted = [...metrics].sort((one, other) => order(one) - order(other) || one[0].localeCompare(other[0]));
  return [...sorted, ...hyperparams].map(([name, kind]) => [`${kind}:${name}`, name, kind]);
}

function linesOf(name, kind) {
  const shown = visibleRuns();
  const single = shown.length === 1;
  const lines = [];
  for (const run of shown) {
    const label = single ? "" : `${run.sections.title} `;
    const colour = single ? "--c1" : run.colour;
    if (kind === "hyperparam") {
      const curve = run.curves.hyperparams.get(name);
      if (curve) lines.push({ label: label.trim(), colour: single ? "--c3" : colour, stepped: true, dots: false, curve });
      continue;
    }
    const train = run.curves.steps.get(name) || run.curves.epochs.get(name);
    if (train) lines.push({ label: `${label}train`, colour, band: true, dots: train.x.length < 40, curve: train });
    const val = run.curves.evaluations.get(name.startsWith("val_") ? name : `val_${name}`);
    if (val) lines.push({ label: `${label}val`, colour: single ? "--c2" : colour, dashed: !single, dots: true, curve: val });
  }
  return lines;
}

function marksOf(name, kind) {
  const run = runs.get(chosen);
  if (!view.marks || !run?.visible) return [];
  const changes = (run.sections.changes || []).filter((row) => kind !== "hyperparam" || row.name === name);
  const marks = changes.slice(-60).map((row) => ({ step: row.step, colour: "--c4" }));
  const alerts = (run.sections.alerts || []).filter((row) => kind === "metric" && row.metric.replace(/^val_/, "") === name);
  for (const row of alerts.slice(-30)) marks.push({ step: row.step, colour: "--bad" });
  return marks;
}

function drawCharts() {
  const names = panelNames();
  const wanted = new Set(names.map(([key]) => key));
  for (const [key, panel] of panels) {
    if (!wanted.has(key)) {
      panel.remove();
      panels.delete(key);
    }
  }
  const words = view.filter.toLowerCase();
  for (const [key, name, kind] of names) {
    let panel = panels.get(key);
    if (!panel) {
      panel = new Panel(name, view);
      panels.set(key, panel);
      $("charts").append(panel.element);
    }
    panel.element.hidden = words !== "" && !name.toLowerCase().includes(words);
    if (panel.dirty && panel.seen && !panel.element.hidden) panel.draw(linesOf(name, kind), marksOf(name, kind));
  }
  // Metrics come before hyperparameters, whichever the page has learned of first.
  names.forEach(([key], index) => {
    const element = panels.get(key).element;
    if ($("charts").children[index] !== element) $("charts").insertBefore(element, $("charts").children[index] || null);
  });
  $("empty").hidden = names.length > 0;
}

// --- frames --------------------------------------------------------------------------------------------------

function newRun(id) {
  const taken = new Set([...runs.values()].map((run) => run.colour));
  return {
    id,
    sections: {},
    curves: { steps: new Map(), epochs: new Map(), evaluations: new Map(), hyperparams: new Map(), machine: new Map() },
    colour: COLOURS.find((colour) => !taken.has(colour)) || COLOURS[runs.size % COLOURS.length],
    visible: true,
  };
}

function take(frame) {
  if (frame.full) for (const id of runs.keys()) if (!(id in frame.runs)) runs.delete(id);
  for (const id of frame.gone || []) runs.delete(id);
  for (const [id, entry] of Object.entries(frame.runs)) {
    let run = runs.get(id);
    if (!run) {
      run = newRun(id);
      runs.set(id, run);
      chosen = id; // the newest run
    }
    const { curves, ...sections } = entry;
    Object.assign(run.sections, sections);
    if (frame.full) for (const named of Object.values(run.curves)) named.clear();
    for (const [kind, named] of Object.entries(curves || {})) {
      for (const [name, data] of Object.entries(named)) {
        if (!run.curves[kind].has(name)) run.curves[kind].set(name, new Curve());
        run.curves[kind].get(name).put(data);
        markDirty(kind, name);
      }
    }
    if (sections.changes || sections.alerts || sections.title) for (const panel of panels.values()) panel.dirty = true;
  }
  if (!runs.has(chosen)) chosen = [...runs.keys()].pop() ?? null;
  if (frame.full) for (const panel of panels.values()) panel.dirty = true;
  view.redraw();
  show(frame);
}

function markDirty(kind, name) {
  const key = kind === "hyperparams" ? `hyperparam:${name}` : `metric:${name}`;
  const panel = panels.get(key) || panels.get(`metric:${name.replace(/^val_/, "")}`);
  if (panel) panel.dirty = true;
}

// --- the chosen run -------------------------------------------------------------------------------------------

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(seconds % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let index = 0;
  while (value >= 1000 && index < units.length - 1) {
    value /= 1000;
    index += 1;
  }
  return `${index ? value.toPrecision(3) : value} ${units[index]}`;
}

function whole(value) {
  return Math.round(value).toLocaleString("en");
}

function clock(time) {
  return new Date(time * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
}

function show(frame) {
  showRuns();
  const run = runs.get(chosen);
  const entry = frame === null ? null : frame.runs[chosen];
  if (!run || (frame !== null && !entry)) return;
  const changed = (name) => entry === null || frame?.full || name in entry;
  const { sections } = run;
  document.body.classList.toggle("from-log", !sections.loop); // a log need not have every event
  if (changed("status") || changed("title") || changed("can_control")) showStatus(sections);
  if (changed("values") || changed("hyperparams") || changed("can_control")) showHyperparams(sections);
  if (changed("changes")) showLog("changes", sections.changes, changeRow);
  if (changed("alerts")) showLog("alerts", sections.alerts, alertRow);
  if (changed("commands")) showLog("commands", sections.commands, commandRow);
  if (changed("checkpoints")) showLog("checkpoints", sections.checkpoints, checkpointRow);
  if (changed("notices")) showLog("notices", sections.notices, noticeRow);
  if (changed("samples")) showSamples(sections.samples);
  if (changed("samples") || changed("sample_names")) showSamplers(sections);
  if (changed("machine")) showMachine(run);
  if (changed("loop")) showLoop(sections.loop);
  if (changed("subscribers")) showSubscribers(sections.subscribers);
  $("notices-card").hidden = !sections.notices?.length;
}

function showRuns() {
  const shape = JSON.stringify([chosen, [...runs.values()].map((run) => [run.id, run.sections.title, run.visible])]);
  if ($("runs").dataset.shape === shape) return;
  $("runs").dataset.shape = shape;
  const chips = [...runs.values()].map((run) => {
    const eye = make("button", "eye", make("span", "dot"));
    eye.type = "button";
    eye.style.color = `var(${run.colour})`;
    eye.title = "Show or hide its curves";
    eye.setAttribute("aria-label", `Show or hide ${run.sections.title}`);
    eye.setAttribute("aria-pressed", String(run.visible));
    eye.addEventListener("click", () => toggleRun(run));
    const name = make("button", "", run.sections.title || run.id);
    name.type = "button";
    name.addEventListener("click", () => choose(run.id));
    return make("span", run.id === chosen ? "run chosen" : "run", eye, name);
  });
  $("runs").replaceChildren(...(runs.size > 1 ? chips : []));
}

function toggleRun(run) {
  run.visible = !run.visible;
  showRuns();
  view.redrawAll();
}

function choose(id) {
  chosen = id;
  runs.get(id).visible = true;
  show(null);
  view.redrawAll();
}

function showStatus(sections) {
  const { status } = sections;
  $("title").textContent = sections.title;
  $("state").textContent = status.state;
  $("state").className = `badge ${status.state}`;
  const ended = ENDED.includes(status.state);
  $("reason").textContent = ended && status.reason !== "completed" ? status.reason : "";
  document.title = `${status.state === "running" ? "▶ " : ""}${sections.title} – eventtrain`;
  const share = status.total_steps ? Math.min(1, status.step / status.total_steps) : null;
  const part = status.state === "completed" ? 1 : share;
  $("bar").style.width = part === null ? "" : `${(part * 100).toFixed(2)}%`;
  $("bar").parentElement.classList.toggle("unknown", share === null && !ended);
  $("bar").parentElement.setAttribute("aria-valuenow", share === null ? "" : String(Math.round(share * 100)));
  const now = ended ? status.updated : Math.max(status.updated || 0, Date.now() / 1000 + offset_s);
  const facts = [
    ["step", whole(status.step), status.total_steps ? `of ${whole(status.total_steps)}` : ""],
    ["epoch", String(status.epoch + 1), status.total_epochs ? `of ${status.total_epochs}` : ""],
    status.rate && !ended && status.state !== "paused" ? ["speed", number(status.rate), "steps/s"] : ["speed", "–", ""],
    ["time left", ended ? "–" : duration(status.left_s), ""],
    ["elapsed", status.started ? duration(Math.max(0, now - status.started)) : "–", status.attempt > 1 ? `attempt ${status.attempt}` : ""],
  ];
  $("facts").replaceChildren(
    ...facts.map(([label, value, more]) => make("div", "", make("dt", "", label), make("dd", "", `${value} `, make("small", "", more)))),
  );
  const can = hello.control && sections.can_control;
  $("buttons").hidden = !can;
  $("pause").textContent = status.state === "paused" ? "Resume" : "Pause";
  $("pause").classList.toggle("primary", status.state === "paused");
}

function showHyperparams(sections) {
  const values = { ...sections.hyperparams, ...sections.values };
  const can = hello.control && sections.can_control;
  const shape = JSON.stringify([chosen, Object.keys(values), can]);
  const box = $("hyperparams");
  if (box.dataset.shape !== shape) {
    box.dataset.shape = shape;
    const names = Object.keys(values).sort((one, other) => /learning_rate|^lr$/.test(other) - /learning_rate|^lr$/.test(one));
    box.replaceChildren(...names.map((name, index) => hyperparamRow(name, can, index === 0)));
    if (!box.children.length) box.append(make("p", "empty", "none"));
  }
  for (const row of box.querySelectorAll(".hp")) {
    row.querySelector(".value").textContent = number(values[row.dataset.name]);
    row.querySelector(".value").title = String(values[row.dataset.name]);
  }
}

function hyperparamRow(name, can, open) {
  if (!can) {
    const row = make("div", "hp", make("div", "line", make("span", "name", name), make("span", "value")));
    row.dataset.name = name;
    return row;
  }
  const row = make("details", "hp", make("summary", "line", make("span", "name", name), make("span", "value")));
  row.dataset.name = name;
  row.open = open;
  const input = make("input", "");
  input.type = "text";
  input.inputMode = "decimal";
  input.placeholder = "new value";
  input.setAttribute("aria-label", `New value of ${name}`);
  // A key of several places is a path, which ends with the name.
  const last = name.match(/([A-Za-z_]\w*)['"\])]*$/);
  const target = last && last[1] !== name ? { name: last[1], path: name } : { name };
  const set = make("button", "small", "Set");
  set.type = "submit";
  const scale = (factor, text) => {
    const button = make("button", "small", text);
    button.type = "button";
    button.addEventListener("click", () => command({ kind: "scale_hyperparam", ...target, factor }, `${name} ${text}`));
    return button;
  };
  const form = make("form", "", input, set, scale(0.5, "÷2"), scale(2, "×2"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = input.value.trim().replace(",", ".");
    const value = text === "true" || text === "false" ? text === "true" : Number(text);
    if (text === "" || Number.isNaN(value)) {
      toast(`“${input.value}” is not a number`, "bad");
      return;
    }
    input.value = "";
    command({ kind: "set_hyperparam", ...target, value }, `${name} = ${number(value)}`);
  });
  row.append(form);
  return row;
}

function showLog(id, rows, row) {
  $(id).replaceChildren(...(rows || []).slice(-60).reverse().map(row));
}

function logRow(row, what, more, bad = false) {
  const item = make("li", "", make("span", "what", ...what), make("span", "step", `step ${whole(row.step)}`));
  item.append(make("span", bad ? "more bad" : "more", more || ""), make("span", "when", clock(row.time)));
  return item;
}

function changeRow(row) {
  const by = [row.by && `by ${row.by}`, row.reason].filter(Boolean).join(": ");
  return logRow(row, [make("b", "", row.name), ` ${number(row.old)} → ${number(row.new)}`], by);
}

function alertRow(row) {
  const open = row.resolved === null;
  const badge = make("span", open ? `badge ${row.severity}` : "badge", open ? row.severity : `resolved at ${whole(row.resolved)}`);
  return logRow(row, [make("b", "", row.name), " ", badge], row.message);
}

function commandRow(row) {
  const by = [row.by, row.reason].filter(Boolean).join(": ");
  const item = logRow(row, [row.text], row.rejected === null ? by : `rejected: ${row.rejected}`, row.rejected !== null);
  item.title = row.rejected === null ? `took effect at the boundary of step ${row.step}` : "";
  return item;
}

function checkpointRow(row) {
  const colour = { committed: "completed", uploaded: "completed", writing: "paused" }[row.state] || "failed";
  const size = row.size_bytes === null ? "" : `${bytes(row.size_bytes)} in ${number(row.duration_s)} s`;
  const what = [make("b", "", row.tag || row.name || "checkpoint"), " ", make("span", `badge ${colour}`, row.state)];
  const item = logRow(row, what, row.detail || size, Boolean(row.detail));
  const when = item.querySelector(".when");
  when.title = clock(row.time);
  when.dataset.time = row.time;
  showAge(when);
  return item;
}

// Tables have no time.
function showAge(when) {
  const time = Number(when.dataset.time);
  if (time > 0) when.textContent = `${duration(Math.max(0, Date.now() / 1000 + offset_s - time))} ago`;
}

function noticeRow(row) {
  return logRow(row, [make("b", "", row.subject)], row.text);
}

function showSamples(rows) {
  $("samples-card").hidden = !rows?.length;
  const figures = (rows || []).map((row) => {
    const caption = make("figcaption", "", make("b", "", row.name), ` step ${whole(row.step)}`);
    const shown = make(row.image ? "img" : "pre", "", row.image ? null : row.text);
    if (row.image) {
      shown.src = `data:image/png;base64,${row.image}`;
      shown.alt = row.name;
    }
    return make("figure", "", caption, shown);
  });
  $("samples").replaceChildren(...figures);
}

// Of a run that is read from its files, the names are those of the samples that it has made.
function showSamplers(sections) {
  const made = (sections.samples || []).map((row) => row.name);
  const names = [...new Set([...(sections.sample_names || []), ...made])];
  const shape = JSON.stringify(names);
  if ($("samplers").dataset.shape === shape) return;
  $("samplers").dataset.shape = shape;
  const buttons = names.map((name) => {
    const button = make("button", "", `Sample ${name}`);
    button.type = "button";
    button.title = "Have the model make this sample now";
    button.addEventListener("click", () => command({ kind: "take_sample", name }, `sample ${name}`));
    return button;
  });
  $("samplers").replaceChildren(...buttons);
}

const MACHINE = /percent$|bytes$|_c$|_w$|share$/;

function showMachine(run) {
  const sources = Object.entries(run.sections.machine || {});
  const tiles = [];
  for (const [source, metrics] of sources) {
    for (const [name, value] of Object.entries(metrics)) {
      if (!MACHINE.test(name) || /total_bytes$|limit_bytes$/.test(name)) continue;
      const total = metrics[name.replace(/(used|available|peak)_bytes$/, "total_bytes")] ?? metrics[name.replace(/used_bytes$/, "limit_bytes")];
      tiles.push(tile(name, value, total === value ? undefined : total, run.curves.machine.get(`${source}/${name}`)));
    }
  }
  $("machine").replaceChildren(...tiles.slice(0, 24));
  $("machine-card").hidden = tiles.length === 0;
}

function tile(name, value, total, curve) {
  const unit = { percent: "%", c: "°C", w: "W" }[name.split("_").pop()];
  let text = unit ? `${number(Number(Number(value).toPrecision(3)))} ${unit}` : number(value);
  if (name.endsWith("bytes")) text = bytes(value) + (total ? ` of ${bytes(total)}` : "");
  if (name.endsWith("share")) text = `${(value * 100).toFixed(1)} %`;
  const label = name.replace(/_(percent|bytes|c|w)$/, "").replaceAll("_", " ");
  return make("div", "tile", make("div", "label", label), make("div", "value", text), curve ? sparkline(curve) : null);
}

function showLoop(loop) {
  $("loop-card").hidden = !loop || !loop.duration_s;
  if ($("loop-card").hidden) return;
  const parts = [
    ["dispatching steps", loop.dispatch_s],
    ["waiting for the device", loop.device_wait_s],
    ["waiting for data", loop.data_wait_s],
    ["waiting for subscribers", loop.observer_wait_s],
    ["handing over metrics", loop.observing_s],
  ];
  const rest = loop.duration_s - parts.reduce((sum, [, value]) => sum + value, 0);
  parts.push(["compiling, evaluating, pauses", Math.max(0, rest)]);
  const stack = make("div", "stack");
  const shares = make("div", "shares");
  parts.forEach(([label, value], index) => {
    const share = value / loop.duration_s;
    const segment = make("div", `k${index + 1}`);
    segment.style.width = `${share * 100}%`;
    stack.append(segment);
    shares.append(make("div", "", make("i", `k${index + 1}`), label, make("b", "", `${(share * 100).toFixed(1)} %`)));
  });
  $("loop").replaceChildren(stack, shares);
}

function showSubscribers(rows) {
  $("subscribers-card").hidden = !rows?.length;
  if (!rows) return;
  const head = ["", "handled", "pending", "lag", "CPU", "CPU in all", "longest", "errors", "dropped"];
  const table = [make("tr", "", ...head.map((text) => make("th", "", text)))];
  for (const row of rows) {
    const cell = (text, level = "") => make("td", level, text);
    const count = (value, level) => cell(value.toLocaleString("en"), value ? level : "zero");
    const name = make("td", "", row.name);
    if (row.state !== "active") name.append(" ", make("span", "badge failed", row.state));
    table.push(
      make(
        "tr",
        "",
        name,
        cell(row.delivered.toLocaleString("en")),
        count(row.pending, ""),
        cell(row.lag_s ? `${number(row.lag_s)} s` : "0", row.lag_s > 1 ? "warn" : row.lag_s ? "" : "zero"),
        cell(`${(row.cpu * 100).toFixed(1)} %`, row.cpu > 0.25 ? "warn" : row.cpu < 0.0005 ? "zero" : ""),
        cell(`${number(row.cpu_s)} s`),
        cell(`${number(row.longest_s * 1000)} ms`, row.longest_s > 0.25 ? "warn" : ""),
        count(row.errors, "bad"),
        count(row.dropped, "warn"),
      ),
    );
  }
  $("subscribers").replaceChildren(...table);
}

// --- commands -------------------------------------------------------------------------------------------------

function toast(text, level = "") {
  const element = make("div", `toast ${level}`, text);
  $("toasts").append(element);
  setTimeout(() => element.remove(), level === "bad" ? 9000 : 5000);
}

async function post(path, body) {
  const headers = { "Content-Type": "application/json", Authorization: `Bearer ${token}` };
  const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), credentials: "omit" });
  return { status: answer.status, ...(await answer.json()) };
}

async function command(command, text) {
  try {
    const answer = await post("api/commands", { run: chosen, command });
    if (answer.error) toast(`${text}: ${answer.error}`, "bad");
    else if (answer.pending) toast(`${text}: ${answer.pending}`, "wait");
    else toast(`${text}: took effect at step ${answer.step.toLocaleString("en")}`);
  } catch (error) {
    toast(`${text}: ${error.message}`, "bad");
  }
}

async function action(name) {
  try {
    const answer = await post("api/actions", { run: chosen, action: name });
    toast(answer.error ? `${name}: ${answer.error}` : `${name}: requested`, answer.error ? "bad" : "");
  } catch (error) {
    toast(`${name}: ${error.message}`, "bad");
  }
}

const paused = () => runs.get(chosen)?.sections.status.state === "paused";
const commands = {
  pause: () => (paused() ? command({ kind: "resume" }, "resume") : command({ kind: "pause" }, "pause")),
  evaluate: () => command({ kind: "evaluate" }, "evaluate"),
  checkpoint: () => command({ kind: "save_checkpoint" }, "checkpoint"),
  profile: () => command({ kind: "profile", steps: Number($("profile-steps").value) || 10 }, "profile"),
  stop: () => $("stop-dialog").showModal(),
};
for (const [name, run] of Object.entries(commands)) $(name).addEventListener("click", run);
$("stop-cancel").addEventListener("click", () => $("stop-dialog").close());
$("stop-form").addEventListener("submit", () => {
  const reason = $("stop-reason").value.trim();
  $("stop-reason").value = "";
  command({ kind: "stop", reason }, "stop");
});

function showActions() {
  const buttons = Object.entries(hello.actions).map(([name, text]) => {
    const button = make("button", "", name);
    button.type = "button";
    button.title = text;
    button.addEventListener("click", () => action(name));
    return button;
  });
  $("actions").replaceChildren(...buttons);
}

// --- controls of the view ---------------------------------------------------------------------------------------

function press(id, value) {
  $(id).setAttribute("aria-pressed", String(value));
}

function toggle(id) {
  view[id] = !view[id];
  store(id, String(view[id]));
  press(id, view[id]);
  view.redrawAll();
}

function setSmoothing(value) {
  view.smoothing = Math.min(0.99, Math.max(0, value));
  $("smoothing").value = String(view.smoothing);
  $("smoothing-value").textContent = String(Number(view.smoothing.toFixed(2)));
  store("smoothing", String(view.smoothing));
  view.redrawAll();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  view.redrawAll();
}

const dark = matchMedia("(prefers-color-scheme: dark)");
function toggleTheme() {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  store("theme", theme);
  setTheme(theme);
}
dark.addEventListener("change", () => store("theme") || setTheme(dark.matches ? "dark" : "light"));

for (const id of ["log", "band", "marks"]) {
  press(id, view[id]);
  $(id).addEventListener("click", () => toggle(id));
}
$("smoothing").addEventListener("input", (event) => setSmoothing(Number(event.target.value)));
$("filter").addEventListener("input", (event) => {
  view.filter = event.target.value;
  view.redraw();
});
$("unzoom").addEventListener("click", () => view.setZoom(null));
$("theme").addEventListener("click", toggleTheme);
$("help").addEventListener("click", () => $("help-dialog").showModal());

const keys = {
  "/": () => $("filter").focus(),
  "[": () => setSmoothing(view.smoothing - 0.1),
  "]": () => setSmoothing(view.smoothing + 0.1),
  "?": () => $("help-dialog").showModal(),
  l: () => toggle("log"),
  b: () => toggle("band"),
  m: () => toggle("marks"),
  t: toggleTheme,
  p: () => $("buttons").hidden || commands.pause(),
  e: () => $("buttons").hidden || commands.evaluate(),
  c: () => $("buttons").hidden || commands.checkpoint(),
  s: () => $("buttons").hidden || commands.stop(),
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.activeElement?.blur();
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || document.querySelector("dialog[open]")) return;
  if (/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && event.target.type !== "range") return;
  const run = /^[1-9]$/.test(event.key) ? [...runs.values()][Number(event.key) - 1] : null;
  const key = run ? () => toggleRun(run) : keys[event.key];
  if (!key) return;
  event.preventDefault();
  key();
});

// --- the connection ----------------------------------------------------------------------------------------------

function connection(text, level) {
  $("connection").textContent = text;
  $("connection").className = `connection ${level}`;
}

// The token is moved from the address to the memory of this tab, so that it is neither in the history nor on the screen.
function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    store("token", given);
    history.replaceState(null, "", location.pathname + location.search);
  }
  token = given || store("token") || "";
}

function askForToken() {
  return new Promise((resolve) => {
    $("token-dialog").showModal();
    $("token-form").onsubmit = () => {
      token = $("token-input").value.trim();
      store("token", token);
      $("token-input").value = "";
      resolve();
    };
  });
}

async function read() {
  const answer = await fetch("api/stream", { headers: { Authorization: `Bearer ${token}` }, credentials: "omit", cache: "no-store" });
  if (answer.status === 401) {
    connection("no valid token", "lost");
    await askForToken();
    return;
  }
  if (!answer.ok) throw new Error((await answer.json()).error);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) message(part);
  }
}

function message(part) {
  const lines = part.split("\n");
  const data = lines.find((line) => line.startsWith("data: "));
  if (!data) return;
  const parsed = JSON.parse(data.slice(6));
  if (lines.includes("event: hello")) {
    hello = parsed;
    offset_s = hello.time - Date.now() / 1000;
    connection(hello.control ? "live" : "live, read-only", "live");
    showActions();
  } else {
    take(parsed);
  }
}

async function main() {
  takeToken();
  setTheme(store("theme") || (dark.matches ? "dark" : "light"));
  setSmoothing(view.smoothing);
  if (!token) await askForToken();
  for (;;) {
    try {
      await read();
      connection("connecting", "");
    } catch (error) {
      connection("no connection", "lost");
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

setInterval(() => {
  if (runs.has(chosen)) showStatus(runs.get(chosen).sections);
  document.querySelectorAll("[data-time]").forEach(showAge);
}, 1000);
window.addEventListener("hashchange", () => {
  takeToken();
});
main();
