"""Statistics of the reference videos for Fréchet distances: computed once, by all processes together.

The videos are divided into parts, whose number does not depend on the number of processes. Each process takes every
n-th part and writes a file for it, so that a run that was killed goes on with the parts that are missing; then the
parts are added up. The key of a file is the digest of all that the statistics depend on: network and videos by the size
and date of their files, stride, format.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from imageconductor.evaluation.drawn_motion.config import EvaluateConfig
from imageconductor.evaluation.drawn_motion.reference_videos import (
    count_references,
    list_reference_files,
    read_references,
)
from imageconductor.evaluation.drawn_motion.video_format import VideoFormat
from imageconductor.evaluation.input_checks import network_file
from imageconductor.evaluation.metrics.frechet import Statistics, collect_statistics
from imageconductor.evaluation.metrics.frechet_names import FrechetName
from imageconductor.evaluation.score_files import identify_file
from imageconductor.evaluation.scores import describe_failure

if TYPE_CHECKING:
    from imageconductor.evaluation.drawn_motion.protocol import Evaluation

logger = logging.getLogger(__name__)

_MAX_PARTS = 16
_MIN_VIDEOS = 16  # of a part


def collect_own_part(evaluation: Evaluation, distance: FrechetName, wanted: VideoFormat) -> None:
    """Computes this process's parts of the reference statistics; a failure is left to `load_reference` to report."""
    state = evaluation.state
    try:
        if not locate_statistics(evaluation, distance, wanted).exists():
            _collect(evaluation, distance, wanted, state.process_index, state.num_processes)
    except Exception as error:  # The network's file is the user's; the other processes must not wait in vain.
        logger.warning("%s of the reference videos: %s", distance, describe_failure(error))


def load_reference(evaluation: Evaluation, distance: FrechetName, wanted: VideoFormat) -> Statistics:
    """Statistics of the reference videos in a format, after computing what is missing of them."""
    target = locate_statistics(evaluation, distance, wanted)
    if not target.exists():
        parts = _collect(evaluation, distance, wanted, 0, 1)
        total = Statistics.load(parts[0])
        for path in parts[1:]:
            total = total + Statistics.load(path)
        total.save(target)
        for path in parts:
            path.unlink()
    return Statistics.load(target)


def describe_reference(config: EvaluateConfig, distance: FrechetName, wanted: VideoFormat) -> dict[str, Any]:
    """All that the statistics of the reference videos depend on."""
    weights = network_file(config, distance)
    stride = 1  # of sprites, whatever is asked for
    if config.reference is not None:
        videos: Any = [identify_file(path) for path in list_reference_files(config)]
        stride = config.reference_stride
    else:
        videos = [config.world_seed, config.num_reference, config.style, asdict(config.world)]
    return {
        "network": [distance, None if weights is None else identify_file(weights)],
        "shape": [*wanted.size, wanted.num_judged, stride],
        "reference": videos,
    }


def compute_digest(value: Any) -> str:
    """16 hexadecimal digits of a value of JSON's types."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def locate_statistics(evaluation: Evaluation, distance: FrechetName, wanted: VideoFormat) -> Path:
    """File of the statistics of the reference videos in a format."""
    key = compute_digest(describe_reference(evaluation.config, distance, wanted))
    return evaluation.output / "reference" / f"{distance}-{key}.safetensors"


def _collect(
    evaluation: Evaluation, distance: FrechetName, wanted: VideoFormat, index: int, num_processes: int
) -> list[Path]:
    """Computes what is missing of every n-th part; files of these parts."""
    config, target = evaluation.config, locate_statistics(evaluation, distance, wanted)
    total = count_references(config)
    num_parts = max(1, min(_MAX_PARTS, total // _MIN_VIDEOS))
    numbers = range(index, num_parts, num_processes)
    files = {number: target.with_name(f"{target.stem}-part-{number}.safetensors") for number in numbers}
    missing = {n: range(total * n // num_parts, total * (n + 1) // num_parts) for n in numbers if not files[n].exists()}
    title = f"reference: {distance}, {wanted}"
    count = sum(map(len, missing.values()))
    with tqdm(total=count, desc=title, dynamic_ncols=True, disable=index > 0 or not count) as bar:
        for number, videos in missing.items():
            read = read_references(config, wanted.size, wanted.num_judged, videos)
            shown = (video for video in read if not bar.update(1) or True)
            weights = network_file(config, distance)
            collect_statistics(distance, shown, weights, wanted.num_judged, evaluation.device).save(files[number])
    return list(files.values())
