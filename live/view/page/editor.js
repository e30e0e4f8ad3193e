// One's own labels of a video: changes, undo and redo, and saving after every change.

import { json, put } from "./server.js";

const MOST_UNDO = 500;

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const sorted = (intervals) =>
  [...intervals].sort((a, b) => a.start - b.start || a.end - b.end || (a.track + a.label < b.track + b.label ? -1 : 1));

export class Editor {
  // `told` is called with (kind, detail): "changed", "saving", "saved", "failed" (reason), "conflict" (their state).
  constructor(video, told) {
    this.video = video;
    this.told = told;
    this.intervals = [];
    this.others = [];
    this.state = "";
    this.past = [];
    this.future = [];
    this.saving = false;
    this.dirty = false;
    this.blocked = false; // by a conflict, until the user has decided
    this.address = `/api/videos/${video}/labels`;
    this.kept = `surgstage-unsaved-${video}`;
  }

  async load() {
    const found = await json(this.address);
    this._take(found);
    const kept = JSON.parse(sessionStorage.getItem(this.kept) ?? "null");
    if (!kept) return;
    if (same(sorted(kept.intervals), sorted(this.intervals))) {
      sessionStorage.removeItem(this.kept);
      return;
    }
    // the page was left before its last change was saved
    this.past.push(this.intervals);
    this.intervals = kept.intervals;
    this.dirty = true;
    if (kept.state === this.state) await this.save();
    else this._conflict(found, kept.intervals);
  }

  _take(found) {
    this.state = found.state;
    this.intervals = found.own;
    this.others = found.others;
  }

  change(intervals, what) {
    if (intervals === this.intervals || same(sorted(intervals), sorted(this.intervals))) return false;
    this.past.push(this.intervals);
    if (this.past.length > MOST_UNDO) this.past.shift();
    this.future = [];
    this._set(intervals, what);
    return true;
  }

  undo() {
    if (!this.past.length) return false;
    this.future.push(this.intervals);
    this._set(this.past.pop(), "undone");
    return true;
  }

  redo() {
    if (!this.future.length) return false;
    this.past.push(this.intervals);
    this._set(this.future.pop(), "redone");
    return true;
  }

  _set(intervals, what) {
    this.intervals = sorted(intervals);
    this.dirty = true;
    this._keep();
    this.told("changed", what);
    this.save();
  }

  _keep() {
    try {
      sessionStorage.setItem(this.kept, JSON.stringify({ state: this.state, intervals: this.intervals }));
    } catch {
      // no room: a reload within the moment before the labels are saved would lose the last change
    }
  }

  // Save the newest state; changes made meanwhile are saved after it.
  async save() {
    if (this.saving || this.blocked || !this.dirty) return;
    this.saving = true;
    this.told("saving");
    while (this.dirty && !this.blocked) {
      const sent = this.intervals;
      this.dirty = false;
      try {
        const found = await put(this.address, { state: this.state, intervals: sent });
        this.state = found.state;
        this.others = found.others;
      } catch (error) {
        this.dirty = true;
        this.saving = false;
        if (error.status === 409) this._conflict(error.content.current, this.intervals);
        else this.told("failed", error.message);
        return;
      }
      if (this.dirty) this._keep();
    }
    this.saving = false;
    sessionStorage.removeItem(this.kept);
    this.told("saved");
  }

  _conflict(theirs, mine) {
    this.blocked = true;
    this.told("conflict", { theirs, mine });
  }

  // Decide a conflict: keep the saved labels (one's own can be got back by undo), or replace them.
  async decide(theirs, keepMine) {
    this.blocked = false;
    this.state = theirs.state;
    this.others = theirs.others;
    if (keepMine) {
      this.dirty = true;
      this._keep();
      await this.save();
      return;
    }
    this.dirty = false;
    sessionStorage.removeItem(this.kept);
    this.past.push(this.intervals);
    this.intervals = theirs.own;
    this.told("changed", "taken from the file");
    this.told("saved");
  }

  // Look whether the labels were changed elsewhere, and show those if there is nothing unsaved here.
  async refresh() {
    if (this.dirty || this.saving || this.blocked) return;
    const found = await json(this.address);
    if (this.dirty || this.saving || found.state === this.state) return;
    const before = this.intervals;
    this._take(found);
    if (!same(sorted(before), sorted(this.intervals))) this.past.push(before);
    this.told("changed", "changed elsewhere");
  }
}
