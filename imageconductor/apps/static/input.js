// Mouse, pen, touch and keys. A gesture begins at pointerdown and changes the drawing at pointerup alone;
// what moves in between is shown from a copy, which pointercancel and Escape throw away.

const CLICK_PX = 4; // on the screen; a pointer that moves farther drags
const STROKE_PX = 3; // on the screen: how far the curve of a freehand track may be from the stroke

function listenToPointers(ed) {
  const {svg} = ed.canvas;
  svg.addEventListener("pointerdown", (event) => startGesture(ed, event));
  svg.addEventListener("pointermove", (event) => continueGesture(ed, event));
  svg.addEventListener("pointerup", (event) => endGesture(ed, event));
  svg.addEventListener("pointercancel", (event) => event.pointerId === ed.gesture?.pointer && cancelGesture(ed));
  svg.addEventListener("contextmenu", (event) => ed.gesture && event.preventDefault());
}

function startGesture(ed, event) {
  if (!ed.drawing || ed.gesture || event.button !== 0) return;
  ed.isKeyed = false;
  event.preventDefault(); // no selection of text, no mouse events after touch
  ed.canvas.svg.focus({preventScroll: true});
  ed.canvas.svg.setPointerCapture(event.pointerId);
  ed.isTouch = event.pointerType === "touch";
  const {track, point} = event.target.dataset;
  const at = pointerPosition(ed.canvas.svg, event);
  ed.gesture = {
    pointer: event.pointerId,
    client: [event.clientX, event.clientY],
    from: at,
    line: [clampPoint(at, ed.drawing)],
    track: track === undefined ? -1 : Number(track),
    point: point === undefined ? -1 : Number(point),
    kind: ed.preset ? "preset" : ed.tool === "cut" ? "cut" : "press",
    before: ed.drawing,
    ...(ed.tool === "box" ? boxGesture(ed, event) : {}),
  };
}

function continueGesture(ed, event) {
  const {gesture} = ed;
  if (gesture?.pointer !== event.pointerId) return;
  if (gesture.kind === "press") {
    const moved = Math.hypot(event.clientX - gesture.client[0], event.clientY - gesture.client[1]);
    if (moved < CLICK_PX) return;
    ed.root.classList.add("dragging");
    if (!gesture.isBox) gesture.kind = dragKind(ed, gesture);
  }
  if (gesture.isBox) {
    dragBox(ed, gesture, event);
    return;
  }
  if (gesture.kind === "preset") return;
  const at = pointerPosition(ed.canvas.svg, event);
  if (gesture.kind === "freehand" || gesture.kind === "cut") {
    const events = event.getCoalescedEvents?.() ?? [];
    for (const each of events.length ? events : [event]) {
      gesture.line.push(clampPoint(pointerPosition(ed.canvas.svg, each), ed.drawing));
    }
    showStroke(ed, gesture.line, gesture.kind);
    return;
  }
  const track = gesture.before.tracks[gesture.track];
  const moved = gesture.kind === "point"
    ? movePoint(track, gesture.point, at, ed.drawing)
    : moveTrack(track, [at[0] - gesture.from[0], at[1] - gesture.from[1]], ed.drawing);
  ed.drawing = replaceTrack(gesture.before, gesture.track, moved);
  renderTracks(ed);
  renderFrame(ed);
}

/** What a drag does: move the point or the track under it where they are selected, else draw. */
function dragKind(ed, gesture) {
  if (gesture.point >= 0) {
    ed.point = gesture.point;
    return "point";
  }
  return gesture.track >= 0 && gesture.track === ed.selected ? "track" : "freehand";
}

function endGesture(ed, event) {
  const {gesture} = ed;
  if (gesture?.pointer !== event.pointerId) return;
  ed.gesture = null;
  ed.root.classList.remove("dragging");
  if (gesture.isBox) {
    endBoxGesture(ed, gesture, event);
    return;
  }
  showStroke(ed, []);
  const scale = pixelScale(ed.canvas.svg);
  if (gesture.kind === "freehand") {
    gesture.line.push(clampPoint(pointerPosition(ed.canvas.svg, event), ed.drawing));
    const track = simplifyStroke(gesture.line, STROKE_PX * scale);
    addTrack(ed, {...track, points: track.points.map((point) => clampPoint(point, ed.drawing))});
  } else if (gesture.kind === "cut") {
    cutOut(ed, gesture.line, scale);
  } else if (gesture.kind === "preset") {
    placePreset(ed, clampPoint(gesture.from, ed.drawing));
  } else if (gesture.kind === "press") {
    click(ed, gesture);
  } else {
    commit(ed, ed.drawing);
  }
}

/** Forgets a gesture: the drawing is what it was before. */
function cancelGesture(ed) {
  if (!ed.gesture) return;
  ed.drawing = ed.gesture.before;
  ed.gesture = null;
  ed.root.classList.remove("dragging");
  showStroke(ed, []);
  render(ed);
}

/** A press without a drag: on a point, on a path, or on the picture. */
function click(ed, gesture) {
  const at = clampPoint(gesture.from, ed.drawing);
  const open = ed.isOpen ? ed.drawing.tracks[ed.selected] : null;
  if (gesture.point >= 0) {
    if (open && gesture.point === open.points.length - 1) ed.isOpen = false;
    ed.point = gesture.point;
    render(ed);
  } else if (open) {
    appendPoint(ed, open, at);
  } else if (gesture.track < 0) {
    addTrack(ed, {points: [at]}, true);
  } else if (gesture.track === ed.selected) {
    insertAt(ed, gesture.track, at);
  } else {
    select(ed, gesture.track);
  }
}

function appendPoint(ed, track, at) {
  ed.point = track.points.length;
  commit(ed, replaceTrack(ed.drawing, ed.selected, insertPoint(track, ed.point, at)));
}

function insertAt(ed, n, at) {
  const track = ed.drawing.tracks[n];
  if (track.points.length < 2) return;
  ed.point = insertionIndex(track, at, ed.drawing.num_frames);
  commit(ed, replaceTrack(ed.drawing, n, insertPoint(track, ed.point, at)));
}

/** The line under the pointer. */
function showStroke(ed, line, kind = "freehand") {
  const closed = kind === "cut" ? "Z" : "";
  ed.canvas.groups.stroke.replaceChildren(
    ...(line.length ? [draw("path", {class: `line ${kind}`, d: polyline(line) + closed})] : []),
  );
}

const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};

function listenToKeys(ed) {
  ed.canvas.svg.addEventListener("keydown", (event) => {
    if (ed.drawing && !event.altKey && handleKey(ed, event)) {
      event.preventDefault();
      event.stopPropagation();
    }
  });
}

/** Does what a key on the canvas means; true if it means anything. */
function handleKey(ed, event) {
  const {key} = event, track = ed.drawing.tracks[ed.selected];
  if (event.ctrlKey || event.metaKey) {
    if (key.toLowerCase() === "z") step(ed, event.shiftKey ? 1 : -1);
    else if (key.toLowerCase() === "y") step(ed, 1);
    else return false;
    return true;
  }
  if (key === "Escape") return escape(ed);
  if (ed.gesture) return false;
  if (key === " ") togglePlaying(ed);
  else if (ed.tool === "box") return handleBoxKey(ed, event);
  else if (key === "Enter") return enter(ed);
  else if (!track) return false;
  else if (key === "Delete" || key === "Backspace") remove(ed);
  else if (key in ARROWS) nudge(ed, ARROWS[key].map((step) => step * (event.shiftKey ? 10 : 1)));
  else if (key === "[" || key === "]") {
    const count = track.points.length;
    ed.point = (Math.max(ed.point, key === "]" ? -1 : 0) + (key === "]" ? 1 : count - 1)) % count;
    render(ed);
  } else return false;
  return true;
}

/** Begins a track, or the chosen preset, in the middle; sets the next point of a track that began so, until one stays
    where the last is; ends a track that was clicked. True if there was anything to do. */
function enter(ed) {
  const track = ed.drawing.tracks[ed.selected];
  const middle = clampPoint(sizeOf(ed.drawing).map((side) => (side - 1) / 2), ed.drawing);
  if (ed.preset) placePreset(ed, middle);
  else if (ed.isOpen) {
    if (ed.isKeyed && !endsTwice(track)) appendPoint(ed, track, track.points.at(-1));
    else finish(ed);
  } else if (!track) {
    ed.isKeyed = true;
    addTrack(ed, {points: [middle]}, true);
  } else return false;
  return true;
}

/** Gives up, one thing at a time: the gesture, the tool, the open track, the selected point, the selected track. */
function escape(ed) {
  if (ed.gesture) cancelGesture(ed);
  else if (ed.tool === "box") escapeBox(ed);
  else if (ed.tool === "cut" || ed.preset) setTool(ed, "draw");
  else if (ed.isOpen) finish(ed);
  else if (ed.point >= 0) {
    ed.point = -1;
    render(ed);
  } else if (ed.selected >= 0) select(ed, -1);
  else return false;
  return true;
}

function nudge(ed, by) {
  const track = ed.drawing.tracks[ed.selected], point = track.points[ed.point];
  const moved = point
    ? movePoint(track, ed.point, [point[0] + by[0], point[1] + by[1]], ed.drawing)
    : moveTrack(track, by, ed.drawing);
  commit(ed, replaceTrack(ed.drawing, ed.selected, moved));
}
