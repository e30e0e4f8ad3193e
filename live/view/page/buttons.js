// What each button does; keys.js has the same for keys.

import { showExport, showHelp } from "./panels.js";
import { $ } from "./parts.js";

export function listenToButtons(app) {
  // after a click of the mouse, keys are for the timeline: the space bar plays, and does not press the button again
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("main button");
    if (event.detail && button && !document.querySelector("dialog[open]")) $("#timeline").focus({ preventScroll: true });
  });
  const on = (id, does) => $(id).addEventListener("click", does);
  on("#back", () => app.stepFrames(-1));
  on("#on", () => app.stepFrames(1));
  on("#back-second", () => app.stepSeconds(-1));
  on("#on-second", () => app.stepSeconds(1));
  on("#play", () => app.playOrPause());
  on("#split", () => app.split());
  on("#begin-here", () => app.borderHere(-1));
  on("#end-here", () => app.borderHere(1));
  on("#merge", () => app.merge(1));
  on("#remove", () => app.remove());
  on("#accept", () => app.accept());
  on("#undo", () => app.editor?.undo());
  on("#redo", () => app.editor?.redo());
  on("#zoom-in", () => app.timeline.zoom(2));
  on("#zoom-out", () => app.timeline.zoom(0.5));
  on("#zoom-all", () => app.timeline.all());
  on("#other-tracks", () => app.showOthers(!app.othersShown));
  on("#show-help", showHelp);
  on("#show-export", () => showExport(app.state, app.number));
  on("#show-history", () => app.history());
  on("#add-track", () => app.addTrack());
  on("#add-class", () => app.addClass());
}
