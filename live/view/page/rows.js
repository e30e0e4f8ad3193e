// Turns labels and predictions into what the timeline draws, and into lists of intervals that can be compared.

import { after } from "./clock.js";
import { colourOf } from "./colours.js";
import { canonical, ofLane } from "./intervals.js";

// The classes of each track, in the order of their numbers: {track: [{name, number, colour}]}.
export function classStyles(names) {
  return Object.fromEntries(
    Object.entries(names).map(([track, all]) => [
      track,
      all.map((name, i) => ({ name, number: i + 1, colour: colourOf(i, all.length) })),
    ]),
  );
}

// One's own labels of a track as a row that can be changed.
export function ownRow(title, track, intervals, names, several) {
  const numberOf = new Map(names.map((name, i) => [name, i]));
  const lane = (label) => {
    const own = ofLane(intervals, { track, label });
    return {
      title: label ?? "",
      label,
      starts: own.map((one) => one.start),
      ends: own.map((one) => one.end),
      numbers: own.map((one) => numberOf.get(one.label) ?? -1),
      sure: own.map((one) => one.confidence === undefined),
    };
  };
  const lanes = several ? names.map(lane) : [lane(null)];
  return { title, track, own: true, several, lanes, edges: null, strip: null };
}

// A row of the server, whose classes have numbers of their own.
export function sourceRow(row, names) {
  const track = canonical(row.track);
  const numbers = row.classes.map((name) => names.indexOf(name));
  const starts = row.labels.map((_, i) => row.spans[2 * i]);
  const ends = row.labels.map((_, i) => row.spans[2 * i + 1]);
  const lane = (label) => {
    const keep = row.labels.map((_, i) => i).filter((i) => label === null || row.classes[row.labels[i]] === label);
    return {
      title: label ?? "",
      label,
      starts: keep.map((i) => starts[i]),
      ends: keep.map((i) => ends[i]),
      numbers: keep.map((i) => numbers[row.labels[i]]),
      values: label === null ? null : (row.values?.of[row.names.indexOf(label)] ?? null),
    };
  };
  const lanes = row.several ? row.classes.map(lane) : [lane(null)];
  const strip = row.several ? null : (row.values?.of[0] ?? null);
  return { title: row.name, track, own: false, several: row.several, lanes, edges: row.values?.edges ?? null, strip };
}

// A row of the server as intervals, the start of one's own labels; those of a prediction have its mean probability.
export function intervalsOf(row, track) {
  if (row.asIntervals?.track === track) return row.asIntervals.list;
  const list = row.labels.map((label, i) => {
    const one = { track, label: row.classes[label], start: row.spans[2 * i], end: row.spans[2 * i + 1] };
    if (row.kind !== "prediction") return one;
    return { ...one, confidence: meanOf(row, row.several ? row.names.indexOf(one.label) : 0, one) };
  });
  row.asIntervals = { track, list };
  return list;
}

function meanOf(row, which, { start, end }) {
  const values = row.values?.of[which];
  if (!values) return 0.5;
  let [sum, count] = [0, 0];
  for (let i = after(row.values.edges, start - 1e-3); i < values.length; i++) {
    if (row.values.edges[i] >= end - 1e-3) break;
    sum += values[i];
    count += 1;
  }
  return count ? Math.round((sum / count / 255) * 1e4) / 1e4 : 0.5;
}

// The bytes of a row's values: edges (T + 1) float32, then T uint8 for each name.
export function readValues(content, samples, names) {
  const edges = new Float32Array(content, 0, samples + 1);
  const first = 4 * (samples + 1);
  return { edges, of: names.map((_, i) => new Uint8Array(content, first + i * samples, samples)) };
}
