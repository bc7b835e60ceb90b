"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const holder = document.getElementById("charts");
  if (!data.steps.length) {
    holder.textContent = "Nothing has been logged yet.";
    return;
  }

  const HEIGHT = 190;
  const MARGIN = { left: 52, right: 8, top: 8, bottom: 20 };
  const SHORTEST_DRAG = 6;
  // the part that is shown (indices into the steps), the smoothing and the step under the pointer; all charts share them
  const state = { first: 0, last: data.steps.length - 1, smoothing: 0.6, axis: "step", hover: null };
  const charts = [];

  const hasEpochs = Boolean(data.epochs) && data.epochs.every((epoch) => epoch !== null);
  const positions = () => (state.axis === "epoch" ? data.epochs : data.steps);

  function shown(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  }

  /** Round numbers that cut [low, high] in about `count` parts. */
  function ticks(low, high, count) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough) || 10 * power;
    const found = [];
    for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) {
      found.push(Math.abs(at) < step * 1e-6 ? 0 : at);
    }
    return found;
  }

  /** Powers of ten, or round numbers where there are too few of them. */
  function logTicks(low, high) {
    const found = [];
    for (let power = Math.ceil(low - 1e-9); power <= high + 1e-9; power += 1) found.push(10 ** power);
    if (found.length >= 2) return found;
    return ticks(10 ** low, 10 ** high, 4).filter((value) => value > 0);
  }

  /** Exponential moving average without a bias at the start; gaps stay gaps. */
  function smoothed(values, share) {
    let sum = 0;
    let weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = share * sum + (1 - share) * value;
      weight = share * weight + (1 - share);
      return sum / weight;
    });
  }

  function chart(spec) {
    const card = document.createElement("figure");
    card.className = "chart";
    card.innerHTML =
      '<div class="head"><h3></h3><button type="button" class="log" aria-pressed="false" title="logarithmic scale">log</button></div>' +
      '<p class="about"></p><ul class="legend"></ul><div class="plot"><svg role="img"><g class="axes"></g>' +
      '<g class="curves"></g><rect class="brush" width="0"></rect><g class="pointer"></g></svg></div>';
    const find = (selector) => card.querySelector(selector);
    find("h3").textContent = spec.title;
    find(".about").textContent = spec.about;
    find("svg").setAttribute("aria-label", spec.title);
    const values = spec.curves.map((curve, index) => {
      const item = document.createElement("li");
      const swatch = document.createElement("i");
      swatch.style.background = `var(--c${index % 4})`;
      const value = document.createElement("b");
      item.append(swatch, `${curve.name} `, value);
      find(".legend").append(item);
      return value;
    });
    holder.append(card);
    const plot = find(".plot");
    const self = { plot, log: false, smooth: [] };
    // a key that only some log steps have (a probe now and then) is joined over the gaps; elsewhere a gap is a number that was not finite
    const sparse = spec.curves.map((curve) => 2 * curve.values.filter((value) => value !== null).length < curve.values.length);
    const positive = spec.curves.every((curve) => curve.values.every((value) => value === null || value > 0));
    const toggle = find(".log");
    toggle.hidden = !positive;
    toggle.addEventListener("click", () => {
      self.log = !self.log;
      toggle.setAttribute("aria-pressed", String(self.log));
      self.draw();
    });
    self.smooth = spec.curves.map((curve) => curve.values);
    self.restyle = () => {
      self.smooth = spec.curves.map((curve) => (spec.exact ? curve.values : smoothed(curve.values, state.smoothing)));
    };

    // set by draw: from a value to a pixel
    let across = () => 0;
    let down = () => 0;
    let width = 0;

    self.draw = () => {
      width = plot.clientWidth;
      const right = width - MARGIN.right;
      const bottom = HEIGHT - MARGIN.bottom;
      const scale = self.log ? Math.log10 : (value) => value;
      const x = positions();
      const [from, to] = [x[state.first], x[state.last]];
      let low = Infinity;
      let high = -Infinity;
      spec.curves.forEach((curve, index) => {
        for (let at = state.first; at <= state.last; at += 1) {
          for (const value of [curve.values[at], self.smooth[index][at]]) {
            if (value === null) continue;
            low = Math.min(low, scale(value));
            high = Math.max(high, scale(value));
          }
        }
      });
      if (!Number.isFinite(low)) [low, high] = [0, 1];
      // a reference line is worth room while it does not flatten the curves
      const reach = Math.max(high - low, Math.abs(high) * 0.05);
      for (const line of spec.lines) {
        const value = scale(line.value);
        if (value > high && value - high < 1.5 * reach) high = value;
        if (value < low && low - value < 1.5 * reach) low = value;
      }
      if (high - low < 1e-12 * Math.max(1, Math.abs(high))) {
        const pad = Math.abs(high) * 0.1 || 1;
        [low, high] = [low - pad, high + pad];
      }
      const pad = (high - low) * 0.06;
      [low, high] = [low - pad, high + pad];
      across = (value) => MARGIN.left + ((value - from) / (to - from || 1)) * (right - MARGIN.left);
      down = (value) => bottom - ((scale(value) - low) / (high - low)) * (bottom - MARGIN.top);

      let axes = "";
      for (const value of self.log ? logTicks(low, high) : ticks(low, high, 4)) {
        const y = down(value).toFixed(1);
        axes += `<line class="gridline" x1="${MARGIN.left}" x2="${right}" y1="${y}" y2="${y}"></line>`;
        axes += `<text x="${MARGIN.left - 6}" y="${y}" dy="4" text-anchor="end">${shown(value)}</text>`;
      }
      for (const value of to > from ? ticks(from, to, Math.max(2, width / 90)) : [from]) {
        const place = across(value);
        const anchor = place > right - 14 ? "end" : "middle";
        const x = anchor === "end" ? right + MARGIN.right - 1 : place.toFixed(1);
        axes += `<text x="${x}" y="${HEIGHT - 5}" text-anchor="${anchor}">${shown(value)}</text>`;
      }
      find(".axes").innerHTML = axes;

      let curves = "";
      for (const line of spec.lines) {
        const value = scale(line.value);
        if (value < low || value > high) continue;
        const y = down(line.value).toFixed(1);
        curves += `<line class="reference" stroke="var(--c${line.curve % 4})" x1="${MARGIN.left}" x2="${right}" y1="${y}" y2="${y}"></line>`;
      }
      spec.curves.forEach((curve, index) => {
        const color = `var(--c${index % 4})`;
        if (state.smoothing > 0 && !spec.exact) {
          curves += `<path class="raw" stroke="${color}" d="${path(curve.values, sparse[index])}"></path>`;
        }
        curves += `<path class="curve" stroke="${color}" d="${path(self.smooth[index], sparse[index])}"></path>`;
        if (!sparse[index]) return;
        for (let at = state.first; at <= state.last; at += 1) {
          const value = curve.values[at];
          if (value !== null) curves += `<circle r="2.4" fill="${color}" cx="${across(x[at]).toFixed(1)}" cy="${down(value).toFixed(1)}"></circle>`;
        }
      });
      find(".curves").innerHTML = curves;
      self.point();
    };

    function path(series, joined) {
      const x = positions();
      let text = "";
      let pen = "M";
      let alone = null;
      for (let at = state.first; at <= state.last; at += 1) {
        if (series[at] === null) {
          if (!joined) pen = "M";
          continue;
        }
        const point = `${across(x[at]).toFixed(1)} ${down(series[at]).toFixed(1)}`;
        // a value between two gaps would be a line of no length
        alone = !joined && pen === "M" && (at === state.last || series[at + 1] === null);
        text += alone ? `M${point}h1.5` : pen + point;
        pen = "L";
      }
      return text;
    }

    /** The value at the pointer, or the last one that is shown. */
    self.point = () => {
      const at = state.hover ?? state.last;
      spec.curves.forEach((curve, index) => {
        let place = at;
        while ((sparse[index] || state.hover === null) && place > state.first && curve.values[place] === null) place -= 1;
        values[index].textContent = shown(curve.values[place]);
      });
      let marks = "";
      if (state.hover !== null && state.hover >= state.first && state.hover <= state.last) {
        const x = across(positions()[state.hover]);
        marks += `<line class="cursor" x1="${x}" x2="${x}" y1="${MARGIN.top}" y2="${HEIGHT - MARGIN.bottom}"></line>`;
        spec.curves.forEach((curve, index) => {
          const value = curve.values[state.hover];
          if (value === null) return;
          marks += `<circle r="3.2" fill="var(--c${index % 4})" cx="${x}" cy="${down(value)}"></circle>`;
        });
        const name = state.axis === "epoch" ? `epoch ${shown(data.epochs[state.hover])}` : `step ${data.steps[state.hover]}`;
        const end = x > width - 90;
        marks += `<text x="${end ? x - 6 : x + 6}" y="${MARGIN.top + 9}" text-anchor="${end ? "end" : "start"}">${name}</text>`;
      }
      find(".pointer").innerHTML = marks;
    };

    /** The log step nearest to a pixel. */
    function nearest(pixel) {
      const x = positions();
      let best = state.first;
      for (let at = state.first; at <= state.last; at += 1) {
        if (Math.abs(across(x[at]) - pixel) < Math.abs(across(x[best]) - pixel)) best = at;
      }
      return best;
    }

    let start = null;
    const place = (event) => event.clientX - plot.getBoundingClientRect().left;
    const brush = find(".brush");
    plot.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      start = place(event);
      plot.setPointerCapture(event.pointerId);
    });
    plot.addEventListener("pointermove", (event) => {
      const now = place(event);
      state.hover = nearest(now);
      charts.forEach((one) => one.point());
      if (start === null) return;
      brush.setAttribute("x", Math.min(start, now));
      brush.setAttribute("y", MARGIN.top);
      brush.setAttribute("width", Math.abs(now - start));
      brush.setAttribute("height", HEIGHT - MARGIN.top - MARGIN.bottom);
    });
    plot.addEventListener("pointerup", (event) => {
      const begin = start;
      start = null;
      brush.setAttribute("width", 0);
      if (begin === null || Math.abs(place(event) - begin) < SHORTEST_DRAG) return;
      const [a, b] = [nearest(Math.min(begin, place(event))), nearest(Math.max(begin, place(event)))];
      if (b > a) zoom(a, b);
    });
    const leave = () => {
      start = null;
      brush.setAttribute("width", 0);
      state.hover = null;
      charts.forEach((one) => one.point());
    };
    plot.addEventListener("pointerleave", leave);
    plot.addEventListener("pointercancel", leave);
    plot.addEventListener("dblclick", () => zoom(0, data.steps.length - 1));
    charts.push(self);
  }

  const reset = document.getElementById("reset");
  function zoom(first, last) {
    [state.first, state.last] = [first, last];
    reset.disabled = first === 0 && last === data.steps.length - 1;
    charts.forEach((one) => one.draw());
  }
  reset.addEventListener("click", () => zoom(0, data.steps.length - 1));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") zoom(0, data.steps.length - 1);
  });

  const slider = document.getElementById("smoothing");
  function smooth() {
    state.smoothing = Number(slider.value);
    document.getElementById("smoothing-value").textContent = state.smoothing.toFixed(2);
    charts.forEach((one) => {
      one.restyle();
      one.draw();
    });
  }
  slider.addEventListener("input", smooth);
  const axis = document.getElementById("axis");
  if (!hasEpochs) axis.closest("label").remove();
  axis.addEventListener("change", () => {
    state.axis = axis.value;
    charts.forEach((one) => one.draw());
  });

  data.charts.forEach(chart);
  document.getElementById("controls").hidden = false;
  smooth();
  if (data.thinned) {
    const remark = document.createElement("p");
    remark.className = "about";
    remark.textContent = "Of a long run, each group of log steps shows its smallest and its largest value.";
    holder.after(remark);
  }
  new ResizeObserver(() => charts.forEach((one) => one.draw())).observe(holder);
})();
