"""The denoising loop: the scheduler's steps, the noise that they draw, and the callbacks between them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDIMParallelScheduler, DDIMScheduler, EulerDiscreteScheduler, TCDScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from imageconductor.diffusion.clean_estimate import estimate_x_0
from imageconductor.diffusion.inversion import mix_noise_prior
from imageconductor.models.denoiser import Condition
from imageconductor.models.weights import refuse_non_finite
from imageconductor.sampling.branches import ADAPTERS, Adapters, Control, GuidedDenoiser, MergedCopy, Text
from imageconductor.sampling.inputs import CallInputs, draw_flow
from imageconductor.sampling.residual_cache import CallCache
from imageconductor.sampling.windows import Anchor, condition_window

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds", "x_0", "branch_x_0")
"""What a callback may ask for: diffusers' names, and estimates of the clean latents (`_Estimates`)."""

_RESUMABLE = (DDIMScheduler, DDIMParallelScheduler, EulerDiscreteScheduler, TCDScheduler)
"""Schedulers whose step follows from prediction, t and sample alone, while `eta` is 0."""


@dataclass(frozen=True)
class StepCallback:
    """A `callback_on_step_end` and the tensors that it is given."""

    function: Callable[..., Any]
    names: tuple[str, ...]

    @classmethod
    def parse(cls, function: Callable[..., Any] | None, names: Sequence[str] | None) -> StepCallback | None:
        """The callback of a call; one of diffusers' own says itself what it needs.

        Raises:
            ValueError: It asks for a tensor that this pipeline does not have.
        """
        if function is None:
            return None
        if isinstance(function, (PipelineCallback, MultiPipelineCallbacks)):
            names = function.tensor_inputs
        if unknown := [name for name in names or () if name not in CALLBACK_TENSORS]:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {', '.join(CALLBACK_TENSORS)}, "
                f"got {', '.join(map(str, unknown))}"
            )
        return cls(function, tuple(names or ()))

    def __call__(
        self,
        pipe: Any,
        step: int,
        t: Tensor,
        latents: Tensor,
        conditions: Mapping[Text, Condition],
        is_guided: bool,
        estimates: Mapping[str, Any],
    ) -> tuple[Tensor, dict[Text, Condition] | None]:
        """The latents after the callback, and the conditions if it changed a text.

        `prompt_embeds` are (P, L, D), or (2P, L, D) with the negative ones first while guidance evaluates both, as in
        diffusers' pipelines. Texts are copies, and may be changed in place or returned. `estimates` are those of x_0
        that it asks for.

        Raises:
            ValueError: What comes back has another shape.
        """
        uncond, prompt = conditions["uncond"].text, conditions["prompt"].text
        embeds = torch.cat([uncond, prompt]) if is_guided else prompt.clone()
        tensors = {"latents": latents, "prompt_embeds": embeds, "negative_prompt_embeds": uncond.clone(), **estimates}
        given = {name: tensors[name] for name in self.names}
        returned = given | (self.function(pipe, step, t, dict(given)) or {})
        new = returned.get("latents", latents)
        if new.shape != latents.shape:
            raise ValueError(f"callback_on_step_end: latents must be {tuple(latents.shape)}, got {tuple(new.shape)}")
        texts: dict[Text, Tensor] = {"uncond": uncond, "prompt": prompt}
        if (embeds := returned.get("prompt_embeds")) is not None:
            if is_guided and len(embeds) == 2 * len(prompt):
                texts["uncond"], embeds = embeds.chunk(2)
            texts["prompt"] = _fit_rows("prompt_embeds", embeds, prompt)
        negative = returned.get("negative_prompt_embeds")
        if negative is not None and not torch.equal(negative, uncond):
            texts["uncond"] = _fit_rows("negative_prompt_embeds", negative, uncond)
        if all(torch.equal(text, conditions[name].text) for name, text in texts.items()):
            return new.to(latents), None
        return new.to(latents), {name: replace(conditions[name], text=text) for name, text in texts.items()}


def _fit_rows(name: str, given: Tensor, before: Tensor) -> Tensor:
    """A callback's embeddings; one row may stand for several that were equal (diffusers' cutoffs return the last)."""
    if given.shape[1:] == before.shape[1:] and (
        len(given) == len(before) or (len(given) == 1 and torch.equal(before, before[-1:].expand_as(before)))
    ):
        return given.to(before).expand_as(before)
    raise ValueError(f"callback_on_step_end: {name} must be {tuple(before.shape)}, got {tuple(given.shape)}")


@dataclass(frozen=True)
class _Estimates:
    """Estimates of the clean latents for a callback.

    "x_0" is that of the guided prediction, (B, C, T, h, w) float32. "branch_x_0" has one for each motion control alone,
    at the same x_t, with the prompt and without guidance: "undrawn", without trajectories, and "camera", "object" and
    "mixed" where the model has their LoRAs. It costs a pass of the decoder for each that the step does not evaluate
    anyway, and one of the motion ControlNet for each set of LoRAs.

    Attributes:
        scheduler: With the noise levels of the training.
        branches: Adapters by the names in "branch_x_0"; empty where that is not asked for.
        names: What the callback asks for.
    """

    scheduler: Any
    branches: dict[str, Adapters]
    names: tuple[str, ...]

    @classmethod
    def asked_for(cls, callback: StepCallback | None, scheduler: Any, inputs: CallInputs) -> _Estimates:
        """What a callback's names ask for.

        Raises:
            ValueError: The scheduler does not say how noisy a timestep is.
        """
        names = tuple(name for name in callback.names if name.endswith("x_0")) if callback else ()
        if names and not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{' and '.join(names)}: {type(scheduler).__name__} has no alphas_cumprod; ask for latents"
            )
        branches: dict[str, Adapters] = {}
        if "branch_x_0" in names:
            branches["undrawn"] = None
            controls = (Control.CAMERA, Control.OBJECT, Control.MIXED) if inputs.trajectories else ()
            branches |= {one.value: ADAPTERS[one] for one in controls if set(ADAPTERS[one]) <= set(inputs.adapters)}
        return cls(scheduler, branches, names)

    def tensors(
        self,
        predictions: Mapping[tuple[Text, Adapters], Tensor],
        guided: Tensor,
        x_t: Tensor,
        time: float,
        shows_branches: bool,
    ) -> dict[str, Any]:
        """The estimates by name."""
        if not self.names:
            return {}
        kind, alpha = self.scheduler.config["prediction_type"], _alpha_cumprod(self.scheduler, time)

        def estimate(prediction: Tensor) -> Tensor:
            return estimate_x_0(prediction.float(), x_t.float(), alpha, kind)

        found: dict[str, Any] = {"x_0": estimate(guided)} if "x_0" in self.names else {}
        if "branch_x_0" in self.names:
            shown = self.branches if shows_branches else {}
            found["branch_x_0"] = {name: estimate(predictions["prompt", one]) for name, one in shown.items()}
        return found


def _alpha_cumprod(scheduler: Any, time: float) -> float:
    """Cumulative alpha at a timestep; between two of the training's, sigma is interpolated, as Euler's method does."""
    before = int(time)
    levels = scheduler.alphas_cumprod[before : before + 2].cpu().double()
    if time == before or len(levels) < 2:
        return float(levels[0])
    sigmas = ((1 - levels) / levels).sqrt()
    return 1 / (1 + float(torch.lerp(sigmas[0], sigmas[1], time - before)) ** 2)


def denoise(
    pipe: Any,
    sample: Tensor,
    inputs: CallInputs,
    conditions: Mapping[Text, Condition],
    generators: Sequence[torch.Generator] | None,
    eta: float,
    callback: StepCallback | None,
    cache: CallCache | None = None,
    merged: MergedCopy | None = None,
    start: int = 0,
    kept: list[Tensor] | None = None,
    anchor: Anchor | None = None,
    bar: Any = None,
) -> Tensor:
    """Latents (B, C, T, h, w) from noise, by the steps of the pipeline's scheduler, whose timesteps are set.

    Args:
        pipe: The pipeline. A callback may set its `_interrupt`, which ends the loop, its `_guidance_scale` and `_mix`,
            and `_shows_branches`, which says whether "branch_x_0" is evaluated.
        sample: (B, C, T, h, w) float32, scaled noise, or the sample before step `start`.
        inputs: Of the call.
        conditions: Of P videos, for each text.
        generators: One for each of the B videos, for the noise within steps; None = torch's global one.
        eta: DDIM's stochasticity.
        callback: Called after each step.
        cache: ControlNet outputs of earlier calls.
        merged: The motion ControlNet with merged LoRAs, kept for all windows; None = one of its own.
        start: Steps that are left out.
        kept: Takes the sample before each step, and the last one, on the CPU.
        anchor: Frames that are there already, in a window that goes on from another.
        bar: Shows progress beyond this run; None = one of its own.

    Raises:
        ValueError: A callback returns tensors that do not fit, or a step gives values that are not finite.
    """
    networks, timesteps = pipe.denoiser, pipe.scheduler.timesteps
    times: list[float] = timesteps.tolist()
    predict, planned, merged = None, None, merged or MergedCopy()
    estimates = _Estimates.asked_for(callback, pipe.scheduler, inputs)
    arguments = _step_arguments(pipe.scheduler, generators, eta)
    if start and hasattr(pipe.scheduler, "set_begin_index"):
        pipe.scheduler.set_begin_index(start)
    _keep(sample, kept)
    with pipe.progress_bar(total=len(times) - start) if bar is None else nullcontext(bar) as shown:
        for index, t in enumerate(timesteps[start:], start):
            if pipe.interrupt:
                break
            guides = inputs.shortcuts.guides(index, len(times))
            asked = pipe.guidance_scale, pipe.mix, index < inputs.gated_fraction * len(times), guides
            if predict is None or asked != planned:
                planned, holds = asked, inputs.shortcuts.controlnet_interval > 1
                acting = _acting(conditions, asked[2])
                predict = GuidedDenoiser(networks, inputs.plan(*asked), acting, cache, holds, merged)
            x_t = pipe.scheduler.scale_model_input(sample, t)
            shows_branches = pipe._shows_branches
            also = list(estimates.branches.values()) if shows_branches else []
            reuses = inputs.shortcuts.reuses(index)
            predictions = predict.predict(x_t.to(pipe.unet.dtype), t, times[index], also, reuses)
            prediction = predict.guide(predictions)  # Eq. 5, or classifier-free guidance
            if anchor is not None:
                kind, alpha = pipe.scheduler.config["prediction_type"], _alpha_cumprod(pipe.scheduler, times[index])
                prediction = anchor.hold(prediction, x_t, alpha, kind)
            sample = pipe.scheduler.step(prediction.float(), t, sample, **arguments)[0]
            refuse_non_finite(pipe, sample, f"denoising step {index + 1} of {pipe.num_timesteps}")
            if callback is not None:
                tensors = estimates.tensors(predictions, prediction, x_t, times[index], shows_branches)
                is_guided = predict.texts != ["prompt"]
                sample, texts = callback(pipe, index, t, sample, conditions, is_guided, tensors)
                if texts is not None:
                    conditions, predict = texts, None
            _keep(sample, kept)
            shown.update()
    return sample


def denoise_windows(
    pipe: Any, noise: Tensor, inputs: CallInputs, conditions: Mapping[Text, Condition], *given: Any
) -> Tensor:
    """Latents (B, C, T, h, w) of a video of several windows, each of which goes on from the one before.

    Every window is a run of all steps, in which a callback counts from 0; `pipe._window` is its number. Guidance that a
    callback has switched off is on again, and the mix stays as it has set it. An interrupted run leaves the window as
    it is, and noise in those that it does not reach.

    Args:
        pipe: As in `denoise`.
        noise: (B, C, T, h, w) float32, scaled.
        inputs: Of the call.
        conditions: Of the whole video, from `build_conditions`.
        given: Generators, eta, callback, cache and merged, as in `denoise`.

    Raises:
        ValueError: As `denoise`, or the scheduler does not say how noisy a timestep is.
    """
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise ValueError(
            f"a video of {inputs.num_frames} frames is made in windows, which {type(pipe.scheduler).__name__} cannot "
            "join: it has no alphas_cumprod; take another scheduler, or fewer frames"
        )
    sample, end = noise.clone(), 0
    flow = next(iter(conditions.values())).flow
    with pipe.progress_bar(total=pipe.num_timesteps * len(inputs.windows)) as bar:
        for pipe._window, frames in enumerate(inputs.windows):
            window = slice(frames.start, frames.stop)
            anchor = Anchor(sample[:, :, frames.start : end].clone()) if end else None
            if anchor is not None:
                pipe.scheduler.set_timesteps(inputs.num_inference_steps, device=inputs.device)
                pipe._guidance_scale, flow = inputs.guidance_scale, draw_flow(pipe, inputs, frames)
            read = condition_window(conditions, frames, flow, anchor)
            made = denoise(pipe, noise[:, :, window], inputs, read, *given, anchor=anchor, bar=bar)
            if anchor is not None:
                made[:, :, 0] = anchor.latents[:, :, 0]  # of which the last step leaves a trace of noise
            sample[:, :, window], end = made, frames.stop
            if pipe.interrupt:
                break
    return sample


def _acting(conditions: Mapping[Text, Condition], is_gated: bool) -> Mapping[Text, Condition]:
    """The conditions of a step, in which the gates act or are left out."""
    return conditions if is_gated else {name: one.without_gates() for name, one in conditions.items()}


def _keep(sample: Tensor, kept: list[Tensor] | None) -> None:
    """Appends a copy of the sample on the CPU."""
    if kept is not None:
        kept.append(sample.detach().to("cpu", torch.float32, copy=True))


def check_resume(
    scheduler: Any, inputs: CallInputs, step: int | None, eta: float, latents: Tensor | None, noise_prior: Any
) -> None:
    """Makes sure that a run can go on from the sample before a step, once the scheduler's timesteps are set.

    Raises:
        ValueError: There is no such step or no sample, a step depends on more than its sample, or the video has several
            windows.
    """
    if len(inputs.windows) > 1:
        raise ValueError(
            f"keep_latents and resume_from need a video of one window, and {inputs.num_frames} frames have "
            f"{len(inputs.windows)}; take at most {len(inputs.windows[0])} frames"
        )
    if step is None:
        return
    if latents is None or noise_prior is not None:
        raise ValueError(f"resume_from={step} goes with latents, the sample before that step, and without noise_prior")
    if not 0 <= step <= len(scheduler.timesteps):
        raise ValueError(f"resume_from must be a step from 0 to {len(scheduler.timesteps)}, got {step}")
    remainder = step % inputs.shortcuts.controlnet_interval
    if remainder and step < len(scheduler.timesteps):
        raise ValueError(
            f"resume_from={step} lies within a controlnet_interval of {inputs.shortcuts.controlnet_interval}, whose "
            f"ControlNet outputs latents do not hold; resume at step {step - remainder}"
        )
    if eta:
        raise ValueError(f"resume_from needs steps that draw no noise, so eta must be 0, got {eta}")
    if not isinstance(scheduler, _RESUMABLE):
        raise ValueError(
            f"resume_from: a step of {type(scheduler).__name__} may draw noise or use earlier predictions, which "
            f"latents do not hold; take {', '.join(one.__name__ for one in _RESUMABLE)}"
        )


def as_generators(
    given: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[torch.Generator] | None:
    """A generator for each of `count` videos; one that serves all stands there as often.

    Raises:
        ValueError: Their number is another.
    """
    if given is None or isinstance(given, torch.Generator):
        return None if given is None else [given] * count
    if len(given) != count:
        raise ValueError(f"{count} videos need as many generators, got {len(given)}")
    return list(given)


def _step_arguments(scheduler: Any, generators: Sequence[torch.Generator] | None, eta: float) -> dict[str, Any]:
    """What a scheduler's `step` takes beside prediction, t and sample; its noise is drawn video by video."""
    accepted = inspect.signature(scheduler.step).parameters
    arguments: dict[str, Any] = {"return_dict": False}
    if "eta" in accepted:
        # With 1, DDIM takes the root of a number that is 0 where training ends in pure noise, and by rounding below it.
        arguments["eta"] = min(eta, 1 - 1e-6)
    if "generator" in accepted:
        arguments["generator"] = None if generators is None else list(generators)
    elif hasattr(scheduler, "noise_sampler_seed"):  # DPMSolverSDEScheduler: Brownian paths, one seed for each video
        seeds = [int(torch.randint(2**63 - 1, (), generator=g, device=g.device)) for g in generators or ()]
        scheduler.noise_sampler_seed = seeds or scheduler.config["noise_sampler_seed"]
    return arguments


def mix_noise_priors(
    noise: Tensor, inverted: Sequence[Tensor], fraction: float, generators: Sequence[torch.Generator] | None
) -> Tensor:
    """Initial noise (B, C, T, h, w) of `mix_noise_prior`, each video with one of the clips, by its generator.

    Args:
        noise: (B, C, T, h, w).
        inverted: (C, T, h', w') of each clip; sizes may differ.
        fraction: p.
        generators: One for each video; None = torch's global one.
    """
    mixed = []
    for own, generator in zip(noise.split(1), generators or [None] * len(noise), strict=True):
        device = None if generator is None else generator.device
        chosen = inverted[int(torch.randint(len(inverted), (), generator=generator, device=device))]
        mixed.append(mix_noise_prior(own, chosen[None].to(own.device), fraction))
    return torch.cat(mixed)
