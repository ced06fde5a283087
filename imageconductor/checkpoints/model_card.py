"""Provenance of a model folder and its card: sources, training settings, measured results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from imageconductor.config import parse_yaml
from imageconductor.files import read_text, write_text

FILES = ("sources.json", "results.json", "training/*.yaml")
_HEADER = """---
library_name: diffusers
pipeline_tag: image-to-video
tags: [image-conductor, image-to-video, trajectory-control, animatediff]
---
"""
_STEPS = ("max_steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "lora_rank", "mixed_precision")


def read_provenance(folder: Path) -> dict[str, str]:
    """Texts of the files beside the weights that say where these come from, by name."""
    paths = [path for pattern in FILES for path in sorted(folder.glob(pattern))]
    return {path.relative_to(folder).as_posix(): read_text(path) for path in paths}


def write_provenance(folder: Path, files: dict[str, str]) -> None:
    """Writes what `read_provenance` gave, and the card that sums it up as README.md."""
    for name, text in files.items():
        write_text(folder / name, text)
    write_text(folder / "README.md", model_card(folder, files, folder.name))


def model_card(folder: Path, files: dict[str, str], name: str) -> str:
    """A model's README in the hub's format: how to use it, its parts and their licences, its training, its figures.

    Args:
        folder: The model folder; its `model_index.json` gives the defaults of sampling.
        files: From `read_provenance`.
        name: Folder or repository that the reader loads.
    """
    index = json.loads(read_text(folder / "model_index.json"))
    defaults = index["sampling_defaults"]
    shape = {key: defaults[key] for key in ("width", "height", "num_frames")}
    sections = [_HEADER, f"# {name}\n\n{_USE.format(name=name, **shape)}", _defaults(defaults)]
    if "sources.json" in files:
        sections.append(_parts(json.loads(files["sources.json"])))
    trained = {Path(name).stem: text for name, text in files.items() if name.startswith("training/")}
    if trained:
        sections.append(_training(trained))
    if "results.json" in files:
        sections.append(_results(json.loads(files["results.json"])))
    return "\n".join(sections)


_USE = """One image, a prompt and drawn trajectories become a video; camera and objects are controlled apart.

```python
from PIL import Image
from imageconductor.conditioning import camera_preset
from imageconductor.sampling.pipeline import ImageConductorPipeline

pipe = ImageConductorPipeline.from_pretrained("{name}")
tracks = camera_preset("pan-left", ({width}, {height}), {num_frames})
video = pipe(Image.open("photo.png"), tracks, prompt="what it shows", control="camera").frames[0]
```

With the package `imageconductor` installed, `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` of
diffusers gives the same pipeline of a local copy (`huggingface_hub.snapshot_download` makes one of a repository).
"""


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _defaults(defaults: dict[str, Any]) -> str:
    rows = [(name, json.dumps(value)) for name, value in defaults.items()]
    return "## Defaults\n\n" + _table(("setting", "value"), rows)


def _parts(record: dict[str, Any]) -> str:
    licences = record["recipe"].get("licences") or {}
    rows = []
    for name, source in record["sources"].items():
        files = ", ".join(f"{file} ({digest[:12]})" for file, digest in source["sha256"].items())
        rows.append((name, source["path"], files, source["keys"], licences.get(name, "not stated")))
    return "## Parts\n\n" + _table(("part", "from", "file (SHA-256)", "tensors", "licence"), rows)


def _training(stages: dict[str, str]) -> str:
    rows = []
    for name, text in stages.items():
        config = parse_yaml(text, name)
        data = ", ".join(config.get("data") or []) or "sprite world: " + ", ".join(config.get("sets") or [])
        rows.append((name, *(config.get(key, "") for key in _STEPS), config.get("trajectories", ""), data))
    return "## Training\n\n" + _table(("stage", *_STEPS, "trajectories", "data"), rows)


def _results(record: dict[str, Any]) -> str:
    rows = [
        (name, f"{figure['mean']:.2f}", _format_interval(figure), figure["n"])
        for name, figure in record["intervals"].items()
        if figure["mean"] is not None
    ]
    return "## Measured\n\n" + _table(("figure", "mean", "95 %", "n"), rows)


def _format_interval(figure: dict[str, Any]) -> str:
    """The interval; a dash where the videos come from too few images for one."""
    return "–" if figure["low"] is None else f"{figure['low']:.2f} .. {figure['high']:.2f}"
