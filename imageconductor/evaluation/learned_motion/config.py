"""Settings of an evaluation of learned motions: methods, motions with their reference clips and prompts, metrics."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from imageconductor.evaluation.metrics.motion_fidelity import ReferenceChoice
from imageconductor.files import find_shipped, read_text

FramePairs = Literal["consecutive", "all"]

_MOTION = "{motion}"


@dataclass(frozen=True)
class LearnedMethod:
    """One line of the table: a model, and what it is given of each motion; in all paths {motion} is the motion's name.

    A `motion_director` run stands for its LoRA of the kind that is asked for, as in `sample.py`.
    """

    model: str | None = None  # model folder; null = the evaluation's
    motion_lora: list[str] = field(default_factory=list)  # LoRAs of the motion modules or runs, each FILE or FILE:scale
    appearance_lora: list[str] = field(default_factory=list)  # LoRAs of a look or runs, each FILE or FILE:scale
    noise_prior: str | None = None  # run whose inverted noise the videos begin with, RUN or RUN:fraction

    def of_motion(self, name: str) -> LearnedMethod:
        """The method with the motion's name in place of {motion}."""

        def fill(text: str | None) -> Any:
            return None if text is None else text.replace(_MOTION, name)

        motion_lora, appearance_lora = (
            [fill(text) for text in own] for own in (self.motion_lora, self.appearance_lora)
        )
        return LearnedMethod(fill(self.model), motion_lora, appearance_lora, fill(self.noise_prior))


@dataclass(frozen=True)
class LearnedMotion:
    """A motion that was learned: the clips that it was learned from, and prompts of other appearance."""

    references: list[str] = field(default_factory=list)  # videos, folders of videos, or JSON files, as in training
    prompts: list[str] = field(default_factory=list)  # what the videos show
    prompt_file: str | None = None  # text file with one more prompt a line
    images: list[str] = field(default_factory=list)  # first frames, one for each prompt; none = prompts alone

    def read_prompts(self, name: str) -> list[str]:
        """The prompts of the list and then of the file.

        Args:
            name: Of the motion, for messages.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: There is no prompt, or one is given twice.
        """
        prompts = list(self.prompts)
        if self.prompt_file is not None:
            path = find_shipped(self.prompt_file)
            if not path.is_file():
                raise FileNotFoundError(f"motion {name}: no file of prompts at {path}")
            prompts += read_text(path).splitlines()
        prompts = [words for text in prompts if (words := " ".join(text.split()))]
        if not prompts:
            raise ValueError(f"motion {name} has no prompts; give prompts, or a prompt_file with one a line")
        if twice := next((text for text in prompts if prompts.count(text) > 1), None):
            raise ValueError(f"motion {name} has the prompt {twice!r} twice")
        return prompts

    def list_requests(self, name: str, seeds: list[int]) -> list[VideoRequest]:
        """The videos that are asked for.

        Args:
            name: Of the motion.
            seeds: One video of each prompt for each of them.

        Raises:
            FileNotFoundError: As `read_prompts`, or an image is missing.
            ValueError: As `read_prompts`, or there are more or fewer images than prompts.
        """
        prompts, images = self.read_prompts(name), [find_shipped(path) for path in self.images]
        if images and len(images) != len(prompts):
            raise ValueError(f"motion {name} has {len(prompts)} prompts and {len(images)} images; give one image each")
        if missing := next((path for path in images if not path.is_file()), None):
            raise FileNotFoundError(f"motion {name}: no image at {missing}")
        given = [{"image": str(path), "image_digest": hashlib.sha256(path.read_bytes()).hexdigest()} for path in images]
        pairs = zip(prompts, given or [{}] * len(prompts), strict=True)
        return [VideoRequest(name, prompt, seed, **image) for prompt, image in pairs for seed in seeds]


@dataclass(frozen=True)
class VideoRequest:
    """A video that every method makes: a prompt, a seed and perhaps a first frame under a motion."""

    motion: str
    prompt: str
    seed: int
    image: str | None = None
    image_digest: str = ""  # of the file

    @property
    def key(self) -> str:
        """Name of its files, which stays the same when prompts and seeds are added, and differs by the image."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:40].strip("-")
        digest = hashlib.sha256((self.prompt + self.image_digest).encode()).hexdigest()[:8]
        return "-".join(filter(None, (words, digest, str(self.seed))))


@dataclass
class LearnedMotionConfig:
    """Settings of an evaluation of learned motions, `protocol: learned_motion`."""

    ELSEWHERE: ClassVar[dict[str, str]] = {}  # settings of other protocols by name; `commands.evaluate` fills it

    protocol: Literal["learned_motion"] = "learned_motion"  # MotionDirector's: prompts x motions
    model: str | None = None  # model folder of the methods that name none
    # Lines of the table by name, each {model: FOLDER, motion_lora: [FILE], appearance_lora: [FILE], noise_prior: RUN};
    # {motion} in a path is the motion's name. A method without LoRAs, {}, is the base model.
    methods: dict[str, LearnedMethod] = field(default_factory=dict)
    # Motions by name, each {references: [FILE or FOLDER], prompts: [...], prompt_file: FILE with one a line,
    # images: [FILE for each prompt]}.
    motions: dict[str, LearnedMotion] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])  # one video of each prompt for each of them
    size: tuple[int, int] | None = None  # (W, H) of the videos; null = the models'
    num_frames: int | None = None  # frames of each video; null = the models'
    negative_prompt: str | None = None  # null = the model's default
    num_inference_steps: int | None = None  # denoising steps; null = the model's default
    guidance_scale: float | None = None  # lambda_cfg, 1 = off; null = the model's default
    batch_size: int = 4  # videos that are sampled together
    # Precision of the networks; null = float16 on a GPU, float32 elsewhere.
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    device: str | None = None  # torch device, e.g. cuda or cpu; null = a GPU of this process where there is one
    # Frames per second of reference clips' windows, about, as in training; null = every frame_step-th frame.
    fps: float | None = None
    frame_step: int = 1  # between a window's frames, where `fps` does not say it
    # What counts of several reference clips and windows: the one that a video is most like, or the mean over all.
    reference_choice: ReferenceChoice = "best"
    tracker: Literal["lucas_kanade", "cotracker"] = "lucas_kanade"  # point tracker that measures the motion
    cotracker: str = "facebookresearch/co-tracker"  # CoTracker's repository for torch.hub, or a local clone of it
    grid: int = 10  # tracked points along each side of the frame
    still_fraction: float = 0.01  # of the frame's diagonal; tracks that stay nearer to their start stand still
    # CLIP model, folder or hub name, for text alignment and frame consistency; null = neither is measured.
    clip: str | None = None
    frame_pairs: FramePairs = "consecutive"  # frames whose CLIP cosine is the frame consistency
    pick_score: str | None = None  # folder or hub name of PickScore_v1; null = PickScore is not measured

    def __post_init__(self) -> None:
        for name in ("batch_size", "frame_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("grid", "num_frames"):
            if getattr(self, name) is not None and getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size must be positive, got {self.size[0]}x{self.size[1]}")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"fps must be positive, got {self.fps}")
        if not 0 <= self.still_fraction < 1:
            raise ValueError(f"still_fraction must lie in [0, 1), got {self.still_fraction}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more different numbers, got {self.seeds}")
        if self.tracker != "cotracker" and self.cotracker != LearnedMotionConfig.cotracker:
            raise ValueError("cotracker goes with tracker=cotracker; leave it out")
        for what in ("methods", "motions"):
            if not getattr(self, what):
                raise ValueError(f"nothing to evaluate: give {what}")
            for name in getattr(self, what):
                if name != Path(name).name or name.startswith("."):
                    raise ValueError(f"methods and motions give folders their names; {name!r} cannot be one")
        for name, method in self.methods.items():
            if method.model is None and self.model is None:
                raise ValueError(f"method {name} has no model; give it one, or model=FOLDER for all that have none")
        for name, motion in self.motions.items():
            if not motion.references:
                raise ValueError(f"motion {name} has no references; name the clips that it was learned from")
