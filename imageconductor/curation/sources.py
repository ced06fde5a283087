"""What there is to curate: one `Source` for each clip-to-be, from a folder, a CSV or RealEstate10K."""

from __future__ import annotations

import csv
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imageconductor.curation.curate_config import CurateConfig

logger = logging.getLogger(__name__)

VIDEOS = (
    ".mp4",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".ts",
    ".flv",
    ".wmv",
    ".ogv",
    ".gif",
    ".3gp",
)
_COLUMNS = {"id": ("id", "videoid"), "caption": ("caption", "name")}


@dataclass(frozen=True, slots=True)
class Source:
    """A stretch of footage that becomes one clip, or none.

    Attributes:
        id: Names it among all sources; seeds derive from it.
        path: A video, or a folder of frames.
        caption: Empty if the source has none.
        camera_only: Nothing moves but the camera.
        start_s, end_s: The stretch in seconds; None = from the beginning, to the end.
    """

    id: str
    path: str
    caption: str = ""
    camera_only: bool = False
    start_s: float | None = None
    end_s: float | None = None

    @property
    def key(self) -> str:
        """Its name in shards: 16 hexadecimal digits."""
        return hashlib.sha256(self.id.encode()).hexdigest()[:16]


def find_sources(config: CurateConfig) -> list[Source]:
    """All sources, sorted by id, each id once.

    Raises:
        FileNotFoundError: The input is not there, or nothing is in it.
        ValueError: A CSV lacks a column, or a RealEstate10K file is none.
    """
    root = Path(config.input)
    if not root.exists():
        raise FileNotFoundError(f"input={root}: no such file or folder")
    reader = {"folder": _folder, "csv": _csv, "realestate10k": _realestate10k}[config.source]
    sources: dict[str, Source] = {}
    repeated = 0
    for source in reader(root, config):
        repeated += source.id in sources
        sources.setdefault(source.id, source)
    if not sources:
        raise FileNotFoundError(f"input={root}: holds nothing that source={config.source} could read")
    if repeated:
        logger.warning("%d sources repeat the id of an earlier one and are left out", repeated)
    return [sources[name] for name in sorted(sources)]


def _folder(root: Path, config: CurateConfig) -> Iterator[Source]:
    """Videos below a folder; `NAME.txt` beside `NAME.mp4` is its caption."""
    if not root.is_dir():
        raise FileNotFoundError(f"input={root}: not a folder; for a table of clips set source=csv")
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in VIDEOS and path.is_file():
            text = path.with_suffix(".txt")
            caption = " ".join(text.read_text(encoding="utf-8", errors="replace").split()) if text.is_file() else ""
            yield Source(_text(path.relative_to(root)), str(path), caption, config.camera_only)


def _csv(path: Path, config: CurateConfig) -> Iterator[Source]:
    """Rows of id, caption and path; WebVid's own columns (videoid, name, page_dir) are read too."""
    if not path.is_file():
        raise FileNotFoundError(f"input={path}: source=csv needs a CSV file")
    root = Path(config.videos) if config.videos else path.parent
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.DictReader(file)
        header = rows.fieldnames or []
        columns = {what: next((name for name in names if name in header), None) for what, names in _COLUMNS.items()}
        if columns["id"] is None or ("path" not in header and "page_dir" not in header):
            raise ValueError(
                f"{path}: needs the columns id, caption, path, or WebVid's videoid, name, page_dir; "
                f"it has {', '.join(header) or 'none'}"
            )
        for row in rows:
            name = row[columns["id"]]
            place = row["path"] if "path" in header else f"{row['page_dir']}/{name}.mp4"
            if name and place:
                caption = (row[columns["caption"]] or "") if columns["caption"] else ""
                yield Source(name, str(root / place), " ".join(caption.split()), config.camera_only)


def _realestate10k(root: Path, config: CurateConfig) -> Iterator[Source]:
    """Its text files: the video's address, then a line a frame that begins with microseconds.

    Footage is looked for as `VIDEOS/YOUTUBE_ID.*`, or as a folder `VIDEOS/CLIP` of frames named by their microseconds.
    """
    videos = Path(config.videos) if config.videos else root
    for path in sorted(root.rglob("*.txt")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if not lines or "://" not in lines[0]:
            continue
        try:
            times = [int(line.split()[0]) / 1e6 for line in lines[1:] if line.strip()]
        except ValueError as error:
            raise ValueError(f"{path}: a line begins with no timestamp; RealEstate10K's files do: {error}") from error
        if not times:
            continue
        youtube = lines[0].strip().rpartition("v=")[2].split("&")[0]
        name = _text(path.relative_to(root).with_suffix(""))
        folders = [videos / name, videos / path.stem]
        files = [videos / f"{youtube}{suffix}" for suffix in VIDEOS]
        found = next((place for place in [*folders, *files] if place.exists()), videos / f"{youtube}.mp4")
        yield Source(name, str(found), "", True, min(times), max(times))


def _text(path: Path) -> str:
    """A path as text that can be written anywhere, even if its name is not UTF-8."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
