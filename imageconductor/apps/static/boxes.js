// Boxes: where objects are and how large. An object is {name, boxes: [[x1, y1, x2, y2] or null, ...], frames: [...]},
// as in a boxes file, and replaced, never changed, as tracks are. Its sides count from the picture's left and top edge,
// half a pixel beside the points of tracks, which count from the centre of the top-left pixel.

const LEAST_SIDE_PX = 1; // of a box, in pixels of the picture
const CORNERS = [[0, 1], [2, 1], [2, 3], [0, 3]]; // which of x1, y1, x2, y2 each corner takes, clockwise from top left

function objectsOf(drawing) {
  return drawing.objects ?? [];
}

/** Where a pointer's position, which counts as points do, lies in the picture's area. */
function inArea([x, y], drawing) {
  return [limit(x + 0.5, 0, drawing.width), limit(y + 0.5, 0, drawing.height)];
}

/** The smallest box around two corners, at least a pixel wide and high and within the picture. */
function boxBetween(a, b, drawing) {
  const sides = [0, 1].map((axis) => {
    const most = sizeOf(drawing)[axis];
    const low = limit(Math.min(a[axis], b[axis]), 0, most - LEAST_SIDE_PX);
    return [low, limit(Math.max(a[axis], b[axis]), low + LEAST_SIDE_PX, most)];
  });
  return [sides[0][0], sides[1][0], sides[0][1], sides[1][1]].map((value) => round(value));
}

/** A box moved as far as the picture allows. */
function shiftBox([x1, y1, x2, y2], [dx, dy], drawing) {
  dx = limit(dx, -x1, drawing.width - x2);
  dy = limit(dy, -y1, drawing.height - y2);
  return [x1 + dx, y1 + dy, x2 + dx, y2 + dy].map((value) => round(value));
}

/** A box with one corner at another place; beyond the opposite corner it turns over. */
function withCorner(box, corner, at, drawing) {
  const [x, y] = CORNERS[(corner + 2) % 4].map((side) => box[side]);
  return boxBetween([x, y], at, drawing);
}

function cornerOf(box, corner) {
  return CORNERS[corner].map((side) => box[side]);
}

/** The box of an object in each of numFrames frames, as place_boxes of conditioning/box_files.py: [{box, present}, ...].
    Centre and size follow the curves through the key boxes; an object that is never present has no box. */
function placeBoxes(object, numFrames, size) {
  const {frames} = object, keys = frames.map((_, k) => k).filter((k) => object.boxes[k]);
  const knots = keys.map((k) => frames[k]), boxes = keys.map((k) => object.boxes[k]);
  const values = boxes.map(([x1, y1, x2, y2]) => [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]);
  const slopes = [0, 1, 2, 3].map((i) => (knots.length > 1 ? pchipSlopes(knots, values.map((value) => value[i])) : [0]));
  return Array.from({length: numFrames}, (_, t) => {
    const last = Math.max(frames.findLastIndex((frame) => frame <= t), 0), present = Boolean(object.boxes[last]);
    if (!keys.length) return {box: null, present};
    const at = limit(t, knots[0], knots[knots.length - 1]), key = knots.indexOf(at);
    if (key >= 0) return {box: boxes[key], present};
    const k = segmentOf(knots, at);
    const [cx, cy, w, h] = slopes.map((slope, i) => cubicAt(knots, values.map((value) => value[i]), slope, at, k));
    const box = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2];
    return {box: box.map((value, i) => limit(value, 0, size[i % 2])), present};
  });
}

/** The object with a key box, or null for absent, at a frame. */
function withKey(object, frame, box) {
  const keys = object.frames.map((at, k) => [at, object.boxes[k]]).filter(([at]) => at !== frame);
  keys.push([frame, box]);
  keys.sort((a, b) => a[0] - b[0]);
  return {...object, boxes: keys.map((key) => key[1]), frames: keys.map((key) => key[0])};
}

function withoutKey(object, frame) {
  const kept = object.frames.map((_, k) => k).filter((k) => object.frames[k] !== frame);
  return {...object, boxes: kept.map((k) => object.boxes[k]), frames: kept.map((k) => object.frames[k])};
}

/** Whether an object would still have a box without its key at a frame. */
function hasOtherKey(object, frame) {
  return object.frames.some((at, k) => at !== frame && object.boxes[k]);
}

/** The object counted in another number of frames, as retime_objects of drawn_boxes.py: each key at the nearest frame,
    which keeps the one that is nearest to it. */
function countBoxesIn(object, old, numFrames) {
  const factor = (numFrames - 1) / Math.max(old - 1, 1), nearest = new Map();
  object.frames.forEach((frame, k) => {
    const place = Math.floor(frame * factor + 0.5), distance = Math.abs(frame * factor - place);
    if (!nearest.has(place) || distance < nearest.get(place).distance) nearest.set(place, {distance, k});
  });
  return {...object, boxes: [...nearest.values()].map(({k}) => object.boxes[k]), frames: [...nearest.keys()]};
}

/** The object with frames for its boxes, where it came with a box for each frame. */
function withFrames(object) {
  return {...object, frames: object.frames ?? object.boxes.map((_, k) => k)};
}

/** The smallest box at a place in a frame: the number of its object, or -1. */
function smallestBoxAt(ed, [x, y]) {
  let best = [Infinity, -1];
  objectsOf(ed.drawing).forEach((object, n) => {
    const {box, present} = placeBoxes(object, ed.numFrames, sizeOf(ed.drawing))[ed.frame];
    if (!present || x < box[0] || y < box[1] || x > box[2] || y > box[3]) return;
    const area = (box[2] - box[0]) * (box[3] - box[1]);
    if (area < best[0]) best = [area, n];
  });
  return best[1];
}

/** What a boxes file holds of the drawing. */
function boxesFileOf(drawing) {
  const {width, height, num_frames} = drawing;
  return {width, height, num_frames, objects: objectsOf(drawing)};
}

function boxColour(n) {
  return PALETTE[n % PALETTE.length]; // as in sampling/video.py
}

function boxName(object, n) {
  return object.name.trim() || `Box ${n + 1}`;
}

/** All boxes as they are in the present frame; the selected one last, with its corners and the way of its centre. */
function renderBoxes(ed) {
  const {groups, svg} = ed.canvas, scale = pixelScale(svg), objects = objectsOf(ed.drawing);
  const order = objects.map((_, n) => n).filter((n) => n !== ed.box);
  if (objects[ed.box]) order.push(ed.box);
  groups.boxes.replaceChildren(...order.map((n) => boxNode(ed, n, scale)).filter(Boolean));
}

function boxNode(ed, n, scale) {
  const object = objectsOf(ed.drawing)[n], placed = placeBoxes(object, ed.numFrames, sizeOf(ed.drawing));
  const {box, present} = placed[ed.frame], isSelected = n === ed.box;
  if (!box) return null;
  const node = draw("g", {class: isSelected ? "box selected" : "box", style: `--colour: ${boxColour(n)}`});
  if (isSelected) node.append(...wayNodes(placed, scale));
  if (!present) return isSelected ? node : null;
  const [x, y] = [box[0] - 0.5, box[1] - 0.5], area = {x, y, width: box[2] - box[0], height: box[3] - box[1]};
  node.append(
    draw("rect", {class: "edges halo", ...area}), draw("rect", {class: "edges", ...area}),
    draw("rect", {class: "hit", ...area, "data-box": n}), labelNode(ed, boxName(object, n), box, scale),
  );
  if (isSelected) {
    CORNERS.forEach((_, corner) => {
      const [cx, cy] = cornerOf(box, corner).map((side) => side - 0.5), data = {"data-box": n, "data-corner": corner};
      const half = 5 * scale, name = corner === ed.corner ? "handle selected" : "handle";
      node.append(
        draw("circle", {class: `hit corner-${corner % 2}`, cx, cy, r: (ed.isTouch ? 20 : 10) * scale, ...data}),
        draw("rect", {class: `${name} corner-${corner % 2}`, x: cx - half, y: cy - half, width: 2 * half, height: 2 * half, ...data}),
      );
    });
  }
  return node;
}

/** Where the centre of a box is in each frame, where that is not one place. */
function wayNodes(placed, scale) {
  const centres = placed.filter(({present}) => present).map(({box}) => [(box[0] + box[2] - 1) / 2, (box[1] + box[3] - 1) / 2]);
  if (centres.every((point) => String(point) === String(centres[0]))) return [];
  const d = polyline(centres);
  const dots = centres.map(([cx, cy]) => draw("circle", {class: "pace", cx, cy, r: 1.8 * scale}));
  return [draw("path", {class: "way halo", d}), draw("path", {class: "way", d}), ...dots];
}

/** The name above a box where there is room, else within it. */
function labelNode(ed, name, [x1, y1], scale) {
  const size = 13 * scale, isAbove = y1 > size * 1.5;
  const y = (isAbove ? y1 - 5 * scale : y1 + size * 1.1) - 0.5;
  return draw("text", {class: "name", x: x1 - 0.5 + (isAbove ? 0 : 6 * scale), y, "font-size": size}, name);
}
