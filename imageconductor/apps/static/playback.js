// Playing the drawing: a dot for each track at the frames' own pace, and the picture itself cut and dragged along.

const FILL_PX = 96; // of the longer side of the patch that fills a hole
const FILL_ROUNDS = 400;

/** The dots of all tracks at the present frame, and the preview. */
function renderFrame(ed) {
  const {groups, svg} = ed.canvas, {drawing, numFrames} = ed, size = sizeOf(drawing), t = ed.frame;
  const isShown = ed.isPlaying || t > 0, scale = pixelScale(svg);
  const ghost = (frames, colour, kind) => frames[t].visible && draw("circle", {
    class: `ghost ${kind}`, style: `--colour: ${colour}`, cx: frames[t].point[0], cy: frames[t].point[1], r: 6 * scale,
  });
  const ghosts = [];
  if (isShown) {
    drawing.tracks.forEach((track, n) => {
      ghosts.push(ghost(placeTrack(track, numFrames, numFrames, size), colourOf(drawing, n), "drawn"));
    });
    if (drawing.camera) {
      for (const frames of placeCamera(drawing.camera, numFrames, numFrames, size)) {
        ghosts.push(ghost(frames, CONTROL_COLOURS.camera, "grid"));
      }
    }
  }
  groups.ghosts.replaceChildren(...ghosts.filter(Boolean));
  renderBoxes(ed);
  renderPreview(ed, isShown && ed.isPreviewing);
  renderPlayhead(ed);
}

/** The scene moved by the camera's amounts, with the cut parts filled and moved along their tracks. */
function renderPreview(ed, isShown) {
  const {groups, defs} = ed.canvas, {drawing, numFrames} = ed, size = sizeOf(drawing);
  groups.pieces.replaceChildren();
  groups.fills.replaceChildren();
  defs.replaceChildren();
  groups.moving.removeAttribute("transform");
  if (!isShown) return;
  if (drawing.camera) {
    const [a, b, dx, dy] = cameraTransform(drawing.camera, ed.frame, numFrames, numFrames, size);
    const [cx, cy] = [(size[0] - 1) / 2, (size[1] - 1) / 2];
    const shift = [cx - a * cx + b * cy + dx, cy - b * cx - a * cy + dy];
    groups.moving.setAttribute("transform", `matrix(${a} ${b} ${-b} ${a} ${shift[0]} ${shift[1]})`);
  }
  drawing.tracks.forEach((track, n) => {
    if (!track.cut) return;
    const id = `${ed.id}-cut-${n}`, frames = placeTrack(track, numFrames, numFrames, size);
    const [x, y] = frames[ed.frame].point, dx = x - frames[0].point[0], dy = y - frames[0].point[1];
    defs.append(draw("clipPath", {id}, draw("path", {d: `${polyline(track.cut)}Z`})));
    const fill = fillOf(ed, track.cut);
    if (fill) groups.fills.append(draw("image", {...fill, preserveAspectRatio: "none", "clip-path": `url(#${id})`}));
    const piece = ed.canvas.groups.picture.cloneNode();
    piece.setAttribute("clip-path", `url(#${id})`);
    groups.pieces.append(draw("g", {transform: `translate(${dx} ${dy})`}, piece));
  });
}

/** The patch that stands where a part was cut out; made once for each outline, and null until it is ready. */
function fillOf(ed, cut) {
  const key = JSON.stringify(cut);
  if (!ed.fills.has(key)) {
    ed.fills.set(key, null);
    makeFill(ed, cut).then((fill) => {
      ed.fills.set(key, fill);
      renderFrame(ed);
    });
  }
  return ed.fills.get(key);
}

/** A small picture of the surroundings of an outline, spread over its inside, as attributes of an SVG image. */
async function makeFill(ed, cut) {
  const picture = new Image();
  picture.src = ed.props.image;
  await picture.decode();
  const [width, height] = sizeOf(ed.drawing);
  const xs = cut.map((point) => point[0]), ys = cut.map((point) => point[1]);
  const margin = 0.1 * Math.max(Math.max(...xs) - Math.min(...xs), Math.max(...ys) - Math.min(...ys)) + 2;
  const left = Math.max(Math.min(...xs) - margin, -0.5), top = Math.max(Math.min(...ys) - margin, -0.5);
  const right = Math.min(Math.max(...xs) + margin, width - 0.5), bottom = Math.min(Math.max(...ys) + margin, height - 0.5);
  const scale = Math.min(1, FILL_PX / Math.max(right - left, bottom - top));
  const w = Math.max(3, Math.round((right - left) * scale)), h = Math.max(3, Math.round((bottom - top) * scale));
  const canvas = make("canvas", {width: w, height: h}), context = canvas.getContext("2d", {willReadFrequently: true});
  context.setTransform(w / (right - left), 0, 0, h / (bottom - top), 0, 0);
  context.translate(-left, -top);
  context.beginPath();
  cut.forEach(([x, y]) => context.lineTo(x, y));
  context.lineWidth = 4 / scale; // the edge of what is cut belongs to it
  context.stroke();
  context.fill();
  const isHole = context.getImageData(0, 0, w, h).data.filter((_, i) => i % 4 === 3).map((alpha) => alpha > 0);
  context.clearRect(left, top, right - left, bottom - top);
  context.drawImage(picture, -0.5, -0.5, width, height);
  const pixels = context.getImageData(0, 0, w, h);
  diffuse(pixels.data, isHole, w, h);
  context.putImageData(pixels, 0, 0);
  return {href: canvas.toDataURL(), x: left, y: top, width: right - left, height: bottom - top};
}

/** Spreads the colours around a hole over it until they change smoothly (Laplace's equation, over-relaxed). */
function diffuse(data, isHole, w, h) {
  for (let channel = 0; channel < 3; channel++) {
    const values = Float32Array.from({length: w * h}, (_, i) => data[4 * i + channel]);
    const known = values.filter((_, i) => !isHole[i]);
    const mean = known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : 128;
    values.forEach((_, i) => { if (isHole[i]) values[i] = mean; });
    for (let pass = 0; pass < FILL_ROUNDS; pass++) {
      for (let i = 0; i < w * h; i++) {
        if (!isHole[i]) continue;
        const x = i % w, near = [];
        if (x > 0) near.push(values[i - 1]);
        if (x + 1 < w) near.push(values[i + 1]);
        if (i >= w) near.push(values[i - w]);
        if (i + w < w * h) near.push(values[i + w]);
        const average = near.reduce((sum, value) => sum + value, 0) / near.length;
        values[i] += 1.8 * (average - values[i]);
      }
    }
    values.forEach((value, i) => { data[4 * i + channel] = value; });
  }
}

/** Starts or stops playing, over and over, each frame as long as it lasts in the video. */
function togglePlaying(ed) {
  ed.isPlaying = !ed.isPlaying && Boolean(ed.drawing);
  if (!ed.isPlaying) {
    renderFrame(ed);
    renderPanels(ed);
    return;
  }
  const began = performance.now() - (ed.frame / ed.fps) * 1000;
  const tick = (now) => {
    if (!ed.isPlaying || !ed.root.isConnected || !ed.drawing) return;
    const frame = Math.floor(Math.max(now - began, 0) / 1000 * ed.fps) % ed.numFrames;
    if (frame !== ed.frame) {
      ed.frame = frame;
      renderFrame(ed);
    }
    requestAnimationFrame(tick);
  };
  renderFrame(ed);
  renderPanels(ed);
  requestAnimationFrame(tick);
}

/** Shows one frame. */
function seek(ed, frame) {
  ed.isPlaying = false;
  ed.frame = limit(Math.round(frame), 0, ed.numFrames - 1);
  renderFrame(ed);
  renderPanels(ed);
}
