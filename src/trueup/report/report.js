// Draws the charts in the reader's theme when they come into view, and browses the samples.
// Data comes from the two JSON elements; every text is set by textContent.
"use strict";
(() => {
  const data = (id) => JSON.parse(document.getElementById(id).textContent);

  // charts

  const figures = data("chart-data");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim() || name;

  // A copy of a figure in which the names of colours are colours.
  function paint(value, key) {
    if (Array.isArray(value)) return value.map((v) => paint(v, key));
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, paint(v, k)]));
    return typeof value === "string" && key.toLowerCase().endsWith("color") ? color(value) : value;
  }

  function layout(spec, width) {
    const out = paint(spec, "");
    const narrow = width < 480;
    const axis = {
      gridcolor: color("rule"), linecolor: color("rule"), zerolinecolor: color("rule"), automargin: true, fixedrange: coarse,
      tickfont: { size: narrow ? 10.5 : 12 },
    };
    for (const key of Object.keys(out).filter((k) => /^[xy]axis/.test(k))) {
      const title = out[key].title || {};
      out[key] = { ...axis, ...out[key], title: { standoff: 8, ...title, font: { size: narrow ? 11 : 12, color: color("muted") } } };
    }
    return {
      margin: { l: 8, r: 12, t: 8, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: coarse ? false : "zoom",
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif", size: 12, color: color("text") },
      hovermode: "closest", hoverlabel: { bgcolor: color("raised"), bordercolor: color("rule"), font: { color: color("text") } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: narrow ? 11 : 12 } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("muted"), activecolor: color("text") },
      ...out,
    };
  }

  const options = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  const drawn = new Set();

  function draw(place) {
    const figure = figures[place.dataset.chart];
    drawn.add(place);
    Plotly.react(place, paint(figure.data, ""), layout(figure.layout, place.clientWidth), options);
  }

  const places = [...document.querySelectorAll("[data-chart]")];
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        watcher.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "500px" });
  places.forEach((place) => watcher.observe(place));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
  addEventListener("beforeprint", () => places.forEach(draw));

  // the contents start closed where there is little room
  if (innerWidth < 640) document.querySelector("nav details").open = false;

  // samples

  const form = document.getElementById("filters");
  if (!form) return;
  const rows = data("sample-data").rows;
  const PAGE = 25;
  let found = [];
  let shown = 0;

  const element = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const fullModel = (row) => [row.model, row.mode || row.side].filter(Boolean).join(", ");
  const keys = { stage: (r) => r.stage, model: fullModel, category: (r) => r.category, step: (r) => (r.step === null ? "" : String(r.step)) };
  const figureNames = [...new Set(rows.flatMap((r) => Object.keys(r.figures)))];

  function fill(name, values, any) {
    const select = form.elements[name];
    const before = select.value;
    select.replaceChildren(new Option(any, ""), ...values.map(([value, text]) => new Option(text, value)));
    select.value = values.some(([v]) => v === before) ? before : "";
    select.parentElement.hidden = values.length < 2 && name !== "order";
  }

  // The choices of each filter are those that occur in the chosen stage.
  function choices() {
    fill("stage", [...new Set(rows.map(keys.stage))].map((v) => [v, v]), "every stage");
    const stage = form.elements.stage.value;
    const here = rows.filter((r) => !stage || r.stage === stage);
    for (const [name, any] of [["model", "every model"], ["category", "every category"]]) {
      fill(name, [...new Set(here.map(keys[name]))].filter(Boolean).sort().map((v) => [v, v]), any);
    }
    fill("step", [...new Set(here.map(keys.step))].filter(Boolean).sort((a, b) => a - b).map((v) => [v, v]), "every step");
  }

  const orders = [["", "as written"]];
  for (const name of figureNames) orders.push(["-" + name, name + ", highest first"], ["+" + name, name + ", lowest first"]);
  orders.push(["-length", "longest text first"]);
  form.elements.order.replaceChildren(...orders.map(([value, text]) => new Option(text, value)));

  function search() {
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    found = rows.filter((row) => {
      for (const name of Object.keys(keys)) {
        const wanted = form.elements[name].value;
        if (wanted && keys[name](row) !== wanted) return false;
      }
      if (!words.length) return true;
      const text = (row.prompt + "\n" + row.completion).toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const order = form.elements.order.value;
    if (order) {
      const name = order.slice(1);
      const sign = order[0] === "-" ? -1 : 1;
      const value = (row) => (name === "length" ? row.completion.length : row.figures[name]);
      found = found.filter((row) => value(row) !== undefined).sort((a, b) => sign * (value(a) - value(b)));
    }
    shown = 0;
    document.getElementById("rows").replaceChildren();
    more();
  }

  function card(row) {
    const out = element("article", "sample");
    const meta = element("p", "meta");
    meta.append(element("span", "chip", row.stage + (row.step === null ? "" : " · step " + row.step)));
    if (fullModel(row)) meta.append(element("span", "chip", fullModel(row)));
    if (row.category) meta.append(element("span", "chip", row.category));
    for (const [name, value] of Object.entries(row.figures)) {
      const figure = value.toFixed(2).replace("-", "−");
      meta.append(element("span", "", name === "kl" ? `KL ${figure} nats` : `${name} ${figure}`));
    }
    if (row.stop === "length") meta.append(element("span", "cut", "cut by length"));
    out.append(meta);
    for (const [role, text] of row.earlier || []) {
      const turn = element("p", "turn");
      const said = element("span", "text", text);
      said.dir = "auto";
      turn.append(element("b", "", role), " ", said);
      out.append(turn);
    }
    const prompt = element("p", "text prompt", row.prompt);
    const answer = element("div", "text answer" + (row.completion ? "" : " empty"), row.completion || "(empty)");
    prompt.dir = answer.dir = "auto";
    out.append(prompt, answer);
    return out;
  }

  function more() {
    const next = found.slice(shown, shown + PAGE);
    document.getElementById("rows").append(...next.map(card));
    shown += next.length;
    const count = (n) => n.toLocaleString("en");
    document.getElementById("count").textContent = found.length
      ? `${count(found.length)} of ${count(rows.length)} match; the first ${count(shown)} are shown.`
      : "No sample matches.";
    document.getElementById("more").hidden = shown >= found.length;
  }

  let timer;
  form.addEventListener("input", (event) => {
    clearTimeout(timer);
    if (event.target.name === "stage") choices();
    timer = setTimeout(search, event.target.name === "text" ? 150 : 0);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("more").addEventListener("click", more);
  choices();
  search();
})();
