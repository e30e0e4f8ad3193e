// Two rows of a track beside each other: how much of them is equal, and where they differ.

import { clockText, durationText } from "./clock.js";
import { canonical, commonSeconds, differences, ofLane } from "./intervals.js";
import { $, fillSelect, say } from "./parts.js";
import { intervalsOf } from "./rows.js";

const OWN = "own";

export class Comparison {
  constructor(app) {
    this.app = app;
    for (const id of ["#compare-a", "#compare-b"]) $(id).addEventListener("change", () => this.show());
    $("#next-difference").addEventListener("click", () => this.go(1));
    $("#previous-difference").addEventListener("click", () => this.go(-1));
  }

  // The rows of the track that can be compared: [[key, title, row or null for one's own labels]].
  get rows() {
    const { app } = this;
    const found = app.shownRows
      .map((row, i) => [String(i), row.title, row])
      .filter(([, , row]) => row.track === canonical(app.track) && !row.several);
    const own = app.editor && !app.several ? [[OWN, app.ownTitle("phase"), null]] : [];
    return [...own, ...found];
  }

  // Offer the rows; one's own labels, and else the truth, are compared with the next row unless the user has chosen.
  choose() {
    const { app, rows } = this;
    const options = rows.map(([key, title]) => [key, title]);
    const truth = rows.find(([, , row]) => row?.source.kind === "truth")?.[0];
    const hasOwn = app.intervals.some((one) => one.track === app.track);
    const a = hasOwn && !app.several ? OWN : (truth ?? options.find(([key]) => key !== OWN)?.[0]);
    const b = options.map(([key]) => key).find((key) => key !== a && key !== OWN);
    const place = `${app.number} ${app.track} ${hasOwn}`;
    const kept = this.place === place;
    this.place = place;
    fillSelect($("#compare-a"), options, kept ? $("#compare-a").value : a);
    fillSelect($("#compare-b"), options, kept ? $("#compare-b").value : b);
    this.show();
  }

  _intervals(key) {
    const { app } = this;
    const row = this.rows.find(([one]) => one === key)?.[2];
    return ofLane(row ? intervalsOf(row.source, app.track) : app.intervals, app.lane);
  }

  show() {
    const { app } = this;
    const [a, b] = [$("#compare-a").value, $("#compare-b").value];
    app.timeline.marks = [];
    $("#agreement").textContent = "";
    if (app.clock && a !== "" && b !== "" && a !== b) this._compare(this._intervals(a), this._intervals(b));
    $("#next-difference").disabled = $("#previous-difference").disabled = !app.timeline.marks.length;
    app.timeline.draw();
  }

  _compare(one, other) {
    const found = differences(one, other, this.app.clock.end);
    const common = commonSeconds(one, other);
    const differing = found.reduce((sum, [from, to]) => sum + to - from, 0);
    this.app.timeline.marks = found;
    if (!common) return;
    const agree = ((100 * (common - differing)) / common).toFixed(1);
    $("#agreement").textContent = `${agree} % equal, ${found.length} disagreement${found.length === 1 ? "" : "s"}`;
  }

  // Go to the next (1) or previous (-1) disagreement.
  go(step) {
    const { app } = this;
    if (!app.clock) return;
    const starts = app.timeline.marks.map(([from]) => app.clock.frameAt(from));
    const next = step > 0 ? starts.findIndex((one) => one > app.frame) : starts.findLastIndex((one) => one < app.frame);
    if (next < 0) return;
    const [from, to, one, other] = app.timeline.marks[next];
    app.goTo(starts[next]);
    say(`${clockText(from, 1)}, ${durationText(to - from)}: ${one ?? "no label"} and ${other ?? "no label"}`);
  }
}
