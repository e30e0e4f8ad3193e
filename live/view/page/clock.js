// When the frames of a video are shown, and how times are written.

// The first position at which a rising array is more than `value`.
export function after(array, value) {
  let [low, high] = [0, array.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (array[middle] > value) high = middle;
    else low = middle + 1;
  }
  return low;
}

export class Clock {
  // `timing` is {count, fps, end_s, numbers?, edges_s?}: frame k is shown from edges_s[k], or from k / fps.
  constructor(timing) {
    this.count = timing.count;
    this.fps = timing.fps;
    this.end = timing.end_s;
    this.edges = timing.edges_s ?? null;
    this.numbers = timing.numbers ?? null;
  }

  time(frame) {
    if (frame >= this.count) return this.end;
    return this.edges ? this.edges[frame] : frame / this.fps;
  }

  number(frame) {
    return this.numbers ? this.numbers[frame] : frame;
  }

  // The frame that is on screen at a time.
  frameAt(time) {
    const t = time + 1e-4;
    if (!this.edges) return Math.min(Math.max(Math.floor(t * this.fps), 0), this.count - 1);
    return Math.min(Math.max(after(this.edges, t) - 1, 0), this.count - 1);
  }

  // The nearest border between two frames.
  snap(time) {
    const frame = this.frameAt(Math.min(Math.max(time, 0), this.end));
    const [from, to] = [this.time(frame), this.time(frame + 1)];
    return time - from <= to - time ? from : to;
  }

  // The duration of the frame at a time: the shortest that an interval can be.
  step(time) {
    const frame = this.frameAt(time);
    return this.time(frame + 1) - this.time(frame);
  }
}

export function clockText(seconds, digits = 0) {
  const factor = 10 ** digits;
  const whole = Math.max(0, Math.floor(seconds * factor + 1e-6));
  const s = Math.floor(whole / factor);
  const two = (value) => String(value).padStart(2, "0");
  const rest = digits ? `.${String(whole % factor).padStart(digits, "0")}` : "";
  return `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)}${rest}`;
}

export function durationText(seconds) {
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor(whole / 60) % 60} min`;
}
