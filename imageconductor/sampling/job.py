"""One generation: settings, checked inputs, and the folder of files that comes out."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from imageconductor import config as config_file
from imageconductor.conditioning.presets import CAMERA_PRESETS, OBJECT_PRESETS

if TYPE_CHECKING:
    from PIL import Image

    from imageconductor.conditioning import Trajectories


@dataclass
class SampleJob:
    """What `sample.py` is asked for; the schema of `run.yaml`. None = the model's default."""

    model: str = "models/sprites"  # model folder, or organisation/name on the hub
    base: str | None = None  # DreamBooth file instead of the model's spatial layers, VAE and text encoder
    lora: list[str] = field(default_factory=list)  # style LoRAs, FILE or FILE:scale
    motion_lora: list[str] = field(default_factory=list)  # LoRAs of the motion modules, likewise
    image: str | None = None  # first frame, cover-cropped to the size
    trajectories: str | None = None  # JSON
    preset: str | None = None  # one of the evaluation motions instead
    start: tuple[float, float] | None = None  # x, y px where an object preset begins; None = the middle
    strength: float = 1.0  # of a preset
    prompt: str = ""
    negative_prompt: str | None = None
    control: Literal["camera", "object", "mixed", "base"] | None = None  # None = what suits the preset, else object
    camera_free_scale: float | None = None  # lambda_trajs of Eq. 5; None = off
    guidance_scale: float | None = None  # lambda_cfg
    trajectory_guidance_scale: float | None = None  # away from the video without the trajectories; 1 = off
    steps: int | None = None
    seed: list[int] = field(default_factory=lambda: [0])
    num_videos: int | None = None  # further seeds count up from the last one
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    device: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    offload: Literal["none", "model", "sequential"] = "none"  # what waits in main memory; needs a GPU
    vae_tiling: bool = False  # the autoencoder works on tiles, for frames larger than memory allows
    decode_chunk_size: int = 16  # frames that the autoencoder decodes at a time
    compile: bool = False  # torch.compile; minutes at the start, then less time a step
    domain_adapter_scale: float | None = None  # of AnimateDiff's domain adapter; None = as the model was assembled

    def __post_init__(self) -> None:
        for name in ("steps", "num_videos", "height", "width", "num_frames", "fps", "decode_chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.seed or min(self.seed) < 0 or max(self.seed) >= 2**63:
            raise ValueError(f"seed must be one or more numbers from 0 to 2^63 - 1, got {self.seed}")
        if len(set(self.seed)) < len(self.seed):
            raise ValueError(f"seed names a number twice: {self.seed}")
        if self.num_videos is not None and self.num_videos < len(self.seed):
            raise ValueError(f"num_videos is {self.num_videos}, but {len(self.seed)} seeds are given")
        if self.trajectories is not None and self.preset is not None:
            raise ValueError(f"trajectories ({self.trajectories}) and preset ({self.preset}) exclude each other")
        if self.compile and self.offload != "none":
            raise ValueError(f"compile and offload {self.offload!r} exclude each other")
        for text in (*self.lora, *self.motion_lora):
            parse_lora(text)
        known = (*CAMERA_PRESETS, *OBJECT_PRESETS)
        if self.preset is not None and self.preset not in known:
            raise ValueError(f"unknown preset {self.preset!r}; there are {', '.join(known)}")

    @property
    def seeds(self) -> list[int]:
        """One for each video."""
        more = (self.num_videos or len(self.seed)) - len(self.seed)
        return [*self.seed, *(self.seed[-1] + 1 + i for i in range(more))]


@dataclass(frozen=True)
class Inputs:
    """A job whose every input has been read and fitted, before any weight is loaded."""

    job: SampleJob  # no None left but camera_free_scale
    image: Image.Image
    trajectories: Trajectories


def parse_lora(text: str) -> tuple[str, float]:
    """File and scale of `FILE[:scale]`; the scale is 1 when it is not given.

    Raises:
        ValueError: What stands after the colon of a file that does not exist as written is no number.
    """
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return path, float(scale)
    except ValueError:
        raise ValueError(f"{text!r}: expected FILE or FILE:scale, and {scale!r} is no number") from None


def load_job(path: Path) -> SampleJob:
    """A job from YAML; files that it names are looked for beside it first, then in the working folder."""
    job = config_file.load(SampleJob, path)
    beside = {
        name: str(path.parent / value)
        for name in ("image", "trajectories", "model")
        if (value := getattr(job, name)) is not None and (path.parent / value).exists()
    }
    return replace(job, **beside)


def prepare(job: SampleJob) -> Inputs:
    """Reads and checks everything that can be known without the weights.

    Raises:
        ValueError, FileNotFoundError: In one line, what is wrong and where.
    """
    from imageconductor.checkpoints.domain_adapter import DomainAdapter
    from imageconductor.conditioning import Trajectories, camera_preset, cover_crop, load_image, object_preset
    from imageconductor.sampling.pipeline import ImageConductorPipeline, model_folder

    if job.image is None:
        raise ValueError("an image is needed: --image FILE")
    device = _device(job.device)
    for file in (job.base, *(parse_lora(text)[0] for text in (*job.lora, *job.motion_lora))):
        if file is not None and not Path(file).is_file():
            raise FileNotFoundError(f"no file at {file}")
    if job.offload != "none" and device == "cpu":
        raise ValueError(f"offload {job.offload!r} keeps networks off the GPU, and the device is cpu; leave it out")
    job = replace(
        job,
        model=str(model_folder(job.model)),
        device=device,
        dtype=job.dtype or ("float16" if device.startswith("cuda") else "float32"),
    )
    if job.control is None:
        job = replace(job, control="camera" if job.preset in CAMERA_PRESETS else "object")
    defaults = ImageConductorPipeline.read_sampling_defaults(job.model)
    defaults["steps"] = defaults.pop("num_inference_steps")
    unset = {f.name: defaults[f.name] for f in fields(job) if getattr(job, f.name) is None and f.name in defaults}
    job = replace(job, **unset)
    size, num_frames = (cast(int, job.width), cast(int, job.height)), cast(int, job.num_frames)
    if job.camera_free_scale is not None and job.control != "object":
        raise ValueError(f"camera_free_scale goes with control 'object', not {job.control!r}")

    image = load_image(cast(str, job.image))
    if job.preset in CAMERA_PRESETS:
        trajectories = camera_preset(job.preset, size, num_frames, strength=job.strength)
    elif job.preset is not None:
        start = job.start or (size[0] / 2, size[1] / 2)
        trajectories = object_preset(job.preset, size, num_frames, start=start, strength=job.strength)
    elif job.trajectories is not None:
        trajectories = Trajectories.load(job.trajectories, num_frames, published_size=size).cover_crop(size)
    else:
        trajectories = Trajectories.empty(size, num_frames)
    if job.domain_adapter_scale is not None and not DomainAdapter.is_in(Path(job.model)):
        raise FileNotFoundError(f"{job.model} has no domain adapter; assemble it with domain_adapter=FILE")
    if trajectories.num_tracks:
        ImageConductorPipeline.check_adapters(job.model, cast(str, job.control))
    ImageConductorPipeline.check_shape(job.model, size, num_frames)
    return Inputs(replace(job, seed=job.seeds, num_videos=None), cover_crop(image, size), trajectories)


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a CPU build asked for CUDA
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def check_output(folder: Path) -> None:
    """Raises ValueError if something lies where the output is to go."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; name another --output")


def generate(inputs: Inputs, output: Path) -> list[Path]:
    """Makes the videos and writes the folder, which appears when it is complete or not at all.

    Returns:
        The files: video-SEED.mp4 and overlay-SEED.mp4 for each seed, first_frame.png, trajectories.json, run.yaml.
    """
    import torch

    from imageconductor.checkpoints.personalise import personalise
    from imageconductor.sampling.pipeline import ImageConductorPipeline
    from imageconductor.sampling.video import draw_trajectories, to_uint8, upscale_for_viewing, write_mp4

    job, trajectories = inputs.job, inputs.trajectories
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        inputs.image.save(temporary / "first_frame.png")
        trajectories.save(temporary / "trajectories.json")
        record = replace(
            job,
            image="first_frame.png",
            trajectories="trajectories.json" if trajectories.num_tracks else None,
            preset=None,
            start=None,
            model=str(Path(job.model).resolve()),
            base=None if job.base is None else str(Path(job.base).resolve()),
            lora=[str(Path(text).resolve()) for text in job.lora],
            motion_lora=[str(Path(text).resolve()) for text in job.motion_lora],
        )
        config_file.save(record, temporary / "run.yaml")
        dtype = getattr(torch, cast(str, job.dtype))
        pipe = ImageConductorPipeline.from_pretrained(job.model, torch_dtype=dtype)
        loras, motion_loras = [*map(parse_lora, job.lora)], [*map(parse_lora, job.motion_lora)]
        personalise(pipe, job.base, loras, motion_loras, job.domain_adapter_scale)
        if job.vae_tiling:
            pipe.vae.enable_tiling()
        if job.offload == "model":
            pipe.enable_model_cpu_offload(device=cast(str, job.device))
        elif job.offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=cast(str, job.device))
        else:
            pipe.to(job.device)
        if job.compile:
            pipe.compile()
        result: Any = pipe(
            image=inputs.image,
            trajectories=trajectories if trajectories.num_tracks else None,
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            control=job.control,
            camera_free_scale=job.camera_free_scale,
            guidance_scale=job.guidance_scale,
            trajectory_guidance_scale=job.trajectory_guidance_scale,
            num_inference_steps=job.steps,
            num_frames=job.num_frames,
            height=job.height,
            width=job.width,
            num_videos_per_prompt=len(job.seed),
            generator=[torch.Generator().manual_seed(seed) for seed in job.seed],
            decode_chunk_size=job.decode_chunk_size,
            output_type="np",
        )
        fps: Any = job.fps
        for seed, video in zip(job.seed, result.frames, strict=True):
            large, factor = upscale_for_viewing(to_uint8(video))
            write_mp4(temporary / f"video-{seed}.mp4", large, fps)
            write_mp4(temporary / f"overlay-{seed}.mp4", draw_trajectories(large, trajectories, factor), fps)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(output.iterdir())
