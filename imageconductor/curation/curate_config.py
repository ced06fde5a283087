"""Settings of the curation; `configs/curate/` states them for each kind of source, docs/data.md explains them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from imageconductor.config import default_values


@dataclass
class CurateConfig:
    """Settings of one curation, from raw video to annotated shards."""

    RENAMED: ClassVar[dict[str, str]] = {"drop_share": "drop_fraction", "min_tracked": "min_tracked_fraction"}

    input: str  # folder of videos, CSV file of clips and captions, or RealEstate10K folder
    output: str  # folder of the shards, the index and the report; an unfinished one is continued
    source: Literal["folder", "csv", "realestate10k"] = "folder"  # kind of `input`
    videos: str | None = None  # folder of the footage that a CSV or RealEstate10K refers to; null = beside `input`
    camera_only: bool = False  # marks all clips as showing camera motion only; RealEstate10K's always are
    # Clips
    size: tuple[int, int] = (384, 256)  # (W, H) of the clips in pixels; section 2.2
    num_frames: int = 32  # frames per clip; section 2.2
    max_interval: int = 16  # the spacing of a clip's frames is drawn from 1..this many source frames; section 2.2
    cut_detector: Literal["adaptive", "content"] = "adaptive"  # PySceneDetect's detector
    cut_threshold: float | None = None  # a lower one finds more cuts; null = 3 for adaptive, 27 for content
    max_scan_s: float = 120.0  # seconds of each source that are read, from its start, within `time_limit_s`
    min_side_px: int = 64  # footage whose shorter side is below this is rejected, for it would be enlarged too much
    max_side_px: int = 8192  # footage whose longer side exceeds this is rejected, which bounds the memory
    # Motion
    flow: Literal["dis", "raft"] = "dis"  # optical flow of the motion score; raft needs torchvision and `raft_weights`
    raft_weights: str | None = None  # file of torchvision's raft_large state dict
    raft_batch: int = 8  # pairs of frames per RAFT evaluation, from one clip or several
    drop_fraction: float = 0.25  # fraction of all clips, those with the least motion, that is dropped; section 2.2
    min_motion: float = 10.0  # clips with a lower motion score are still (10 = 0.03 px a frame at 384x256)
    # Tracks
    tracker: Literal["lucas_kanade", "cotracker"] = "lucas_kanade"  # lucas_kanade needs no weights
    cotracker: str = "facebookresearch/co-tracker"  # torch.hub repository, or a local clone of it
    cotracker_model: str = "cotracker3_offline"  # entry point of the repository; the weights are CC-BY-NC
    grid: int = 16  # tracked points along each side of the first frame; section 2.2
    min_tracked_fraction: float = 0.3  # clips whose points are visible in less of the frames are rejected
    # Boxes of objects
    boxes: str | None = None  # folder of what a detector found, ID.json for a source; null = clips have no boxes
    # Captions of sources that have none
    captioner: Literal["none", "blip2"] = "none"  # none leaves the caption empty
    blip2: str = "Salesforce/blip2-opt-2.7b"  # folder or hub name of BLIP-2; OPT's licence is non-commercial
    caption_frames: int = 3  # evenly spaced frames that BLIP-2 describes; the descriptions are joined
    # Running
    seed: int = 0  # seed of the random choice of frames in each source
    clips_per_shard: int = 64  # sources per shard; rejected ones leave it smaller
    executor: Literal["local", "ray"] = "local"  # processes of this machine, or Ray's
    workers: int = 0  # processes of passes without networks; 0 = one per core, or all of the cluster at `ray_address`
    # Processes of passes with networks; 0 = as many as `gpus_per_worker` allows, one without a GPU.
    gpu_workers: int = 0
    gpus_per_worker: float = 1.0  # part of a GPU that a process with networks takes; with 0.25 four share each GPU
    ray_address: str | None = None  # address of a running cluster; null = a local one is started
    device: str | None = None  # device of RAFT, CoTracker and BLIP-2; null = every GPU in turn, or the CPU if none
    batch_size: int = 4  # clips per call of RAFT, CoTracker and BLIP-2; passes without networks take one
    time_limit_s: float = 1200.0  # seconds for one clip in one pass; a clip that exceeds it is rejected

    def __post_init__(self) -> None:
        for name in (
            "num_frames",
            "max_interval",
            "grid",
            "caption_frames",
            "clips_per_shard",
            "raft_batch",
            "batch_size",
            "min_side_px",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_frames < 2:
            raise ValueError(f"num_frames must be at least 2, got {self.num_frames}")
        if min(self.size) < 16 or any(side % 2 for side in self.size):
            raise ValueError(f"size must be two even numbers from 16 on, got {self.size}")
        for name in ("drop_fraction", "min_tracked_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("workers", "gpu_workers", "min_motion", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.gpus_per_worker <= 1:
            raise ValueError(
                f"gpus_per_worker must lie in (0, 1], got {self.gpus_per_worker}; a process uses one GPU at most, "
                "and none with device=cpu"
            )
        if self.executor == "ray" and ":" in (self.device or ""):
            raise ValueError(f"device={self.device}: Ray assigns the GPUs; with executor=ray set device=cuda, or none")
        if self.max_side_px < self.min_side_px:
            raise ValueError(f"max_side_px must be at least min_side_px={self.min_side_px}, got {self.max_side_px}")
        for name in ("time_limit_s", "max_scan_s", "cut_threshold"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.flow == "raft" and self.raft_weights is None:
            raise ValueError("flow=raft needs raft_weights=FILE, torchvision's raft_large state dict")
        if self.flow == "raft" and any(side % 8 or side < 128 for side in self.size):
            raise ValueError(f"flow=raft needs sides in multiples of 8 from 128 on, got size={self.size}")


EXECUTION_FIELDS = (
    "executor",
    "workers",
    "gpu_workers",
    "gpus_per_worker",
    "ray_address",
    "device",
    "raft_batch",
    "batch_size",
    "time_limit_s",
)
"""Settings that change how a curation runs but not its result; they may differ when a run is continued."""

_FOOTAGE_FIELDS = ("input", "output", "videos")  # footage may move; `find_sources` tells whether it is the same
_FILE_FIELDS = ("raft_weights", "cotracker", "blip2", "boxes")  # may move, but keep their names
_USED_WITH = {
    "raft_weights": ("flow", "raft"),
    "cotracker": ("tracker", "cotracker"),
    "cotracker_model": ("tracker", "cotracker"),
    "blip2": ("captioner", "blip2"),
    "caption_frames": ("captioner", "blip2"),
    "raft_batch": ("flow", "raft"),
    "ray_address": ("executor", "ray"),
}
"""The choice, as a setting and its value, without which a setting has no effect."""


def check_unused(config: CurateConfig) -> None:
    """Refuses settings that would do nothing: of networks that are not chosen, say.

    Raises:
        ValueError: Names such a setting and the choice that it belongs to.
    """
    defaults = default_values(config)
    for name, (choice, value) in _USED_WITH.items():
        if getattr(config, name) != defaults[name] and getattr(config, choice) != value:
            raise ValueError(
                f"{name}={getattr(config, name)} does nothing with {choice}={getattr(config, choice)}; set "
                f"{choice}={value}, or leave {name} out"
            )
    if config.videos is not None and config.source == "folder":
        raise ValueError(
            f"videos={config.videos} is for source=csv and source=realestate10k; with source=folder the footage is in "
            f"input={config.input}"
        )


def select_result_settings(config: CurateConfig) -> dict[str, Any]:
    """The settings that the result depends on, of networks' files and of boxes the names alone."""
    settings = {
        name: value
        for name, value in vars(config).items()
        if name not in (*EXECUTION_FIELDS, *_FOOTAGE_FIELDS)
        and (name not in _USED_WITH or getattr(config, _USED_WITH[name][0]) == _USED_WITH[name][1])
    }
    return settings | {name: Path(settings[name]).name for name in _FILE_FIELDS if settings.get(name)}
