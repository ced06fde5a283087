// The picture with everything that is drawn on it, as SVG in pixels of the picture.
// (0, 0) is the centre of the top-left pixel, so the picture and the viewBox begin at -0.5.

const CONTROL_COLOURS = {camera: "#40a0ff", object: "#ff4040"}; // as in sampling/video.py
const PALETTE = ["#ff4040", "#40a0ff", "#ffc828", "#5adc78", "#dc6eff", "#ff8c3c"];
const UNMARKED = PALETTE.filter((colour) => !Object.values(CONTROL_COLOURS).includes(colour));
const SVG = "http://www.w3.org/2000/svg";

/** An HTML element with attributes, listeners (on...) and children. */
function make(tag, attributes = {}, ...children) {
  return dress(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
function draw(tag, attributes = {}, ...children) {
  return dress(document.createElementNS(SVG, tag), attributes, children);
}

function dress(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** A colour for each track: that of what it moves, or the next one of the palette. */
function colourOf(drawing, index) {
  const {control} = drawing.tracks[index];
  if (control) return CONTROL_COLOURS[control] ?? PALETTE[0];
  const others = drawing.camera || drawing.tracks.some((track) => track.control) ? UNMARKED : PALETTE;
  return others[index % others.length];
}

/** The groups of the canvas, from back to front. What the preview moves is cut off at the edge of the picture. */
function buildCanvas(id) {
  const groups = {};
  const svg = draw("svg", {class: "canvas", tabindex: 0, role: "application", preserveAspectRatio: "xMidYMid meet"});
  const edge = draw("rect", {x: -0.5, y: -0.5}), defs = draw("defs");
  svg.append(draw("clipPath", {id: `${id}-edge`}, edge), defs);
  for (const name of ["scene", "pieces", "dim", "camera", "tracks", "ghosts", "boxes", "stroke"]) {
    groups[name] = draw("g", {class: name});
    svg.append(groups[name]);
  }
  groups.picture = draw("image", {preserveAspectRatio: "none"});
  groups.fills = draw("g");
  groups.moving = draw("g", {}, groups.picture, groups.fills);
  groups.scene.append(groups.moving);
  for (const group of [groups.scene, groups.pieces]) group.setAttribute("clip-path", `url(#${id}-edge)`);
  return {svg, groups, defs, edge};
}

/** Pixels of the picture under one pixel of the screen. */
function pixelScale(svg) {
  const matrix = svg.getScreenCTM();
  return matrix && matrix.a ? 1 / Math.hypot(matrix.a, matrix.b) : 1;
}

/** Where a pointer is, in pixels of the picture: exact at any size, zoom, pixel ratio and in full screen. */
function pointerPosition(svg, event) {
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  return [point.x, point.y];
}

function polyline(points) {
  return points.map(([x, y], k) => `${k ? "L" : "M"}${round(x)} ${round(y)}`).join("");
}

/** The curve of a track as a polyline that is finer than the eye. */
function curvePoints(track, countedIn) {
  if (track.points.length < 2) return track.points;
  const {knots, at} = trackCurve(track, countedIn);
  const steps = track.interpolation === "linear" || track.points.length === 2 ? 1 : 16;
  return knots.flatMap((knot, k) => k + 1 < knots.length
    ? Array.from({length: steps}, (_, i) => at(knot + (i / steps) * (knots[k + 1] - knot))) : [at(knot)]);
}

/** An arrow head at the end of a polyline, `length` long. */
function arrowHead(points, length) {
  const tip = points[points.length - 1];
  const from = points.findLast(([x, y]) => Math.hypot(tip[0] - x, tip[1] - y) >= length * 0.7);
  if (!from) return null;
  const angle = Math.atan2(tip[1] - from[1], tip[0] - from[0]);
  const corner = (turn) => [tip[0] - length * Math.cos(angle + turn), tip[1] - length * Math.sin(angle + turn)];
  return `${polyline([corner(0.45), tip, corner(-0.45)])}Z`;
}

/** The picture, and the part of it that the video will not show, dimmed. */
function renderPicture(ed) {
  const {svg, groups} = ed.canvas, [width, height] = sizeOf(ed.drawing);
  svg.setAttribute("viewBox", `-0.5 -0.5 ${width} ${height}`);
  svg.style.aspectRatio = `${width} / ${height}`;
  ed.root.style.setProperty("--ic-aspect", width / height);
  dress(ed.canvas.edge, {width, height}, []);
  dress(groups.picture, {x: -0.5, y: -0.5, width, height, href: ed.props.image || "data:,"}, []);
  groups.dim.replaceChildren();
  const video = ed.props.video_size;
  if (!video) return;
  const scale = Math.max(video[0] / width, video[1] / height); // as first_frame.cover_scale
  const kept = [video[0] / scale, video[1] / scale];
  const left = (width - kept[0]) / 2 - 0.5, top = (height - kept[1]) / 2 - 0.5;
  const outer = `M-0.5 -0.5h${width}v${height}h${-width}Z`;
  const inner = `M${left} ${top}h${kept[0]}v${kept[1]}h${-kept[0]}Z`;
  if (kept[0] > width - 0.5 && kept[1] > height - 0.5) return;
  groups.dim.append(draw("path", {d: outer + inner, "fill-rule": "evenodd"}));
}

/** All tracks; the selected one last, with its points. */
function renderTracks(ed) {
  const {groups, svg} = ed.canvas, scale = pixelScale(svg);
  const order = ed.drawing.tracks.map((_, n) => n).filter((n) => n !== ed.selected);
  if (ed.drawing.tracks[ed.selected]) order.push(ed.selected);
  groups.tracks.replaceChildren(...order.map((n) => trackNode(ed, n, scale)));
}

function trackNode(ed, n, scale) {
  const track = ed.drawing.tracks[n], colour = colourOf(ed.drawing, n), isSelected = n === ed.selected;
  const node = draw("g", {class: isSelected ? "track selected" : "track", style: `--colour: ${colour}`});
  if (track.points.length === 1) {
    const [cx, cy] = track.points[0];
    node.append(
      draw("circle", {class: "hit", cx, cy, r: 13 * scale, "data-track": n}),
      draw("circle", {class: "ring halo", cx, cy, r: 9 * scale}),
      draw("circle", {class: "ring", cx, cy, r: 9 * scale}),
      draw("circle", {class: "dot", cx, cy, r: 4 * scale}),
    );
  } else {
    const curve = curvePoints(track, ed.drawing.num_frames), d = polyline(curve), head = arrowHead(curve, 14 * scale);
    node.append(draw("path", {class: "line halo", d}), draw("path", {class: "line", d}));
    if (head) node.append(draw("path", {class: "head", d: head}));
    node.append(draw("path", {class: "hit", d, "data-track": n}));
    const [cx, cy] = track.points[0];
    if (!isSelected) node.append(draw("circle", {class: "dot", cx, cy, r: 4 * scale}));
  }
  if (track.cut) node.append(draw("path", {class: "outline", d: `${polyline(track.cut)}Z`}));
  if (isSelected) node.append(...pointNodes(ed, track, n, scale));
  return node;
}

/** A small dot for each frame, which shows the pace, and a handle for each control point. */
function pointNodes(ed, track, n, scale) {
  const nodes = [];
  if (track.points.length > 1) {
    for (const {point: [cx, cy]} of placeTrack(track, ed.numFrames, ed.numFrames, sizeOf(ed.drawing))) {
      nodes.push(draw("circle", {class: "pace", cx, cy, r: 1.8 * scale}));
    }
  }
  track.points.forEach(([cx, cy], k) => {
    const data = {"data-track": n, "data-point": k};
    const name = k === ed.point ? "handle selected" : "handle";
    nodes.push(
      draw("circle", {class: "hit", cx, cy, r: (ed.isTouch ? 20 : 10) * scale, ...data}),
      draw("circle", {class: name, cx, cy, r: (track.points.length > 40 ? 3 : 5.5) * scale, ...data}),
    );
  });
  return nodes;
}

/** The grid of tracks that the camera's amounts make. */
function renderCamera(ed) {
  const {groups, svg} = ed.canvas, {camera} = ed.drawing, scale = pixelScale(svg);
  groups.camera.replaceChildren();
  if (!camera) return;
  for (const frames of placeCamera(camera, ed.numFrames, ed.numFrames, sizeOf(ed.drawing))) {
    const points = frames.filter(({visible}) => visible).map(({point}) => point);
    if (!points.length) continue;
    const [cx, cy] = points[0], head = arrowHead(points, 10 * scale);
    groups.camera.append(
      draw("path", {class: "line halo", d: polyline(points)}),
      draw("path", {class: "line", d: polyline(points)}),
      draw("circle", {class: "dot", cx, cy, r: 3 * scale}),
    );
    if (head) groups.camera.append(draw("path", {class: "head", d: head}));
  }
}

/** Everything that depends on the drawing. */
function render(ed) {
  ed.root.classList.toggle("no-picture", !ed.drawing);
  if (ed.drawing) {
    renderPicture(ed);
    renderCamera(ed);
    renderTracks(ed);
    renderFrame(ed);
  }
  renderPanels(ed);
}
