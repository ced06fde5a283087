"""Settings of the curation; `configs/curate/` states them for each kind of source, docs/data.md explains them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class CurateConfig:
    """From raw video to annotated shards."""

    input: str  # folder of videos; CSV of id, caption, path; or RealEstate10K folder
    output: str  # folder of the shards, the index and the report; an unfinished one is continued
    source: Literal["folder", "csv", "realestate10k"] = "folder"
    videos: str | None = (
        None  # where the CSV's paths, or RealEstate10K's videos or frames, lie; None = beside the input
    )
    camera_only: bool = False  # nothing moves but the camera; RealEstate10K always
    # Clips
    size: tuple[int, int] = (384, 256)  # (W, H); section 2.2
    num_frames: int = 32  # section 2.2
    max_interval: int = 16  # frames of the source between two of a clip, drawn from 1..this; section 2.2
    cut_detector: Literal["adaptive", "content"] = "adaptive"  # PySceneDetect's
    cut_threshold: float | None = None  # None = the detector's own, 3 or 27; less finds more cuts
    max_scan_s: float = 600.0  # only so much of a source is looked at, from its start
    min_side_px: int = 64  # footage with a shorter side is rejected; it would have to be blown up
    max_side_px: int = 8192  # a longer side is rejected, so that memory stays bounded
    # Motion
    flow: Literal["dis", "raft"] = "dis"  # raft: needs torchvision and `raft_weights`
    raft_weights: str | None = None  # torchvision's raft_large state dict
    raft_batch: int = 8  # pairs of frames that RAFT takes at a time, of one clip or several
    drop_fraction: float = 0.25  # of the data set, the clips that move least; section 2.2
    min_motion: float = 10.0  # a lower motion score is a still picture (10 = 0.03 px a frame at 384x256)
    # Tracks
    tracker: Literal["lucas_kanade", "cotracker"] = "lucas_kanade"
    cotracker: str = "facebookresearch/co-tracker"  # torch.hub repository, or a local clone of it
    cotracker_model: str = "cotracker3_offline"  # its weights are CC-BY-NC
    grid: int = 16  # points a side; section 2.2
    min_tracked: float = 0.1  # clips whose tracks are visible less than this on average are rejected
    # Captions where the source has none
    captioner: Literal["none", "blip2"] = "none"
    blip2: str = "Salesforce/blip2-opt-2.7b"  # folder or hub name
    caption_frames: int = 3  # frames described, evenly spaced; their descriptions are joined
    # Running
    seed: int = 0
    clips_per_shard: int = 64  # sources a shard is made of; what is rejected leaves it smaller
    executor: Literal["local", "ray"] = "local"
    workers: int = 0  # processes; 0 = one a core, one a GPU where networks are used, all there is on a cluster
    ray_address: str | None = None  # of a running cluster; None = start one here
    gpus_per_worker: float = 0.0  # ray: for RAFT, CoTracker and BLIP-2; a fraction shares a GPU
    device: str | None = None  # of these three; None = cuda where there is one
    batch_size: int = 4  # clips that these three take at a time; what needs no network takes one
    time_limit_s: float = 1200.0  # for one clip in one step; what takes longer, twice, is rejected

    def __post_init__(self) -> None:
        for name in (
            "num_frames",
            "max_interval",
            "grid",
            "caption_frames",
            "clips_per_shard",
            "raft_batch",
            "batch_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_frames < 2:
            raise ValueError(f"num_frames must be at least 2, got {self.num_frames}")
        if min(self.size) < 16 or any(side % 2 for side in self.size):
            raise ValueError(f"size must be two even numbers from 16 on, got {self.size}")
        for name in ("drop_fraction", "min_tracked"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("workers", "gpus_per_worker", "min_motion"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("time_limit_s", "max_scan_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.flow == "raft" and self.raft_weights is None:
            raise ValueError("flow=raft needs raft_weights=FILE, torchvision's raft_large state dict")


RUNNING = ("executor", "workers", "ray_address", "gpus_per_worker", "time_limit_s", "raft_batch", "batch_size")
"""Settings that say how the work is done, not what comes out; they may change when a run is continued."""
