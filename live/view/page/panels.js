// The parts of the page around the timeline: classes, intervals, durations, and the dialogs.

import { clockText, durationText } from "./clock.js";
import { keyOf, textOn } from "./colours.js";
import { ofLane } from "./intervals.js";
import { $, fillSelect, make } from "./parts.js";
import { download, json } from "./server.js";

export const KEYS = [
  ["Space", "play or pause"],
  ["← →", "one frame back or on; with Shift one second, with Alt ten"],
  ["↑ ↓", "previous or next border of your labels (or of the first row)"],
  ["Home, End", "first or last frame"],
  ["1 to 9, 0", "this class begins here (tools: begins or ends here)"],
  ["[ and ]", "the border before, or after, the playhead moves here"],
  ["S", "split the interval here"],
  ["M, Shift+M", "merge the interval with the next, or the previous one"],
  ["R", "choose another class for the interval"],
  ["Delete", "remove the interval's label"],
  ["Y", "accept a label that a model has suggested"],
  ["Z, Shift+Z", "undo, redo"],
  ["T", "next track"],
  ["D, Shift+D", "next or previous disagreement of the two compared rows"],
  ["+ − F", "zoom in, zoom out, show everything (also Ctrl and the mouse wheel)"],
  ["O", "show or hide the other tracks"],
  ["N, P", "next or previous video"],
  ["Escape", "stop dragging"],
];

export function showHelp() {
  const row = ([key, what]) => make("tr", {}, make("th", { scope: "row", textContent: key }), make("td", { textContent: what }));
  $("#keys tbody").replaceChildren(...KEYS.map(row));
  $("#help").showModal();
}

// One button per class; `pressed(name)` is called for it.
export function showClasses(styles, several, enabled, pressed) {
  const made = JSON.stringify([styles, several, enabled]);
  if ($("#classes").dataset.made === made) return; // they keep the focus
  $("#classes").dataset.made = made;
  const buttons = styles.map((style, i) => {
    const swatch = make("span", { className: "swatch", textContent: keyOf(i) || String(style.number) });
    swatch.style.background = style.colour;
    swatch.style.color = textOn(style.colour);
    const button = make("button", { type: "button", disabled: !enabled }, swatch, ` ${style.name}`);
    button.title = several ? `${style.name} begins or ends here` : `${style.name} begins here`;
    button.addEventListener("click", () => pressed(style.name));
    return button;
  });
  $("#classes").replaceChildren(...buttons);
}

// Seconds per class: of the columns given, [[title, {class: seconds}, is a mean]], and where the operation is now.
export function showDurations(styles, columns, now) {
  const section = $("#durations");
  section.hidden = columns.length === 0;
  if (section.hidden) return;
  const head = make("tr", {}, make("th", { scope: "col", textContent: "Class" }));
  for (const [title] of columns) head.append(make("th", { scope: "col", textContent: title }));
  const rows = styles.map((style) => {
    const row = make("tr", {}, make("th", { scope: "row", textContent: `${style.number} ${style.name}` }));
    if (now === style.name) row.setAttribute("aria-current", "true");
    for (const [, seconds] of columns) {
      const value = seconds[style.name];
      row.append(make("td", { className: "numbers", textContent: value === undefined ? "–" : durationText(value) }));
    }
    return row;
  });
  section.querySelector("thead").replaceChildren(head);
  section.querySelector("tbody").replaceChildren(...rows);
}

export function secondsOf(intervals, track) {
  const sums = {};
  for (const one of ofLane(intervals, { track, label: null })) sums[one.label] = (sums[one.label] ?? 0) + one.end - one.start;
  return sums;
}

// ---------------------------------------------------------------------------------------------- dialogs

export async function showHistory(video, restore) {
  const entries = await json(`/api/videos/${video}/history`);
  const rows = entries.map((entry, i) => {
    const back = make("button", { type: "button", textContent: "Go back to this", disabled: i === 0 });
    back.addEventListener("click", () => {
      $("#history").close();
      restore(entry.intervals);
    });
    const count = `${entry.intervals.length} interval${entry.intervals.length === 1 ? "" : "s"}`;
    const when = new Date(entry.saved).toLocaleString();
    return make("tr", {}, make("th", { scope: "row", textContent: when }), make("td", { textContent: count }), make("td", {}, back));
  });
  if (!rows.length) rows.push(make("tr", {}, make("td", { textContent: "Nothing has been saved yet." })));
  $("#history tbody").replaceChildren(...rows);
  $("#history").showModal();
}

const FORMATS = {
  csv: "CSV: video, track, label, start, end",
  eaf: "ELAN (.eaf)",
  labelstudio: "Label Studio (.json)",
  cholec80: "Cholec80 text (phases, a row per frame)",
};

export function showExport(state, video) {
  $("#export-about").textContent = state.can_save
    ? `Your labels are also saved, as you make them, as CSV in the folder ${state.folder}.`
    : "There are no labels of yours: start view with --labels DIR.";
  fillSelect($("#export-format"), state.formats.map((one) => [one, FORMATS[one] ?? one]), "csv");
  $("#export-problem").textContent = "";
  $("#do-export").disabled = !state.can_save;
  $("#do-export").onclick = async () => {
    const which = $("#export-which").value === "all" ? "all" : video;
    try {
      await download(`/api/export?format=${$("#export-format").value}&video=${which}`);
      $("#export-problem").textContent = "";
    } catch (error) {
      $("#export-problem").textContent = error.message;
    }
  };
  $("#export").showModal();
}

// Ask which of two states is to be kept; resolves to "mine" or "theirs".
export function askConflict(theirs, mine) {
  const count = (list) => `${list.length} interval${list.length === 1 ? "" : "s"}`;
  $("#conflict-about").textContent = `Saved: ${count(theirs.own)}. Here: ${count(mine)}.`;
  const dialog = $("#conflict");
  dialog.oncancel = (event) => event.preventDefault(); // a decision is needed
  dialog.showModal();
  return new Promise((decided) => {
    dialog.onclose = () => decided(dialog.returnValue === "mine" ? "mine" : "theirs");
  });
}

// Ask for a name; resolves to null or {name, several}.
export function askName(title, withSeveral) {
  const dialog = $("#name");
  $("#name-title").textContent = title;
  $("#name-several").hidden = !withSeveral;
  $("#name-text").value = "";
  $("#name-overlap").checked = false;
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((decided) => {
    dialog.onclose = () => {
      const name = $("#name-text").value.trim().replace(/\s+/g, " ");
      decided(dialog.returnValue === "ok" && name ? { name, several: $("#name-overlap").checked } : null);
    };
  });
}
