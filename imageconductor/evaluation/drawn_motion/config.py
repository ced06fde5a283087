"""Settings of an evaluation: the methods that are compared, the tasks that they are given, and the metrics."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from imageconductor.conditioning.preset_names import CAMERA_PRESETS, OBJECT_PRESETS
from imageconductor.config import default_values
from imageconductor.data.sprite_world import SpriteWorldConfig
from imageconductor.evaluation.metrics.frechet_names import FrechetName
from imageconductor.sampling.shortcuts import NO_SHORTCUTS, Shortcuts

RequestSet = Literal["camera", "object"]


@dataclass(frozen=True)
class Task:
    """A set of requests, and the control under which a model answers them."""

    requests: RequestSet = "object"  # the set of requests: camera motions, or motions of objects
    # LoRAs that are active in the motion ControlNet; base = none of them, none = no trajectories are given at all.
    control: Literal["camera", "object", "mixed", "base", "none"] = "object"
    camera_free_scale: float | None = None  # lambda_trajs of Eq. 5, with control object; null = no camera-free guidance
    image: bool = True  # whether the first frame is given; false = text-to-video on the same trajectories

    @property
    def settings(self) -> dict[str, Any]:
        """As a record of videos has them; without `image` where it is given, as records before it were."""
        return {key: value for key, value in asdict(self).items() if key != "image" or not value}


@dataclass(frozen=True)
class Method:
    """One line of the tables: a model or a folder of videos that another program made, and their format."""

    model: str | None = None  # model folder, or its name on the hub; null = the method is a folder of videos
    videos: str | None = None  # folder of TASK/KEY.mp4, named as an evaluation names its own under videos/METHOD
    base: str | None = None  # DreamBooth file that replaces the model's UNet, VAE and text encoder
    lora: list[str] = field(default_factory=list)  # style LoRAs of the UNet, each FILE or FILE:scale
    motion_lora: list[str] = field(default_factory=list)  # LoRAs of the motion modules, each FILE or FILE:scale
    # The model's few-step LoRA makes the videos, in 4 steps without guidance where this method does not say otherwise:
    # the evaluation's steps and guidance are those of the other methods.
    few_step: bool = False
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # part of the steps in which guidance acts
    controlnet_interval: int = 1  # steps that share an evaluation of the ControlNets
    num_inference_steps: int | None = None  # denoising steps; null = the evaluation's
    guidance_scale: float | None = None  # lambda_cfg, 1 = off; null = the evaluation's
    # Method whose videos, seed by seed, these are to equal in less time: the PSNR between them is measured too.
    original: str | None = None
    size: tuple[int, int] | None = None  # (W, H) of its videos; null = the evaluation's
    num_frames: int | None = None  # frames of its videos; null = the evaluation's
    # How a first frame gets that size: crop covers it and cuts off what is left over, resize stretches the picture.
    fit: Literal["crop", "resize"] = "crop"
    # Numbers of its frames that stand for the evaluation's frames 0, 1, ...; null = all, spread evenly over the motion.
    frames: list[int] | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.videos is None):
            raise ValueError(f"a method needs a model or videos, and not both; got {self.model} and {self.videos}")
        made_by = self.base, self.lora, self.motion_lora, self.few_step, self.num_inference_steps
        if self.videos is not None and (any(made_by) or self.guidance_scale is not None):
            told = f"the videos in {self.videos} are made already"
            raise ValueError(f"base, LoRAs, steps and guidance need a model; {told}")
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {self.num_inference_steps}")
        shortcuts = Shortcuts(self.guidance_interval, self.controlnet_interval)
        if self.videos is not None and shortcuts != NO_SHORTCUTS:
            raise ValueError(f"intervals need a model; the videos in {self.videos} are made already")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size must be positive, got {self.size[0]}x{self.size[1]}")
        if self.num_frames is not None and self.num_frames < 2:
            raise ValueError(f"num_frames must be at least 2, got {self.num_frames}")
        if self.frames is not None and (
            len(self.frames) < 2
            or self.frames[0] < 0
            or any(after <= before for before, after in itertools.pairwise(self.frames))
        ):
            raise ValueError(f"frames must be two or more numbers from 0 on that rise, got {self.frames}")


@dataclass
class EvaluateConfig:
    """Settings of an evaluation."""

    RENAMED: ClassVar[dict[str, str]] = {"arms": "tasks", "rows": "methods", "frechet_arms": "frechet_tasks"}
    ELSEWHERE: ClassVar[dict[str, str]] = {}  # settings of other protocols by name; `commands.evaluate` fills it

    # What is evaluated: how videos follow drawn trajectories; or, as learned_motion, how they repeat a motion that
    # MotionDirector learned; or, as boxes, how objects follow boxes. These have settings of their own:
    # `--config configs/evaluate/motion_director.yaml --help`, and the same of smcd_sprites.yaml.
    protocol: Literal["drawn_motion"] = "drawn_motion"
    model: str | None = None  # model folder to evaluate, one line of the tables, named after the folder
    videos: str | None = None  # folder of another method's videos, one more line, named after the folder
    # Further lines of the tables by name, each {videos: FOLDER}, or {model: FOLDER, base: FILE, lora: [FILE:scale],
    # motion_lora: [FILE:scale], few_step: true, num_inference_steps: N, guidance_scale: X}; and, for videos of another
    # format, size: [W, H], num_frames: N, fit: crop or resize, and frames: [i, ...], the numbers of its frames that
    # stand for the evaluation's (null = all, spread evenly). original: NAME, of the line that a faster one imitates.
    methods: dict[str, Method] = field(default_factory=dict)
    # Tasks by name, each {requests: camera or object, control: camera, object, mixed, base or none,
    # camera_free_scale: X, image: true or false}; none given = camera and object, as in Table 1.
    tasks: dict[str, Task] = field(default_factory=dict)
    # Folder of first frames, each with NAME.json: {"caption": "...", "objects": [[x, y], ...]}; null = sprite scenes.
    images: str | None = None
    # JSON file that fixes the presets, their reach, the seeds and the number of images, so that tables can be compared,
    # e.g. configs/evaluate/table1_requests.json; null = by the settings below.
    fixed_requests: str | None = None
    # Trajectories that are requested: the presets below, or the motion that each sprite scene really has.
    motions: Literal["presets", "own"] = "presets"
    camera_presets: list[str] = field(default_factory=lambda: list(CAMERA_PRESETS))  # motions of the camera set
    object_presets: list[str] = field(default_factory=lambda: list(OBJECT_PRESETS))  # motions of the object set
    strength: float = 1.0  # factor on the reach of the presets, which is 0.225 of the shorter side
    num_scenes: int = 16  # sprite scenes in each set
    world_seed: int = 10_000  # seed of the sprite scenes; training uses 0, so these are held out
    style: Literal["colour", "ink"] = "colour"  # look of the sprite scenes
    # What sprite scenes are made of: the world of the model. Its size, length, kind, seed, look and words
    # for motion are those of the evaluation.
    world: SpriteWorldConfig = field(default_factory=SpriteWorldConfig)
    num_points: int = 4  # tracks of a camera request with motions=own: background points of the sprite scene
    size: tuple[int, int] | None = None  # (W, H) of the videos; null = the model's, 384 x 256 where there is none
    num_frames: int | None = None  # frames of each video; null = the model's number, 16 where there is no model
    seed: int = 0  # seed of the initial noise; request i takes seed + i
    num_inference_steps: int | None = None  # denoising steps; null = the model's default
    guidance_scale: float | None = None  # lambda_cfg, 1 = off; null = the model's default
    trajectory_guidance_scale: float | None = None  # guidance by the trajectories, 1 = off; null = the model's default
    batch_size: int = 4  # videos that are sampled together
    # Precision of the networks; null = float16 on a GPU, float32 elsewhere.
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    device: str | None = None  # torch device, e.g. cuda or cpu; null = a GPU of this process where there is one
    tracker: Literal["lucas_kanade", "cotracker"] = "lucas_kanade"  # point tracker that measures the motion
    cotracker: str = "facebookresearch/co-tracker"  # CoTracker's repository for torch.hub, or a local clone of it
    # CLIP model, folder or hub name, for text similarity and frame consistency; null = neither is measured.
    clip: str | None = None
    # Fréchet distances to compute, none by default; frechet_small needs no weights and compares with nothing published.
    frechet: list[FrechetName] = field(default_factory=list)
    # Tasks whose videos together form the generated set of a Fréchet distance.
    frechet_tasks: list[str] = field(default_factory=lambda: ["camera", "object"])
    fid_weights: str | None = None  # file of pytorch-fid's Inception-v3 weights, needed for fid
    fvd_weights: str | None = None  # file of an I3D as TorchScript, needed for fvd
    # Folder of mp4 files that form the reference set of a Fréchet distance; null = clips of the sprite world.
    reference: str | None = None
    num_reference: int = 256  # reference videos, drawn by the hashes of their names; the paper draws 5,000 of WebVid
    # Every n-th frame of a reference video is used, e.g. 3 for footage at 24 fps beside videos at 8 fps.
    reference_stride: int = 1
    shown: int = 12  # videos of each task in the report, those with the largest errors

    def __post_init__(self) -> None:
        for name in ("num_scenes", "num_points", "batch_size", "num_reference", "reference_stride", "shown"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.strength <= 0:
            raise ValueError(f"strength must be positive, got {self.strength}")
        for name, known in (("camera_presets", CAMERA_PRESETS), ("object_presets", OBJECT_PRESETS)):
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise ValueError(f"{name}: there is no {', '.join(unknown)}; there are {', '.join(known)}")
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one motion")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size must be positive, got {self.size[0]}x{self.size[1]}")
        if self.num_frames is not None and self.num_frames < 2:
            raise ValueError(f"num_frames must be at least 2, got {self.num_frames}")
        if self.fixed_requests is not None:
            self._check_fixed_alone()
        if self.motions == "own" and self.images is not None:
            raise ValueError("motions=own needs scenes whose motion is known: leave images out")
        for name in self._list_changed(self.idle):
            raise ValueError(f"{name} goes with {self.idle[name]}; leave it out")
        if not self.tasks:
            self.tasks = {"camera": Task("camera", "camera"), "object": Task("object", "object")}
        for name in (*self.tasks, *self.methods):
            if name != Path(name).name or name.startswith("."):
                raise ValueError(f"methods and tasks give folders their names; {name!r} cannot be one")
        for name, task in self.tasks.items():
            if task.camera_free_scale is not None and task.control != "object":
                raise ValueError(f"task {name}: camera_free_scale needs control object, not {task.control}")
        self._check_frechet()
        if not self.all_methods:
            raise ValueError("nothing to evaluate: give model=FOLDER, videos=FOLDER or methods")
        for name, method in self.methods.items():
            others = [other for other in self.all_methods if other != name]
            if method.original is not None and method.original not in others:
                raise ValueError(
                    f"method {name}: original {method.original!r} is no other method; "
                    f"there are: {', '.join(others) or 'none'}"
                )

    def _check_fixed_alone(self) -> None:
        """Refuses settings that the file of fixed requests states too."""
        fixed = ("camera_presets", "object_presets", "strength", "motions", "num_scenes", "seed")
        for name in self._list_changed(fixed):
            raise ValueError(f"{self.fixed_requests} fixes {name}: leave it out, or fixed_requests")

    def _list_changed(self, names: Collection[str]) -> list[str]:
        """Those of the settings that do not have their default."""
        defaults = default_values(self)
        return [name for name in names if getattr(self, name) != defaults[name]]

    @property
    def idle(self) -> dict[str, str]:
        """Settings of which nothing is made here, each with what it goes with."""
        idle: dict[str, str] = {}
        if self.motions == "own":
            idle |= {name: "motions=presets" for name in ("strength", "camera_presets", "object_presets")}
        else:
            idle["num_points"] = "motions=own"
        if self.images is not None:
            told = "sprite scenes, and images takes their place"
            idle |= {name: told for name in ("num_scenes", "world_seed", "style", "world")}
        if self.tracker != "cotracker":
            idle["cotracker"] = "tracker=cotracker"
        return idle

    def _check_frechet(self) -> None:
        if self.frechet and (unknown := sorted(set(self.frechet_tasks) - set(self.tasks))):
            raise ValueError(f"frechet_tasks: there is no task {', '.join(unknown)}; there are {', '.join(self.tasks)}")
        if self.frechet and self.reference is None and self.images is not None:
            raise ValueError(f"{', '.join(self.frechet)} needs videos to compare with: reference=FOLDER")
        for name in ("fid", "fvd"):
            if name in self.frechet and getattr(self, f"{name}_weights") is None:
                raise ValueError(f"{name} needs {name}_weights=FILE; docs/reproduce.md says where to get it")

    @property
    def all_methods(self) -> dict[str, Method]:
        """All methods by name; those of `model` and `videos` are named after their folders."""
        given = [Method(model=self.model)] if self.model is not None else []
        given += [Method(videos=self.videos)] if self.videos is not None else []
        named = {Path(method.model or method.videos or "").resolve().name: method for method in given}
        if len(named) < len(given) or named.keys() & self.methods.keys():
            names = ", ".join([*named, *self.methods])
            raise ValueError(f"two methods have the same name: {names}; give them names under methods")
        return {**named, **self.methods}
