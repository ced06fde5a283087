"""The denoising loop: the scheduler's steps, the noise that they draw, and the callbacks between them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from imageconductor.diffusion.inversion import mix_noise_prior
from imageconductor.models.denoiser import Condition, Denoiser
from imageconductor.models.weights import refuse_non_finite
from imageconductor.sampling.branches import GuidedDenoiser, Text
from imageconductor.sampling.inputs import CallInputs

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
"""What a callback may ask for, under diffusers' names."""


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
        self, pipe: Any, step: int, t: Tensor, latents: Tensor, conditions: Mapping[Text, Condition], is_guided: bool
    ) -> tuple[Tensor, dict[Text, Condition] | None]:
        """The latents after the callback, and the conditions if it changed a text.

        `prompt_embeds` are (P, L, D), or (2P, L, D) with the negative ones first while guidance evaluates both, as in
        diffusers' pipelines.

        Raises:
            ValueError: What comes back has another shape.
        """
        uncond, prompt = conditions["uncond"].text, conditions["prompt"].text
        embeds = torch.cat([uncond, prompt]) if is_guided else prompt
        tensors = {"latents": latents, "prompt_embeds": embeds, "negative_prompt_embeds": uncond.clone()}
        returned = self.function(pipe, step, t, {name: tensors[name] for name in self.names}) or {}
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


def denoise(
    pipe: Any,
    sample: Tensor,
    inputs: CallInputs,
    conditions: Mapping[Text, Condition],
    generators: Sequence[torch.Generator] | None,
    eta: float,
    callback: StepCallback | None,
) -> Tensor:
    """Latents (B, C, T, h, w) from noise, by the steps of the pipeline's scheduler, whose timesteps are set.

    Args:
        pipe: The pipeline. A callback may set its `_interrupt`, which ends the loop, and its `_guidance_scale`.
        sample: (B, C, T, h, w) float32, scaled noise.
        inputs: Of the call.
        conditions: Of P videos, for each text.
        generators: One for each of the B videos, for the noise within steps; None = torch's global one.
        eta: DDIM's stochasticity.
        callback: Called after each step.

    Raises:
        ValueError: A callback returns tensors that do not fit, or a step gives values that are not finite.
    """
    networks = Denoiser(pipe.unet, pipe.image_controlnet, pipe.motion_controlnet)
    scale = pipe.guidance_scale
    predict = GuidedDenoiser(networks, inputs.plan(scale), conditions)
    arguments = _step_arguments(pipe.scheduler, generators, eta)
    with pipe.progress_bar(total=pipe.num_timesteps) as bar:
        for index, t in enumerate(pipe.scheduler.timesteps):
            if pipe.interrupt:
                break
            x_t = pipe.scheduler.scale_model_input(sample, t).to(pipe.unet.dtype)
            prediction = predict(x_t, t)  # Eq. 5, or classifier-free guidance
            sample = pipe.scheduler.step(prediction.float(), t, sample, **arguments)[0]
            refuse_non_finite(pipe, sample, f"denoising step {index + 1} of {pipe.num_timesteps}")
            if callback is not None:
                sample, texts = callback(pipe, index, t, sample, conditions, is_guided="uncond" in predict.texts)
                if texts is not None or pipe.guidance_scale != scale:
                    conditions, scale = texts or conditions, pipe.guidance_scale
                    del predict  # It may hold a copy of a network.
                    predict = GuidedDenoiser(networks, inputs.plan(scale), conditions)
            bar.update()
    return sample


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
        arguments["eta"] = eta
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
