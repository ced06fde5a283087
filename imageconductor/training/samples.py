"""Samples of stages that are trained on annotated clips, or on the sprite world."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from imageconductor.data.batches import Samples, SpriteSamples
from imageconductor.data.box_datasets import BoxClip
from imageconductor.data.box_samples import BoxSamples
from imageconductor.data.clip_index import Shard
from imageconductor.data.clip_records import ClipRecord, CorruptClipError
from imageconductor.data.clips import ClipSamples
from imageconductor.training.stage_configs import BoxStageConfig
from imageconductor.training.train_config import TrainConfig

logger = logging.getLogger(__name__)

_SPRITE_CLIPS = 16  # held-out clips of the sprite world
HELD_OUT_SEED = 20_000  # is added to a world's seed; evaluation uses 10,000


def read_held_out(config: TrainConfig, previewed: int | None = None) -> list[dict[str, Any]]:
    """The first held-out samples: of `data`, or of scenes of the sprite world that no stage is trained on.

    Args:
        config: Of the run.
        previewed: How many, for previews: sprite clips have all their frames then. None = for validation, with the
            frames that the run sees: `config.held_out_clips`, or 16 of the sprite world.
    """
    count = config.held_out_clips or _SPRITE_CLIPS if previewed is None else previewed
    if config.data:
        samples: Samples = ClipSamples(
            config.data,
            config.size,
            config.clip_frames,
            held_out_clips=config.held_out_clips,
            shows_held_out=True,
        )
        count = min(count, config.held_out_clips)
    else:
        world = replace(config.world, seed=config.world.seed + HELD_OUT_SEED)
        seen = (config.num_frames, config.max_frame_spacing) if previewed is None else (None, None)
        samples = SpriteSamples(world, config.sets, *seen)
    return [samples[position] for position in range(count)]


def build_samples(config: TrainConfig) -> Samples:
    """The samples that a run is trained on.

    Raises:
        FileNotFoundError: A source holds no clip.
        ValueError: The clips cannot be used together, or all of them are held out.
    """
    if not config.data:
        return SpriteSamples(config.world, config.sets, config.num_frames, config.max_frame_spacing)
    return ClipSamples(
        config.data,
        config.size,
        config.clip_frames,
        config.horizontal_flip,
        config.shuffle_shards,
        config.seed,
        config.held_out_clips,
    )


def build_box_samples(config: BoxStageConfig) -> Samples:
    """The samples of a stage that sees boxes; raises as `BoxSamples`."""
    if not config.data:
        return SpriteSamples(config.world, config.sets, config.num_frames, config.max_frame_spacing, has_boxes=True)
    return BoxSamples(
        config.data,
        config.split,
        config.size,
        config.clip_frames,
        config.max_objects,
        seed=config.seed,
        horizontal_flip=config.horizontal_flip,
        random_crop=config.random_crop,
        min_box_area=config.min_box_area,
        reserved_clips=config.reserved_clips,
        held_out_clips=config.held_out_clips,
    )


def known_class_names(samples: Samples) -> dict[str, str]:
    """Class names of YouTube-VIS and of JSON lines, each with the key of a clip; others are in files of each clip."""
    found: dict[str, str] = {}
    for part in samples.entries.parts if isinstance(samples, BoxSamples) else ():
        for entry in () if isinstance(part, Shard) else part:
            if isinstance(entry, BoxClip):
                found |= dict.fromkeys(entry.boxes.names, entry.key)
            elif not isinstance(entry, Path | ClipRecord):
                found |= dict.fromkeys((one.name for one in entry.objects), entry.key)
    return found


def read_held_out_boxes(config: BoxStageConfig, previewed: int | None = None) -> list[dict[str, Any]]:
    """As `read_held_out`, with boxes, and for previews too with the frames that the run sees."""
    count = config.held_out_clips or _SPRITE_CLIPS if previewed is None else previewed
    if config.data:
        kept: dict[str, Any] = {"held_out_clips": config.held_out_clips, "shows_held_out": True}
        kept["reserved_clips"] = config.reserved_clips
        samples: Samples = BoxSamples(
            config.data, config.split, config.size, config.clip_frames, config.max_objects, **kept
        )
        count = min(count, config.held_out_clips)
    else:
        world = replace(config.world, seed=config.world.seed + HELD_OUT_SEED)
        samples = SpriteSamples(world, config.sets, config.num_frames, config.max_frame_spacing, has_boxes=True)
    found, faults = [], []
    for position in range(count):
        try:
            found.append(samples[position])
        except (CorruptClipError, ValueError, OSError) as error:
            faults.append(str(error))
            logger.warning("a held-out clip is left out: %s", error)
    if faults and not found:
        raise CorruptClipError(f"none of {count} held-out clips can be read; the first: {faults[0]}")
    return found
