"""Lists the sources of a curation, each of which may become one clip, from a folder, a CSV or RealEstate10K."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imageconductor.curation.curate_config import CurateConfig
from imageconductor.data.videos import VIDEO_SUFFIXES, read_caption_beside
from imageconductor.files import list_files, read_csv, read_text

logger = logging.getLogger(__name__)

_COLUMNS = {"id": ("id", "videoid", "video"), "caption": ("caption", "name")}


@dataclass(frozen=True, slots=True)
class Source:
    """A stretch of footage from which at most one clip is taken.

    Attributes:
        id: Unique name; seeds derive from it.
        path: Video file, or folder of frames.
        caption: Empty if the source has none.
        camera_only: Whether only the camera moves.
        start_s, end_s: Bounds of the stretch in seconds; None = the beginning, the end.
    """

    id: str
    path: str
    caption: str = ""
    camera_only: bool = False
    start_s: float | None = None
    end_s: float | None = None

    @property
    def key(self) -> str:
        """The name of its clip in shards: 16 hexadecimal digits."""
        return hashlib.sha256(self.id.encode()).hexdigest()[:16]


def find_sources(config: CurateConfig) -> list[Source]:
    """All sources, sorted by id; of several with one id, the first.

    Raises:
        FileNotFoundError: The input is missing or holds no source.
        ValueError: A CSV lacks a column, or its quotation marks do not balance; a text file is in another encoding than
            Unicode's, or not in RealEstate10K's format.
    """
    root = Path(config.input)
    if not root.exists():
        raise FileNotFoundError(f"input={root}: no such file or folder")
    reader = {"folder": _read_folder, "csv": _read_csv, "realestate10k": _read_realestate10k}[config.source]
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


def _read_folder(root: Path, config: CurateConfig) -> Iterator[Source]:
    """The videos below a folder; `NAME.txt` beside `NAME.mp4` holds its caption."""
    if not root.is_dir():
        raise FileNotFoundError(f"input={root}: not a folder; for a table of clips set source=csv")
    for path in sorted(list_files(root)):
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
            yield Source(_to_text(path.relative_to(root)), str(path), read_caption_beside(path), config.camera_only)


def _read_csv(path: Path, config: CurateConfig) -> Iterator[Source]:
    """The rows of a table with the columns id, caption and path, or those of WebVid or OpenVid.

    WebVid's are videoid, name and page_dir; OpenVid's are video, a file's name that is the id too, and caption.
    """
    if not path.is_file():
        raise FileNotFoundError(f"input={path}: source=csv needs a CSV file")
    root = Path(config.videos) if config.videos else path.parent
    rows = read_csv(path)
    header = next(rows, [])
    columns = {what: next((name for name in names if name in header), None) for what, names in _COLUMNS.items()}
    where = next((name for name in ("path", "page_dir", "video") if name in header), None)
    if columns["id"] is None or where is None:
        raise ValueError(
            f"{path}: needs the columns id, caption, path, WebVid's videoid, name, page_dir, or OpenVid's video, "
            f"caption; it has {', '.join(header) or 'none'}"
        )
    for row in (dict(zip(header, values, strict=True)) for values in rows):
        name = row[columns["id"]]
        place = f"{row['page_dir']}/{name}.mp4" if where == "page_dir" else row[where]
        if name and place:
            caption = (row[columns["caption"]] or "") if columns["caption"] else ""
            yield Source(name, str(root / place), " ".join(caption.split()), config.camera_only)


def _read_realestate10k(root: Path, config: CurateConfig) -> Iterator[Source]:
    """RealEstate10K's text files: the address of a video, then a line per frame that begins with its microseconds.

    The footage is `VIDEOS/YOUTUBE_ID.*`, or a folder `VIDEOS/CLIP` of frames that are named by their microseconds.
    """
    videos = Path(config.videos) if config.videos else root
    for path in sorted(path for path in list_files(root) if path.suffix == ".txt"):
        lines = read_text(path).splitlines()
        if not lines or "://" not in lines[0]:
            continue
        try:
            times = [int(line.split()[0]) / 1e6 for line in lines[1:] if line.strip()]
        except ValueError as error:
            raise ValueError(f"{path}: a line begins with no timestamp; RealEstate10K's files do: {error}") from error
        if not times:
            continue
        youtube = lines[0].strip().rpartition("v=")[2].split("&")[0]
        name = _to_text(path.relative_to(root).with_suffix(""))
        folders = [videos / name, videos / path.stem]
        files = [videos / f"{youtube}{suffix}" for suffix in VIDEO_SUFFIXES]
        found = next((place for place in [*folders, *files] if place.exists()), videos / f"{youtube}.mp4")
        yield Source(name, str(found), "", True, min(times), max(times))


def _to_text(path: Path) -> str:
    """A path as valid UTF-8 text; bytes of its name that are not UTF-8 are escaped."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
