// Files: import, export, and what is dropped on the editor.

const MAX_IMPORT_BYTES = 8 << 20; // as in drawing.py

/** Takes files that are dropped anywhere on the editor, which the browser would open in place of the page. */
function listenToDrops(ed) {
  const hasFiles = (event) => event.dataTransfer.types.includes("Files");
  ed.root.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  ed.root.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    takeDropped(ed, [...event.dataTransfer.files]);
  });
}

/** A picture goes to the page's own place for pictures, everything else is imported. */
function takeDropped(ed, files) {
  const picture = files.find((file) => file.type.startsWith("image/"));
  if (!picture) {
    importFiles(ed, files);
    return;
  }
  const input = ed.props.picture_input && document.querySelector(ed.props.picture_input);
  if (!input) {
    say(ed, "A picture cannot be dropped here now.", true);
    return;
  }
  const chosen = new DataTransfer();
  chosen.items.add(picture);
  input.files = chosen.files;
  input.dispatchEvent(new Event("change", {bubbles: true}));
}

/** The tracks of files in place of those of the drawing, and boxes in place of its boxes; one step to undo. */
async function importFiles(ed, files) {
  if (!files.length) return;
  ed.parts.file.value = "";
  if (!ed.drawing) {
    say(ed, "Choose a picture first.", true);
    return;
  }
  if (files.reduce((sum, file) => sum + file.size, 0) > MAX_IMPORT_BYTES) {
    say(ed, "These files are larger than 8 MiB; keep fewer tracks or frames.", true);
    return;
  }
  say(ed, "Reading…");
  const answer = await server.import_tracks({
    files: await Promise.all(files.map(async (file) => ({name: file.name, data: await asBase64(file)}))),
    size: sizeOf(ed.drawing),
    video_size: ed.props.video_size ?? null,
    num_frames: ed.numFrames,
    max_objects: ed.props.max_objects ?? null,
    max_tracks: ed.props.max_tracks ?? null,
    max_points: ed.props.max_points ?? null,
  }).catch((error) => ({error: String(error?.message ?? error)}));
  if (answer.error) {
    say(ed, answer.error, true);
    return;
  }
  say(ed, answer.notes.join(" "));
  ed.selected = -1;
  setTool(ed, answer.drawing ? "draw" : "box");
  const drawing = drawingOf(answer.drawing, ed.numFrames) ?? ed.drawing;
  commit(ed, {...drawing, objects: answer.objects ?? ed.drawing.objects});
}

function asBase64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function exportDrawing(ed, event) {
  if (!ed.drawing) {
    event.preventDefault();
    return;
  }
  const {objects, ...tracks} = valueOf(ed.drawing);
  offerText(ed.parts.save, JSON.stringify(tracks));
}

/** Gives a link a text to download. */
function offerText(link, text) {
  URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
}
