"use strict";
// Draws the curves of a report from the JSON in the page. Text goes in as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const shown = new Set(data.groups.map((group, i) => (group.shown ? i : -1)).filter((i) => i >= 0));
  const axisOf = (name) => data.axes.find((axis) => axis.name === name);
  let axis = axisOf(data.x);

  const SVG = "http://www.w3.org/2000/svg";
  const make = (name, attributes, parent) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.append(element);
    return element;
  };
  const write = (text, attributes, parent) => {
    make("text", attributes, parent).textContent = text;
  };

  // Numbers as people read them.
  const UNITS = {
    bytes: [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]],
    seconds: [[3600, "h"], [60, "min"], [1, "s"], [1e-3, "ms"]],
    count: [[1, ""]],
  };
  const unitFor = (most, unit) => {
    const units = UNITS[unit];
    return units.find(([factor]) => most >= factor) || units[units.length - 1];
  };
  const digits = (value, places = 4) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-3 || size >= 1e6) {
      return value.toExponential(Math.min(2, places)).replace(/\.?0*e\+?/, "e");
    }
    return String(Number(value.toPrecision(places)));
  };
  const withUnit = (value, unit) => {
    const [factor, name] = unitFor(Math.abs(value), unit);
    return `${digits(value / factor)} ${name}`.trim();
  };

  // Where ticks stand: 1, 2 or 5 times a power of ten; or powers of ten.
  const linearTicks = (low, high, count) => {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
      ticks.push(Number((i * step).toPrecision(12)));
    }
    return ticks;
  };
  const logTicks = (low, high, count) => {
    const decades = Math.log10(high / low);
    const multiples = decades < 1 ? [1, 2, 3, 5, 7] : decades < 2.5 ? [1, 2, 5] : [1];
    const every = Math.max(1, Math.ceil(decades / count));
    const ticks = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
      if (e % every) continue;
      for (const m of multiples) {
        const tick = Number((m * 10 ** e).toPrecision(12));
        if (tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9)) ticks.push(tick);
      }
    }
    return ticks.length > 1 ? ticks : linearTicks(low, high, count);
  };
  const scale = (low, high, from, to, log) => {
    const f = log ? Math.log : (v) => v;
    const [a, b] = [f(low), f(high)];
    return (value) => from + ((f(value) - a) / (b - a)) * (to - from);
  };
  const range = (lists, positive) => {
    let [low, high] = [Infinity, -Infinity];
    for (const list of lists) {
      for (const value of list) {
        if (positive && value <= 0) continue;
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    }
    return [low, high];
  };

  class Chart {
    constructor(figure, content) {
      this.content = content;
      this.plot = figure.querySelector(".plot");
      this.logY = figure.querySelector(".log");
      this.logX = figure.querySelector(".logx");
      for (const button of [this.logY, this.logX]) {
        button.addEventListener("click", () => {
          button.setAttribute("aria-pressed", String(button.ariaPressed !== "true"));
          this.draw();
        });
      }
      this.plot.addEventListener("pointermove", (event) => {
        const box = this.svg.getBoundingClientRect();
        this.point(((event.clientX - box.left) * this.width) / box.width, event);
      });
      this.plot.addEventListener("pointerleave", () => this.leave());
      this.plot.addEventListener("blur", () => this.leave());
      this.plot.addEventListener("keydown", (event) => {
        const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (!way) return;
        event.preventDefault();
        const box = this.svg.getBoundingClientRect();
        const x = Math.min(this.right, Math.max(this.left, (this.at ?? this.left) + way * 8));
        this.point(x, { clientX: box.left + x, clientY: box.top + 40 });
      });
    }

    draw() {
      this.leave();
      const width = (this.width = Math.max(260, this.plot.clientWidth));
      const height = Math.round(Math.min(340, Math.max(220, width * 0.56)));
      const [left, right, top, bottom] = [62, width - 16, 10, height - 44];
      Object.assign(this, { left, right, top, bottom });
      this.plot.replaceChildren();
      const svg = (this.svg = make("svg", { viewBox: `0 0 ${width} ${height}` }, this.plot));
      const [logX, logY] = [this.logX.ariaPressed === "true", this.logY.ariaPressed === "true"];
      const curves = this.content.curves.filter((c) => shown.has(c.group) && c.x[axis.name]);
      const [xLow, xHigh] = range(curves.map((c) => c.x[axis.name]), logX);
      let [yLow, yHigh] = range(curves.flatMap((c) => [c.mean, c.low, c.high]), logY);
      this.curves = [];
      if (!(xHigh > -Infinity && yHigh > -Infinity)) {
        const why = curves.length ? "no value above zero" : "no curve chosen";
        write(why, { x: width / 2, y: height / 2, "text-anchor": "middle" }, svg);
        return;
      }
      if (logY) {
        const room = (yHigh / yLow) ** 0.05;
        [yLow, yHigh] = yHigh > yLow ? [yLow / room, yHigh * room] : [yLow / 2, yHigh * 2];
      } else {
        const room = (yHigh - yLow) * 0.06 || Math.abs(yHigh) * 0.5 || 1;
        [yLow, yHigh] = [yLow >= 0 && yLow < room * 4 ? 0 : yLow - room, yHigh + room];
      }
      const start = logX ? xLow : 0;
      const x = scale(start, xHigh > start ? xHigh : start * 2 || 1, left, right, logX);
      const y = scale(yLow, yHigh, bottom, top, logY);
      this.axes(x, y, [start, xHigh], [yLow, yHigh], logX, logY);

      const clip = `clip${charts.indexOf(this)}`;
      const area = make("clipPath", { id: clip }, make("defs", {}, svg));
      make("rect", { x: left, y: top - 4, width: right - left + 4, height: bottom - top + 4 }, area);
      const bands = make("g", { "clip-path": `url(#${clip})` }, svg);
      const lines = make("g", { "clip-path": `url(#${clip})` }, svg);
      const hidden = [];
      for (const curve of curves) {
        const group = data.groups[curve.group];
        const colour = `var(--c${group.colour})`;
        const along = curve.x[axis.name];
        const onAxis = (i) => (!logX || along[i] > 0) && (!logY || curve.mean[i] > 0);
        const points = along.map((_, i) => i).filter(onAxis);
        if (!points.length) {
          hidden.push(group.label);
          continue;
        }
        const at = (i, value) => [x(along[i]), y(logY ? Math.max(value, yLow) : value)];
        const top_ = this.path(points.map((i) => at(i, curve.high[i])));
        const back = this.path(points.map((i) => at(i, curve.low[i])), true);
        make("path", { d: `M${top_}L${back}Z`, class: "band", fill: colour }, bands);
        const line = this.path(points.map((i) => at(i, curve.mean[i])));
        const dash = { d: `M${line}`, class: "curve", stroke: colour, "stroke-dasharray": group.dash };
        make("path", dash, lines);
        if (points.length === 1) {
          const [cx, cy] = at(points[0], curve.mean[points[0]]);
          make("circle", { cx, cy, r: 3.5, fill: colour, class: "curve" }, lines);
        }
        this.curves.push({ curve, group, colour, points, px: points.map((i) => x(along[i])), y });
      }
      if (hidden.length) {
        const text = `not above zero: ${hidden.join("; ")}`;
        write(text.length > 60 ? `${text.slice(0, 59)}…` : text, { x: left + 6, y: bottom - 7 }, svg);
      }
      this.cross = make("g", {}, svg);
    }

    // Corners of a line; of one that holds its value from record to record, a staircase's.
    path(points, reversed = false) {
      const corners = [];
      points.forEach(([px, py], i) => {
        if (this.content.steps && i) corners.push([px, points[i - 1][1]]);
        corners.push([px, py]);
      });
      if (reversed) corners.reverse();
      return corners.map(([px, py]) => `${px.toFixed(1)},${py.toFixed(1)}`).join("L");
    }

    axes(x, y, [xLow, xHigh], [yLow, yHigh], logX, logY) {
      const { svg, left, right, top, bottom } = this;
      for (const tick of (logY ? logTicks : linearTicks)(yLow, yHigh, 6)) {
        const at = y(tick);
        make("line", { x1: left, x2: right, y1: at, y2: at, class: "tick" }, svg);
        write(digits(tick), { x: left - 8, y: at + 4, "text-anchor": "end" }, svg);
      }
      const [factor, unit] = unitFor(xHigh, axis.unit);
      const count = Math.max(3, Math.min(8, (right - left) / 75));
      const ticks = (logX ? logTicks : linearTicks)(xLow / factor, xHigh / factor, count);
      for (const tick of ticks) {
        const at = x(tick * factor);
        make("line", { x1: at, x2: at, y1: bottom, y2: bottom + 4, class: "base" }, svg);
        write(digits(tick), { x: at, y: bottom + 18, "text-anchor": "middle" }, svg);
      }
      make("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "base" }, svg);
      const name = unit ? `${axis.title} (${unit})` : axis.title;
      write(name, { x: (left + right) / 2, y: bottom + 38, "text-anchor": "middle" }, svg);
    }

    point(px, event) {
      if (!this.curves.length) return;
      this.at = px;
      this.cross.replaceChildren();
      const rows = [];
      for (const { curve, group, colour, points, px: places, y } of this.curves) {
        let best = 0;
        places.forEach((place, k) => {
          if (Math.abs(place - px) < Math.abs(places[best] - px)) best = k;
        });
        const near = places.length === 1 ? Infinity : 14;
        if (px > places[places.length - 1] + near || px < places[0] - near) continue;
        const i = points[best];
        rows.push({ group, colour, curve, i, cx: places[best], cy: y(curve.mean[i]) });
      }
      if (!rows.length) return this.leave();
      rows.sort((a, b) => b.curve.mean[b.i] - a.curve.mean[a.i]);
      const nearest = rows.reduce((a, b) => (Math.abs(b.cx - px) < Math.abs(a.cx - px) ? b : a));
      const line = { x1: nearest.cx, x2: nearest.cx, y1: this.top, y2: this.bottom, class: "cross" };
      make("line", line, this.cross);
      for (const { colour, cx, cy } of rows) {
        make("circle", { cx, cy, r: 4, fill: colour, class: "dot" }, this.cross);
      }
      tell(withUnit(nearest.curve.x[axis.name][nearest.i], axis.unit), rows, event);
    }

    leave() {
      this.at = undefined;
      if (this.cross) this.cross.replaceChildren();
      tip.hidden = true;
    }
  }

  const tip = document.getElementById("tip");
  const cell = (row, name, text) => {
    const made = row.insertCell();
    made.className = name;
    made.textContent = text;
    return made;
  };
  const tell = (where, rows, event) => {
    const head = document.createElement("b");
    head.textContent = axis.name === "step" ? `step ${where}` : where;
    const table = document.createElement("table");
    for (const { group, colour, curve, i } of rows) {
      const row = table.insertRow();
      const swatch = document.createElement("i");
      swatch.style.background = colour;
      cell(row, "swatch", "").append(swatch);
      cell(row, "who", group.label);
      cell(row, "value", digits(curve.mean[i]));
      const spread = curve.high[i] > curve.low[i];
      cell(row, "range", spread ? `${digits(curve.low[i], 3)} – ${digits(curve.high[i], 3)}` : "");
    }
    tip.replaceChildren(head, table);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const beside = event.clientX + 18;
    const fits = beside + box.width < innerWidth - 8;
    tip.style.left = `${Math.max(8, fits ? beside : event.clientX - box.width - 18)}px`;
    tip.style.top = `${Math.max(8, Math.min(event.clientY + 14, innerHeight - box.height - 8))}px`;
  };

  const charts = [...document.querySelectorAll(".chart")].map(
    (figure) => new Chart(figure, data.charts[Number(figure.dataset.chart)]),
  );
  const drawAll = () => charts.forEach((chart) => chart.draw());

  const keys = [...document.querySelectorAll(".key")];
  const choose = () => {
    keys.forEach((key, i) => key.setAttribute("aria-pressed", String(shown.has(i))));
    drawAll();
  };
  keys.forEach((key, i) =>
    key.addEventListener("click", () => {
      if (!shown.delete(i)) shown.add(i);
      choose();
    }),
  );
  document.getElementById("all")?.addEventListener("click", () => {
    keys.forEach((_, i) => shown.add(i));
    choose();
  });
  document.getElementById("none")?.addEventListener("click", () => {
    shown.clear();
    choose();
  });
  const axes = [...document.querySelectorAll("[data-axis]")];
  axes.forEach((button) =>
    button.addEventListener("click", () => {
      axis = axisOf(button.dataset.axis);
      axes.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      drawAll();
    }),
  );
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  let width = 0;
  new ResizeObserver(() => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    drawAll();
  }).observe(document.body);
  choose();
})();
