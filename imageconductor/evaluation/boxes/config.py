"""Settings of an evaluation of boxes: methods, the clips whose first frames and boxes they are given, metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from imageconductor.data.sprite_world import SpriteWorldConfig
from imageconductor.evaluation.metrics.frechet_names import FrechetName


@dataclass(frozen=True)
class BoxMethod:
    """One line of the table: a model, and what it is given of each clip; the caption always."""

    model: str | None = None  # model folder; null = the evaluation's
    motion_lora: list[str] = field(default_factory=list)  # LoRAs of the motion modules, each FILE or FILE:scale
    image: bool = True  # the clip's first frame
    boxes: bool = True  # the boxes and class names of its objects
    centres: bool = False  # the boxes' centres as trajectories
    control: Literal["camera", "object", "mixed", "base"] = "object"  # LoRAs that follow these trajectories
    # What carries the first frame; null = both where boxes are given and the model has scene gates, else controlnet.
    first_frame_by: Literal["controlnet", "gates", "both"] | None = None
    scene_guidance_scale: float = 1.0  # s_img, above 1 boxes and the gates' first frame are followed more closely
    gated_fraction: float = 1.0  # of the steps, in which gates act


@dataclass
class BoxEvaluateConfig:
    """Settings of an evaluation of boxes, `protocol: boxes`."""

    ELSEWHERE: ClassVar[dict[str, str]] = {}  # settings of other protocols by name; `commands.evaluate` fills it

    protocol: Literal["boxes"] = "boxes"  # SMCD's: the first frame, caption and boxes of true clips
    model: str | None = None  # model folder of the methods that name none
    # Lines of the table by name, each {model: FOLDER, image: true, boxes: true, centres: false, ...}.
    methods: dict[str, BoxMethod] = field(default_factory=dict)
    dataset: Literal["got10k", "youtube_vis", "sprites"] = "sprites"  # where the clips come from
    data: str | None = None  # folder of the data set, with its splits; not for sprites
    split: str = "val"  # of the data set
    world: SpriteWorldConfig = field(default_factory=SpriteWorldConfig)  # of sprites; size and length are the videos'
    captions: str | None = None  # JSON of captions by clip, for youtube_vis; null = caption.json in the folder
    num_clips: int | None = None  # the first clips of the split; null = all, and 64 of sprites
    frame_step: int = 1  # between the frames that are taken of a clip, from its first one on
    seed: int = 0  # of the first video's noise; each clip has the next one
    size: tuple[int, int] | None = None  # (W, H) of the videos; null = the models'
    num_frames: int | None = None  # frames of each video; null = the models'
    negative_prompt: str | None = None  # null = the model's default
    num_inference_steps: int | None = None  # denoising steps; null = the model's default
    guidance_scale: float | None = None  # lambda_cfg, 1 = off; null = the model's default
    batch_size: int = 1  # videos that are sampled together
    # Precision of the networks; null = float16 on a GPU, float32 elsewhere.
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    device: str | None = None  # torch device, e.g. cuda or cpu; null = a GPU of this process where there is one
    # Tracker of boxes that starts on the requested box of frame 0; csrt needs opencv-contrib-python-headless.
    box_tracker: Literal["median-flow", "mil", "csrt"] = "median-flow"
    # CLIP model, folder or hub name, for text alignment and first-frame fidelity; null = neither is measured.
    clip: str | None = None
    dino: str | None = None  # ViT of DINO, folder or hub name, for first-frame fidelity; null = not measured
    frechet: list[FrechetName] = field(default_factory=list)  # distances to the true clips: fid, fvd, frechet_small
    fid_weights: str | None = None  # file of pytorch-fid's Inception-v3 weights, needed for fid
    fvd_weights: str | None = None  # file of an I3D as TorchScript, needed for fvd

    def __post_init__(self) -> None:
        for name in ("batch_size", "frame_step", "num_clips"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_frames is not None and self.num_frames < 2:
            raise ValueError(f"num_frames must be at least 2, got {self.num_frames}")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size must be positive, got {self.size[0]}x{self.size[1]}")
        if (self.data is None) != (self.dataset == "sprites"):
            told = "renders its own clips; leave data out" if self.dataset == "sprites" else "needs data=FOLDER"
            raise ValueError(f"dataset {self.dataset} {told}")
        if not self.methods:
            raise ValueError("nothing to evaluate: give methods")
        for name, method in self.methods.items():
            if name != Path(name).name or name.startswith(".") or name in ("true clips", "box of frame 0"):
                raise ValueError(f"methods give folders their names; {name!r} cannot be one")
            if method.model is None and self.model is None:
                raise ValueError(f"method {name} has no model; give it one, or model=FOLDER for all that have none")
        for distance in self.frechet:
            setting = f"{distance}_weights"
            if distance != "frechet_small" and getattr(self, setting) is None:
                raise ValueError(f"{distance} needs {setting}=FILE")
