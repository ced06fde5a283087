"""Generation as a command, a page or a notebook asks for it: settings, checked inputs, a pipeline, videos, files.

inputs = prepare(job)              reads and checks everything that needs no weight
pipe = load_pipeline(inputs.job)   once for many jobs of the same model
videos = render(pipe, [inputs])
write(inputs, videos[0], folder)   of `job_files`
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from imageconductor import config as config_file
from imageconductor.conditioning.preset_names import CAMERA_PRESETS, OBJECT_PRESETS
from imageconductor.sampling.loras import find_job_loras, parse_lora, parse_noise_prior, takes_few_steps
from imageconductor.sampling.shortcuts import Shortcuts

if TYPE_CHECKING:
    from PIL import Image

    from imageconductor.conditioning import Boxes, Trajectories
    from imageconductor.sampling.pipeline import ImageConductorPipeline
    from imageconductor.sampling.video import Frames

MOTIONS = ("trajectories", "preset", "motion_from")
"""Settings of which one says how things move."""

MIX_CONTROLS = ("camera", "object", "mixed")
"""Controls that `mix` weighs, in its order."""

_FILE = {"metavar": "FILE"}
_LORA = {"metavar": "FILE[:X]"}
_FOLDER = {"metavar": "FOLDER"}


@dataclass
class SampleJob:
    """What `sample.py` is asked for: the schema of `run.yaml` and the command's options. None = the model's default."""

    # first frame; cropped to the shape of the video; none = the prompt alone
    image: str | None = field(default=None, metadata=_FILE)
    # drawn tracks: JSON, or a file of another tool (docs/formats.md), or a folder of Tora's text files; a track of one
    # point holds still
    trajectories: str | None = field(default=None, metadata=_FILE)
    # frame in which they were drawn, where the file does not state it; default: the image's, or that of the video for
    # bare lists
    trajectories_size: str | None = field(default=None, metadata={"metavar": "WxH"})
    # a video whose motion is taken instead, on a grid of 3 x 3 points and over its whole length
    motion_from: str | None = field(default=None, metadata={"metavar": "VIDEO"})
    # a ready-made motion instead, listed below
    preset: str | None = field(default=None, metadata={"metavar": "NAME"})
    start: tuple[float, float] | None = None  # where an object preset begins, pixels; default: the middle
    strength: float = 1.0  # factor on the motion of a preset, 1 = moderate
    # where objects are and how large (docs/boxes.md): JSON, or a folder of a picture and bbox.txt
    boxes: str | None = field(default=None, metadata=_FILE)
    boxes_name: str | None = None  # class of the object of a bbox.txt, which does not tell it
    prompt: str = ""  # what the video shows
    negative_prompt: str | None = None  # what it does not show
    # what the trajectories move; base = no LoRA; default: as the preset or the tracks say, mixed where only some say
    # camera, else object
    control: Literal["camera", "object", "mixed", "base"] | None = None
    camera_free_scale: float | None = None  # lambda_trajs of Eq. 5, above 1 pins the camera; default: off
    guidance_scale: float | None = None  # lambda_cfg of classifier-free guidance, 1 = off
    trajectory_guidance_scale: float | None = None  # above 1 follows the tracks more closely, 1 = off
    # how strongly the camera LoRA, the object LoRA and both together follow the tracks, 0 = not at all; in place of
    # control, camera_free_scale and trajectory_guidance_scale
    mix: tuple[float, float, float] | None = field(default=None, metadata={"metavar": ("CAMERA", "OBJECT", "MIXED")})
    scene_guidance_scale: float = 1.0  # s_img, above 1 boxes and the gates' first frame are followed more closely
    # what carries the first frame; default: both where boxes are given and the model has scene gates, else controlnet
    first_frame_by: Literal["controlnet", "gates", "both"] | None = None
    gated_fraction: float = 1.0  # of the steps, in which boxes and the gates' first frame act
    # part of the steps in which guidance acts, 0 1 = all; quicker, and another video
    guidance_interval: tuple[float, float] = field(default=(0.0, 1.0), metadata={"metavar": ("START", "STOP")})
    controlnet_interval: int = 1  # steps that share an evaluation of the ControlNets; above 1 quicker, another video
    # model folder, or organisation/name on the hub
    model: str = field(default="models/sprites", metadata=_FOLDER)
    # DreamBooth model in Stable Diffusion's own layout, in place of spatial layers, VAE and text encoder
    base: str | None = field(default=None, metadata=_FILE)
    # style LoRA and its scale; may be repeated
    lora: list[str] = field(default_factory=list, metadata=_LORA)
    # LoRA of the motion modules, or a motion_director run, and its scale; may be repeated
    motion_lora: list[str] = field(default_factory=list, metadata=_LORA)
    # LoRA of a look: a motion_director run, one of its clips, or a file, and its scale; may be repeated
    appearance_lora: list[str] = field(default_factory=list, metadata=_LORA)
    # motion_director run whose clips' inverted noise is mixed into the video's, and its fraction; default: the run's
    noise_prior: str | None = field(default=None, metadata={"metavar": "RUN[:X]"})
    domain_adapter_scale: float | None = None  # of AnimateDiff's domain adapter; default: as assembled
    steps: int | None = None  # denoising steps
    # the model's LoRA for few steps, by default up to 4, unguided; default: where it has one, for at most 8 steps
    few_step: bool | None = None
    seed: list[int] = field(default_factory=lambda: [0])  # one video for each
    num_videos: int | None = None  # more videos, with seeds that count up from the last one
    repeat: int | None = None  # that many videos with fresh seeds instead, which run.yaml records
    width: int | None = None  # pixels
    height: int | None = None  # pixels
    num_frames: int | None = None  # frames of the video; more than those of a window are made window by window
    # Frames that are made at a time; default: as many as the model was trained on, or as a motion was learned from.
    window_frames: int | None = None
    window_overlap: int | None = None  # frames that two windows have in common, at least; default: a quarter
    fps: int | None = None  # frames a second of the files
    device: str | None = None  # cuda if there is one, else cpu
    dtype: Literal["float32", "float16", "bfloat16"] | None = None  # default: float16 on cuda, else float32
    offload: Literal["none", "model", "sequential"] = "none"  # networks that wait in main memory; slower, needs a GPU
    vae_tiling: bool = False  # decode tile by tile, for frames larger than memory allows
    decode_chunk_size: int = 16  # frames decoded at a time (16)
    compile: bool = False  # torch.compile, for GPUs: minutes at the start, then perhaps less time a step

    def __post_init__(self) -> None:
        config_file.check_finite(self)
        for name in ("steps", "num_videos", "repeat", "height", "width", "num_frames", "fps", "decode_chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.seed or min(self.seed) < 0 or max(self.seed) >= 2**63:
            raise ValueError(f"seed must be one or more numbers from 0 to 2^63 - 1, got {self.seed}")
        if len(set(self.seed)) < len(self.seed):
            raise ValueError(f"seed names a number twice: {self.seed}")
        if self.num_videos is not None and self.num_videos < len(self.seed):
            raise ValueError(f"num_videos is {self.num_videos}, but {len(self.seed)} seeds are given")
        if self.repeat is not None and (self.num_videos is not None or self.seed != [0]):
            raise ValueError(f"repeat {self.repeat} draws its own seeds; leave seed and num_videos out")
        stated = [f"{name} ({value})" for name in MOTIONS if (value := getattr(self, name)) is not None]
        if len(stated) > 1:
            raise ValueError(f"{' and '.join(stated)} exclude each other")
        if self.trajectories_size is not None:
            if self.trajectories is None:
                raise ValueError(f"trajectories_size {self.trajectories_size} goes with trajectories; leave it out")
            from imageconductor.conditioning.trajectory_json import parse_size

            parse_size(self.trajectories_size, "trajectories_size")
        if self.start is not None and self.preset not in OBJECT_PRESETS:
            raise ValueError(f"start {self.start} goes with an object preset; leave it out")
        if self.strength != 1 and self.preset is None:
            raise ValueError(f"strength {self.strength} goes with preset; leave it out")
        if self.boxes_name is not None and self.boxes is None:
            raise ValueError(f"boxes_name {self.boxes_name!r} goes with boxes; leave it out")
        has_scale = self.camera_free_scale is not None or self.trajectory_guidance_scale not in (None, 1)
        if self.mix is not None and has_scale:
            raise ValueError(f"mix {self.mix} excludes camera_free_scale and trajectory_guidance_scale; leave them out")
        Shortcuts(self.guidance_interval, self.controlnet_interval)
        if self.compile and self.offload != "none":
            raise ValueError(f"compile and offload {self.offload!r} exclude each other")
        for text in (*self.lora, *self.motion_lora, *self.appearance_lora):
            parse_lora(text)
        if self.noise_prior is not None:
            parse_noise_prior(self.noise_prior)
        known = (*CAMERA_PRESETS, *OBJECT_PRESETS)
        if self.preset is not None and self.preset not in known:
            raise ValueError(f"unknown preset {self.preset!r}; there are {', '.join(known)}")

    @property
    def seeds(self) -> list[int]:
        """One for each video."""
        if self.repeat is not None:
            return [secrets.randbelow(2**31) for _ in range(self.repeat)]
        more = (self.num_videos or len(self.seed)) - len(self.seed)
        fresh = (seed for seed in count(self.seed[-1] + 1) if seed not in self.seed)
        return [*self.seed, *islice(fresh, more)]


@dataclass(frozen=True)
class Inputs:
    """A job whose inputs have been read and checked, before any weight is loaded.

    Attributes:
        job: With the model's defaults in place of None, camera_free_scale and domain_adapter_scale apart, and
            trajectory_guidance_scale without tracks.
        image: The first frame, in the size of the video; None = the prompt alone.
        trajectories: In pixels of the video; without tracks, the motion ControlNet is left out.
        boxes: In pixels of the video; None = none, and the object gates are left out.
    """

    job: SampleJob
    image: Image.Image | None
    trajectories: Trajectories
    boxes: Boxes | None = None


def prepare(job: SampleJob) -> Inputs:
    """Reads and checks everything that can be known without the weights.

    Raises:
        ValueError, FileNotFoundError: In one line, what is wrong and where.
    """
    from imageconductor.checkpoints.domain_adapter import DomainAdapter
    from imageconductor.checkpoints.model_folder import (
        check_adapters,
        check_controlnets,
        check_shape,
        read_gate_config,
        read_latent_channels,
        read_max_frames,
        read_sampling_defaults,
    )
    from imageconductor.checkpoints.personalise import check_base, check_loras
    from imageconductor.checkpoints.reference_run import check_noise_prior, read_num_frames
    from imageconductor.conditioning import cover_crop
    from imageconductor.sampling import job_conditions as conditions
    from imageconductor.sampling.branches import ADAPTERS, Control
    from imageconductor.sampling.gate_inputs import check_gate_scales, choose_first_frame
    from imageconductor.sampling.windows import choose_window, split_frames

    if job.image is None and not job.prompt:
        raise ValueError("an image or a prompt is needed: --image FILE, --prompt TEXT")
    weights = {"mix": job.mix, "camera_free_scale": job.camera_free_scale}
    if job.trajectory_guidance_scale != 1:
        weights["trajectory_guidance_scale"] = job.trajectory_guidance_scale
    job = _with_defaults(job)
    size, num_frames = (cast(int, job.width), cast(int, job.height)), cast(int, job.num_frames)
    image = None if job.image is None else conditions.read_first_frame(job.image, size)
    trajectories = conditions.build_trajectories(job, size, num_frames, size if image is None else image.size)
    if job.control is None:
        usual = read_sampling_defaults(job.model)["control"]
        job = replace(job, control=cast(Any, conditions.suitable_control(trajectories, usual, job.preset)))
    if image is not None or trajectories.num_tracks:
        check_controlnets(job.model, "a video of an image or trajectories")
    if job.camera_free_scale is not None and job.control != "object":
        raise ValueError(f"camera_free_scale goes with control 'object', not {job.control!r}")
    if not trajectories.num_tracks:
        for name, value in weights.items():
            if value is not None:
                raise ValueError(f"{name} {value} weighs what trajectories do; draw a track, or leave {name} out")
        job = replace(job, trajectory_guidance_scale=None)
    if job.domain_adapter_scale is not None and not DomainAdapter.is_in(Path(job.model)):
        raise FileNotFoundError(f"{job.model} has no domain adapter; assemble it with domain_adapter=FILE")
    if trajectories.num_tracks:
        check_adapters(job.model, ADAPTERS[Control(job.control)], f"control {job.control!r}")
        if job.mix is not None:
            check_adapters(job.model, ADAPTERS[Control.MIXED], f"mix {job.mix}")
    check_shape(job.model, size)
    trained, most = read_sampling_defaults(job.model)["num_frames"], read_max_frames(job.model)
    learned = [read_num_frames(Path(parse_lora(text)[0])) or 0 for text in job.motion_lora]
    job = replace(job, window_frames=choose_window(job.window_frames, max([trained, *learned]), most))
    split_frames(num_frames, cast(int, job.window_frames), job.window_overlap)
    boxes = None if job.boxes is None else conditions.read_boxes(job, size, num_frames)
    has_scene = read_gate_config(job.model, "scene_gates") is not None
    carrier = choose_first_frame(job.first_frame_by, [] if image is None else [(0,)], boxes is not None, has_scene)
    check_gate_scales(job.scene_guidance_scale, job.gated_fraction, boxes is not None or carrier != "controlnet")
    job = replace(job, first_frame_by=carrier)
    styles, motions = find_job_loras(job)
    check_loras(Path(job.model), [path for path, _ in styles], [path for path, _ in motions])
    if job.base is not None:
        check_base(job.base)
    if job.noise_prior is not None:
        check_noise_prior(parse_noise_prior(job.noise_prior)[0], read_latent_channels(job.model), num_frames)
    job = replace(job, seed=job.seeds, num_videos=None, repeat=None)
    return Inputs(job, None if image is None else cover_crop(image, size), trajectories, boxes)


def load_pipeline(job: SampleJob) -> ImageConductorPipeline:
    """The pipeline of a job's model with its base, LoRAs, device, precision and memory settings, ready to be called.

    Args:
        job: From `prepare`, or with model, device and dtype given.

    Raises:
        ValueError, FileNotFoundError: A file of weights is missing or does not fit.
    """
    import torch

    from imageconductor.checkpoints.few_step import few_step_scheduler
    from imageconductor.checkpoints.personalise import fold_loras, personalise
    from imageconductor.devices import warn_of_imitation
    from imageconductor.sampling.pipeline import ImageConductorPipeline

    dtype, device = getattr(torch, cast(str, job.dtype)), cast(str, job.device)
    warn_of_imitation(dtype, torch.device(device), "dtype float32" if device == "cpu" else "dtype float16")
    pipe = ImageConductorPipeline.from_pretrained(job.model, dtype=dtype)
    if job.few_step:
        pipe.scheduler = few_step_scheduler(pipe.scheduler)
    personalise(pipe, job.base, *find_job_loras(job), job.domain_adapter_scale)
    if job.vae_tiling:
        pipe.vae.enable_tiling()
    if job.offload == "none":
        pipe.to(device)
    fold_loras(pipe)
    if job.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif job.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    if job.compile:
        pipe.compile()
    return pipe


def render(
    pipe: ImageConductorPipeline, inputs: Sequence[Inputs], on_step: Callable[..., Any] | None = None
) -> list[list[Frames]]:
    """Videos of several inputs in one call: for each of them one for each of its seeds, (T, H, W, 3) uint8.

    Args:
        pipe: From `load_pipeline`; the inputs' models, LoRAs and memory settings are not looked at again.
        inputs: As `call_arguments` takes them.
        on_step: The pipeline's `callback_on_step_end`, for progress.

    Raises:
        ValueError: They differ in what they must share.
    """
    from imageconductor.sampling.video import to_uint8

    result: Any = pipe(**call_arguments(inputs), output_type="np", callback_on_step_end=on_step)
    videos = [to_uint8(video) for video in result.frames]
    each = len(videos) // len(inputs)
    return [videos[start : start + each] for start in range(0, len(videos), each)]


def call_arguments(inputs: Sequence[Inputs]) -> dict[str, Any]:
    """Arguments of the pipeline's call for several inputs; generators are fresh.

    Args:
        inputs: Equal in all but image, trajectories, boxes, prompts and seeds, and in the number of seeds. Either all
            of them have trajectories or none, and so with images and boxes.

    Raises:
        ValueError: They differ in something else.
    """
    import torch

    from imageconductor.checkpoints.reference_run import load_noise_prior

    job = inputs[0].job
    own = {"image", *MOTIONS, "trajectories_size", "start", "strength", "boxes", "boxes_name"}
    own |= {"prompt", "negative_prompt", "seed"}
    for field_ in fields(SampleJob):
        values = [getattr(one.job, field_.name) for one in inputs]
        if field_.name not in own and any(value != values[0] for value in values):
            raise ValueError(f"videos that are made together must agree in {field_.name}, got {values}")
    seeds = [seed for one in inputs for seed in one.job.seeds]
    counts = {len(one.job.seeds) for one in inputs}
    drawn = [one.trajectories for one in inputs if one.trajectories.num_tracks]
    images = [one.image for one in inputs if one.image is not None]
    boxes = [one.boxes for one in inputs if one.boxes is not None]
    if len(counts) > 1 or not {len(drawn), len(images), len(boxes)} <= {0, len(inputs)}:
        raise ValueError(
            "videos that are made together must agree in the number of seeds, and in having images, trajectories and "
            "boxes"
        )
    prior = None
    if job.noise_prior is not None:
        run, fraction = parse_noise_prior(job.noise_prior)
        prior = list(load_noise_prior(run).values()), fraction
    return {
        "image": images or None,
        "trajectories": drawn or None,
        "prompt": [one.job.prompt for one in inputs],
        "negative_prompt": None if job.negative_prompt is None else [str(one.job.negative_prompt) for one in inputs],
        "control": job.control,
        "camera_free_scale": job.camera_free_scale,
        "guidance_scale": job.guidance_scale,
        "trajectory_guidance_scale": job.trajectory_guidance_scale if drawn else None,
        "mix": None if job.mix is None else dict(zip(MIX_CONTROLS, job.mix, strict=True)),
        "boxes": boxes or None,
        "scene_guidance_scale": job.scene_guidance_scale,
        "first_frame_by": job.first_frame_by,
        "gated_fraction": job.gated_fraction,
        "guidance_interval": job.guidance_interval,
        "controlnet_interval": job.controlnet_interval,
        "num_inference_steps": job.steps,
        "num_frames": job.num_frames,
        "window_frames": job.window_frames,
        "window_overlap": job.window_overlap,
        "height": job.height,
        "width": job.width,
        "num_videos_per_prompt": counts.pop(),
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "noise_prior": prior,
        "decode_chunk_size": job.decode_chunk_size,
    }


def _with_defaults(job: SampleJob) -> SampleJob:
    """The job with its model as a local folder, and with the model's defaults and this machine's device."""
    from imageconductor.checkpoints.few_step import few_step_defaults
    from imageconductor.checkpoints.model_folder import locate_model, read_sampling_defaults
    from imageconductor.devices import choose_device

    device = choose_device(job.device)
    if job.base is not None and not Path(job.base).is_file():
        raise FileNotFoundError(f"no file at {job.base}")
    find_job_loras(job)
    if job.offload != "none" and device == "cpu":
        raise ValueError(f"offload {job.offload!r} keeps networks off the GPU, and the device is cpu; leave it out")
    dtype = job.dtype or ("float16" if device.startswith("cuda") else "float32")
    job = replace(job, model=str(locate_model(job.model)), device=device, dtype=dtype)
    defaults = read_sampling_defaults(job.model)
    defaults["steps"] = defaults.pop("num_inference_steps")
    job = replace(job, few_step=takes_few_steps(job.model, job.few_step, job.steps or defaults["steps"]))
    if job.few_step:
        defaults |= few_step_defaults(defaults["steps"])
    if job.mix is not None:
        defaults["trajectory_guidance_scale"] = 1.0  # The mix's weights take its place.
    del defaults["control"]  # depends on the trajectories
    unset = {f.name: defaults[f.name] for f in fields(job) if getattr(job, f.name) is None and f.name in defaults}
    return replace(job, **unset)
