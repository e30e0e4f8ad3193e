// The picture at the playhead. Standing, it is the frame that the project's own reader gives, so that frame k is frame
// k in every format. Playing, it is the browser's player if it can play the file, otherwise the frames as fast as they
// come.

import { blob } from "./server.js";

export class Player {
  // `moved(frame, playing)` is called when playing moves on; `stopped()` when it ends.
  constructor(parts, moved, stopped) {
    Object.assign(this, parts, { moved, stopped });
    this.frame = 0;
    this.playing = false;
    this.loading = false;
    this.shown = null; // [video, frame] of the picture on the page
    this.film.addEventListener("error", () => this._noFilm());
  }

  open(video, clock, media) {
    this.pause();
    this.video = video;
    this.clock = clock;
    this.frame = 0;
    this.canPlay = Boolean(media) && this.film.canPlayType(media) !== "";
    this.film.hidden = true;
    if (this.canPlay) this.film.src = `/api/videos/${video}/media`;
    else this.film.removeAttribute("src");
  }

  _noFilm() {
    this.canPlay = false;
    if (this.playing) this._run();
  }

  show(frame) {
    this.frame = frame;
    if (!this.playing) this._load();
  }

  // Load the newest frame that is asked for; those that were passed meanwhile are left out.
  async _load() {
    if (this.loading || !this.clock) return;
    this.loading = true;
    try {
      while (!this._isShown()) {
        const [video, frame] = [this.video, this.frame];
        let picture = null;
        let reason = "";
        try {
          picture = await blob(`/api/videos/${video}/frames/${frame}`);
        } catch (error) {
          reason = error.message;
        }
        if (video !== this.video) continue;
        if (picture) await this._put(picture, frame);
        this.none.hidden = Boolean(picture);
        this.none.textContent = reason;
        this.picture.hidden = !picture;
        this.shown = [video, frame];
        if (!this.playing) this.film.hidden = true;
      }
    } finally {
      this.loading = false;
    }
  }

  _isShown() {
    return this.shown && this.shown[0] === this.video && this.shown[1] === this.frame;
  }

  async _put(picture, frame) {
    const old = this.picture.src;
    this.picture.src = URL.createObjectURL(picture);
    this.picture.alt = `frame ${this.clock.number(frame)}`;
    try {
      await this.picture.decode();
    } catch {
      // replaced by a newer one while it was decoded
    }
    if (old.startsWith("blob:")) URL.revokeObjectURL(old);
  }

  setSpeed(speed) {
    this.speed = speed;
    this.film.playbackRate = speed;
  }

  async play() {
    if (this.playing || !this.clock) return;
    if (this.frame >= this.clock.count - 1) this.frame = 0;
    this.playing = true;
    if (!this.canPlay) {
      this._run();
      return;
    }
    this.film.currentTime = this.clock.time(this.frame) + this.clock.step(this.clock.time(this.frame)) / 2;
    this.film.playbackRate = this.speed ?? 1;
    try {
      await this.film.play();
    } catch {
      this._noFilm();
      return;
    }
    if (!this.playing) return;
    this.film.hidden = false;
    this._watch();
  }

  _watch() {
    if (!this.playing || !this.canPlay) return;
    this.frame = this.clock.frameAt(this.film.currentTime);
    this.moved(this.frame);
    if (this.film.ended || this.film.paused) this.pause();
    else requestAnimationFrame(() => this._watch());
  }

  // Without a film: the frame that is due, or the next one that can be had.
  async _run() {
    const [started, first] = [performance.now(), this.clock.time(this.frame)];
    const video = this.video;
    this.film.hidden = true;
    while (this.playing && video === this.video) {
      const due = this.clock.frameAt(first + ((performance.now() - started) / 1000) * (this.speed ?? 1));
      if (due !== this.frame) {
        this.frame = due;
        this.moved(due);
        await this._load();
      }
      if (due >= this.clock.count - 1) this.pause();
      else await new Promise((go) => requestAnimationFrame(go));
    }
  }

  pause() {
    if (!this.playing) return;
    this.playing = false;
    this.film.pause();
    this.stopped();
    this._load();
  }
}
