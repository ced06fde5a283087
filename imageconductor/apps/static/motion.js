// Where tracks and scene points are in each frame: the same arithmetic as imageconductor/conditioning
// (timing.py, interpolation.py, camera.py), so that what plays here is what the model is given.

const EASINGS = {
  "linear": (u) => u,
  "ease-in": (u) => u * u,
  "ease-out": (u) => 1 - (1 - u) * (1 - u),
  "ease-in-out": (u) => u * u * (3 - 2 * u),
};

function limit(value, lowest, highest) {
  return Math.min(Math.max(value, lowest), highest);
}

function isInside(point, size) {
  return point[0] >= 0 && point[1] >= 0 && point[0] < size[0] && point[1] < size[1];
}

/** The part of the motion that is done in frame t of numFrames; start and end count in a clip of `countedIn` frames. */
function progressAt(timing, t, numFrames, countedIn) {
  const passed = t / Math.max(numFrames - 1, 1);
  const last = Math.max(countedIn - 1, 1);
  const start = (timing.start ?? 0) / last;
  const end = timing.end == null ? 1 : timing.end / last;
  let done = limit((passed - start) / (end - start), 0, 1);
  if (timing.returns) done = 1 - Math.abs(2 * done - 1);
  return EASINGS[timing.easing ?? "linear"](done);
}

/** The slopes of the monotone cubic (PCHIP) through values at rising knots: a weighted harmonic mean of the secants. */
function pchipSlopes(knots, values) {
  const n = values.length;
  const h = [], secant = [];
  for (let k = 0; k + 1 < n; k++) {
    h.push(knots[k + 1] - knots[k]);
    secant.push((values[k + 1] - values[k]) / h[k]);
  }
  if (n === 2) return [secant[0], secant[0]];
  const slopes = new Array(n).fill(0);
  for (let k = 1; k + 1 < n; k++) {
    if (secant[k - 1] * secant[k] <= 0) continue;
    const before = 2 * h[k] + h[k - 1], after = h[k] + 2 * h[k - 1];
    slopes[k] = (before + after) / (before / secant[k - 1] + after / secant[k]);
  }
  slopes[0] = pchipEnd(h[0], h[1], secant[0], secant[1]);
  slopes[n - 1] = pchipEnd(h[n - 2], h[n - 3], secant[n - 2], secant[n - 3]);
  return slopes;
}

/** The slope at an end from three points, changed where it would break the shape. */
function pchipEnd(h0, h1, secant0, secant1) {
  const slope = ((2 * h0 + h1) * secant0 - h0 * secant1) / (h0 + h1);
  if (Math.sign(slope) !== Math.sign(secant0)) return 0;
  if (Math.sign(secant0) !== Math.sign(secant1) && Math.abs(slope) > 3 * Math.abs(secant0)) return 3 * secant0;
  return slope;
}

function cubicAt(knots, values, slopes, at, k) {
  const h = knots[k + 1] - knots[k], u = (at - knots[k]) / h;
  return (1 + 2 * u) * (1 - u) ** 2 * values[k] + u * (1 - u) ** 2 * h * slopes[k]
    + u * u * (3 - 2 * u) * values[k + 1] + u * u * (u - 1) * h * slopes[k + 1];
}

/** Index of the segment of rising knots in which `at` lies. */
function segmentOf(knots, at) {
  let k = 0;
  while (k + 2 < knots.length && at >= knots[k + 1]) k++;
  return k;
}

/** A function from the axis of the curve to [x, y]; `knots` are where the K >= 2 control points stand on that axis. */
function curveThrough(points, knots, isLinear) {
  const axes = [0, 1].map((axis) => {
    const values = points.map((point) => point[axis]);
    return {
      values,
      slopes: isLinear ? null : pchipSlopes(knots, values),
      lowest: Math.min(...values),
      highest: Math.max(...values),
    };
  });
  return (at) => {
    const k = segmentOf(knots, at), u = (at - knots[k]) / (knots[k + 1] - knots[k]);
    return axes.map(({values, slopes, lowest, highest}) => {
      const exact = slopes ? cubicAt(knots, values, slopes, at, k) : values[k] + u * (values[k + 1] - values[k]);
      return limit(exact, lowest, highest);
    });
  };
}

function uniformKnots(count) {
  return Array.from({length: count}, (_, k) => k / Math.max(count - 1, 1));
}

/** The curve of a track, and its knots: even ones, or the times of its points as parts of the clip.

    A track that states what is seen was measured: lines join its seen points. */
function trackCurve(track, countedIn) {
  const knots = track.times
    ? track.times.map((time) => time / Math.max(countedIn - 1, 1))
    : uniformKnots(track.points.length);
  const isJoined = track.visible?.filter(Boolean).length > 1;
  const used = (list) => isJoined ? list.filter((_, k) => track.visible[k]) : list;
  const isLinear = track.interpolation === "linear" || Boolean(track.visible);
  return {knots, at: curveThrough(used(track.points), used(knots), isLinear)};
}

/** The positions of a track in each of numFrames frames: [{point: [x, y], visible}, ...]. */
function placeTrack(track, numFrames, countedIn, size) {
  const {points} = track, seen = track.visible ?? points.map(() => true);
  const frames = Array.from({length: numFrames}, (_, t) => t);
  const shown = (point) => !track.outside || isInside(point, size);
  if (points.length === 1) return frames.map(() => ({point: points[0], visible: seen[0] && shown(points[0])}));
  const {knots, at} = trackCurve(track, countedIn);
  return frames.map((t) => {
    const where = track.times
      ? limit(t / Math.max(numFrames - 1, 1), knots[0], knots[knots.length - 1])
      : progressAt(track, t, numFrames, countedIn);
    const k = segmentOf(knots, where);
    // Rounded, so that a frame that meets a point does not ask for the next one too.
    const place = Number((k + (where - knots[k]) / (knots[k + 1] - knots[k])).toFixed(9));
    const point = at(where);
    return {point, visible: seen[Math.floor(place)] && seen[Math.ceil(place)] && shown(point)};
  });
}

/** The similarity that scene points undergo in frame t: [a, b, dx, dy], x' = a x - b y + dx and y' = b x + a y + dy,
    in pixels from the centre of the frame. */
function cameraTransform(camera, t, numFrames, countedIn, size) {
  const u = progressAt(camera, t, numFrames, countedIn);
  const zoom = camera.zoom ?? 0, pan = camera.pan ?? [0, 0], side = Math.min(...size);
  const growth = (1 + 2 * Math.abs(zoom) * u) ** (zoom >= 0 ? 1 : -1);
  const angle = -((camera.roll ?? 0) * Math.PI / 180) * u;
  return [growth * Math.cos(angle), growth * Math.sin(angle), -pan[0] * side * u, -pan[1] * side * u];
}

/** The tracks of the camera's grid, row by row, as `placeTrack` gives them; one that leaves the frame stays hidden. */
function placeCamera(camera, numFrames, countedIn, size) {
  const [columns, rows] = camera.grid ?? [3, 3];
  const centre = [(size[0] - 1) / 2, (size[1] - 1) / 2];
  const along = (i, count, length) => Math.max((i + 0.5) * length / count - 0.5, 0);
  const moves = Array.from({length: numFrames}, (_, t) => cameraTransform(camera, t, numFrames, countedIn, size));
  const tracks = [];
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const x = along(column, columns, size[0]) - centre[0], y = along(row, rows, size[1]) - centre[1];
      let visible = true;
      tracks.push(moves.map(([a, b, dx, dy]) => {
        const point = [a * x - b * y + dx + centre[0], b * x + a * y + dy + centre[1]];
        visible &&= isInside(point, size);
        return {point, visible};
      }));
    }
  }
  return tracks;
}

/** [x, y] at lengths along a polyline, the length at each of its points, and that of all. */
function alongPolyline(points) {
  const lengths = [0];
  for (let k = 1; k < points.length; k++) {
    lengths.push(lengths[k - 1] + Math.hypot(points[k][0] - points[k - 1][0], points[k][1] - points[k - 1][1]));
  }
  const at = (length) => {
    const k = limit(segmentOf(lengths, length), 0, points.length - 2);
    const u = (length - lengths[k]) / (lengths[k + 1] - lengths[k] || 1);
    return [0, 1].map((axis) => points[k][axis] + u * (points[k + 1][axis] - points[k][axis]));
  };
  return {at, lengths, total: lengths[lengths.length - 1]};
}

function distanceToSegment([x, y], [ax, ay], [bx, by]) {
  const dx = bx - ax, dy = by - ay;
  const u = limit(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy || 1), 0, 1);
  return Math.hypot(x - ax - u * dx, y - ay - u * dy);
}

/** Indices of the points where a polyline turns (Douglas and Peucker): lines between them stay within the tolerance. */
function findTurns(points, tolerance, first = 0, last = points.length - 1) {
  let farthest = [tolerance, -1];
  for (let k = first + 1; k < last; k++) {
    const distance = distanceToSegment(points[k], points[first], points[last]);
    if (distance > farthest[0]) farthest = [distance, k];
  }
  const turn = farthest[1];
  return turn < 0 ? [] : [...findTurns(points, tolerance, first, turn), turn, ...findTurns(points, tolerance, turn, last)];
}

/** Lengths along a stroke about `spacing` apart, which meet its turns where they are not too close together. */
function spaceEvenly(turns, total, spacing) {
  const kept = [0];
  for (const turn of turns) {
    if (turn - kept[kept.length - 1] >= spacing / 2 && total - turn >= spacing / 2) kept.push(turn);
  }
  kept.push(total);
  return kept.slice(1).reduce((places, end, k) => {
    const count = Math.max(1, Math.round((end - kept[k]) / spacing));
    return [...places, ...Array.from({length: count}, (_, i) => kept[k] + (i + 1) / count * (end - kept[k]))];
  }, [0]);
}

/** Few control points along a stroke, and the interpolation where straight lines with corners need fewer than a curve;
    either stays within `tolerance` px of the stroke. The points are about equally far apart, because the server takes as
    long for each stretch between two points: the motion is even. */
function simplifyStroke(stroke, tolerance, most = 32) {
  const line = alongPolyline(stroke);
  if (stroke.length < 2 || line.total === 0) return {points: stroke.slice(0, 1)};
  const turns = findTurns(stroke, 2 * tolerance).map((k) => line.lengths[k]);
  const samples = uniformKnots(129).map((part) => line.at(part * line.total));
  const isClose = (curve) => samples.every((sample) => curve.some((point, k) =>
    k > 0 && distanceToSegment(sample, curve[k - 1], point) <= tolerance));
  let uneven = null, points = [];
  for (let count = 1; count < most; count++) {
    const places = spaceEvenly(turns, line.total, line.total / count);
    if (places.length > most) break;
    points = places.map(line.at);
    const curve = uniformKnots(8 * points.length).map(curveThrough(points, uniformKnots(points.length), false));
    const fit = isClose(curve) ? {points} : isClose(points) ? {points, interpolation: "linear"} : null;
    if (!fit) continue;
    const gaps = places.slice(1).map((place, k) => place - places[k]);
    if (Math.max(...gaps) <= 1.7 * Math.min(...gaps)) return fit;
    uneven ??= fit;
  }
  return uneven ?? {points};
}
