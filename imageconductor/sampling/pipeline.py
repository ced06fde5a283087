"""The pipeline: one image, a prompt and drawn trajectories -> a video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from imageconductor.conditioning import Boxes, Trajectories
from imageconductor.sampling.branches import Control, MergedCopy
from imageconductor.sampling.denoising import (
    CALLBACK_TENSORS,
    StepCallback,
    as_generators,
    check_resume,
    denoise,
    denoise_windows,
    mix_noise_priors,
)
from imageconductor.sampling.inputs import (
    CallInputs,
    Mix,
    Picture,
    build_conditions,
    check_inputs,
    check_whole,
    choose_texts,
    parse_mix,
    parse_seeds,
)
from imageconductor.sampling.model_pipeline import ModelPipeline
from imageconductor.sampling.output import OUTPUT_TYPES, ImageConductorOutput, convert_frames
from imageconductor.sampling.residual_cache import CallCache, ResidualCache
from imageconductor.sampling.shortcuts import Shortcuts


class ImageConductorPipeline(ModelPipeline):
    """Image-to-video generation whose camera or objects follow drawn trajectories, and whose objects follow boxes."""

    _callback_tensor_inputs = list(CALLBACK_TENSORS)  # noqa: RUF012

    def prepare_latents(
        self,
        inputs: CallInputs,
        num_videos_per_prompt: int,
        generators: Sequence[torch.Generator] | None,
        latents: Tensor | None = None,
        noise_prior: tuple[Sequence[Tensor], float] | None = None,
        is_scaled: bool = False,
    ) -> Tensor:
        """Initial noise (B, C, T, h, w) float32 as the scheduler scales it, once its timesteps are set.

        Args:
            inputs: Of the call.
            num_videos_per_prompt: Videos of each condition.
            generators: One for each video, so that a video does not depend on its batch; None = torch's global one.
            latents: Noise of unit variance that is taken instead, once its shape is checked.
            noise_prior: As in the call, mixed in.
            is_scaled: The given latents are a sample of the scheduler's, which is returned as it is.

        Raises:
            ValueError: The shape of the latents is another.
        """
        count, device = inputs.count * num_videos_per_prompt, inputs.device
        height, width = (side // self.vae_scale_factor for side in reversed(inputs.size))
        shape = (count, self.unet.config["in_channels"], inputs.num_frames, height, width)
        if latents is None:
            drawn = randn_tensor(shape, None if generators is None else list(generators), device, torch.float32)
        elif latents.shape == shape:
            drawn = latents.to(device, torch.float32)
        else:
            raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
        if not drawn.isfinite().all():
            raise ValueError("the given latents hold nan or infinite values")
        if noise_prior is not None:
            drawn = mix_noise_priors(drawn, *noise_prior, generators)
        return drawn if is_scaled else drawn * self.scheduler.init_noise_sigma

    @property
    def guidance_scale(self) -> float:
        """lambda_cfg of the call that runs; a callback may set `_guidance_scale`, and at most 1 turns guidance off."""
        return max(1.0, self._guidance_scale)

    @property
    def mix(self) -> Mix | None:
        """Weights of the motion controls in the call that runs, or None; a callback may set `_mix`, to None too."""
        return parse_mix(self._mix)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call that runs evaluates the negative prompt too."""
        return self.guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the call that runs, each of which ends with the callback."""
        return self._num_timesteps

    @property
    def window(self) -> int:
        """Number of the window of frames that the call denoises at present, from 0."""
        return self._window

    @property
    def num_windows(self) -> int:
        """Windows of frames of the call that runs, each with `num_timesteps` steps."""
        return self._num_windows

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`, which leaves out the remaining steps."""
        return self._interrupt

    # -- the call

    @torch.no_grad()
    def __call__(
        self,
        image: Picture | Sequence[Picture] | None = None,
        trajectories: Trajectories | Sequence[Trajectories] | None = None,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] | None = None,
        control: Control | str | None = None,
        camera_free_scale: float | None = None,
        guidance_scale: float | None = None,
        trajectory_guidance_scale: float | None = None,
        mix: Mapping[Control, float] | Mapping[str, float] | None = None,
        boxes: Boxes | Sequence[Boxes] | None = None,
        scene_guidance_scale: float = 1.0,
        first_frame_by: str | None = None,
        gated_fraction: float = 1.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        controlnet_interval: int = 1,
        num_inference_steps: int | None = None,
        num_frames: int | None = None,
        window_frames: int | None = None,
        window_overlap: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        noise_prior: tuple[Sequence[Tensor], float] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        eta: float = 0.0,
        decode_chunk_size: int = 16,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        residual_cache: ResidualCache | None = None,
        keep_latents: bool = False,
        resume_from: int | None = None,
    ) -> ImageConductorOutput | tuple[Any, ...]:
        """Videos that begin with the image and move along the trajectories, and whose objects fill the boxes.

        Several images, trajectories, boxes or prompts make several videos; one of a kind serves all.

        Args:
            image: First frame, cover-cropped to the size, or pictures by the number of their frame, {0: first,
                -1: last}. None leaves the image ControlNet out: text-to-video.
            trajectories: With as many frames as the video, drawn on a frame of any size, which is cropped as the image
                is. None leaves the motion ControlNet out.
            prompt: What the video shows.
            negative_prompt: What it does not show; None = the model's default, as below.
            control: "camera", "object", "mixed" (both LoRAs) or "base" (none); None = what the trajectories say that
                they move, else the model's default.
            camera_free_scale: lambda_trajs of Eq. 5, with control "object"; None = plain classifier-free guidance.
            guidance_scale: lambda_cfg; at most 1 = off, as in diffusers' pipelines.
            trajectory_guidance_scale: Above 1 it extrapolates away from the video without the trajectories.
            mix: Weights of several motion controls at once, {"camera": 1.0, "object": 0.5}, in place of `control` and
                the two scales of the trajectories.
            boxes: With as many frames as the video, of a frame of any size, which is cropped as the image is. None
                leaves the object gates out.
            scene_guidance_scale: s_img of SMCD: above 1 boxes and the gates' first frame are followed more closely.
            first_frame_by: "controlnet", "gates" or "both" carry the picture of frame 0; None = both where boxes are
                given and the model has scene gates, else the ControlNet.
            gated_fraction: Of the steps, in which gates act; the last ones are then the model's without them.
            guidance_interval: Part of the steps in which guidance acts; the others evaluate the prompt alone, and
                the video is another one.
            controlnet_interval: Steps that share an evaluation of the ControlNets; above 1, another video too.
            num_inference_steps: Denoising steps.
            num_frames: T, any number: more than `window_frames` are made in windows of so many, each of which goes on
                from the one before.
            window_frames: None = the model's default number of frames.
            window_overlap: Frames that two windows have in common, at least; None = a quarter of a window.
            height: Pixels, a multiple of the VAE scale factor.
            width: Pixels, a multiple of the VAE scale factor.
            num_videos_per_prompt: Videos of each condition; they share the ControlNets' work.
            generator: One for all videos, drawn from in turn, or one for each; also of the noise within steps.
            seed: In its place: one video of each condition for each of the numbers.
            latents: (B, C, T, h, w), initial noise of unit variance; the sample before the step with `resume_from`.
            noise_prior: Inverted noise (C, T, h, w) of clips, of which each video takes one, and its fraction p of the
                initial noise (MotionDirector).
            prompt_embeds: (P, L, D), text embeddings in place of the prompts.
            negative_prompt_embeds: (P, L, D), in place of the negative prompts.
            eta: DDIM's stochasticity.
            decode_chunk_size: Frames decoded at a time.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: Called as `f(pipe, step, timestep, tensors)`, diffusers' own too; what it returns
                replaces latents and embeddings. It may set `_interrupt = True`, `_guidance_scale` and `_mix` of `pipe`.
            callback_on_step_end_tensor_inputs: Names among `_callback_tensor_inputs` of the tensors passed to it. "x_0"
                is the estimate of the clean latents, "branch_x_0" a dict of those of each motion control alone, which
                costs evaluations; while `pipe._shows_branches` is False, which a callback may set, it is empty.
            residual_cache: Keeps ControlNet outputs for calls with other seeds, images or trajectories.
            keep_latents: Returns the sample before each step too, as `latents`; for a video of one window.
            resume_from: Leaves out that many steps, with DDIM at eta 0 and others whose steps depend on the sample
                alone; `latents` are then an entry of those that `keep_latents` returned.

        Raises:
            ValueError: Arguments that do not fit the model or each other.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        check_whole(
            num_inference_steps=num_inference_steps,
            num_frames=num_frames,
            window_frames=window_frames,
            window_overlap=window_overlap,
            height=height,
            width=width,
            num_videos_per_prompt=num_videos_per_prompt,
            decode_chunk_size=decode_chunk_size,
            resume_from=resume_from,
        )
        seeds = parse_seeds(seed, generator, num_videos_per_prompt)
        num_videos_per_prompt = max(num_videos_per_prompt, len(seeds))
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {eta}")
        if decode_chunk_size < 1:
            raise ValueError(f"decode_chunk_size must be at least 1, got {decode_chunk_size}")
        texts = choose_texts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        inputs = check_inputs(
            self,
            image,
            trajectories,
            *texts,
            boxes=boxes,
            control=control,
            mix=mix,
            camera_free_scale=camera_free_scale,
            guidance_scale=guidance_scale,
            trajectory_guidance_scale=trajectory_guidance_scale,
            scene_guidance_scale=scene_guidance_scale,
            first_frame_by=first_frame_by,
            gated_fraction=gated_fraction,
            num_inference_steps=num_inference_steps,
            num_frames=num_frames,
            window_frames=window_frames,
            window_overlap=window_overlap,
            shortcuts=Shortcuts(guidance_interval, controlnet_interval),
            size=(width, height),
        )
        if seeds:
            generator = [torch.Generator().manual_seed(seed) for _ in range(inputs.count) for seed in seeds]
        callback = StepCallback.parse(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.scheduler.set_timesteps(inputs.num_inference_steps, device=inputs.device)
        if resume_from is not None or keep_latents:
            check_resume(self.scheduler, inputs, resume_from, eta, latents, noise_prior)
        generators = as_generators(generator, inputs.count * num_videos_per_prompt)
        is_resumed = resume_from is not None
        noise = self.prepare_latents(inputs, num_videos_per_prompt, generators, latents, noise_prior, is_resumed)
        self._guidance_scale, self._mix = inputs.guidance_scale, inputs.mix
        self._num_timesteps = len(self.scheduler.timesteps)
        self._interrupt, self._shows_branches, self._window, self._num_windows = False, True, 0, len(inputs.windows)
        conditions, kept = build_conditions(self, inputs), [] if keep_latents else None
        times = self.scheduler.timesteps.tolist()
        cache = None if residual_cache is None else CallCache(residual_cache, self.denoiser, times)
        given = inputs, conditions, generators, eta, callback, cache, MergedCopy()
        if len(inputs.windows) > 1:
            sample = denoise_windows(self, noise, *given)
        else:
            sample = denoise(self, noise, *given, resume_from or 0, kept)
        del given, conditions, cache  # The motion ControlNet's merged copy would stay beside the autoencoder,
        self.maybe_free_model_hooks()  # and so would the UNet.
        place = "cpu" if output_type in ("pil", "np") else None
        frames = sample if output_type == "latent" else self.decode_latents(sample, decode_chunk_size, place)
        self.maybe_free_model_hooks()
        output = ImageConductorOutput(frames=convert_frames(frames, output_type), latents=kept)
        return output if return_dict else output.to_tuple()
