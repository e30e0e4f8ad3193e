"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("data").textContent);
  const config = { responsive: true, displayModeBar: false, showTips: false, doubleClick: false };

  // Figures are drawn when they come near the window or their details are opened: forty videos stay quick.
  const nearby = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
  }, { rootMargin: "300px" });

  function draw(box) {
    nearby.unobserve(box);
    const { data, layout } = figures[box.dataset.figure];
    Plotly.react(box, data, layout, config);
    box.dataset.drawn = "yes";
    if (box.classList.contains("ribbon") && !box.rows) followTime(box);
  }

  const boxes = [...document.querySelectorAll(".figure")];
  boxes.forEach((box) => nearby.observe(box));
  window.addEventListener("beforeprint", () => boxes.filter((box) => !box.dataset.drawn && box.offsetParent).forEach(draw));

  // ------------------------------------------------------------------ the switch

  const convention = document.getElementById("convention");
  const metric = document.getElementById("metric");

  function choose() {
    for (const part of document.querySelectorAll(".convention")) part.hidden = part.dataset.convention !== convention.value;
    const bars = document.querySelector(".figure.bars");
    if (!bars) return;
    const id = `bars-${convention.value}-${metric.value}`;
    document.getElementById("bars").hidden = !(id in figures);
    document.getElementById("no-bars").hidden = id in figures;
    if (!(id in figures)) return;
    bars.dataset.figure = id;
    if (bars.dataset.drawn) draw(bars);
  }

  if (convention) convention.addEventListener("change", choose);
  if (metric) metric.addEventListener("change", choose);
  if (convention) choose(); // a browser may come back to a page with another choice

  // ------------------------------------------------------------------ time in a ribbon

  const unescape = (text) => text.replace(/\u200b/g, "").replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");

  function clock(ms) {
    const whole = Math.floor(ms / 1000);
    const two = (value) => String(value).padStart(2, "0");
    return `${Math.floor(whole / 3600)}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
  }

  function followTime(box) {
    const rows = (box.rows = new Map());
    const { data, layout } = figures[box.dataset.figure];
    layout.yaxis.categoryarray.forEach((name) => rows.set(name, []));
    for (const trace of data) trace.y.forEach((name, i) => rows.get(name).push([trace.base[i], trace.base[i] + trace.x[i], unescape(trace.meta)]));
    const changes = [...new Set([...rows.values()].flat().map((run) => run[0]))].sort((a, b) => a - b);
    const end = layout.xaxis.range[1];
    const readout = document.querySelector(`[data-readout="${box.dataset.figure}"]`);
    const cursor = box.appendChild(document.createElement("div"));
    cursor.className = "cursor";
    cursor.hidden = true;
    let now = null;

    function show(ms) {
      now = Math.min(Math.max(ms, 0), end - 1);
      const said = [...rows].map(([name, runs]) => {
        const run = runs.find((one) => one[0] <= now && now < one[1]);
        return `${unescape(name)}: ${run ? run[2] : "-"}`;
      });
      readout.textContent = `${clock(now)} \u00a0 ${said.join(" \u00a0 ")}`;
      const axis = box._fullLayout.xaxis;
      cursor.style.left = `${axis._offset + axis.l2p(now)}px`;
      cursor.hidden = false;
    }

    box.addEventListener("pointermove", (event) => {
      const axis = box._fullLayout.xaxis;
      const px = event.clientX - box.getBoundingClientRect().left - axis._offset;
      if (px >= 0 && px <= axis._length) show(axis.p2l(px));
    });
    box.addEventListener("keydown", (event) => {
      const next = {
        ArrowRight: () => changes.find((ms) => now === null || ms > now) ?? end - 1,
        ArrowLeft: () => changes.filter((ms) => now !== null && ms < now).pop() ?? 0,
        Home: () => 0,
        End: () => end - 1,
      }[event.key];
      if (!next) return;
      event.preventDefault();
      show(next());
    });
    for (const gone of ["pointerleave", "blur"]) box.addEventListener(gone, () => { cursor.hidden = true; });
  }
})();
