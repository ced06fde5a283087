"""Files from which other programs make videos of the same requests.

FOLDER/METHOD/SET/KEY.png            first frame, in the size of the method's videos
FOLDER/METHOD/SET/KEY.json           trajectories in that frame, one point for each frame of the method's videos
FOLDER/METHOD/SET/requests.json      format, and prompt, seed and checksum by KEY
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from imageconductor.evaluation.drawn_motion.config import EvaluateConfig, RequestSet
from imageconductor.evaluation.drawn_motion.requests import Request, build_sets
from imageconductor.evaluation.drawn_motion.video_format import VideoFormat, fit_requests, resolve_formats
from imageconductor.files import atomic_folder, atomic_path, write_text


def export_requests(config: EvaluateConfig, folder: Path) -> None:
    """Writes the requests of an evaluation in the format of each method; needs neither weights nor videos.

    Args:
        config: Settings of the evaluation.
        folder: New or empty.

    Raises:
        ValueError, FileNotFoundError: The settings or the images are wrong.
        FileExistsError: The folder holds something.
    """
    drawn, formats = resolve_formats(config)
    requests = build_sets(config, drawn.size, drawn.num_frames)
    with atomic_folder(folder) as temporary:
        write_requests(temporary, requests, drawn, formats)


def write_requests(
    folder: Path,
    requests: Mapping[RequestSet, Sequence[Request]],
    drawn: VideoFormat,
    formats: Mapping[str, VideoFormat],
) -> None:
    """Writes what is missing or has changed of the requests, by set, in the format of each method.

    Args:
        folder: Folder of the methods' folders.
        requests: By set, in the format `drawn`.
        drawn: Format in which requests are drawn.
        formats: By method.
    """
    for name, wanted in formats.items():
        for kind, listed in requests.items():
            target = folder / name / kind
            record = target / "requests.json"
            old = json.loads(record.read_text(encoding="utf-8"))["requests"] if record.exists() else {}
            entries: dict[str, dict[str, Any]] = {}
            for request in fit_requests(listed, drawn, wanted, judged=False):
                entry = {"prompt": request.prompt, "seed": request.seed, "sha256": request.sha256}
                entries[request.key] = entry
                if old.get(request.key) != entry:
                    with atomic_path(target / f"{request.key}.png") as temporary:
                        Image.fromarray(request.image).save(temporary)
                    request.trajectories.save(target / f"{request.key}.json")
            write_text(record, json.dumps({**asdict(wanted), "requests": entries}, indent=1, ensure_ascii=False))
