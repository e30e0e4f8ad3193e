// What the page shows while it follows a live operation.

import { clockText, durationText } from "./clock.js";
import { Live } from "./live.js";
import { showDurations } from "./panels.js";
import { $, fillSelect, say } from "./parts.js";
import { classStyles } from "./rows.js";

const LEAST_S = 60; // of the timeline, so that the first seconds do not fill it

export class LiveView {
  constructor(app) {
    this.app = app;
    app.timeline.follow = true;
    app.timeline.marks = [];
    app.track = "phase";
    for (const id of ["#compare-a", "#compare-b"]) fillSelect($(id), []);
    $("#agreement").textContent = $("#where").textContent = "";
    this.live = new Live("stream", () => this.show());
    app.timeline.setEnd(LEAST_S);
    this.show();
  }

  close() {
    this.live.events.close();
    $("#now").textContent = "";
  }

  show() {
    const { app, live } = this;
    app.styles = classStyles({ ...live.classes, tool: live.tools });
    app.timeline.show(live.rows(), app.styles);
    app.timeline.setEnd(Math.max(live.end, LEAST_S), false);
    app.time = live.end;
    app.timeline.setTime(live.end, app.timeline.follow);
    const { last } = live;
    const phase = last ? live.classes.phase[last.phase] : null;
    $("#now").textContent = last
      ? `${phase} for ${durationText(Math.max(last.time - last.since, 0))}`
      : `waiting for ${app.state.live} …`;
    $("#saved").textContent = last
      ? `at ${clockText(last.time)}, probability ${last.probability.toFixed(2)}, delay ${Math.round(1000 * last.delay)} ms` +
        (live.skipped ? `; ${live.skipped} line(s) could not be read` : "")
      : "";
    if (phase && phase !== this.phase) say(`${phase} since ${clockText(last.since)}`);
    this.phase = phase;
    const columns = [["so far", live.seconds("phase")], ...app.trainingColumns("phase")];
    showDurations(app.styles.phase ?? [], columns, phase);
    $("#timeline").setAttribute("aria-valuetext", `${clockText(live.end)}; ${phase ?? "nothing yet"}`);
  }
}
