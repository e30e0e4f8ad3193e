// The timeline: ribbons over time on a canvas, of which only what is visible is drawn, so that the length of the
// operation does not matter. What it shows is also in the table of intervals and in the readout, as text.

import { after, clockText } from "./clock.js";
import { textOn } from "./colours.js";

const AXIS_PX = 22;
const OVERVIEW_PX = 18;
const MARKS_PX = 10;
const GAP_PX = 6;
const RIBBON_PX = 26;
const OWN_PX = 34;
const LANE_PX = 15;
const VALUES_PX = 12;
const TITLE_PX = 15;
const WIDE_PX = 700;
const GUTTER_PX = 168;
const REACH_PX = { mouse: 6, pen: 10, touch: 18 };
const LEAST_S = 0.5;
const STEPS_S = [0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400];

export class Timeline {
  // `answer` has seek(time, done), border(row, lane, time) -> border or null, drag(row, lane, border, time, done) and
  // cancel(). A row is {title, track, own, lanes: [{title, starts, ends, numbers, values}], edges, strip}.
  constructor(canvas, answer) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.answer = answer;
    this.rows = [];
    this.marks = [];
    this.end = 1;
    this.from = 0;
    this.to = 1;
    this.time = 0;
    this.follow = false; // keep the end in view, as a live operation grows
    this.held = null;
    this.waiting = false;
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    canvas.addEventListener("pointerdown", (event) => this._down(event));
    canvas.addEventListener("pointermove", (event) => this._move(event));
    canvas.addEventListener("pointerup", (event) => this._up(event));
    canvas.addEventListener("pointercancel", () => this._cancel());
    canvas.addEventListener("wheel", (event) => this._wheel(event), { passive: false });
  }

  show(rows, classes) {
    this.rows = rows;
    this.classes = classes; // by track: [{name, colour, key}]
    this.draw();
  }

  setEnd(end, all = true) {
    const whole = this.from === 0 && this.to >= this.end;
    this.end = Math.max(end, LEAST_S);
    if (all || whole) [this.from, this.to] = [0, this.end];
    else if (this.follow) [this.from, this.to] = [this.end - (this.to - this.from), this.end];
    this.draw();
  }

  setTime(time, reveal = true) {
    this.time = time;
    const span = this.to - this.from;
    if (reveal && !this.held && (time < this.from || time > this.to)) this._window(time - span / 2, span);
    this.draw();
  }

  zoom(factor, around = this.time) {
    const span = Math.min(Math.max((this.to - this.from) / factor, LEAST_S), this.end);
    const inside = around >= this.from && around <= this.to ? around : (this.from + this.to) / 2;
    this._window(inside - ((inside - this.from) / (this.to - this.from)) * span, span);
    this.follow = false;
    this.draw();
  }

  all() {
    [this.from, this.to, this.follow] = [0, this.end, true];
    this.draw();
  }

  _window(from, span) {
    this.from = Math.min(Math.max(from, 0), this.end - span);
    this.to = this.from + span;
  }

  // ------------------------------------------------------------------------------------------ geometry

  _layout() {
    const wide = this.canvas.parentElement.clientWidth >= WIDE_PX;
    this.width = this.canvas.parentElement.clientWidth;
    this.left = wide ? GUTTER_PX : 0;
    let y = OVERVIEW_PX + AXIS_PX + MARKS_PX + GAP_PX;
    const places = [];
    for (const row of this.rows) {
      if (!wide) y += TITLE_PX;
      const top = y;
      const lanes = row.lanes.map((lane) => {
        const height = row.lanes.length > 1 || row.several ? LANE_PX : row.own ? OWN_PX : RIBBON_PX;
        const place = { lane, y, height };
        y += height;
        return place;
      });
      const strip = row.strip ? y : null;
      if (row.strip) y += VALUES_PX;
      places.push({ row, top, lanes, strip, bottom: y });
      y += GAP_PX;
    }
    this.places = places;
    this.height = y + 2;
  }

  x(time) {
    return this.left + ((time - this.from) / (this.to - this.from)) * (this.width - this.left);
  }

  timeAt(x) {
    return this.from + ((x - this.left) / (this.width - this.left)) * (this.to - this.from);
  }

  // ------------------------------------------------------------------------------------------ drawing

  draw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this._draw();
    });
  }

  _draw() {
    this._layout();
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(this.width * ratio), Math.round(this.height * ratio)];
    if (this.canvas.width !== width || this.canvas.height !== height) {
      Object.assign(this.canvas, { width, height });
      this.canvas.style.height = `${this.height}px`;
    }
    const c = this.context;
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, this.width, this.height);
    c.textBaseline = "middle";
    this._axis(c);
    for (const place of this.places) this._row(c, place);
    this._overview(c);
    this._differences(c);
    this._playhead(c);
    this.drawn = (this.drawn ?? 0) + 1;
  }

  _axis(c) {
    const span = this.to - this.from;
    const perStep = (this.width - this.left) / 90;
    const step = STEPS_S.find((one) => span / one <= perStep) ?? 28800;
    c.font = "12px system-ui, sans-serif";
    c.fillStyle = "#333";
    c.textAlign = "left";
    const y = OVERVIEW_PX + AXIS_PX / 2 + 1;
    for (let t = Math.ceil(this.from / step) * step; t <= this.to; t += step) {
      const x = this.x(t);
      c.fillRect(x, OVERVIEW_PX + 3, 1, AXIS_PX - 5);
      if (x < this.width - 56) c.fillText(clockText(t, step < 1 ? 1 : 0), x + 4, y);
    }
  }

  _row(c, place) {
    const { row, lanes, strip } = place;
    c.font = row.own ? "600 13px system-ui, sans-serif" : "13px system-ui, sans-serif";
    c.fillStyle = "#222";
    c.textAlign = "left";
    if (this.left) {
      const fits = lanes.length > 1;
      const width = this.left - (fits ? 76 : 12);
      c.fillText(row.title, 2, lanes[0].y + lanes[0].height / 2, width);
    } else c.fillText(row.title, 2, place.top - TITLE_PX / 2, this.width - 4);
    const styles = this.classes[row.track] ?? [];
    c.save();
    c.beginPath();
    c.rect(this.left, place.top, this.width - this.left, place.bottom - place.top);
    c.clip();
    for (const { lane, y, height } of lanes) {
      this._background(c, y, height, row.own);
      if (lane.values) this._values(c, row.edges, lane.values, y, height, "#767676");
      this._spans(c, lane, styles, y, height, lane.values ? 0.55 : 1, !row.several);
    }
    if (strip !== null) {
      c.fillStyle = "#F2F2F2";
      c.fillRect(this.left, strip, this.width - this.left, VALUES_PX);
      this._values(c, row.edges, row.strip, strip + 1, VALUES_PX - 1, "#5A5A5A");
    }
    c.restore();
    if (lanes.length > 1) this._laneTitles(c, lanes);
  }

  // On a narrow page, which has no gutter, the titles are on the lanes.
  _laneTitles(c, lanes) {
    c.font = "11px system-ui, sans-serif";
    c.textAlign = this.left ? "right" : "left";
    for (const { lane, y, height } of lanes) {
      if (!this.left) {
        c.fillStyle = "rgb(255 255 255 / 80%)";
        c.fillRect(0, y + 2, c.measureText(lane.title).width + 6, height - 4);
      }
      c.fillStyle = "#222";
      c.fillText(lane.title, this.left ? this.left - 6 : 3, y + height / 2, 74);
    }
  }

  _background(c, y, height, own) {
    c.fillStyle = own ? "#FFFFFF" : "#EDEDED";
    c.fillRect(this.left, y + 1, this.width - this.left, height - 2);
    if (own) {
      c.strokeStyle = "#767676";
      c.lineWidth = 1;
      c.strokeRect(this.left + 0.5, y + 0.5, this.width - this.left - 1, height - 1);
    }
  }

  _spans(c, lane, styles, y, height, opacity, named) {
    const { starts, ends, numbers } = lane;
    c.globalAlpha = opacity;
    let painted = -1; // narrow intervals share a pixel, of which the first one is drawn
    for (let i = after(ends, this.from); i < starts.length && starts[i] < this.to; i++) {
      const [x, right] = [this.x(starts[i]), this.x(ends[i])];
      const column = Math.floor(x);
      if (right - x < 1 && column === painted) continue;
      painted = column;
      const style = styles[numbers[i]] ?? { colour: "#999999", name: "?", key: "" };
      c.fillStyle = style.colour;
      c.fillRect(x, y + 2, Math.max(right - x, 1), height - 4);
      if (right - x < 3) continue;
      if (lane.sure && !lane.sure[i]) this._unsure(c, x, right, y, height);
      c.globalAlpha = 1;
      c.fillStyle = "#FFFFFF";
      c.fillRect(x, y + 2, 1, height - 4);
      if (named && right - x > 12) this._name(c, style, Math.max(x, this.left), Math.min(right, this.width), y + height / 2);
      c.globalAlpha = opacity;
    }
    c.globalAlpha = 1;
  }

  // A model's label that nobody has accepted: a dashed line below it.
  _unsure(c, x, right, y, height) {
    c.strokeStyle = "#000000";
    c.lineWidth = 2;
    c.setLineDash([4, 3]);
    c.beginPath();
    c.moveTo(x + 1, y + height - 4);
    c.lineTo(right - 1, y + height - 4);
    c.stroke();
    c.setLineDash([]);
  }

  _name(c, style, from, to, y) {
    c.font = "12px system-ui, sans-serif";
    c.textAlign = "left";
    c.fillStyle = textOn(style.colour);
    const number = String(style.number);
    const full = `${number} ${style.name}`;
    const room = to - from - 8;
    const text = c.measureText(full).width <= room ? full : number;
    if (c.measureText(text).width <= room + 4) c.fillText(text, from + 4, y);
  }

  // The least value of each pixel's samples: a moment of doubt stays visible at any zoom.
  _values(c, edges, values, y, height, colour) {
    if (!edges || !values.length) return;
    c.fillStyle = colour;
    let i = Math.max(after(edges, this.from) - 1, 0);
    for (let x = this.left; x < this.width && i < values.length; x++) {
      const until = this.timeAt(x + 1);
      if (edges[i] >= until) continue;
      let least = values[i];
      while (i + 1 < values.length && edges[i + 1] < until) {
        i++;
        if (values[i] < least) least = values[i];
      }
      const high = (least / 255) * (height - 2);
      c.fillRect(x, y + height - 1 - high, 1, high);
      if (i + 1 >= values.length && edges[i + 1] < until) break;
    }
  }

  _overview(c) {
    const main = this.places.find((one) => one.row.own && one.row.lanes.length === 1) ?? this.places[0];
    c.fillStyle = "#E6E6E6";
    c.fillRect(this.left, 2, this.width - this.left, OVERVIEW_PX - 4);
    const [from, to] = [this.from, this.to];
    [this.from, this.to] = [0, this.end];
    if (main && main.lanes.length === 1) {
      this._spans(c, { ...main.lanes[0].lane, sure: null }, this.classes[main.row.track] ?? [], 2, OVERVIEW_PX - 4, 0.8, false);
    }
    const [x, right, now] = [this.x(from), this.x(to), this.x(this.time)];
    [this.from, this.to] = [from, to];
    c.strokeStyle = "#000000";
    c.lineWidth = 2;
    c.strokeRect(x + 1, 2, Math.max(right - x - 2, 2), OVERVIEW_PX - 3);
    c.fillStyle = "#000000";
    c.fillRect(now - 1, 0, 2, OVERVIEW_PX);
  }

  _differences(c) {
    const y = OVERVIEW_PX + AXIS_PX;
    c.fillStyle = "#B3261E";
    let painted = -1;
    for (const [start, end] of this.marks) {
      if (end < this.from || start > this.to) continue;
      const [x, right] = [Math.max(this.x(start), this.left), Math.min(this.x(end), this.width)];
      if (right - x < 1 && Math.floor(x) === painted) continue;
      painted = Math.floor(x);
      c.fillRect(x, y + 2, Math.max(right - x, 1.5), MARKS_PX - 4);
    }
    if (this.left && this.marks.length) {
      c.font = "11px system-ui, sans-serif";
      c.textAlign = "right";
      c.fillText("differs", this.left - 6, y + MARKS_PX / 2);
    }
  }

  _playhead(c) {
    const x = this.x(this.time);
    if (x < this.left - 1 || x > this.width + 1) return;
    c.fillStyle = "#FFFFFF";
    c.fillRect(x - 2, OVERVIEW_PX, 4, this.height);
    c.fillStyle = "#000000";
    c.fillRect(x - 1, OVERVIEW_PX, 2, this.height);
    c.beginPath();
    c.moveTo(x - 6, OVERVIEW_PX);
    c.lineTo(x + 6, OVERVIEW_PX);
    c.lineTo(x, OVERVIEW_PX + 8);
    c.fill();
  }

  // ------------------------------------------------------------------------------------------ pointer

  _at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  // The border of one's own labels under the pointer.
  _border(x, y, kind) {
    for (const { row, lanes } of this.places ?? []) {
      if (!row.own) continue;
      for (const { lane, y: top, height } of lanes) {
        if (y < top || y > top + height) continue;
        const reach = REACH_PX[kind] ?? REACH_PX.mouse;
        const border = this.answer.border(row, lane, this.timeAt(x));
        if (border && Math.abs(this.x(border.time) - x) <= reach) return { row, lane, border };
      }
    }
    return null;
  }

  _down(event) {
    if (event.button !== 0) return;
    const [x, y] = this._at(event);
    if (y < OVERVIEW_PX) this.held = { kind: "window" };
    else {
      const found = this._border(x, y, event.pointerType);
      const place = this.places.find((one) => y >= one.top && y <= one.bottom);
      if (place?.row.own) this.answer.choose(place.row, place.lanes.find((one) => y >= one.y && y <= one.y + one.height)?.lane);
      this.held = found ? { kind: "border", ...found, x, moved: false } : { kind: "seek" };
    }
    try {
      this.canvas.setPointerCapture(event.pointerId);
    } catch {
      // the pointer has gone already
    }
    this.canvas.focus({ preventScroll: true });
    this._drag(x, false);
  }

  _move(event) {
    const [x, y] = this._at(event);
    if (this.held) this._drag(x, false);
    else this.canvas.style.cursor = this._border(x, y, event.pointerType) ? "ew-resize" : "default";
  }

  _up(event) {
    if (!this.held) return;
    this._drag(this._at(event)[0], true);
    this.held = null;
  }

  _drag(x, done) {
    const held = this.held;
    if (held.kind === "window") {
      const span = this.to - this.from;
      const time = ((x - this.left) / (this.width - this.left)) * this.end;
      this._window(time - span / 2, span);
      this.follow = false;
      this.draw();
    } else if (held.kind === "border") {
      held.moved ||= Math.abs(x - held.x) > 2;
      if (held.moved) this.answer.drag(held.row, held.lane, held.border, this.timeAt(x), done);
      else if (done) this.answer.seek(held.border.time, true);
    } else this.answer.seek(this.timeAt(x), done);
  }

  _cancel() {
    if (this.held?.kind === "border") this.answer.cancel();
    this.held = null;
  }

  // Escape while a border is dragged.
  cancel() {
    const held = this.held !== null;
    this._cancel();
    return held;
  }

  _wheel(event) {
    if (event.ctrlKey || event.metaKey) {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 300), this.timeAt(this._at(event)[0]));
    } else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      event.preventDefault();
      const span = this.to - this.from;
      const by = ((event.deltaX || event.deltaY) / (this.width - this.left)) * span;
      this._window(this.from + by, span);
      this.follow = false;
      this.draw();
    }
  }
}
