// The page: what is open, where the playhead is, and what happens when something is pressed.

import { after, Clock, clockText } from "./clock.js";
import { listenToButtons } from "./buttons.js";
import { Comparison } from "./compare.js";
import { Editor } from "./editor.js";
import * as I from "./intervals.js";
import { listenToKeys } from "./keys.js";
import { LiveView } from "./liveview.js";
import * as panels from "./panels.js";
import { $, fillSelect, make, problem, say } from "./parts.js";
import { Player } from "./player.js";
import { classStyles, intervalsOf, ownRow, readValues, sourceRow } from "./rows.js";
import { Segments } from "./segments.js";
import { bytes, json } from "./server.js";
import { Timeline } from "./timeline.js";
import { isSeveral, knownClasses } from "./tracks.js";

const NARROW_PX = 820; // as in view.css

class App {
  async start() {
    if (location.search) history.replaceState(null, "", "/"); // the key is in a cookie now
    this.timeline = new Timeline($("#timeline"), {
      seek: (time, done) => this.seek(time, done),
      border: (row, lane, time) => this.nearestBorder(row, lane, time),
      drag: (row, lane, border, time, done) => this.drag(lane, border, time, done),
      cancel: () => this.cancelDrag(),
      choose: (row, lane) => this.choose(row.track, lane?.label ?? null),
    });
    const parts = { film: $("#film"), picture: $("#picture"), none: $("#no-picture") };
    this.player = new Player(parts, (frame) => this.playedTo(frame), () => ($("#play").textContent = "Play"));
    this.comparison = new Comparison(this);
    this.segments = new Segments();
    this.added = {}; // tracks and classes that the page has been told: {track: {several, classes}}
    this.listen();
    this.showOthers(window.innerWidth > NARROW_PX);
    try {
      this.state = await json("/api/state");
    } catch (error) {
      problem(error.message);
      return;
    }
    const videos = this.state.videos.map((name, i) => [String(i), name]);
    const live = this.state.live ? [["live", `Live: ${this.state.live}`]] : [];
    fillSelect($("#video"), [...live, ...videos]);
    await this.open(live.length ? "live" : "0");
  }

  listen() {
    listenToButtons(this);
    $("#video").addEventListener("change", (event) => this.open(event.target.value));
    $("#track").addEventListener("change", (event) => this.choose(event.target.value, null));
    $("#speed").addEventListener("change", (event) => this.player.setSpeed(Number(event.target.value)));
    document.addEventListener("visibilitychange", () => document.hidden || this.refresh());
    window.addEventListener("focus", () => this.refresh());
    window.addEventListener("beforeunload", (event) => this.editor?.dirty && event.preventDefault());
    listenToKeys(this);
  }

  async refresh() {
    try {
      await this.editor?.refresh();
    } catch (error) {
      problem(error.message);
    }
  }

  // ------------------------------------------------------------------------------------------ opening

  async open(which) {
    const opening = (this.opening = Symbol(which));
    problem("");
    $("#video").value = which;
    this.live?.close();
    this.live = null;
    this.player.pause();
    document.body.classList.toggle("live", which === "live");
    $("#watch").hidden = $("#edit").hidden = which === "live";
    $("#show-export").disabled = $("#show-history").disabled = which === "live" || !this.state.can_save;
    this.number = which;
    this.clock = null; // nothing can be changed until the video is there
    [this.rows, this.editor, this.preview, this.time, this.frame] = [[], null, null, 0, 0];
    this.timeline.show([], {});
    this.saved("");
    if (which === "live") {
      this.live = new LiveView(this);
      return;
    }
    $("#saved").textContent = "reading the video …";
    try {
      await this.openVideo(Number(which), opening);
    } catch (error) {
      if (this.opening !== opening) return;
      problem(error.message);
      this.saved("");
    }
  }

  async openVideo(number, opening) {
    const [about, editor] = await Promise.all([json(`/api/videos/${number}`), this.loadEditor(number)]);
    if (this.opening !== opening) return;
    const values = about.rows.map(async (row, i) => {
      if (row.samples) row.values = readValues(await bytes(`/api/videos/${number}/rows/${i}`), row.samples, row.names);
    });
    await Promise.all(values);
    if (this.opening !== opening) return;
    this.rows = about.rows;
    this.editor = editor;
    this.clock = new Clock(about.timing);
    this.saved(this.state.can_save ? "every change is saved at once" : "only to look");
    this.player.open(number, this.clock, about.media);
    this.timeline.setEnd(this.clock.end);
    this.settle();
    this.seek(0, true);
    if (editor?.waiting) await this.resolve(editor.waiting);
  }

  async loadEditor(number) {
    if (!this.state.can_save) return null;
    const editor = new Editor(number, (kind, detail) => {
      if (kind === "conflict" && this.editor !== editor) editor.waiting = detail; // shown once the video is there
      else if (this.editor === editor) this.told(kind, detail);
    });
    await editor.load();
    return editor;
  }

  trainingColumns(track) {
    const found = [];
    for (const one of this.state.durations.filter((each) => each.track === track)) {
      // runs that were trained on the same videos have the same durations
      const same = found.find(([, seconds]) => JSON.stringify(seconds) === JSON.stringify(one.mean_s));
      if (same) same[0] += `, ${one.run}`;
      else found.push([`mean in training: ${one.run}`, one.mean_s]);
    }
    return found;
  }

  // ------------------------------------------------------------------------------------------ what is shown

  get intervals() {
    return this.preview ?? this.editor?.intervals ?? [];
  }

  get several() {
    return this.isSeveral(this.track);
  }

  isSeveral(track) {
    return isSeveral(track, this.rows, this.editor?.intervals ?? [], this.added);
  }

  // The lane that keys and buttons change.
  get lane() {
    return { track: this.track, label: this.several ? this.label : null };
  }

  // Bring everything on the page up to date with the labels.
  settle() {
    const others = [...this.rows, ...(this.editor?.others ?? [])];
    this.known = knownClasses(this.state.tracks, others, this.editor?.intervals ?? [], this.added);
    this.styles = classStyles(this.known);
    const tracks = Object.keys(this.known);
    if (!tracks.includes(this.track)) [this.track, this.label] = [tracks[0], null];
    if (this.several) this.label = this.known[this.track].includes(this.label) ? this.label : (this.known[this.track][0] ?? null);
    fillSelect($("#track"), tracks.map((name) => [name, name]), this.track);
    const can = Boolean(this.editor);
    $("#read-only").hidden = can;
    $("#add-track").hidden = $("#add-class").hidden = $("#edits").hidden = !can;
    panels.showClasses(this.styles[this.track], this.several, can, (name) => this.beginClass(name));
    this.shownRows = this.sourceRows();
    this.settleRows();
    this.showStarts();
    this.showTable();
    this.comparison.choose();
  }

  // The rows of others; made anew only when there are other rows or classes, since they can be long.
  sourceRows() {
    const others = this.editor?.others ?? [];
    const made = JSON.stringify(this.known);
    if (this.shownRows && this.madeOf?.[0] === this.rows && this.madeOf[1] === others && this.madeOf[2] === made) {
      return this.shownRows;
    }
    this.madeOf = [this.rows, others, made];
    return [...this.rows, ...others].map((row) => {
      const names = this.known[Object.keys(this.known).find((one) => I.canonical(one) === I.canonical(row.track))] ?? [];
      return { ...sourceRow(row, names), source: row };
    });
  }

  // The rows of the timeline: for each track, truth, one's own labels, and the others; the current track first.
  settleRows() {
    const others = this.othersShown ? Object.keys(this.known).filter((one) => one !== this.track) : [];
    const tracks = [this.track, ...others];
    const rows = tracks.flatMap((track) => {
      const of = this.shownRows.filter((row) => row.track === I.canonical(track));
      const truth = of.filter((row) => row.source.kind === "truth");
      const used = this.intervals.some((one) => one.track === track) || track === this.track;
      const own = this.editor && used ? [ownRow(this.ownTitle(track), track, this.intervals, this.known[track], this.isSeveral(track))] : [];
      const titled = (row) => ({ ...row, track, title: row.track === "phase" ? row.title : `${row.title}, ${row.track}` });
      return [...truth.map(titled), ...own, ...of.filter((row) => row.source.kind !== "truth").map(titled)];
    });
    this.timeline.show(rows, this.styles);
  }

  showOthers(shown) {
    this.othersShown = shown;
    $("#other-tracks").setAttribute("aria-pressed", String(shown));
    if (this.clock) this.settleRows();
  }

  ownTitle(track) {
    const who = this.state.annotator ?? "my labels";
    return I.canonical(track) === "phase" ? who : `${who}, ${track}`;
  }

  showTable() {
    const own = I.ofLane(this.intervals, { track: this.track, label: null });
    this.segments.show(own, this.styles[this.track], Boolean(this.editor), {
      seek: (time) => this.seek(time, true),
      relabel: (one, name) => this.change(I.relabel(this.intervals, this.laneOf(one), one, name), `now ${name}`),
    });
    const columns = [];
    if (own.length) columns.push([this.ownTitle("phase"), panels.secondsOf(own, this.track)]);
    for (const row of this.shownRows.filter((one) => one.track === I.canonical(this.track))) {
      columns.push([row.title, panels.secondsOf(intervalsOf(row.source, this.track), this.track)]);
    }
    panels.showDurations(this.styles[this.track], [...columns, ...this.trainingColumns(I.canonical(this.track))], null);
    this.showPlace();
  }

  laneOf(one) {
    return { track: one.track, label: this.isSeveral(one.track) ? one.label : null };
  }

  // What one's own labels can start from.
  showStarts() {
    const rows = this.shownRows.filter((row) => row.track === I.canonical(this.track) && row.source.labels.length);
    $("#start-from").hidden = !this.editor || this.intervals.some((one) => one.track === this.track);
    $("#starts").replaceChildren();
    for (const row of rows) {
      const button = make("button", { type: "button", textContent: `Start from ${row.title}` });
      button.addEventListener("click", () => this.startFrom(row));
      $("#starts").append(button);
    }
  }

  startFrom(row) {
    const found = intervalsOf(row.source, this.track).map((one) => ({
      ...one,
      start: this.clock.snap(one.start),
      end: this.clock.snap(one.end),
    }));
    const kept = found.filter((one) => one.end > one.start);
    this.change([...this.intervals, ...kept], `${kept.length} intervals of ${row.title}`);
  }

  showPlace() {
    if (!this.clock) return;
    $("#where").textContent = `${clockText(this.time, 2)}  frame ${this.clock.number(this.frame)} of ${this.clock.count}`;
    const parts = this.timeline.rows.map((row) => {
      const names = row.lanes.map((lane) => this.labelAt(row, lane)).filter(Boolean);
      return `${row.title}: ${names.join(", ") || "–"}`;
    });
    $("#readout").replaceChildren(...parts.map((text) => make("li", { textContent: text })));
    const slider = $("#timeline");
    slider.setAttribute("aria-valuemax", this.clock.count - 1);
    slider.setAttribute("aria-valuenow", this.frame);
    slider.setAttribute("aria-valuetext", `${clockText(this.time, 2)}; ${parts.slice(0, 3).join("; ")}`);
    this.segments.mark(this.lane, this.time);
    const current = this.current;
    for (const id of ["#split", "#merge", "#remove"]) $(id).disabled = !current;
    $("#accept").disabled = current?.confidence === undefined;
    $("#undo").disabled = !this.editor?.past.length;
    $("#redo").disabled = !this.editor?.future.length;
  }

  labelAt(row, lane) {
    const i = after(lane.starts, this.time + 1e-4) - 1;
    const style = i >= 0 && this.time + 1e-4 < lane.ends[i] ? this.styles[row.track]?.[lane.numbers[i]] : null;
    if (!style) return "";
    if (!row.strip) return style.name;
    const sample = after(row.edges, this.time + 1e-3) - 1;
    return `${style.name} ${Math.round((100 * (row.strip[sample] ?? 0)) / 255)} %`;
  }

  // ------------------------------------------------------------------------------------------ moving

  seek(time, reveal = false) {
    if (!this.clock) return;
    if (this.player.playing) this.player.pause();
    this.goTo(this.clock.frameAt(Math.min(Math.max(time, 0), this.clock.end)), reveal);
  }

  goTo(frame, reveal = true) {
    this.frame = Math.min(Math.max(frame, 0), this.clock.count - 1);
    this.time = this.clock.time(this.frame);
    this.player.show(this.frame);
    this.timeline.setTime(this.time, reveal);
    this.showPlace();
  }

  playedTo(frame) {
    this.frame = frame;
    this.time = this.clock.time(frame);
    this.timeline.setTime(this.time);
    this.showPlace();
  }

  stepFrames(by) {
    if (!this.clock) return;
    this.player.pause();
    this.goTo(this.frame + by);
  }

  stepSeconds(by) {
    this.seek(this.time + by, true);
  }

  playOrPause() {
    if (!this.clock) return;
    if (this.player.playing) {
      this.player.pause();
      return;
    }
    $("#play").textContent = "Pause";
    this.player.play();
  }

  toBorder(step) {
    if (!this.clock) return;
    const first = this.timeline.rows[0];
    const lanes = this.editor && this.intervals.some((one) => one.track === this.track) ? this.ownTimes() : (first?.lanes[0]?.starts ?? []);
    const times = [...lanes].sort((a, b) => a - b);
    const frames = times.map((time) => this.clock.frameAt(time));
    const next = step > 0 ? frames.find((one) => one > this.frame) : frames.findLast((one) => one < this.frame);
    if (next !== undefined) this.goTo(next);
  }

  ownTimes() {
    return I.ofLane(this.intervals, { track: this.track, label: null }).flatMap((one) => [one.start, one.end]);
  }

  otherVideo(step) {
    const select = $("#video");
    const next = select.selectedIndex + step;
    if (next >= 0 && next < select.options.length) this.open(select.options[next].value);
  }

  // ------------------------------------------------------------------------------------------ changing

  get current() {
    return this.editor ? I.at(this.intervals, this.lane, this.time) : undefined;
  }

  change(intervals, what) {
    if (this.editor?.change(intervals, what)) say(what);
  }

  choose(track, label) {
    this.track = track;
    this.label = label;
    this.settle();
  }

  nextTrack() {
    const tracks = Object.keys(this.known ?? {});
    if (tracks.length > 1) this.choose(tracks[(tracks.indexOf(this.track) + 1) % tracks.length], null);
  }

  beginClass(name) {
    if (!this.editor || !this.clock || name === undefined) return;
    this.label = name;
    const list = this.several
      ? I.toggle(this.intervals, this.track, name, this.time, this.clock.end)
      : I.begin(this.intervals, this.lane, name, this.time, this.clock.end);
    this.change(list, `${name} at ${clockText(this.time, 2)}`);
  }

  split() {
    if (this.current) this.change(I.split(this.intervals, this.current, this.time), `split at ${clockText(this.time, 2)}`);
  }

  merge(step) {
    if (this.current) this.change(I.merge(this.intervals, this.lane, this.current, step), "merged");
  }

  remove() {
    if (this.current) this.change(I.remove(this.intervals, this.current), `${this.current.label} removed`);
  }

  accept() {
    if (this.current) this.change(I.accept(this.intervals, this.current), `${this.current.label} accepted`);
  }

  chooseClass() {
    const row = this.editor && this.segments.mark(this.lane, this.time);
    row?.querySelector("select").focus();
  }

  // The border before (-1) or after (1) the playhead moves to it.
  borderHere(side) {
    if (!this.editor || !this.clock) return;
    const all = I.borders(this.intervals, this.lane);
    const border = side < 0 ? all.findLast((one) => one.time <= this.time + 1e-4) : all.find((one) => one.time > this.time + 1e-4);
    if (border) this.change(this.moved(this.lane, border, this.time), `border at ${clockText(this.time, 2)}`);
  }

  moved(lane, border, time) {
    return I.moveBorder(this.editor.intervals, lane, border, time, this.clock.step(border.time), this.clock.end);
  }

  nearestBorder(row, lane, time) {
    const all = I.borders(this.editor.intervals, { track: row.track, label: lane.label });
    return all.reduce((best, one) => (!best || Math.abs(one.time - time) < Math.abs(best.time - time) ? one : best), null);
  }

  // The page shows the labels as they would be while a border is dragged, and the frame at the border.
  drag(lane, border, time, done) {
    const to = this.clock.snap(time);
    const list = this.moved({ track: this.track, label: lane.label }, border, to);
    this.preview = done ? null : list;
    if (done) this.change(list, `border at ${clockText(to, 2)}`);
    this.goTo(this.clock.frameAt(to), false);
    this.settleRows();
  }

  cancelDrag() {
    this.preview = null;
    this.settleRows();
  }

  async addTrack() {
    const found = await panels.askName("New track", true);
    if (!found) return;
    this.added[found.name] ??= { several: found.several, classes: [] };
    this.choose(found.name, null);
  }

  async addClass() {
    const found = await panels.askName(`New class of ${this.track}`, false);
    if (!found) return;
    (this.added[this.track] ??= { several: false, classes: [] }).classes.push(found.name);
    this.settle();
  }

  async history() {
    try {
      await panels.showHistory(this.number, (intervals) => this.change(intervals, "an earlier state"));
    } catch (error) {
      problem(error.message);
    }
  }

  // ------------------------------------------------------------------------------------------ saving

  saved(text, bad = false) {
    $("#saved").textContent = text;
    $("#saved").classList.toggle("bad", bad);
  }

  told(kind, detail) {
    if (kind === "changed") this.settle();
    else if (kind === "saving") this.saved("saving …");
    else if (kind === "saved") this.saved(`saved ${new Date().toLocaleTimeString()}`);
    else if (kind === "failed") {
      this.saved(`NOT saved: ${detail}`, true);
      setTimeout(() => this.editor?.save(), 3000);
    } else this.resolve(detail);
  }

  async resolve({ theirs, mine }) {
    const { editor } = this;
    this.saved("not saved: changed elsewhere", true);
    const choice = await panels.askConflict(theirs, mine);
    await editor.decide(theirs, choice === "mine");
    this.settle();
  }
}

const app = new App();
window.surgstage = app; // for tests and for the browser's console
app.start();
