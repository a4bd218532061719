"use strict";
// Draws the charts and the traces of the data that stands in the page. Every mark of a chart leads to a trace.
const data = JSON.parse(document.getElementById("data").textContent);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const element = (tag, attributes = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
};
const clock = (unixMs) => new Date(unixMs).toISOString().slice(11, 19);
const round = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : Number(value.toPrecision(3)).toString());

// --- charts ---

const timeAxis = () => ({
  type: "linear",
  min: data.bins[0],
  max: data.bins[data.bins.length - 1] + data.bin_ms,
  ticks: { callback: (value) => clock(value), maxTicksLimit: 6, maxRotation: 0, color: color("--faint") },
  grid: { color: color("--line") },
});
const axis = (title, more = {}) => ({
  beginAtZero: true,
  title: { display: true, text: title, color: color("--faint") },
  ticks: { color: color("--faint") },
  grid: { color: color("--line") },
  ...more,
});
const middle = (bin) => data.bins[bin] + data.bin_ms / 2;
// A point of a bin leads to the trace that shows it best.
const inBins = (values) => values.map((y, bin) => ({ x: middle(bin), y, trace: data.best[bin] }));

// There are fewer colours than there may be parts.
const ofSeries = (number) => color(`--c${number % 12}`);
const KINDS = {
  ordinary: "--c0", "large requests": "--c2", "mostly padding": "--c4", "slower than usual": "--c3", failed: "--c9",
  decodes: "--c0", "computes prompts": "--c6",
};

const charts = {
  causes: () => ({
    type: "bar",
    data: {
      labels: data.causes.edges.slice(0, -1).map(round),
      datasets: data.causes.causes.map(({ cause, requests, traces }, number) => ({
        label: cause,
        data: requests.map((y, bin) => ({ x: round(data.causes.edges[bin]), y, trace: traces[bin] })),
        backgroundColor: number ? ofSeries(number + 1) : color("--c11"), barPercentage: 1, categoryPercentage: 0.96,
      })),
    },
    options: {
      scales: {
        x: { stacked: true, title: { display: true, text: "ms or more", color: color("--faint") }, ticks: { color: color("--faint"), maxTicksLimit: 10, maxRotation: 0 }, grid: { display: false } },
        y: axis("requests", { stacked: true, ticks: { precision: 0, color: color("--faint") } }),
      },
    },
  }),
  timeline: () => {
    const rows = ["device", ...data.timeline.waiting.map(({ trace }, number) => `${number + 1}: ${trace.slice(0, 8)}`)];
    const times = [...data.timeline.blocks, ...data.timeline.waiting].flatMap(({ from, to }) => [from, to]);
    const kinds = [...new Set(data.timeline.blocks.map(({ kind }) => kind))];
    const bars = (label, marks, paint) => ({ label, data: marks, backgroundColor: paint, borderColor: color("--panel"), borderWidth: 1, borderSkipped: false, grouped: false, barPercentage: 0.9, categoryPercentage: 1 });
    return {
      type: "bar",
      data: {
        labels: rows,
        datasets: [
          ...kinds.map((kind) => bars(kind, data.timeline.blocks.filter((block) => block.kind === kind).map(({ from, to, text, trace }) => ({ x: [from, to], y: "device", text, trace })), color(KINDS[kind]))),
          ...(data.timeline.waiting.length ? [bars("waits", data.timeline.waiting.map(({ from, to, trace }, number) => ({ x: [from, to], y: rows[number + 1], trace })), color("--c8"))] : []),
        ],
      },
      options: {
        indexAxis: "y",
        scales: {
          x: { ...timeAxis(), min: Math.min(...times), max: Math.max(...times), ticks: { callback: (value) => new Date(value).toISOString().slice(14, 22), maxTicksLimit: 6, maxRotation: 0, color: color("--faint") } },
          y: { ticks: { color: color("--faint"), autoSkip: false, font: { size: 10 } }, grid: { display: false } },
        },
      },
    };
  },
  latency: () => ({
    type: "bar",
    data: {
      datasets: data.latency.map(({ part, ms }, number) => ({
        label: part, data: inBins(ms), backgroundColor: ofSeries(number), barPercentage: 1, categoryPercentage: 0.96,
      })),
    },
    options: {
      scales: { x: { ...timeAxis(), stacked: true, offset: false }, y: axis("ms per request", { stacked: true }) },
    },
  }),
  cold: () => ({
    type: "bar",
    data: {
      datasets: [
        { label: "requests that waited for a load", data: data.cold.requests.map((y, bin) => ({ x: middle(bin), y, trace: data.cold.traces[bin] })), backgroundColor: color("--c2"), barPercentage: 1 },
        { type: "scatter", label: "load of a model replica, s", data: data.cold.loads, yAxisID: "loads", backgroundColor: color("--c0"), pointStyle: "triangle", radius: 7 },
      ],
    },
    options: {
      scales: { x: { ...timeAxis(), offset: false }, y: axis("requests", { ticks: { precision: 0, color: color("--faint") } }), loads: axis("load, s", { position: "right", grid: { display: false } }) },
    },
  }),
  device: () => ({
    type: "scatter",
    data: {
      datasets: [
        { label: data.device.what, data: inBins(data.device.percent), yAxisID: "percent", showLine: true, backgroundColor: color("--c1"), borderColor: color("--c1"), pointStyle: "rectRot", borderWidth: 1.5 },
        { label: "slowest request", data: inBins(data.device.slowest_ms), backgroundColor: color("--c2"), borderColor: color("--c2"), showLine: true, borderWidth: 1.5 },
        { label: "median request", data: inBins(data.device.median_ms), backgroundColor: color("--c0"), borderColor: color("--c0"), showLine: true, borderWidth: 1.5 },
      ],
    },
    options: {
      scales: { x: timeAxis(), y: axis("latency, ms"), percent: axis("%", { position: "right", max: 100, grid: { display: false } }) },
    },
  }),
  tokens: () => ({
    type: "scatter",
    data: {
      datasets: [
        { label: "slow requests", data: data.tokens.slow, backgroundColor: color("--c2"), pointStyle: "triangle", radius: 5 },
        { label: "other requests", data: data.tokens.others, backgroundColor: color("--c0"), radius: 3 },
        { label: "cost of a run of that many tokens alone (fitted)", data: data.tokens.fit, showLine: true, pointRadius: 0, borderColor: color("--faint"), backgroundColor: color("--faint"), borderDash: [6, 4], borderWidth: 1.5 },
      ],
    },
    options: { scales: { x: axis("tokens of the request"), y: axis("forward, ms") } },
  }),
  batches: () => ({
    type: "scatter",
    data: {
      datasets: [
        { label: "inputs in a run (mean)", data: data.batches.size.map((y, bin) => ({ x: middle(bin), y, trace: data.batches.traces[bin] })), showLine: true, borderColor: color("--c0"), backgroundColor: color("--c0"), borderWidth: 1.5 },
        { label: "padding, % of its tokens", data: data.batches.padding.map((y, bin) => ({ x: middle(bin), y, trace: data.batches.traces[bin] })), yAxisID: "percent", showLine: true, borderColor: color("--c4"), backgroundColor: color("--c4"), pointStyle: "rectRot", borderWidth: 1.5 },
      ],
    },
    options: {
      scales: { x: timeAxis(), y: axis("inputs"), percent: axis("%", { position: "right", max: 100, grid: { display: false } }) },
    },
  }),
};

const TITLES = {
  causes: ({ x }) => `${x} ms or more`,
  timeline: ({ x }) => `${clock(x[0])}, ${round(x[0] % 1000)} ms`,
  tokens: ({ x }) => `${x} tokens`,
};
let drawn = [];
function draw() {
  drawn.forEach((chart) => chart.destroy());
  drawn = Object.entries(charts).map(([name, make]) => {
    const { type, data: content, options } = make();
    return new Chart(document.getElementById(`chart-${name}`), {
      type,
      data: content,
      options: {
        ...options,
        animation: false,
        maintainAspectRatio: false,
        spanGaps: false,
        interaction: { mode: "nearest", intersect: true },
        onClick: (_, hits, chart) => hits.length && open(traceOf(chart, hits[0])),
        onHover: (event, hits, chart) => {
          event.native.target.style.cursor = hits.some((hit) => traceOf(chart, hit)) ? "pointer" : "default";
        },
        plugins: {
          legend: { labels: { color: color("--ink"), boxWidth: 9, boxHeight: 9, usePointStyle: type === "scatter" } },
          tooltip: {
            callbacks: {
              title: (items) => TITLES[name]?.(items[0].raw) ?? clock(items[0].raw.x),
              label: (item) => (name === "timeline" ? `${item.dataset.label}, ${round(item.raw.x[1] - item.raw.x[0])} ms${item.raw.text ? `: ${item.raw.text}` : ""}` : `${item.dataset.label}: ${round(item.raw.y)}`),
              footer: (items) => (items[0].raw.trace ? "click to open a trace" : ""),
            },
          },
        },
      },
    });
  });
}

const traceOf = (chart, { datasetIndex, index }) => chart.data.datasets[datasetIndex].data[index].trace;

function open(trace) {
  if (!trace) return;
  if (location.hash === `#${trace}`) show();
  location.hash = trace;
}

// --- one trace ---

function bar([depth, name, service, startMs, tookMs, failed, shown], scaleMs) {
  const left = Math.min(99.5, Math.max(0, (100 * startMs) / scaleMs));
  const fill = element("i", { className: failed ? "failed" : "" });
  fill.style.left = `${left}%`;
  fill.style.width = `${Math.min(100 - left, (100 * tookMs) / scaleMs)}%`;
  const label = element("span", { className: "name" }, name, element("span", { className: "note" }, ` ${service}`));
  label.style.paddingLeft = `${depth * 0.8}rem`;
  const row = element("div", { className: "row" }, label, element("span", { className: "took" }, `${round(tookMs)} ms`), element("div", { className: "track" }, fill));
  if (shown) row.append(element("span", { className: "shown" }, shown));
  return row;
}

function link(trace) {
  return data.traces[trace]
    ? element("a", { href: `#${trace}`, className: "trace-id" }, trace)
    : element("span", { className: "trace-id" }, trace);
}

function show() {
  const place = document.getElementById("trace");
  const id = location.hash.slice(1);
  const trace = data.traces[id];
  place.hidden = !trace;
  if (!trace) return;
  const close = element("button", { type: "button", onclick: () => { place.hidden = true; history.replaceState(null, "", " "); } }, "close");
  place.replaceChildren(element("h2", {}, "Trace ", element("span", { className: "trace-id" }, id), " ", close));
  place.append(element("p", { className: "note" }, `${clock(trace.at)}, ${round(trace.ms)} ms, ${trace.spent}`));
  trace.spans.forEach((span) => place.append(bar(span, trace.ms)));
  trace.runs.forEach((run) => {
    place.append(element("h2", {}, "The model run of this request"));
    place.append(bar(run.span, trace.ms));
    if (run.members.length > 1) {
      place.append(element("p", { className: "note" }, `${run.members.length} requests in the batch; those on this page can be opened:`));
      run.members.forEach((member) => place.append(element("div", {}, link(member), member === id ? " (this one)" : "")));
    }
  });
  place.append(element("p", { className: "note" }, "In a terminal: ", element("code", {}, `slowlens trace ${id}`)));
  place.scrollIntoView();
}

const place = document.getElementById("charts");
for (const { name, title, text } of data.charts) {
  const canvas = element("canvas", { id: `chart-${name}`, role: "img" });
  canvas.setAttribute("aria-label", `${title}. ${text}`);
  place.append(element("figure", {}, element("figcaption", {}, title), element("p", {}, text), element("div", { className: "plot" }, canvas)));
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("hashchange", show);
show();
