// The table of the intervals of the track: what the timeline draws, as text, with a choice of class for each.

import { after, clockText, durationText } from "./clock.js";
import { at } from "./intervals.js";
import { $, fillSelect, make } from "./parts.js";

const MOST = 120; // rows on the page at once, around the playhead

export class Segments {
  constructor() {
    this.body = $("#segments tbody");
    this.box = $("#segments").parentElement;
  }

  // `answer` has seek(time) and relabel(interval, name).
  show(intervals, styles, enabled, answer) {
    Object.assign(this, { intervals, styles, enabled, answer });
    this.first = null;
    // the row of a person who has just chosen a class there keeps the focus
    const chosen = this.body.contains(document.activeElement) && document.activeElement.closest("tr").interval;
    this.focused = chosen ? chosen.start : null;
  }

  // Mark the row of the interval at a time, keep it in view, and return it.
  mark(lane, time) {
    const near = after(this.intervals.map((one) => one.start), time + 1e-4) - 1;
    this._fill(Math.max(near, 0));
    let current = null;
    for (const row of this.body.rows) {
      const one = row.interval;
      const on = one && at([one], { track: one.track, label: null }, time) && (lane.label === null || lane.label === one.label);
      if (on) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
      if (on) current ??= row;
    }
    if (current && !this.box.contains(document.activeElement)) this._reveal(current);
    return current;
  }

  _reveal(row) {
    const [top, bottom] = [row.offsetTop, row.offsetTop + row.offsetHeight];
    const { scrollTop, clientHeight } = this.box;
    if (top < scrollTop + 24 || bottom > scrollTop + clientHeight) this.box.scrollTop = top - clientHeight / 2;
  }

  // Fill the table with the rows around one; as long as it is among them, they stay.
  _fill(near) {
    const { intervals } = this;
    const margin = intervals.length > MOST ? 10 : 0;
    const inside = this.first !== null && near >= this.first + (this.first ? margin : 0);
    const last = (this.first ?? 0) + MOST;
    if (inside && near < last - (last < intervals.length ? margin : 0)) return;
    this.first = Math.min(Math.max(near - MOST / 2, 0), Math.max(intervals.length - MOST, 0));
    const rows = intervals.slice(this.first, this.first + MOST).map((one) => this._row(one));
    const rest = intervals.length - this.first - rows.length;
    if (this.first) rows.unshift(this._more(`${this.first} more before`));
    if (rest > 0) rows.push(this._more(`${rest} more after`));
    this.body.replaceChildren(...rows);
    const focused = rows.find((row) => row.interval?.start === this.focused);
    if (this.focused !== null) focused?.querySelector("select").focus();
    this.focused = null;
  }

  _more(textContent) {
    return make("tr", {}, make("td", { textContent, colSpan: 4 }));
  }

  _row(one) {
    const go = make("button", { type: "button", className: "link numbers", textContent: clockText(one.start, 1) });
    go.addEventListener("click", () => this.answer.seek(one.start));
    const label = `Label from ${clockText(one.start, 1)}`;
    const choose = make("select", { disabled: !this.enabled, attributes: { "aria-label": label } });
    fillSelect(choose, this.styles.map((style) => [style.name, `${style.number} ${style.name}`]), one.label);
    choose.addEventListener("change", () => this.answer.relabel(one, choose.value));
    const from = one.confidence === undefined ? "person" : `model ${Math.round(100 * one.confidence)} %`;
    const lasts = make("td", { className: "numbers", textContent: durationText(one.end - one.start) });
    const row = make("tr", {}, make("td", {}, go), lasts, make("td", {}, choose), make("td", { textContent: from }));
    row.interval = one;
    return row;
  }
}
