"""MotionDirector: a motion, learned from one clip or a few apart from their appearance, by two LoRA paths of the UNet.

| path | layers | learns from |
|---|---|---|
| appearance (spatial) | self-attention, feed-forward of spatial transformers | L_sp: one frame, no motion modules |
| motion (temporal) | attention, feed-forward of motion modules | L_org + L_ad: all frames, the other path frozen |

Source: arXiv 2310.08465.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from imageconductor.checkpoints.model_folder import check_controlnets, check_shape
from imageconductor.checkpoints.reference_run import has_noise_prior, save_noise_prior
from imageconductor.conditioning.first_frame import keyframe_condition
from imageconductor.data.batches import Samples
from imageconductor.data.clips import names_a_colour
from imageconductor.data.reference_clips import ReferenceClips, read_frames
from imageconductor.data.reference_files import ReferenceClip, find_reference_clips
from imageconductor.devices import HALF
from imageconductor.diffusion.inversion import ddim_inversion
from imageconductor.diffusion.latents import scale_latents
from imageconductor.diffusion.losses import debiased_loss, denoising_loss
from imageconductor.models.adapters import (
    activate,
    active,
    adapter_parameters,
    add_adapter,
    freeze_all_but_adapter,
    frozen,
    lora_dropout,
    lora_targets,
    save_for_diffusers,
)
from imageconductor.models.denoiser import Condition
from imageconductor.models.motion_module import motion_modules_bypassed
from imageconductor.models.networks import Networks, cast_frozen
from imageconductor.processes import own_part
from imageconductor.training.stage_configs import MotionDirectorConfig
from imageconductor.training.stages.base import ParameterGroup, Stage

logger = logging.getLogger(__name__)

MOTION, APPEARANCE = "motion", "appearance"


@dataclass(frozen=True)
class ReferenceCondition(Condition):
    """The condition of one clip, and what was drawn for its step.

    Attributes:
        appearance: Name of the clip's appearance LoRA.
        frame: Of L_sp.
        anchor: (1,) int64, frame of L_ad.
        drops_appearance: Whether the step leaves the appearance LoRA out.
        dropout_seed: Of the dropout within LoRAs.
    """

    appearance: str = APPEARANCE
    frame: int = 0
    anchor: Tensor | None = None
    drops_appearance: bool = False
    dropout_seed: int = 0


class MotionDirectorStage(Stage):
    """A motion LoRA and one or more appearance LoRAs of a frozen text-to-video model, from reference clips."""

    name = "motion_director"
    Config = MotionDirectorConfig
    learns_loras = True
    dropouts = ("text_dropout", "appearance_dropout")
    learns_in_parts = True

    def __init__(self, networks: Networks, config: MotionDirectorConfig):
        if not config.first_frame:
            networks.leave_out_controlnets()
        super().__init__(networks, config)
        self.config = config
        has_both_paths = config.learns_motion and config.dual_path
        self.appearance_dropout = config.appearance_dropout if has_both_paths else 0.0
        self.clips = _find_clips(config)
        # Windows of one video share its appearance, if they have the same colours.
        keys = {(clip.path, clip.channels): clip.key for clip in reversed(self.clips)}
        shares = config.appearance == "shared" or len(keys) == 1
        self.appearance_of = {
            c.key: APPEARANCE if shares else f"{APPEARANCE}_{keys[c.path, c.channels]}" for c in self.clips
        }
        appearances = list(dict.fromkeys(self.appearance_of.values()))
        networks.freeze()
        for number, name in enumerate(appearances):
            _add_lora(self.unet, name, APPEARANCE, config, config.seed + 1 + number)
        if config.learns_motion:
            _add_lora(self.unet, MOTION, MOTION, config, config.seed)
        self.appearances = appearances
        freeze_all_but_adapter(self.unet, *appearances, *([MOTION] if config.learns_motion else []))
        self.previewed = MOTION if config.learns_motion else appearances[0]
        activate(self.unet, self.previewed)

    @classmethod
    def check(cls, config: MotionDirectorConfig) -> None:
        """As `Stage.check`: every clip can be read and gives a window, and the model makes videos of its size.

        Raises:
            FileNotFoundError: A clip or a caption is missing.
            ValueError: A clip is too short or damaged, or is an image where a motion is to be learned.
        """
        clips = _find_clips(config)
        named = next((clip.caption for clip in clips if config.recolour and names_a_colour(clip.caption)), None)
        if named is not None:
            logger.warning(f"recolour=true, but {named!r} names a colour, which most copies have not; leave it out")
        if config.first_frame:
            check_controlnets(config.model, "first_frame=true")
        image = next((clip for clip in clips if clip.is_image), None)
        if image is not None and config.learns_motion:
            raise ValueError(
                f"{image.path} is an image, which has no motion to learn; give videos, or set learns_motion=false"
            )
        for size in {clip.size for clip in clips}:
            check_shape(config.model, size, config.num_frames)

    @classmethod
    def build_samples(cls, config: MotionDirectorConfig) -> Samples:
        """The clips' windows, whose latents `begin` makes."""
        return ReferenceClips(_find_clips(config), config.seed, config.horizontal_flip)

    @classmethod
    def read_held_out(cls, config: MotionDirectorConfig, previewed: int | None = None) -> list[dict[str, Any]]:
        """Prompts and shapes of the previews; with first_frame=true also the first frame of a clip, (3, H, W) uint8."""
        clips = [clip for clip in _find_clips(config) if not clip.is_recoloured]
        prompts = config.preview_prompts or list(dict.fromkeys(clip.caption for clip in clips))
        previews: list[dict[str, Any]] = []
        for number, prompt in enumerate(prompts[:previewed]):
            clip = clips[number % len(clips)] if config.first_frame else clips[0]
            preview = {"caption": prompt, "size": torch.tensor(clip.size), "num_frames": clip.num_frames}
            if config.first_frame:
                preview["first_frame"] = next(read_frames(clip))[:, 0]
            previews.append(preview)
        return previews

    @torch.no_grad()
    def begin(self, data: Any) -> None:
        """Encodes the clips, inverts them where the run is to store a noise prior, and casts the frozen base.

        Raises:
            ValueError: A clip cannot be decoded, or its inversion is not finite.
        """
        if self.config.mixed_precision != "no":
            cast_frozen(self.unet, HALF[self.config.mixed_precision])
        samples: ReferenceClips = data.samples
        samples.encode(self._encode_frames)
        if self.config.noise_prior:
            self._store_noise_prior(samples)

    def _store_noise_prior(self, samples: ReferenceClips) -> None:
        """Inverts the clips, which the processes share, unless the run folder holds their noise already."""
        config, state, run = self.config, PartialState(), Path(self.config.output)
        made_from = [config.model, config.inversion_steps, config.seed]
        numbers = [number for number, clip in enumerate(self.clips) if not clip.is_recoloured]
        clips = [self.clips[number] for number in numbers]
        source = json.dumps([made_from, [[c.key, str(c.path), c.size, list(c.frames)] for c in clips]])
        if has_noise_prior(run, source):
            return
        own = own_part(state, numbers)
        bar = tqdm(own, desc="inversion", unit="clip", disable=not state.is_main_process)
        inverted = dict(gather_object([(self.clips[n].key, self._invert(samples, n)) for n in bar]))
        if state.is_main_process:
            save_noise_prior(run, inverted, source)

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], generators: Sequence[torch.Generator]) -> tuple[Tensor, Condition]:
        """As `Stage.encode`, of one clip: the text is the whole condition, and the step's random choices go along."""
        (generator,), (key,) = generators, batch["key"]
        x_0, mean, _ = self.draw_latents(batch, generators)

        def draw(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        def happens(probability: float) -> bool:
            return bool(torch.rand((), generator=generator) < probability)

        num_frames = mean.shape[2]
        text = self.draw_text(batch, generators)
        picture = keyframe_condition(mean[:, :, :1], (0,), num_frames) if self.config.first_frame else (None, None)
        return x_0, ReferenceCondition(
            text,
            *picture,
            appearance=self.appearance_of[key],
            frame=draw(num_frames),
            anchor=torch.tensor([draw(num_frames)], device=x_0.device),
            drops_appearance=happens(self.appearance_dropout),
            dropout_seed=draw(2**31),
        )

    def loss_terms(self, x_0: Tensor, t: Tensor, eps: Tensor, condition: Condition) -> dict[str, Tensor]:
        """L_sp, L_org and L_ad; a term whose path is left out in this step is zero.

        The gradient of L_sp reaches the clip's appearance LoRA alone, that of the other two the motion LoRA alone.
        """
        assert isinstance(condition, ReferenceCondition)
        x_t, target = self.scheduler.add_noise(x_0, eps, t), self.target(x_0, t, eps)
        terms: dict[str, Tensor] = {}
        with lora_dropout(self.unet, condition.dropout_seed):
            if self.config.dual_path:
                terms["spatial"] = self._spatial_loss(x_t, target, t, condition)
            if self.config.learns_motion:
                terms |= self._temporal_losses(x_t, target, t, condition)
        return terms

    def _spatial_loss(self, x_t: Tensor, target: Tensor, t: Tensor, condition: ReferenceCondition) -> Tensor:
        if condition.drops_appearance:
            return x_t.new_zeros(())
        frame, alone = slice(condition.frame, condition.frame + 1), Condition(condition.text)
        with active(self.unet, condition.appearance), motion_modules_bypassed(self.unet):
            return denoising_loss(self.denoise(x_t[:, :, frame], t, alone), target[:, :, frame])  # L_sp

    def _temporal_losses(
        self, x_t: Tensor, target: Tensor, t: Tensor, condition: ReferenceCondition
    ) -> dict[str, Tensor]:
        acting = [MOTION] if condition.drops_appearance else [MOTION, condition.appearance]
        with ExitStack() as stack:
            stack.enter_context(active(self.unet, *acting))
            if self.config.dual_path:
                stack.enter_context(frozen(self.unet, *self.appearances))
            prediction = self.denoise(x_t, t, condition)
        terms = {"temporal": denoising_loss(prediction, target)}  # L_org
        if self.config.debiasing_beta is not None and condition.anchor is not None:
            terms["debiased"] = debiased_loss(prediction, target, condition.anchor, self.config.debiasing_beta)  # L_ad
        return terms

    @contextmanager
    def previewing(self) -> Iterator[None]:
        """Inside the block the motion LoRA acts alone; of a run without one, the first appearance LoRA."""
        self.unet.eval()  # `loss_terms` has switched dropout on
        with active(self.unet, self.previewed):
            yield

    def trainable(self) -> dict[str, ParameterGroup]:
        """The appearance LoRAs and the motion LoRA, each a group."""
        config, learning = self.config, dict(self.named_parameters())
        names = {id(parameter): name for name, parameter in learning.items()}

        def group(adapters: Sequence[str], rate: float | None = None, decay: float | None = None) -> ParameterGroup:
            parameters = [p for name in adapters for p in adapter_parameters(self.unet, name).values()]
            return ParameterGroup({names[id(p)]: p for p in parameters}, rate, decay)

        groups = {APPEARANCE: group(self.appearances, config.appearance_learning_rate, config.appearance_weight_decay)}
        return {**groups, MOTION: group([MOTION])} if config.learns_motion else groups

    def save(self, folder: Path) -> None:
        """Writes motion_lora/ and appearance_lora/, or appearance_lora/KEY/ where each clip has its own.

        Each holds pytorch_lora_weights.safetensors, which `load_lora_weights` and `sample.py` take.
        """
        if self.config.learns_motion:
            save_for_diffusers(self.unet, MOTION, folder / "motion_lora")
        for name in self.appearances:
            part = folder / "appearance_lora" / name.removeprefix(APPEARANCE).removeprefix("_")
            save_for_diffusers(self.unet, name, part)

    def _encode_frames(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C, T, h, w) of the unscaled latents of frames (3, T, H, W) uint8."""
        mean, std = self._encode_pixels(frames[None])
        return mean[0], std[0]

    def _invert(self, samples: ReferenceClips, number: int) -> Tensor:
        """Noise (C, T, h, w) float32 on the CPU of a clip's window, by the frozen base and an empty prompt."""
        device = self.unet.device
        window = self.clips[number].draw_window(random.Random(self.config.seed))
        mean, _ = samples.latents(number, window)
        x_0 = scale_latents(mean[None], self.vae.config).to(device)
        text = self.encode_text({"caption": [""]}, [False])

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self.denoiser(x.to(self.unet.dtype), t, Condition(text))

        with active(self.unet):
            return ddim_inversion(predict, x_0, self.scheduler, self.config.inversion_steps)[0].cpu()


def _find_clips(config: MotionDirectorConfig) -> list[ReferenceClip]:
    return find_reference_clips(
        config.data,
        prompt=config.prompt,
        captions=config.captions,
        size=config.size,
        num_frames=config.num_frames,
        fps=config.fps,
        frame_step=config.frame_step,
        recolour=config.recolour,
    )


def _add_lora(unet: nn.Module, name: str, target_set: Any, config: MotionDirectorConfig, seed: int) -> None:
    targets = lora_targets(unet, target_set)
    settings: dict[str, Any] = {"rank": config.lora_rank, "dropout": config.lora_dropout, "seed": seed}
    add_adapter(unet, name, targets=targets, clips_rank=True, **settings)
