// The tracks of labels and their classes. `added` are those that were added on the page: {track: {several, classes}}.

import { canonical, overlaps } from "./intervals.js";

// Whether a track has several classes at a time, as that of tools.
export function isSeveral(track, rows, intervals, added) {
  return (
    canonical(track) === "tool" ||
    Boolean(added[track]?.several) ||
    rows.some((row) => row.several && canonical(row.track) === canonical(track)) ||
    overlaps(intervals, track)
  );
}

// The names of each track's classes: those that the server knows, then those of other rows, of one's own labels, and
// those added on the page. One's own labels may spell the tracks phase and tool as phases and tools.
export function knownClasses(ofServer, rows, intervals, added) {
  const found = {};
  const add = (track, names) => {
    const all = (found[track] ??= []);
    for (const name of names) if (!all.includes(name)) all.push(name);
  };
  const spelled = (track) => intervals.find((one) => canonical(one.track) === track)?.track ?? track;
  for (const [track, names] of Object.entries(ofServer)) add(spelled(canonical(track)), names);
  for (const row of rows) add(spelled(canonical(row.track)), row.classes);
  for (const one of intervals) add(one.track, [one.label]);
  for (const [track, one] of Object.entries(added)) add(track, one.classes);
  if (!Object.keys(found).length) found.phase = [];
  return found;
}
