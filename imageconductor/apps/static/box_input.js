// Drawing boxes with mouse, pen, touch and keys, while the box tool is chosen. What is changed in a frame becomes the
// object's key box there.

/** Chooses between drawing tracks and boxes; what the other tool has selected is let go. */
function chooseBoxTool(ed, isChosen) {
  if (isChosen) select(ed, -1);
  else selectBox(ed, -1);
  setTool(ed, isChosen ? "box" : "draw");
}

function selectBox(ed, n) {
  ed.box = n;
  ed.corner = -1;
  render(ed);
}

function replaceBox(drawing, n, object) {
  return {...drawing, objects: objectsOf(drawing).map((old, index) => (index === n ? object : old))};
}

/** The box of the selected object in the present frame; null where it is absent. */
function presentBox(ed) {
  const object = ed.drawing && objectsOf(ed.drawing)[ed.box];
  const placed = object && placeBoxes(object, ed.numFrames, sizeOf(ed.drawing))[ed.frame];
  return placed?.present ? placed.box : null;
}

/** Adds an object with one key box, selected, and asks for its name. */
function addBox(ed, object) {
  const {max_objects: most} = ed.props, objects = objectsOf(ed.drawing);
  if (objects.length >= most) {
    say(ed, `There ${most === 1 ? "is 1 box" : `are ${most} boxes`}, as many as this model takes.`, true);
    return;
  }
  say(ed, "");
  ed.box = objects.length;
  ed.corner = -1;
  commit(ed, {...ed.drawing, objects: [...objects, object]});
  if (!object.name && !ed.isTouch) ed.parts.boxName.focus({preventScroll: true}); // no keyboard over a small screen
}

/** A press in the box tool: on a corner or the inside of the selected box, on a line of another one, or elsewhere. */
function boxGesture(ed, event) {
  if (ed.isPlaying) seek(ed, ed.frame);
  const {box, corner} = event.target.dataset;
  return {
    kind: "press",
    isBox: true,
    box: box === undefined ? -1 : Number(box),
    corner: corner === undefined ? -1 : Number(corner),
  };
}

function dragBox(ed, gesture, event) {
  const at = pointerPosition(ed.canvas.svg, event);
  if (gesture.kind === "press") {
    gesture.kind = gesture.corner >= 0 ? "corner" : gesture.box >= 0 ? "shift" : "rectangle";
    if (gesture.box >= 0) ed.box = gesture.box;
    ed.corner = gesture.corner;
    gesture.start = presentBox(ed);
  }
  const [from, to] = [gesture.from, at].map((point) => inArea(point, ed.drawing));
  if (gesture.kind === "rectangle") {
    gesture.end = to;
    showRectangle(ed, boxBetween(from, to, ed.drawing));
    return;
  }
  const object = objectsOf(gesture.before)[ed.box];
  // Unlike `from` and `to`, the way that the pointer went does not end at the edge of the picture.
  const moved = gesture.kind === "corner"
    ? withCorner(gesture.start, gesture.corner, to, ed.drawing)
    : shiftBox(gesture.start, [at[0] - gesture.from[0], at[1] - gesture.from[1]], ed.drawing);
  ed.drawing = replaceBox(gesture.before, ed.box, withKey(object, ed.frame, moved));
  renderBoxes(ed);
}

function endBoxGesture(ed, gesture, event) {
  const from = inArea(gesture.from, ed.drawing);
  if (gesture.kind !== "press") dragBox(ed, gesture, event); // to where the pointer was let go
  ed.canvas.groups.stroke.replaceChildren();
  if (gesture.kind === "press") {
    if (gesture.corner >= 0) {
      ed.corner = gesture.corner;
      render(ed);
    } else selectBox(ed, smallestBoxAt(ed, from));
  } else if (gesture.kind === "rectangle") {
    const box = boxBetween(from, gesture.end, ed.drawing), least = CLICK_PX * pixelScale(ed.canvas.svg);
    if (Math.min(box[2] - box[0], box[3] - box[1]) < least) say(ed, "A box needs a width and a height.", true);
    else addBox(ed, {name: "", boxes: [box], frames: [ed.frame]});
    render(ed);
  } else {
    // A corner that was drawn beyond the opposite one has another number now.
    if (gesture.kind === "corner") ed.corner = -1;
    commit(ed, ed.drawing);
  }
}

/** The rectangle under the pointer. */
function showRectangle(ed, [x1, y1, x2, y2]) {
  const area = {x: x1 - 0.5, y: y1 - 0.5, width: x2 - x1, height: y2 - y1};
  ed.canvas.groups.stroke.replaceChildren(draw("rect", {class: "rectangle", ...area}));
}

function removeBox(ed) {
  const objects = objectsOf(ed.drawing).filter((_, n) => n !== ed.box);
  ed.box = ed.corner = -1;
  commit(ed, {...ed.drawing, objects});
}

function duplicateBox(ed) {
  const object = objectsOf(ed.drawing)[ed.box], shift = 0.04 * Math.min(...sizeOf(ed.drawing));
  addBox(ed, {...object, boxes: object.boxes.map((box) => box && shiftBox(box, [shift, shift], ed.drawing))});
}

/** Moves the selected box, or its selected corner, in the present frame. */
function nudgeBox(ed, by) {
  const box = presentBox(ed);
  if (!box) return;
  const [x, y] = ed.corner >= 0 ? cornerOf(box, ed.corner) : [];
  const moved = ed.corner >= 0
    ? withCorner(box, ed.corner, [x + by[0], y + by[1]], ed.drawing)
    : shiftBox(box, by, ed.drawing);
  commit(ed, replaceBox(ed.drawing, ed.box, withKey(objectsOf(ed.drawing)[ed.box], ed.frame, moved)));
}

/** Does what a key means for the selected box, or adds one in the middle; true if it means anything. */
function handleBoxKey(ed, event) {
  const {key} = event;
  if (!objectsOf(ed.drawing)[ed.box]) {
    if (key !== "Enter") return false;
    const [width, height] = sizeOf(ed.drawing), sides = [width / 4, height / 4, 3 * width / 4, 3 * height / 4];
    addBox(ed, {name: "", boxes: [sides.map((side) => round(side))], frames: [ed.frame]});
    return true;
  }
  if (key === "Delete" || key === "Backspace") removeBox(ed);
  else if (key in ARROWS) nudgeBox(ed, ARROWS[key].map((step) => step * (event.shiftKey ? 10 : 1)));
  else if (key === "[" || key === "]") {
    ed.corner = (Math.max(ed.corner, key === "]" ? -1 : 0) + (key === "]" ? 1 : 3)) % 4;
    render(ed);
  } else return false;
  return true;
}

/** Gives up the selected corner, then the selected box, then the tool. */
function escapeBox(ed) {
  if (ed.corner >= 0) {
    ed.corner = -1;
    render(ed);
  } else if (ed.box >= 0) selectBox(ed, -1);
  else chooseBoxTool(ed, false);
}
