// What stands around the picture for boxes: the choice of the tool, the name, the keys of a box, its line of the timeline.

const MAX_NAME_CHARS = 60; // as in drawn_boxes.py

/** What a drag draws; shown where the model takes boxes. */
function buildTools(ed) {
  const option = (tool, label, title) => make("label", {class: tool, title},
    make("input", {type: "radio", name: `${ed.id}-tool`, value: tool, onchange: () => chooseBoxTool(ed, tool === "box")}),
    make("span", {}, label));
  return make("fieldset", {class: "choice", "aria-label": "What a drag draws"},
    option("draw", "Track", "Draw how things move"),
    option("box", "Box", "Draw where things are and how large"));
}

function buildBoxPanel(ed) {
  const {parts} = ed;
  parts.boxName = make("input", {type: "text", class: "text", maxlength: MAX_NAME_CHARS, placeholder: "such as dog",
    "aria-label": "Name of the box", autocomplete: "off", spellcheck: "false",
    oninput: () => nameBox(ed), onchange: () => commit(ed, ed.drawing),
    onkeydown: (event) => {
      event.stopPropagation();
      if (event.key === "Enter" || event.key === "Escape") ed.canvas.svg.focus({preventScroll: true});
    }});
  parts.boxShown = make("button", {type: "button", class: "tool shown", onclick: () => toggleShown(ed)});
  parts.boxKey = make("button", {type: "button", class: "tool key", title: "Let the neighbouring key boxes say where it is",
    onclick: () => changeBox(ed, withoutKey(objectsOf(ed.drawing)[ed.box], ed.frame))}, "Remove key");
  parts.boxPanel = make("div", {class: "bar box-panel"},
    make("label", {class: "check"}, "What it shows", parts.boxName), parts.boxShown, parts.boxKey);
  return parts.boxPanel;
}

function changeBox(ed, object) {
  commit(ed, replaceBox(ed.drawing, ed.box, object));
}

/** The name while it is typed; the history gets it when the field is left. */
function nameBox(ed) {
  const object = objectsOf(ed.drawing)[ed.box];
  if (!object) return;
  ed.drawing = replaceBox(ed.drawing, ed.box, {...object, name: ed.parts.boxName.value});
  renderBoxes(ed);
  renderTimeline(ed);
}

/** Hides the selected object from the present frame on, or shows it again. */
function toggleShown(ed) {
  const object = objectsOf(ed.drawing)[ed.box], {box, present} = placeBoxes(object, ed.numFrames, sizeOf(ed.drawing))[ed.frame];
  changeBox(ed, withKey(object, ed.frame, present ? null : box.map((side) => round(side))));
}

function renderBoxPanel(ed) {
  const {parts} = ed, object = ed.drawing && objectsOf(ed.drawing)[ed.box], isChosen = ed.tool === "box";
  parts.tools.hidden = !ed.props.max_objects;
  for (const radio of parts.tools.querySelectorAll("input")) radio.checked = (radio.value === "box") === isChosen;
  parts.boxPanel.hidden = !isChosen;
  parts.saveBoxes.hidden = !ed.drawing || !objectsOf(ed.drawing).length;
  ed.root.classList.toggle("boxing", isChosen);
  ed.root.classList.toggle("has-boxes", !parts.saveBoxes.hidden);
  for (const part of [parts.boxName, parts.boxShown, parts.boxKey]) part.disabled = !object;
  if (parts.boxName.value !== (object?.name ?? "")) parts.boxName.value = object?.name ?? "";
  renderBoxKeys(ed);
}

/** What depends on the frame. */
function renderBoxKeys(ed) {
  const {parts} = ed, object = ed.drawing && objectsOf(ed.drawing)[ed.box], isPresent = Boolean(presentBox(ed));
  parts.boxShown.textContent = isPresent || !object ? "Hide from here" : "Show from here";
  if (!object) return;
  const isOther = hasOtherKey(object, ed.frame);
  parts.boxShown.disabled = isPresent && !isOther;
  parts.boxKey.disabled = !object.frames.includes(ed.frame) || !isOther;
}

/** A line of the timeline for an object: its name, the frames in which it is there, its key boxes. */
function buildBoxRow(ed, key) {
  const row = {n: key, index: Number(key.slice(4)), marks: []};
  row.name = make("button", {type: "button", class: "name", onclick: () => chooseBox(ed, row.index)});
  row.fill = make("div", {class: "spells"});
  row.playhead = make("div", {class: "playhead"});
  row.keys = make("div", {class: "keys"});
  row.note = make("span", {class: "count"});
  row.node = make("div", {class: "row"}, row.name, make("div", {class: "span"}, row.fill, row.playhead, row.keys), row.note);
  return row;
}

function updateBoxRow(ed, row) {
  const object = objectsOf(ed.drawing)[row.index], last = Math.max(ed.numFrames - 1, 1);
  const name = boxName(object, row.index), isSelected = row.index === ed.box;
  row.node.style.setProperty("--colour", boxColour(row.index));
  row.node.classList.toggle("selected", isSelected);
  row.name.textContent = name;
  row.name.title = name;
  row.name.setAttribute("aria-pressed", isSelected);
  const placed = placeBoxes(object, ed.numFrames, sizeOf(ed.drawing));
  row.fill.replaceChildren(...placed.slice(0, last).map(({present}, t) =>
    make("div", {class: present ? "there" : "", style: `left: ${100 * t / last}%; width: ${100 / last}%`})));
  const text = JSON.stringify([object.frames, object.boxes.map(Boolean), last]);
  if (row.text !== text) {
    row.text = text;
    row.keys.replaceChildren(...object.frames.map((frame, k) => make("button", {
      type: "button", class: object.boxes[k] ? "key" : "key absent", style: `left: ${100 * frame / last}%`,
      title: object.boxes[k] ? `Key box in frame ${frame + 1}` : `Absent from frame ${frame + 1} on`,
      "aria-label": object.boxes[k] ? `Key box in frame ${frame + 1}` : `Absent from frame ${frame + 1} on`,
      onclick: () => {
        chooseBox(ed, row.index);
        seek(ed, frame);
      },
    })));
  }
  const count = object.boxes.filter(Boolean).length;
  row.note.textContent = count === 1 ? "1 key box" : `${count} key boxes`;
}

/** Selects a box outside of the picture, which takes its tool up. */
function chooseBox(ed, n) {
  if (ed.tool !== "box") chooseBoxTool(ed, true);
  selectBox(ed, n);
}

function exportBoxes(ed, event) {
  const {saveBoxes} = ed.parts;
  if (!ed.drawing || !objectsOf(ed.drawing).length) {
    event.preventDefault();
    return;
  }
  offerText(saveBoxes, JSON.stringify(boxesFileOf(ed.drawing)));
}

/** What can be done now with boxes. */
function boxHint(ed) {
  const {length} = objectsOf(ed.drawing), object = objectsOf(ed.drawing)[ed.box];
  if (!length) return ["Drag a box around something.", "Then choose a later frame and move it to where it should be."];
  if (!object) return ["Click on a box to change it, or drag a new one."];
  return object.name.trim() ? [] : ["Type what the box shows."];
}
