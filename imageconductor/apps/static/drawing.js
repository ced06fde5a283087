// The drawing: plain objects that are replaced, never changed, and the history of them.
// A track may have `cut`, the outline of the part of the picture that the preview moves along it; the value has not.

const TIMING_KEYS = ["start", "end", "easing", "times"];
const HISTORY_LENGTH = 200;

function round(value, digits = 2) {
  return Number(value.toFixed(digits));
}

function roundPoint(point) {
  return [round(point[0]), round(point[1])];
}

/** A point moved into the picture, whose last pixel ends half a pixel past W - 1; the server accepts 0 <= x < W. */
function clampPoint(point, drawing) {
  return roundPoint([limit(point[0], 0, drawing.width - 0.5), limit(point[1], 0, drawing.height - 0.5)]);
}

function sizeOf(drawing) {
  return [drawing.width, drawing.height];
}

/** The track with other points; what counts points is kept in step, or dropped where it no longer means anything. */
function withPoints(track, points, flags = track.visible, times = track.times) {
  const changed = {...track, points};
  if (track.visible) changed.visible = flags;
  if (track.times) changed.times = times;
  if (points.length === 1) for (const key of TIMING_KEYS) delete changed[key];
  return changed;
}

/** Whether the points of a track may leave the frame. */
function mayLeave(track) {
  return Boolean(track.outside || track.visible);
}

function movePoint(track, k, point, drawing) {
  const points = track.points.slice();
  points[k] = mayLeave(track) ? roundPoint(point) : clampPoint(point, drawing);
  return withPoints(track, points);
}

/** The whole track moved as far as the frame allows. */
function moveTrack(track, [dx, dy], drawing) {
  if (!mayLeave(track)) {
    const xs = track.points.map((point) => point[0]), ys = track.points.map((point) => point[1]);
    dx = limit(dx, -Math.min(...xs), drawing.width - 0.5 - Math.max(...xs));
    dy = limit(dy, -Math.min(...ys), drawing.height - 0.5 - Math.max(...ys));
  }
  const moved = withPoints(track, track.points.map(([x, y]) => roundPoint([x + dx, y + dy])));
  if (track.cut) moved.cut = track.cut.map(([x, y]) => [x + dx, y + dy]);
  return moved;
}

/** The track with a point inserted before its point k; k = its length appends. */
function insertPoint(track, k, point) {
  const put = (list, item) => [...list.slice(0, k), item, ...list.slice(k)];
  const times = track.times && (k < track.times.length
    ? put(track.times, round((track.times[k - 1] + track.times[k]) / 2, 3)) : undefined);
  const changed = withPoints(track, put(track.points, point), track.visible && put(track.visible, true), times);
  if (track.times && !times) delete changed.times; // a point after the last time: the motion is even again
  return changed;
}

function removePoint(track, k) {
  const drop = (list) => list && list.filter((_, index) => index !== k);
  return withPoints(track, drop(track.points), drop(track.visible), drop(track.times));
}

/** The track whose point k is reached in a frame of 0..last; the times of the others give way so that all rise. */
function reachAt(track, k, frame, last) {
  const {start = 0, end = last, easing, ...others} = track, count = track.points.length;
  const gap = Math.min(1, last / (count - 1));
  const times = track.times?.slice() ?? uniformKnots(count).map((part) => start + part * (end - start));
  times[k] = limit(frame, k * gap, last - (count - 1 - k) * gap);
  for (let j = k - 1; j >= 0; j--) times[j] = Math.min(times[j], times[j + 1] - gap);
  for (let j = k + 1; j < count; j++) times[j] = Math.max(times[j], times[j - 1] + gap);
  return {...others, times: times.map((time) => round(time, 3))};
}

/** Whether the last point of a track is where the one before is. */
function endsTwice(track) {
  const [before, last] = track.points.slice(-2);
  return Boolean(last) && String(before) === String(last);
}

/** Where on its curve a track comes nearest to a point: the index at which a new control point belongs there. */
function insertionIndex(track, point, countedIn) {
  const {knots, at} = trackCurve(track, countedIn);
  let best = [Infinity, 1];
  for (let k = 0; k + 1 < knots.length; k++) {
    for (let i = 0; i <= 24; i++) {
      const [x, y] = at(knots[k] + (i / 24) * (knots[k + 1] - knots[k]));
      const distance = Math.hypot(x - point[0], y - point[1]);
      if (distance < best[0]) best = [distance, k + 1];
    }
  }
  return best[1];
}

/** The drawing counted in another number of frames: the motion stays in the same part of the clip. */
function countIn(drawing, numFrames) {
  const old = drawing.num_frames ?? numFrames;
  if (old === numFrames) return {...drawing, num_frames: numFrames};
  const factor = (numFrames - 1) / Math.max(old - 1, 1);
  const scale = (frame) => round(frame * factor, 3);
  const retime = (entry) => {
    const changed = {...entry};
    for (const key of ["start", "end"]) if (key in entry) changed[key] = scale(entry[key]);
    if (entry.times) changed.times = entry.times.map(scale);
    if (numFrames < 2) for (const key of ["start", "end", "times"]) delete changed[key];
    return changed;
  };
  const changed = {...drawing, num_frames: numFrames, tracks: drawing.tracks.map(retime)};
  if (drawing.camera) changed.camera = retime(drawing.camera);
  if (drawing.objects) changed.objects = drawing.objects.map((object) => countBoxesIn(object, old, numFrames));
  return changed;
}

/** What the server gets: the drawing without the outlines of the preview. */
function valueOf(drawing) {
  return {...drawing, tracks: drawing.tracks.map(({cut, ...track}) => track)};
}

/** A value of the server as a drawing, or null; it may lack tracks where it states a camera alone. */
function drawingOf(value, numFrames) {
  if (!value || typeof value !== "object" || !value.width || !value.height) return null;
  const copy = JSON.parse(JSON.stringify(value));
  if (copy.objects) copy.objects = copy.objects.map(withFrames);
  return countIn({...copy, tracks: copy.tracks ?? []}, numFrames);
}

/** Past and undone drawings. */
class History {
  constructor(drawing) {
    this.entries = [drawing];
    this.index = 0;
  }

  get current() {
    return this.entries[this.index];
  }

  push(drawing) {
    this.entries = [...this.entries.slice(0, this.index + 1), drawing].slice(-HISTORY_LENGTH);
    this.index = this.entries.length - 1;
  }

  canStep(by) {
    return this.index + by >= 0 && this.index + by < this.entries.length;
  }

  step(by) {
    if (this.canStep(by)) this.index += by;
    return this.current;
  }
}
