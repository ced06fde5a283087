// What stands around the picture: tools, playing, the timeline, the amounts of the camera.

const ICONS = { // on a grid of 24 x 24
  undo: "M9 7L4 12l5 5M4 12h11a5 5 0 0 1 0 10h-3",
  redo: "M15 7l5 5-5 5M20 12H9a5 5 0 0 0 0 10h3",
  finish: "M5 13l4 4L19 7",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  remove: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10 11v5M14 11v5",
  clear: "M4 4l16 16M20 4L4 20",
  cut: "M12 4a8 8 0 1 0 8 8M12 4c5 0 8 3 8 8M12 9v6M9 12h6",
  load: "M12 4v11M8 11l4 4 4-4M4 16v4h16v-4",
  saveBoxes: "M4 9h16v11H4zM12 16V3M8.5 6.5L12 3l3.5 3.5",
  save: "M12 15V4M8 8l4-4 4 4M4 16v4h16v-4",
  full: "M4 9V4h5M15 4h5v5M20 15v5h-5M9 20H4v-5",
  play: "M7 4l13 8-13 8z",
  stop: "M7 5h3v14H7zM14 5h3v14h-3z",
};

const EASING_NAMES = {"linear": "steady", "ease-in": "slow start", "ease-out": "slow end", "ease-in-out": "slow both"};

const CAMERA_AMOUNTS = [
  {name: "pan-x", label: "Pan right", most: 0.5, step: 0.005, unit: "%", factor: 100},
  {name: "pan-y", label: "Pan down", most: 0.5, step: 0.005, unit: "%", factor: 100},
  {name: "zoom", label: "Zoom in", most: 0.5, step: 0.005, unit: "%", factor: 100},
  {name: "roll", label: "Roll clockwise", most: 45, step: 0.5, unit: "°", factor: 1},
];

function icon(name) {
  return draw("svg", {viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true"}, draw("path", {d: ICONS[name]}));
}

function button(name, label, onclick, text = "") {
  return make("button", {type: "button", class: `tool ${name}`, title: label, "aria-label": label, onclick}, icon(name), text);
}

function choice(label, options, onchange, className = "") {
  return make("select", {class: className, "aria-label": label, title: label, onchange},
    ...options.map(([value, text]) => make("option", {value}, text)));
}

function buildPanels(ed) {
  const {parts} = ed;
  parts.undo = button("undo", "Undo (Ctrl+Z)", () => step(ed, -1));
  parts.redo = button("redo", "Redo (Ctrl+Shift+Z)", () => step(ed, 1));
  parts.finish = button("finish", "Finish this track (Enter)", () => finish(ed), "Finish");
  parts.copy = button("copy", "Duplicate the selected track or box", () => duplicate(ed));
  parts.remove = button("remove", "Delete the selected point, track or box (Delete)", () => remove(ed));
  parts.clear = button("clear", "Clear the drawing", () => clear(ed), "Clear");
  parts.cut = button("cut", "Cut out: enclose what the selected track should move in the preview", () => {
    setTool(ed, ed.tool === "cut" ? "draw" : "cut");
  }, "Cut out");
  parts.full = button("full", "Full screen", () => toggleFullscreen(ed));
  if (!document.fullscreenEnabled) parts.full.hidden = true;
  parts.tools = buildTools(ed);
  parts.moves = buildMoves(ed);
  parts.preset = choice("Add a preset motion", [["", "Preset…"]], () => choosePreset(ed));
  buildFiles(ed);
  const tools = make("div", {class: "bar tools", role: "toolbar", "aria-label": "Drawing"},
    make("div", {class: "group"}, parts.undo, parts.redo),
    parts.tools, parts.moves,
    make("div", {class: "group"}, parts.finish, parts.copy, parts.remove, parts.clear),
    make("div", {class: "group"}, parts.cut, parts.preset),
    make("div", {class: "group end"}, parts.load, parts.save, parts.saveBoxes, parts.full));
  parts.hint = make("div", {class: "hint", "aria-hidden": "true"});
  parts.message = make("div", {class: "message", role: "status"});
  const stage = make("div", {class: "stage"}, ed.canvas.svg, parts.hint);
  ed.root.replaceChildren(tools, buildBoxPanel(ed), parts.message, stage, buildPlaying(ed), buildTimeline(ed), buildCamera(ed));
}

/** What the selected track moves, and tracks that are drawn from now on. */
function buildMoves(ed) {
  const option = (control, label) => make("label", {class: control, title: `Tracks that move ${label.toLowerCase()}`},
    make("input", {type: "radio", name: `${ed.id}-moves`, value: control, onchange: () => mark(ed, control)}),
    make("span", {}, label));
  return make("fieldset", {class: "moves", "aria-label": "What the track moves"},
    option("object", "Object"), option("camera", "Camera"));
}

function buildFiles(ed) {
  const {parts} = ed;
  parts.file = make("input", {type: "file", multiple: true, "aria-label": "Import track files",
    onchange: () => importFiles(ed, [...parts.file.files])});
  parts.load = make("label", {class: "tool load", title: "Import tracks from a file of this or another tool, or boxes"},
    icon("load"), "Import", parts.file);
  parts.save = make("a", {class: "tool save", title: "Export the tracks as JSON", download: "trajectories.json",
    role: "button", href: "#", onclick: (event) => exportDrawing(ed, event)}, icon("save"), "Export");
  parts.saveBoxes = make("a", {class: "tool save-boxes", title: "Export the boxes as JSON", download: "boxes.json",
    role: "button", href: "#", onclick: (event) => exportBoxes(ed, event)}, icon("saveBoxes"), "Boxes");
}

function buildPlaying(ed) {
  const {parts} = ed;
  parts.play = button("play", "Play (Space)", () => togglePlaying(ed));
  parts.scrub = make("input", {type: "range", class: "slider", min: 0, step: 1, "aria-label": "Frame",
    oninput: () => seek(ed, Number(parts.scrub.value))});
  parts.frame = make("output", {class: "frame"});
  parts.reach = make("button", {type: "button", class: "tool reach", title: "Reach the selected point in this frame",
    onclick: () => {
      const track = reachAt(ed.drawing.tracks[ed.selected], ed.point, ed.frame, ed.numFrames - 1);
      commit(ed, replaceTrack(ed.drawing, ed.selected, track));
    }}, "Reach now");
  parts.preview = make("input", {type: "checkbox", checked: true, onchange: () => {
    ed.isPreviewing = parts.preview.checked;
    if (ed.drawing) renderFrame(ed);
  }});
  return make("div", {class: "bar playing"}, parts.play, parts.scrub, parts.frame, parts.reach,
    make("label", {class: "check", title: "Move the picture with the camera, and what was cut out with its track"},
      parts.preview, "Move the picture"));
}

function buildTimeline(ed) {
  ed.parts.rows = make("div", {class: "rows", role: "group", "aria-label": "Timeline"});
  ed.rows = [];
  return ed.parts.rows;
}

/** A line of the timeline: the track's name, the frames in which it moves, its easing. `n` is "camera" or its number. */
function buildRow(ed, n) {
  const row = {n};
  row.name = make("button", {type: "button", class: "name", onclick: () => n !== "camera" && select(ed, n)});
  row.fill = make("div", {class: "fill"});
  row.start = make("input", {type: "range", min: 0, step: 1, class: "start", oninput: () => retime(ed, row, "start"),
    onchange: () => commit(ed, ed.drawing)});
  row.end = make("input", {type: "range", min: 0, step: 1, class: "end", oninput: () => retime(ed, row, "end"),
    onchange: () => commit(ed, ed.drawing)});
  row.note = make("span", {class: "note"});
  row.playhead = make("div", {class: "playhead"});
  row.easing = choice("Pace", Object.entries(EASING_NAMES), () => changeEntry(ed, n, {easing: row.easing.value}));
  row.even = make("button", {type: "button", class: "tool", title: "Take the points at an even pace",
    onclick: () => changeEntry(ed, n, {times: undefined})}, "Even out");
  row.node = make("div", {class: "row"}, row.name,
    make("div", {class: "span"}, row.fill, row.playhead, row.start, row.end, row.note), row.easing, row.even);
  return row;
}

function updateRow(ed, row) {
  const {n} = row, entry = entryOf(ed.drawing, n), last = ed.numFrames - 1;
  const label = n === "camera" ? "Camera" : `Track ${n + 1}`;
  const isStill = n !== "camera" && entry.points.length === 1, isTimed = Boolean(entry.times);
  const start = isTimed ? entry.times[0] : entry.start ?? 0;
  const end = isTimed ? entry.times[entry.times.length - 1] : entry.end ?? last;
  row.node.style.setProperty("--colour", n === "camera" ? CONTROL_COLOURS.camera : colourOf(ed.drawing, n));
  row.node.classList.toggle("selected", n === ed.selected);
  row.name.textContent = label;
  row.name.setAttribute("aria-pressed", n === ed.selected);
  row.fill.style.left = `${100 * start / Math.max(last, 1)}%`;
  row.fill.style.right = `${100 - 100 * end / Math.max(last, 1)}%`;
  for (const [input, frame, what] of [[row.start, start, "begins"], [row.end, end, "ends"]]) {
    input.max = last;
    input.value = frame;
    input.hidden = isStill || isTimed || last < 2;
    input.setAttribute("aria-label", `${label} ${what} to move in frame`);
    input.setAttribute("aria-valuetext", `frame ${Math.round(frame) + 1}`);
    input.title = `${what} in frame ${Math.round(frame) + 1} of ${last + 1}`;
  }
  row.node.classList.toggle("still", isStill);
  row.note.textContent = isStill ? "holds still" : isTimed ? "each point has its time" : "";
  row.easing.value = entry.easing ?? "linear";
  row.easing.hidden = isStill || isTimed;
  row.even.hidden = !isTimed;
}

function renderTimeline(ed) {
  const names = ed.drawing ? ed.drawing.tracks.map((_, n) => n) : [];
  if (ed.drawing?.camera) names.push("camera");
  if (ed.drawing) names.push(...objectsOf(ed.drawing).map((_, n) => `box ${n}`));
  while (ed.rows.length > names.length || ed.rows.some((row, k) => row.n !== names[k])) ed.rows.pop().node.remove();
  for (let k = ed.rows.length; k < names.length; k++) {
    ed.rows.push(String(names[k]).startsWith("box") ? buildBoxRow(ed, names[k]) : buildRow(ed, names[k]));
    ed.parts.rows.append(ed.rows[k].node);
  }
  for (const row of ed.rows) row.keys ? updateBoxRow(ed, row) : updateRow(ed, row);
}

/** Moves the start or the end of an entry while its handle is dragged; the history gets it when it is let go. */
function retime(ed, row, key) {
  const last = ed.numFrames - 1;
  let [start, end] = [Number(row.start.value), Number(row.end.value)];
  if (key === "start") start = Math.min(start, end - 1);
  else end = Math.max(end, start + 1);
  ed.drawing = replaceEntry(ed.drawing, row.n, {start: start > 0 ? start : undefined, end: end < last ? end : undefined});
  renderTracks(ed);
  renderCamera(ed);
  renderFrame(ed);
  updateRow(ed, row);
}

function buildCamera(ed) {
  const {parts} = ed;
  parts.amounts = CAMERA_AMOUNTS.map((amount) => {
    const output = make("output", {});
    const input = make("input", {type: "range", class: "slider", min: -amount.most, max: amount.most, step: amount.step,
      "aria-label": amount.label, oninput: () => turnCamera(ed), onchange: () => commit(ed, ed.drawing)});
    return {...amount, input, output, node: make("label", {}, make("span", {}, amount.label), input, output)};
  });
  parts.still = make("button", {type: "button", class: "tool", onclick: () => {
    const {camera, ...rest} = ed.drawing;
    commit(ed, rest);
  }}, "No camera motion");
  parts.camera = make("details", {class: "amounts"},
    make("summary", {}, "Camera"),
    make("p", {}, "What the camera does; the scene, and the dashed lines, move the other way."),
    ...parts.amounts.map(({node}) => node), parts.still);
  return parts.camera;
}

/** The camera as its sliders say; without amounts there is none. */
function turnCamera(ed) {
  const [panX, panY, zoom, roll] = ed.parts.amounts.map(({input}) => Number(input.value));
  const {camera, ...rest} = ed.drawing, {pan, zoom: _zoom, roll: _roll, ...others} = camera ?? {};
  const amounts = {};
  if (panX || panY) amounts.pan = [panX, panY];
  if (zoom) amounts.zoom = zoom;
  if (roll) amounts.roll = roll;
  const isStill = !Object.keys(amounts).length;
  ed.drawing = isStill ? rest : {...rest, camera: {...others, ...amounts}};
  renderCamera(ed);
  renderFrame(ed);
  renderPanels(ed);
}

function renderCameraPanel(ed) {
  const camera = ed.drawing?.camera, pan = camera?.pan ?? [0, 0];
  const values = [pan[0], pan[1], camera?.zoom ?? 0, camera?.roll ?? 0];
  ed.parts.amounts.forEach(({input, output, unit, factor}, k) => {
    input.value = values[k];
    output.textContent = `${round(values[k] * factor, 1)} ${unit}`;
  });
  ed.parts.still.disabled = !camera;
}

function renderPlayhead(ed) {
  const {parts} = ed;
  parts.scrub.max = ed.numFrames - 1;
  parts.scrub.value = ed.frame;
  parts.frame.textContent = `frame ${ed.frame + 1} of ${ed.numFrames}`;
  renderBoxKeys(ed);
  for (const row of ed.rows) row.playhead.style.left = `${100 * ed.frame / Math.max(ed.numFrames - 1, 1)}%`;
}

/** What the panels show of the state. */
function renderPanels(ed) {
  const {parts, drawing} = ed, track = drawing?.tracks[ed.selected];
  const marks = ed.props.controls ?? [];
  const controls = ed.root.querySelectorAll("button, input, select");
  for (const control of controls) control.disabled = !drawing;
  parts.undo.disabled = !ed.history?.canStep(-1);
  parts.redo.disabled = !ed.history?.canStep(1);
  parts.finish.hidden = !ed.isOpen;
  parts.copy.disabled = parts.remove.disabled = !track && ed.box < 0;
  parts.clear.disabled = !drawing?.tracks.length && !drawing?.camera && !(drawing && objectsOf(drawing).length);
  parts.cut.disabled = !track || track.points.length < 2;
  parts.cut.setAttribute("aria-pressed", ed.tool === "cut");
  parts.reach.hidden = !track || ed.isOpen || ed.point < 0 || track.points.length < 2 || ed.numFrames < 2;
  parts.save.classList.toggle("disabled", !drawing);
  parts.moves.hidden = marks.length < 2 || ed.tool === "box";
  for (const radio of parts.moves.querySelectorAll("input")) {
    radio.checked = radio.value === (track ? track.control : ed.newControl);
  }
  const isPlaying = ed.isPlaying;
  parts.play.replaceChildren(icon(isPlaying ? "stop" : "play"));
  parts.play.setAttribute("aria-label", isPlaying ? "Stop (Space)" : "Play (Space)");
  parts.preview.checked = ed.isPreviewing;
  parts.hint.replaceChildren(...hintLines(ed).map((line) => make("p", {}, line)));
  ed.canvas.svg.setAttribute("aria-label", describe(ed));
  renderBoxPanel(ed);
  renderTimeline(ed);
  renderCameraPanel(ed);
  renderPlayhead(ed);
}

function describe(ed) {
  if (!ed.drawing) return "No picture yet";
  const count = ed.drawing.tracks.length, {length: boxes} = objectsOf(ed.drawing);
  const chosen = ed.selected >= 0 ? `, track ${ed.selected + 1} selected` : "";
  const others = boxes ? ` and ${boxes} box${boxes === 1 ? "" : "es"}` : "";
  if (ed.box >= 0) {
    const name = boxName(objectsOf(ed.drawing)[ed.box], ed.box);
    return `Picture with ${boxes} box${boxes === 1 ? "" : "es"}, ${name} selected. Arrow keys move it or the selected `
      + "corner, square brackets choose a corner, Delete removes it.";
  }
  const keys = ed.selected >= 0 ? "Arrow keys move the selected point, square brackets choose it, Delete removes it."
    : `Enter adds a ${ed.tool === "box" ? "box" : "point"} in the middle.`;
  return `Picture with ${count} drawn track${count === 1 ? "" : "s"}${others}${chosen}. ${keys}`;
}

/** What can be done now, where that is not obvious. */
function hintLines(ed) {
  if (!ed.drawing) return ["Choose a picture, then draw on it how things should move."];
  if (ed.tool === "box") return boxHint(ed);
  if (ed.tool === "cut") return ["Enclose what this track carries in the preview. The video does not read it."];
  if (ed.preset) return [`Click where “${ed.preset.name}” begins; Enter puts it in the middle.`];
  const track = ed.drawing.tracks[ed.selected];
  if (ed.isOpen && ed.isKeyed) {
    return ["Arrow keys move the point, Enter sets the next one.", "Enter twice or Escape ends the track."];
  }
  if (ed.isOpen && track?.points.length === 1) return ["One point holds still. Click where it goes next, or press Enter."];
  if (ed.isOpen) return ["Click for the next point; Enter or a double click ends the track."];
  if (ed.drawing.tracks.length || ed.drawing.camera) return [];
  return ["Drag to draw a path.", "Or click, point by point; a single point holds still."];
}
