"""Blinded comparison of methods by people: the last three columns of the paper's Table 1.

`build_study` makes one page that needs no server and no network: videos of the same name from two methods side by side,
in random order and under neutral names, with the paper's three questions. Answers stay in the browser until the
participant saves them as CSV. `tally` counts them with the key, which the page does not contain. The paper's columns
sum to 100 %, so they are shares of all answers.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from scipy.stats import binomtest

from imageconductor.evaluation.video_files import count_frames
from imageconductor.files import read_csv, read_text

QUESTIONS = {
    "overall": "Which video do you prefer overall?",
    "quality": "Which video looks better: clearer, more natural, more stable?",
    "motion": "Which video moves more as the drawing asks?",
}
"""The paper's questions: overall performance, sample quality, motion similarity (section 3.1)."""

_COLUMNS = ("study", "participant", "pair", *QUESTIONS)
_MAX_MB = 400  # of video that a browser still opens in one page
_NOTE = (
    "First the share of all answers, which sums to 100 % over the methods, as the human columns of the paper's Table 1 "
    "do; then the fraction of its own comparisons that the method won, with the 95 % interval (Wilson)."
)


@dataclass(frozen=True)
class PreferenceRate:
    """How often a method was preferred by one question.

    Attributes:
        method, question: Of which this is.
        wins: Answers for the method.
        comparisons: Answers to pairs that the method is in.
        low, high: 95 % interval (Wilson) of wins / comparisons.
        answers: Answers to all pairs. Over the methods wins / answers sums to 1, as the paper's columns do; of methods
            that are compared equally often, n of them, it is at most 2 / n.
    """

    method: str
    question: str
    wins: int
    comparisons: int
    low: float
    high: float
    answers: int


def build_study(
    methods: Mapping[str, Path],
    drawings: Path | None = None,
    num_pairs: int | None = None,
    seed: int = 0,
) -> tuple[str, dict[str, Any]]:
    """The page, and its key: the study's name, and for each pair the video's name and the methods left and right.

    Args:
        methods: Folder of mp4 files by method; all folders hold the same file names.
        drawings: Folder with a picture of each request, NAME.png or NAME.jpg, which is shown above the pair.
        num_pairs: Number of pairs, drawn at random from all; None = all of them.
        seed: Seed of the pairs that are drawn, their order and their sides.

    Raises:
        ValueError: There are fewer than two methods, their file names differ, a drawing is missing, or the page would
            be too large to open.
    """
    if len(methods) < 2:
        raise ValueError(f"a comparison needs at least two methods, got {', '.join(methods) or 'none'}")
    if num_pairs is not None and num_pairs < 1:
        raise ValueError(f"there must be at least one pair, got {num_pairs}")
    names = _list_common_names(methods)
    pictures = {} if drawings is None else {name: _find_drawing(drawings, name) for name in names}
    random = np.random.default_rng(seed)
    pairs = [(name, *pair) for name in names for pair in itertools.combinations(sorted(methods), 2)]
    chosen = random.permutation(len(pairs))[:num_pairs]
    swapped = random.permutation(len(chosen)) % 2 == 0  # half of the pairs
    key: dict[str, list[str]] = {}
    shown = []
    for number, index in enumerate(chosen):
        name, first, second = pairs[index]
        left, right = (second, first) if swapped[number] else (first, second)
        identity = f"{number + 1:03d}"
        key[identity] = [name, left, right]
        shown.append(
            {
                "id": identity,
                "videos": [_encode_data_url(methods[side] / f"{name}.mp4", "video/mp4") for side in (left, right)],
                "drawing": _encode_data_url(pictures[name], f"image/{pictures[name].suffix[1:]}") if pictures else None,
            }
        )
    size = sum(len(text) for pair in shown for text in pair["videos"]) / 1e6
    if size > _MAX_MB:
        raise ValueError(f"the page would hold {size:.0f} MB of video; browsers open {_MAX_MB}: take fewer pairs")
    study = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    page = Environment(autoescape=True).from_string(_PAGE)
    text = page.render(pairs=shown, questions=QUESTIONS, columns=list(_COLUMNS), study=study)
    return text, {"study": study, "pairs": key}


def read_key(path: Path) -> dict[str, Any]:
    """The key that `build_study` gave, from its file.

    Raises:
        FileNotFoundError: There is no file.
        ValueError: It is not a study's key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no key at {path}")
    try:
        key = json.loads(read_text(path))
        if all(len(pair) == 3 for pair in key["pairs"].values()) and isinstance(key["study"], str):
            return key
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise ValueError(f"{path} is not the key of a study, which `build` writes beside the page")


def tally(answers: Sequence[Path], key: Mapping[str, Any]) -> list[PreferenceRate]:
    """Preference rates by method and question, over the saved answers of all participants.

    Args:
        answers: CSV files that the page saved, one of each participant.
        key: From `build_study`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file is not from this study, or a participant's answers are given twice.
    """
    pairs: dict[str, list[str]] = key["pairs"]
    methods = sorted({method for _, *sides in pairs.values() for method in sides})
    wins = {(method, question): 0 for method in methods for question in QUESTIONS}
    asked = dict(wins)
    seen: dict[tuple[str, str], Path] = {}
    for path in answers:
        for row in _read_answers(path, key):
            who = (row["participant"], row["pair"])
            if who in seen:
                raise ValueError(f"{path}: {who[0]} has answered pair {who[1]} in {seen[who]} already")
            seen[who] = path
            _, left, right = pairs[row["pair"]]
            for question in QUESTIONS:
                if row[question]:
                    wins[left if row[question] == "left" else right, question] += 1
                    asked[left, question] += 1
                    asked[right, question] += 1
    rates = []
    for method, question in itertools.product(methods, QUESTIONS):
        count, total = wins[method, question], asked[method, question]
        answers_given = sum(wins[one, question] for one in methods)
        low, high = (0.0, 1.0)
        if total:
            interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
            low, high = float(interval.low), float(interval.high)
        rates.append(PreferenceRate(method, question, count, total, low, high, answers_given))
    return rates


def format_rates(rates: Sequence[PreferenceRate]) -> str:
    """Markdown table with a line for each method and a column for each question, and what its figures are."""
    lines = ["| method | " + " | ".join(QUESTIONS) + " |", "|---" * (len(QUESTIONS) + 1) + "|"]
    for method in dict.fromkeys(rate.method for rate in rates):
        cells = [
            f"{rate.wins / rate.answers:.1%}; {rate.wins / rate.comparisons:.1%} "
            f"({rate.low:.1%} .. {rate.high:.1%}, n = {rate.comparisons})"
            if rate.comparisons
            else "no answers"
            for rate in rates
            if rate.method == method
        ]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join([*lines, "", _NOTE]) + "\n"


def _read_answers(path: Path, key: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of a participant's file, each of this study."""
    if not path.is_file():
        raise FileNotFoundError(f"no answers at {path}")
    columns, *values = list(read_csv(path)) or [[]]
    if tuple(columns) != _COLUMNS:
        raise ValueError(f"{path} was not saved by the study's page; its columns are {', '.join(columns)}")
    rows = [dict(zip(columns, row, strict=True)) for row in values]
    for row in rows:
        if row["study"] != key["study"]:
            raise ValueError(f"{path} is from study {row['study']}, the key is of {key['study']}")
        if row["pair"] not in key["pairs"]:
            raise ValueError(f"{path} has pair {row['pair']}, which the key does not have; take the key of its study")
        for question in QUESTIONS:
            if row[question] not in ("left", "right", ""):
                raise ValueError(f"{path}: pair {row['pair']}: {question} must be left or right, got {row[question]!r}")
    return rows


def _list_common_names(methods: Mapping[str, Path]) -> list[str]:
    """Names of the videos, which must be the same in every folder."""
    found = {}
    for method, folder in methods.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"{method}: no folder at {folder}")
        found[method] = {path.stem for path in folder.glob("*.mp4")}
        if not found[method]:
            raise ValueError(f"{method}: no mp4 files in {folder}")
    everything = set().union(*found.values())
    for method, names in found.items():
        if missing := sorted(everything - names):
            raise ValueError(f"{method}: {methods[method]} lacks {', '.join(missing[:5])}, which another method has")
    for method, folder in methods.items():
        for name in sorted(everything):
            if count_frames(folder / f"{name}.mp4") is None:
                raise ValueError(f"{method}: {folder / f'{name}.mp4'} cannot be read as a video")
    return sorted(everything)


def _find_drawing(folder: Path, name: str) -> Path:
    for ending in ("png", "jpg", "jpeg", "webp"):
        if (path := folder / f"{name}.{ending}").exists():
            return path
    raise ValueError(f"{folder} has no picture of {name}")


def _encode_data_url(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Which video?</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 1.5rem auto; padding: 0 1rem; color: #222 }
.pair { display: none } .pair.now { display: block }
.videos { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } video { width: 100%; background: #000 }
.drawing { display: block; max-height: 260px; margin: 0 auto 1rem }
fieldset { border: 1px solid #ddd; border-radius: 6px; margin: .8rem 0 } label { margin-right: 2rem }
button { font: inherit; padding: .4rem 1.2rem } .right { float: right } .quiet { color: #777 }
progress { width: 100% }
</style>
<h1>Which video?</h1>
<p>Two videos were made from the same picture and the same drawing. Please answer three questions about each pair; there
is no right answer. Your answers stay in this browser until you save them at the end.</p>
<p><label>Your name or initials <input id="participant" autocomplete="off"></label></p>
<progress id="progress" max="{{ pairs | length }}" value="0"></progress>
{% for pair in pairs %}<section class="pair" data-pair="{{ pair.id }}">
<h2>Pair {{ loop.index }} of {{ pairs | length }}</h2>
{% if pair.drawing %}<img class="drawing" src="{{ pair.drawing }}" alt="what was asked for">{% endif %}
<div class="videos">{% for video in pair.videos %}
<video src="{{ video }}" muted loop playsinline controls></video>{% endfor %}</div>
{% for name, text in questions.items() %}<fieldset><legend>{{ text }}</legend>
{% for side in ("left", "right") %}<label><input type="radio" name="{{ pair.id }}-{{ name }}" value="{{ side }}">
{{ side }}</label>{% endfor %}</fieldset>{% endfor %}
</section>{% endfor %}
<p><button id="back">Back</button> <button id="save">Save my answers</button>
<button id="next" class="right">Next</button></p>
<p class="quiet" id="note"></p>
<script>
const study = {{ study | tojson }}, columns = {{ columns | tojson }}, questions = columns.slice(3);
const pairs = [...document.querySelectorAll(".pair")], place = document.getElementById("participant");
const stored = JSON.parse(localStorage.getItem("study-" + study) || "{}");
const state = { participant: stored.participant || "", at: stored.at || 0, answers: stored.answers || {} };
const keep = () => localStorage.setItem("study-" + study, JSON.stringify(state));
const complete = id => questions.every(q => (state.answers[id] || {})[q]);
function show() {
  pairs.forEach((pair, i) => {
    pair.classList.toggle("now", i === state.at);
    pair.querySelectorAll("video").forEach(v => i === state.at ? v.play().catch(() => {}) : v.pause());
  });
  const done = pairs.filter(pair => complete(pair.dataset.pair)).length;
  document.getElementById("progress").value = done;
  document.getElementById("note").textContent = done + " of " + pairs.length + " pairs are answered.";
  document.getElementById("back").disabled = state.at === 0;
  document.getElementById("next").disabled = state.at === pairs.length - 1;
}
function go(step) { state.at = Math.min(pairs.length - 1, Math.max(0, state.at + step)); keep(); show(); }
place.value = state.participant;
place.oninput = () => { state.participant = place.value.trim(); keep(); };
for (const input of document.querySelectorAll("input[type=radio]")) {
  const [pair, question] = input.name.split("-");
  input.checked = (state.answers[pair] || {})[question] === input.value;
  input.onchange = () => { (state.answers[pair] ||= {})[question] = input.value; keep(); show(); };
}
document.getElementById("back").onclick = () => go(-1);
document.getElementById("next").onclick = () => go(1);
document.getElementById("save").onclick = () => {
  if (!state.participant) {
    document.getElementById("note").textContent = "Please give a name first.";
    return place.focus();
  }
  const cell = text => '"' + String(text).replaceAll('"', '""') + '"';
  const rows = pairs.map(p => p.dataset.pair).filter(id => state.answers[id]).map(id =>
    [study, state.participant, id, ...questions.map(q => state.answers[id][q] || "")].map(cell).join(","));
  const link = document.createElement("a");
  const text = [columns.join(","), ...rows, ""].join("\\n");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = "answers-" + state.participant.replace(/[^A-Za-z0-9]+/g, "-") + ".csv";
  link.click();
};
show();
</script>
</html>
"""
