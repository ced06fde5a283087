"""Bases, LoRAs and learned motions that a visitor may choose from: what lies in the folders given at the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from imageconductor.files import natural_order
from imageconductor.models.adapters import DIFFUSERS_WEIGHTS_NAME

_BASE_PREFIX = "model.diffusion_model."  # of DreamBooth files in Stable Diffusion's own layout
_MOTION_PART = "motion_modules"
_STANDARD_NAMES = (DIFFUSERS_WEIGHTS_NAME, "adapter_model.safetensors")


@dataclass(frozen=True)
class Shelf:
    """Files by the names that the page shows; a visitor names one of these and never a path.

    Attributes:
        bases: DreamBooth files.
        looks: LoRAs of a look, and `motion_director` runs that have learned one.
        motions: LoRAs of a motion, and `motion_director` runs.
    """

    bases: dict[str, Path] = field(default_factory=dict)
    looks: dict[str, Path] = field(default_factory=dict)
    motions: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def scan(cls, folders: Sequence[Path]) -> Shelf:
        """What lies in the folders and below them; safetensors files alone, which hold no code.

        Raises:
            FileNotFoundError: A folder does not exist.
        """
        shelf = cls()
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"no folder at {folder}")
            runs = sorted({path.parent.parent for path in folder.rglob(f"motion_lora/{DIFFUSERS_WEIGHTS_NAME}")})
            for run in runs:
                _add(shelf.motions, _name(run, folder), run)
                if (run / "appearance_lora" / DIFFUSERS_WEIGHTS_NAME).is_file():
                    _add(shelf.looks, _name(run, folder), run)
            files = sorted(folder.rglob("*.safetensors"), key=lambda path: natural_order(str(path)))
            for path in files:
                if path.is_file() and not any(run in path.parents for run in runs):
                    _add(shelf._row(path), _name(path, folder), path)
        return shelf

    def _row(self, path: Path) -> dict[str, Path]:
        """Bases, looks or motions, by the names of the tensors; a file that cannot be read is refused when chosen."""
        try:
            with safe_open(path, "pt") as file:
                keys = list(file.keys())
        except (SafetensorError, OSError):
            return self.looks
        if any(key.startswith(_BASE_PREFIX) for key in keys):
            return self.bases
        return self.motions if any(_MOTION_PART in key for key in keys) else self.looks


def _name(path: Path, folder: Path) -> str:
    """A short name: a LoRA under its library's standard file name is called after its folder."""
    shown = path.parent if path.name in _STANDARD_NAMES else path.with_suffix("") if path.is_file() else path
    return folder.name if shown == folder else shown.relative_to(folder).as_posix()


def _add(row: dict[str, Path], name: str, path: Path) -> None:
    """Two files of one name, in two folders, are told apart by a number."""
    count = 2
    unique = name
    while unique in row:
        unique, count = f"{name} ({count})", count + 1
    row[unique] = path
