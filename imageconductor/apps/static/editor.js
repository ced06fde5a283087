// The state of one editor, what changes it, and its value. All of this is a function's body that Gradio calls for each
// editor with (element, trigger, props, server, upload, watch): nothing here is shared between two editors.

const PARTS_MS = 1000; // Parts of one update arrive no farther apart, even on a slow machine.

/** The only way in which the user changes the drawing: into the history, to the server, onto the screen. */
function commit(ed, drawing) {
  remember(ed, drawing);
  ed.isUntouched = false;
  ed.isDrawn = true;
  settle(ed);
}

function remember(ed, drawing) {
  const ordered = {width: drawing.width, height: drawing.height, num_frames: ed.numFrames, tracks: drawing.tracks};
  if (drawing.camera) ordered.camera = drawing.camera;
  if (objectsOf(drawing).length) ordered.objects = drawing.objects;
  ed.drawing = ordered;
  if (JSON.stringify(ordered) !== JSON.stringify(ed.history.current)) ed.history.push(ordered);
}

/** The value and the screen as the drawing is. */
function settle(ed) {
  const value = valueOf(ed.drawing);
  if (JSON.stringify(value) !== JSON.stringify(ed.props.value)) ed.props.value = value;
  show(ed);
}

/** The screen as the drawing is, with a selection that there is. */
function show(ed) {
  const track = ed.drawing?.tracks[ed.selected];
  if (!track) ed.selected = -1;
  if (!track || ed.point >= track.points.length) ed.point = -1;
  if (!track) ed.isOpen = false;
  if (!ed.drawing || !objectsOf(ed.drawing)[ed.box]) ed.box = ed.corner = -1;
  render(ed);
}

function step(ed, by) {
  if (!ed.drawing || !ed.history.canStep(by)) return;
  cancelGesture(ed);
  ed.isOpen = false;
  ed.drawing = countIn(ed.history.step(by), ed.numFrames);
  settle(ed);
}

function replaceTrack(drawing, n, track) {
  return {...drawing, tracks: drawing.tracks.map((old, index) => (index === n ? track : old))};
}

function entryOf(drawing, n) {
  return n === "camera" ? drawing.camera : drawing.tracks[n];
}

/** The drawing with some keys of a track or of the camera changed; undefined removes a key, as do the defaults. */
function replaceEntry(drawing, n, changes) {
  const changed = {...entryOf(drawing, n), ...changes};
  for (const key of Object.keys(changed)) if (changed[key] === undefined) delete changed[key];
  if (changed.easing === "linear") delete changed.easing;
  return n === "camera" ? {...drawing, camera: changed} : replaceTrack(drawing, n, changed);
}

function changeEntry(ed, n, changes) {
  commit(ed, replaceEntry(ed.drawing, n, changes));
}

/** Adds a track, selected; an open one gets the next points that are clicked. */
function addTrack(ed, track, isOpen = false) {
  const {max_tracks: most} = ed.props;
  if (most && ed.drawing.tracks.length >= most) {
    say(ed, `There are ${most} tracks, as many as can be drawn here.`, true);
    return;
  }
  const control = (ed.props.controls ?? []).length > 1 ? ed.newControl : undefined;
  ed.selected = ed.drawing.tracks.length;
  ed.point = isOpen ? 0 : -1;
  ed.isOpen = isOpen;
  commit(ed, {...ed.drawing, tracks: [...ed.drawing.tracks, control ? {...track, control} : track]});
}

function select(ed, n) {
  if (n >= 0 && ed.tool === "box") chooseBoxTool(ed, false);
  ed.selected = n;
  ed.point = -1;
  ed.isOpen = false;
  render(ed);
}

/** Ends the open track; a last point that the keys have not moved from the one before is dropped. */
function finish(ed) {
  const track = ed.drawing.tracks[ed.selected];
  ed.isOpen = false;
  ed.point = -1;
  if (ed.isKeyed && endsTwice(track)) {
    commit(ed, replaceTrack(ed.drawing, ed.selected, removePoint(track, track.points.length - 1)));
  } else render(ed);
}

/** Deletes the selected point, or the track with its last point or if none is selected. */
function remove(ed) {
  if (ed.box >= 0) {
    removeBox(ed);
    return;
  }
  const track = ed.drawing.tracks[ed.selected];
  if (!track) return;
  if (ed.point >= 0 && track.points.length > 1) {
    const changed = removePoint(track, ed.point);
    ed.point = Math.min(ed.point, changed.points.length - 1);
    commit(ed, replaceTrack(ed.drawing, ed.selected, changed));
  } else {
    const left = ed.drawing.tracks.filter((_, n) => n !== ed.selected);
    ed.selected = -1;
    commit(ed, {...ed.drawing, tracks: left});
  }
}

function clear(ed) {
  if (ed.tool !== "box") setTool(ed, "draw");
  const {camera, objects, ...rest} = ed.drawing;
  commit(ed, {...rest, tracks: []});
}

function duplicate(ed) {
  if (ed.box >= 0) {
    duplicateBox(ed);
    return;
  }
  const track = ed.drawing.tracks[ed.selected];
  if (!track) return;
  const shift = 0.04 * Math.min(...sizeOf(ed.drawing));
  const {control, cut, ...rest} = moveTrack(track, [shift, shift], ed.drawing);
  addTrack(ed, control ? {...rest, control} : rest);
}

/** Marks the selected track, and those that are drawn from now on, as moving the camera or an object. */
function mark(ed, control) {
  ed.newControl = control;
  if (ed.drawing?.tracks[ed.selected]) changeEntry(ed, ed.selected, {control});
}

function setTool(ed, tool) {
  ed.tool = tool;
  if (tool !== "box") ed.box = ed.corner = -1;
  ed.preset = null;
  ed.isOpen = false;
  ed.root.classList.toggle("cutting", tool === "cut");
  render(ed);
}

/** Keeps the outline of what the selected track moves in the preview, and plays it. */
function cutOut(ed, line, scale) {
  setTool(ed, "draw");
  const outline = line.filter((point, k) => k === 0 || Math.hypot(point[0] - line[k - 1][0], point[1] - line[k - 1][1]) > scale);
  if (outline.length < 8 || !ed.drawing.tracks[ed.selected]) return;
  changeEntry(ed, ed.selected, {cut: outline});
  ed.isPreviewing = true;
  ed.frame = 0;
  if (!ed.isPlaying) togglePlaying(ed);
}

function choosePreset(ed) {
  const [kind, index] = ed.parts.preset.value.split(":");
  const preset = ed.props.presets?.[kind]?.[Number(index)];
  ed.parts.preset.value = "";
  if (!preset) return;
  setTool(ed, "draw");
  if (kind === "camera") {
    commit(ed, {...ed.drawing, camera: preset.camera});
    ed.parts.camera.open = true;
  } else {
    ed.preset = preset;
    render(ed);
  }
}

/** A track of the chosen preset that begins at a point; it shrinks as a whole if it would leave the picture. */
function placePreset(ed, at) {
  const {points, interpolation} = ed.preset, side = Math.min(...sizeOf(ed.drawing));
  const path = points.map((point) => point.map((part) => part * side));
  const last = [Math.max(ed.drawing.width - 1, at[0]), Math.max(ed.drawing.height - 1, at[1])];
  let fits = 1;
  for (const point of path) {
    point.forEach((offset, axis) => {
      const room = offset > 0 ? last[axis] - at[axis] : at[axis];
      if (Math.abs(offset) > room) fits = Math.min(fits, room / Math.abs(offset));
    });
  }
  ed.preset = null;
  const placed = path.map(([x, y]) => clampPoint([at[0] + fits * x, at[1] + fits * y], ed.drawing));
  addTrack(ed, interpolation ? {points: placed, interpolation} : {points: placed});
}

function toggleFullscreen(ed) {
  if (document.fullscreenElement) document.exitFullscreen();
  else ed.root.requestFullscreen();
}

/** A line for the user, where all users of a screen reader hear it. */
function say(ed, text, isError = false) {
  ed.parts.message.textContent = text;
  ed.parts.message.classList.toggle("error", isError);
}

/** Takes over what Python has set. It never sets the value itself: one update of Python's may arrive in several parts,
    and the value that is still on its way would be lost. So a drawing that counts in another number of frames is counted
    anew on the screen alone until the user changes it. */
function receive(ed, isNewPicture) {
  ed.numFrames = Math.max(1, Math.round(ed.props.num_frames ?? 16));
  ed.fps = ed.props.fps || 8;
  ed.frame = Math.min(ed.frame, ed.numFrames - 1);
  cancelGesture(ed);
  const drawing = drawingOf(ed.props.value, ed.numFrames);
  const isSameSize = drawing && ed.drawing && String(sizeOf(drawing)) === String(sizeOf(ed.drawing));
  const belongsToPicture = ed.isUntouched && performance.now() - ed.pictureSince < PARTS_MS;
  if (isNewPicture) ed.pictureSince = performance.now();
  if (!drawing || isNewPicture || !isSameSize || belongsToPicture) {
    beginAnew(ed, drawing);
  } else if (JSON.stringify(valueOf(ed.drawing)) !== JSON.stringify(drawing)) {
    remember(ed, drawing);
  }
  show(ed);
}

function beginAnew(ed, drawing) {
  ed.isPlaying &&= Boolean(drawing);
  ed.isDrawn &&= JSON.stringify(drawing) === JSON.stringify(valueOf(ed.drawing)); // it stays on another picture
  Object.assign(ed, {drawing, history: drawing && new History(drawing), isUntouched: true, frame: 0, tool: "draw"});
  Object.assign(ed, {selected: -1, point: -1, box: -1, corner: -1, isOpen: false, preset: null});
  ed.root.classList.remove("cutting");
  ed.fills.clear();
  say(ed, "");
}

function fillPresets(ed) {
  const kinds = [["camera", "Camera"], ["object", "Object, from a point"]];
  ed.parts.preset.replaceChildren(make("option", {value: ""}, "Preset…"), ...kinds.map(([kind, label]) =>
    make("optgroup", {label}, ...(ed.props.presets?.[kind] ?? []).map((preset, k) =>
      make("option", {value: `${kind}:${k}`, title: preset.help}, preset.name)))));
}

function startEditor() {
  const root = element.querySelector(".ic-editor");
  const id = `ic-${Math.random().toString(36).slice(2)}`; // for references within the SVG
  const ed = {
    root, props, id, canvas: buildCanvas(id), parts: {}, rows: [],
    drawing: null, history: null, selected: -1, point: -1, isOpen: false, gesture: null, tool: "draw", preset: null,
    box: -1, corner: -1,
    isDrawn: false, isKeyed: false, newControl: "object", frame: 0, isPlaying: false, isPreviewing: true, isTouch: false, isUntouched: true, pictureSince: 0,
    fills: new Map(),
  };
  buildPanels(ed);
  fillPresets(ed);
  listenToPointers(ed);
  listenToKeys(ed);
  listenToDrops(ed);
  window.addEventListener("beforeunload", (event) => ed.isDrawn && event.preventDefault());
  receive(ed, true);
  watch("image", () => receive(ed, true));
  watch(["value", "num_frames", "fps", "video_size", "controls", "max_objects"], () => receive(ed, false));
  new ResizeObserver(() => ed.drawing && !ed.gesture && render(ed)).observe(ed.canvas.svg);
}

startEditor();
