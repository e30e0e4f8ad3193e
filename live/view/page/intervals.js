// Labelled intervals {track, label, start, end, confidence?} in seconds, and the changes that the page makes to them.
// Nothing is changed in place: every function returns a new list, so that undo keeps the old one.
//
// A lane is a set of intervals that never overlap: a whole track, or for a track with several classes at a time (tools)
// those of one class. `lane` is {track, label}, with label null for a whole track.

export const EPSILON_S = 1e-4;

export const canonical = (track) => ({ phases: "phase", tools: "tool" })[track] ?? track;

const inLane = (one, lane) => one.track === lane.track && (lane.label === null || one.label === lane.label);

export function ofLane(intervals, lane) {
  return intervals.filter((one) => inLane(one, lane)).sort((a, b) => a.start - b.start);
}

// The interval of a lane that holds at a time; undefined in a gap.
export function at(intervals, lane, time) {
  return intervals.find((one) => inLane(one, lane) && one.start <= time + EPSILON_S && time + EPSILON_S < one.end);
}

// Whether intervals of a track overlap, so that it has several classes at a time.
export function overlaps(intervals, track) {
  const own = ofLane(intervals, { track, label: null });
  let end = -Infinity;
  for (const one of own) {
    if (one.start < end - EPSILON_S) return true;
    end = Math.max(end, one.end);
  }
  return false;
}

// What a person has changed or accepted is no longer a model's.
export function asOwn(one, change = {}) {
  const { confidence, ...rest } = one;
  return { ...rest, ...change };
}

const replaced = (intervals, old, fresh) => [...intervals.filter((one) => !old.includes(one)), ...fresh];

// The class begins at a time and lasts to the next border of the lane, or to the end of the video.
export function begin(intervals, lane, label, time, end) {
  const own = ofLane(intervals, lane);
  const current = at(own, lane, time);
  if (current) {
    if (current.label === label && lane.label === null) return intervals;
    const rest = asOwn(current, { label, start: time });
    if (time - current.start < EPSILON_S) return replaced(intervals, [current], [rest]);
    return replaced(intervals, [current], [asOwn(current, { end: time }), rest]);
  }
  const next = own.find((one) => one.start > time);
  const until = next ? next.start : end;
  return until - time < EPSILON_S ? intervals : [...intervals, { track: lane.track, label, start: time, end: until }];
}

// In a track with several classes at a time: a class that holds ends here, and another one begins here.
export function toggle(intervals, track, label, time, end) {
  const lane = { track, label };
  const current = at(intervals, lane, time);
  if (!current) return begin(intervals, lane, label, time, end);
  if (time - current.start < EPSILON_S) return replaced(intervals, [current], []);
  return replaced(intervals, [current], [asOwn(current, { end: time })]);
}

export function split(intervals, one, time) {
  if (time - one.start < EPSILON_S || one.end - time < EPSILON_S) return intervals;
  return replaced(intervals, [one], [asOwn(one, { end: time }), asOwn(one, { start: time })]);
}

export function remove(intervals, one) {
  return replaced(intervals, [one], []);
}

// The interval takes over the next one of its lane (the one before with `step` -1), and the gap between them.
export function merge(intervals, lane, one, step = 1) {
  const own = ofLane(intervals, lane);
  const other = own[own.indexOf(one) + step];
  if (!other) return intervals;
  const change = step > 0 ? { end: other.end } : { start: other.start };
  return replaced(intervals, [one, other], [asOwn(one, change)]);
}

// With several classes at a time, intervals of the new class that it meets become one with it.
export function relabel(intervals, lane, one, label) {
  if (one.label === label) return intervals;
  let fresh = asOwn(one, { label });
  if (lane.label === null) return replaced(intervals, [one], [fresh]);
  const met = intervals.filter(
    (other) => other.track === one.track && other.label === label && other.start < one.end && one.start < other.end,
  );
  const start = Math.min(one.start, ...met.map((other) => other.start));
  const end = Math.max(one.end, ...met.map((other) => other.end));
  fresh = { ...fresh, start, end };
  return replaced(intervals, [one, ...met], [fresh]);
}

export function accept(intervals, one) {
  return one.confidence === undefined ? intervals : replaced(intervals, [one], [asOwn(one)]);
}

// The borders of a lane: each with the interval that ends there and the one that begins there, if they touch.
export function borders(intervals, lane) {
  const own = ofLane(intervals, lane);
  const found = [];
  own.forEach((one, number) => {
    const before = own[number - 1];
    if (before && one.start - before.end < EPSILON_S) found[found.length - 1].after = one;
    else found.push({ time: one.start, before: null, after: one });
    found.push({ time: one.end, before: one, after: null });
  });
  return found;
}

// Move a border, as `borders` gives it, to a time; it stops one step before it would reach another border.
export function moveBorder(intervals, lane, border, time, step, end) {
  const all = borders(intervals, lane);
  const number = all.findIndex((one) => one.before === border.before && one.after === border.after);
  if (number < 0) return intervals;
  // an empty gap may close entirely, an interval keeps at least one step
  const low = number ? all[number - 1].time + (border.before ? step : 0) : 0;
  const high = number + 1 < all.length ? all[number + 1].time - (border.after ? step : 0) : end;
  const to = Math.min(Math.max(time, low), high);
  if (Math.abs(to - border.time) < EPSILON_S) return intervals;
  const fresh = [];
  if (border.before) fresh.push(asOwn(border.before, { end: to }));
  if (border.after) fresh.push(asOwn(border.after, { start: to }));
  return replaced(intervals, [border.before, border.after], fresh);
}

// The stretches [start, end, label a, label b] in which two lists of intervals of one lane have different labels.
// A gap is null, and differs from a label only where `gaps` says so.
export function differences(a, b, end, gaps = false) {
  const cuts = [...new Set([0, end, ...[...a, ...b].flatMap((one) => [one.start, one.end])])].sort((x, y) => x - y);
  const found = [];
  let [i, j] = [0, 0];
  for (let number = 0; number + 1 < cuts.length; number++) {
    const [from, to] = [cuts[number], cuts[number + 1]];
    const middle = (from + to) / 2;
    while (i < a.length && a[i].end <= middle) i++;
    while (j < b.length && b[j].end <= middle) j++;
    const one = i < a.length && a[i].start <= middle ? a[i].label : null;
    const other = j < b.length && b[j].start <= middle ? b[j].label : null;
    if (to - from < EPSILON_S || one === other || (!gaps && (one === null || other === null))) continue;
    const last = found[found.length - 1];
    if (last && from - last[1] < EPSILON_S && last[2] === one && last[3] === other) last[1] = to;
    else found.push([from, to, one, other]);
  }
  return found;
}

// How long both have a label, in seconds.
export function commonSeconds(a, b) {
  let [i, j, sum] = [0, 0, 0];
  while (i < a.length && j < b.length) {
    sum += Math.max(0, Math.min(a[i].end, b[j].end) - Math.max(a[i].start, b[j].start));
    if (a[i].end < b[j].end) i++;
    else j++;
  }
  return sum;
}
