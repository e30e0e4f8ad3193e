// The keys of the page. They act everywhere but in fields and open dialogs.

import { showHelp } from "./panels.js";

const isField = (element) => element.matches?.("input, select, textarea") || element.closest?.("dialog");

export function listenToKeys(app) {
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || isField(event.target)) return;
    if (document.querySelector("dialog[open]")) return;
    // a button that has the focus is pressed by the space bar
    if (event.key === " " && event.target.matches?.("button, a, summary")) return;
    if (event.metaKey || (event.ctrlKey && !["z", "y"].includes(event.key.toLowerCase()))) return;
    if (act(app, event)) event.preventDefault();
  });
}

function act(app, event) {
  const { key, shiftKey: shift, altKey: alt, ctrlKey: control } = event;
  const digit = /^Digit([0-9])$/.exec(event.code)?.[1] ?? /^Numpad([0-9])$/.exec(event.code)?.[1];
  if (digit !== undefined && !shift && !alt && !control) {
    app.beginClass(app.known?.[app.track]?.[(Number(digit) + 9) % 10]);
    return true;
  }
  const step = (by) => (alt ? app.stepSeconds(10 * by) : shift ? app.stepSeconds(by) : app.stepFrames(by));
  const does = {
    " ": () => app.playOrPause(),
    ArrowLeft: () => step(-1),
    ArrowRight: () => step(1),
    ArrowUp: () => app.toBorder(-1),
    ArrowDown: () => app.toBorder(1),
    PageUp: () => app.stepSeconds(-10),
    PageDown: () => app.stepSeconds(10),
    Home: () => app.seek(0, true),
    End: () => app.seek(Infinity, true),
    "[": () => app.borderHere(-1),
    "]": () => app.borderHere(1),
    s: () => app.split(),
    m: () => app.merge(shift ? -1 : 1),
    r: () => app.chooseClass(),
    Delete: () => app.remove(),
    Backspace: () => app.remove(),
    y: () => (control ? app.editor?.redo() : app.accept()),
    z: () => (shift ? app.editor?.redo() : app.editor?.undo()),
    t: () => app.nextTrack(),
    d: () => app.comparison.go(shift ? -1 : 1),
    "+": () => app.timeline.zoom(2),
    "=": () => app.timeline.zoom(2),
    "-": () => app.timeline.zoom(0.5),
    f: () => app.timeline.all(),
    o: () => app.showOthers(!app.othersShown),
    n: () => app.otherVideo(1),
    p: () => app.otherVideo(-1),
    "?": showHelp,
    Escape: () => app.timeline.cancel(),
  };
  const found = does[key.length === 1 ? key.toLowerCase() : key];
  if (!found) return false;
  // in a list that scrolls, these keys scroll it
  if (["ArrowUp", "ArrowDown", "PageUp", "PageDown"].includes(key) && event.target.matches?.(".list")) return false;
  found();
  return true;
}
