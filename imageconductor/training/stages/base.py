"""What a stage is: networks of which some learn, a way from clips to a condition, and named losses.

The loop is the same for all stages: it asks them for `encode`, `loss_terms`, `trainable` and `save`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imageconductor.checkpoints.model_folder import check_controlnets, check_shape
from imageconductor.conditioning.first_frame import keyframe_condition
from imageconductor.conditioning.flow_map import flow_map
from imageconductor.data.batches import Samples, scale_pixels, send
from imageconductor.data.sparse_tracks import sample_sparse
from imageconductor.diffusion.latents import scale_latents
from imageconductor.diffusion.losses import denoising_loss
from imageconductor.models.denoiser import Condition
from imageconductor.models.networks import Networks, load_network
from imageconductor.models.weights import find_weights
from imageconductor.training import samples
from imageconductor.training.train_config import StageConfig, TrainConfig, TrajectoryConfig


@dataclass
class ParameterGroup:
    """Parameters that are optimised alike; None = as the run's settings say."""

    parameters: dict[str, nn.Parameter]
    learning_rate: float | None = None
    weight_decay: float | None = None


class Stage(nn.Module):
    """One stage of the training; calling it gives `loss_terms`.

    As one module it is what DDP wraps, whichever of its networks learn.

    Args:
        networks: Of the model that the stage starts from; the subclass freezes them and lets some learn.
        config: Its settings.

    Attributes:
        name: Of the stage, in YAML and in files.
        Config: Dataclass of its settings, whose `stage` is `name`.
        preview_control: Control under which preview videos are made; None = without trajectories.
        preview_settings: Further arguments of the pipeline's call for preview videos.
        adapters: LoRAs of the motion ControlNet that act.
        dropouts: Attributes that hold the probabilities with which parts of the condition are dropped.
        validated: Loss that is measured on held-out clips.
        learns_in_parts: Whether a step may reach only some of what learns.
        can_be_split: Whether FSDP and DeepSpeed can split its weights.
        learns_loras: Whether all that it writes are LoRAs, which its checkpoints then hold as well, ready to be played.
    """

    name: ClassVar[str]
    Config: ClassVar[type[StageConfig]]
    preview_control: str | None = None
    adapters: ClassVar[tuple[str, ...]] = ()
    dropouts: ClassVar[tuple[str, ...]] = ("text_dropout", "image_dropout")
    validated: ClassVar[str] = "denoising"
    learns_in_parts: ClassVar[bool] = False
    can_be_split: ClassVar[bool] = True
    learns_loras: ClassVar[bool] = False

    def __init__(self, networks: Networks, config: StageConfig):
        super().__init__()
        self.networks = networks
        self.denoiser = networks.denoiser
        self.scheduler = networks.scheduler
        self.text_dropout = config.text_dropout
        self.image_dropout = config.image_dropout if isinstance(config, TrainConfig) else 0.0
        self.preview_settings: dict[str, Any] = {}
        self.vae = networks.vae
        self.text_encoder = networks.text_encoder
        self.unet = networks.unet
        self.image_controlnet = networks.image_controlnet
        self.motion_controlnet = networks.motion_controlnet

    @classmethod
    def check(cls, config: Any) -> None:
        """Makes sure, before any weights are read, that the model fits the clips, and that files named are there.

        Args:
            config: Settings of the stage, its `Config`; the model folder they name is a complete one.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: The model cannot make videos of the clips' shape.
        """
        check_controlnets(config.model, f"stage {cls.name}")
        check_shape(config.model, config.clip_size, config.clip_frames)

    @classmethod
    def build_samples(cls, config: Any) -> Samples:
        """The samples that a run is trained on; raises as `samples.build_samples`."""
        return samples.build_samples(config)

    @classmethod
    def read_held_out(cls, config: Any, previewed: int | None = None) -> list[dict[str, Any]]:
        """The first samples that no step sees, for validation or previews; see `samples.read_held_out`."""
        return samples.read_held_out(config, previewed)

    def begin(self, data: Any) -> None:
        """Called once before the first step, when the networks are on their device.

        Args:
            data: Batches of the run; an item's number is that of the micro-step.
        """

    def loss_terms(self, x_0: Tensor, t: Tensor, eps: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Weighted losses by name; their sum is minimised.

        Args:
            x_0: (B, C, T, h, w), clean latents.
            t: (B,) int64.
            eps: (B, C, T, h, w), noise.
            condition: From `encode`.
        """
        x_t = self.scheduler.add_noise(x_0, eps, t)  # Eq. 6
        prediction = self.denoise(x_t, t, condition)  # eps_theta(x_t, t, c)
        return {"denoising": denoising_loss(prediction, self.target(x_0, t, eps))}  # Eqs. 1 and 3

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """eps_theta(x_t, t, c), or what else the scheduler predicts: (B, C, T, h, w)."""
        return self.denoiser(x_t, t, condition)

    def target(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the prediction ought to be: the noise, v or x_0."""
        if self.scheduler.config["prediction_type"] == "sample":
            return x_0
        if self.scheduler.config["prediction_type"] == "v_prediction":
            return self.scheduler.get_velocity(x_0, eps, t)
        return eps

    def forward(self, x_0: Tensor, t: Tensor, eps: Tensor, condition: Condition) -> dict[str, Tensor]:
        """`loss_terms`, by the name under which DDP and autocast wrap it."""
        return self.loss_terms(x_0, t, eps, condition)

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], generators: Sequence[torch.Generator]) -> tuple[Tensor, Condition]:
        """Clean latents x_0 (B, C, T, h, w) and the condition, from a batch of clips.

        Args:
            batch: points (B, N, T, 2) px, visible (B, N, T), caption; and pixel_values (B, 3, T, H, W) uint8, or from a
                cache latent_mean and latent_std (B, C, T, h, w), size (B, 2) and text (B, L, D).
            generators: One a clip, on the CPU; they draw the posterior's noise, what is dropped and the sparse tracks.
        """
        # The order of what the generators draw must stay, or runs would not go on as they began.
        x_0, mean, size = self.draw_latents(batch, generators)
        text = self.draw_text(batch, generators)
        pictures = self.draw_keyframes(mean, generators)
        with torch.autocast(mean.device.type, enabled=False):  # Flow maps are pixels; half precision would round them.
            flow, has_flow = self.draw_flow(batch, size, generators)
        return x_0, Condition(text, **pictures, flow=flow, has_flow=has_flow)

    def draw_latents(
        self, batch: dict[str, Any], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Clean latents drawn from the posterior of a batch of clips, its mean, each (B, C, T, h, w), and (W, H) px."""
        mean, std, size = self._encode_clips(batch)
        noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
        return mean + std * send(noise, mean.device), mean, size

    def draw_text(self, batch: dict[str, Any], generators: Sequence[torch.Generator]) -> Tensor:
        """As `encode_text`, of which the generators draw what is dropped."""
        return self.encode_text(batch, [bool(torch.rand((), generator=g) < self.text_dropout) for g in generators])

    def draw_keyframes(self, mean: Tensor, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """`Condition.keyframes` and `mask` of the clips' first frames, zero where they are dropped."""
        keyframes, mask = keyframe_condition(mean[:, :, :1], (0,), mean.shape[2])
        kept = draw_kept(self.image_dropout, generators, mean).view(-1, 1, 1, 1, 1)
        return {"keyframes": keyframes * kept, "mask": mask * kept}

    def encode_text(self, batch: dict[str, Any], dropped: Sequence[bool]) -> Tensor:
        """(B, L, D), the empty text in place of dropped ones."""
        device = self.unet.device
        if "text" not in batch:
            captions = ["" if drop else caption for drop, caption in zip(dropped, batch["caption"], strict=True)]
            return self.text_encoder(send(self.networks.tokenize(captions), device)).last_hidden_state
        text = batch["text"].to(device)
        if any(dropped):
            empty = self.text_encoder(self.networks.tokenize([""]).to(device)).last_hidden_state
            text = torch.where(torch.tensor(dropped, device=device).view(-1, 1, 1), empty, text)
        return text

    def draw_flow(
        self, batch: dict[str, Any], size: tuple[int, int], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor | None, Tensor | None]:
        """`Condition.flow` and `Condition.has_flow` of a batch; None in stages without trajectories.

        Args:
            batch: As in `encode`.
            size: (W, H) in pixels.
            generators: As in `encode`.
        """
        del batch, size, generators
        return None, None

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Inside the block `encode` drops nothing."""
        kept = {name: getattr(self, name) for name in self.dropouts}
        for name in kept:
            setattr(self, name, 0.0)
        try:
            yield
        finally:
            for name, probability in kept.items():
                setattr(self, name, probability)

    @contextmanager
    def previewing(self) -> Iterator[None]:
        """Inside the block the networks are as previews want them."""
        yield

    def measures(self) -> dict[str, float]:
        """What is logged beside the losses, by name; every process calls it."""
        return {}

    def trainable(self) -> dict[str, ParameterGroup]:
        """What learns, as groups by name; no parameter may be in two of them."""
        learning = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {self.name: ParameterGroup(learning)}

    def save(self, folder: Path) -> None:
        """Writes what was learned, as the next stage and the pipeline read it."""
        raise NotImplementedError

    def _encode_clips(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Mean and standard deviation of the scaled latents, each (B, C, T, h, w), and (W, H) in pixels."""
        if "latent_mean" in batch:
            width, height = batch["size"][0].tolist()
            mean, std = batch["latent_mean"].to(self.unet.device), batch["latent_std"].to(self.unet.device)
        else:
            height, width = batch["pixel_values"].shape[-2:]
            mean, std = self._encode_pixels(batch["pixel_values"])
        config = self.vae.config
        return scale_latents(mean, config), std * config["scaling_factor"], (width, height)

    def _encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's own latents, (B, C, T, h, w), of pixels (B, 3, T, H, W) uint8."""
        pixels, num_frames = scale_pixels(pixels.to(self.unet.device)).to(self.vae.dtype), pixels.shape[2]
        posterior = self.vae.encode(pixels.transpose(1, 2).flatten(0, 1)).latent_dist
        mean, std = (
            value.float().unflatten(0, (-1, num_frames)).transpose(1, 2) for value in (posterior.mean, posterior.std)
        )
        return mean, std


def draw_kept(dropout: float, generators: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """(B,), of the kind of `like`: 0 for clips whose generator drops a part of their condition, else 1."""
    kept = [float(torch.rand((), generator=generator) >= dropout) for generator in generators]
    return send(torch.tensor(kept, dtype=like.dtype), like.device)


class TrajectoryStage(Stage):
    """A stage that sees trajectories: all of a clip's tracks, or a few drawn by their motion (section 2.2)."""

    def __init__(self, networks: Networks, config: TrajectoryConfig):
        if config.motion_controlnet is not None:
            networks.motion_controlnet = load_network("motion_controlnet", Path(config.motion_controlnet))
        super().__init__(networks, config)
        self.trajectories, self.max_tracks = config.trajectories, config.max_tracks

    @classmethod
    def check(cls, config: Any) -> None:
        """As `Stage.check`: the motion ControlNet to start from, too."""
        super().check(config)
        folder = getattr(config, "motion_controlnet", None)
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(
                f"no motion ControlNet at {folder}; train that stage first, or start from the model's own with "
                "motion_controlnet=null"
            )
        if folder is not None:
            find_weights(Path(folder))

    def draw_flow(
        self, batch: dict[str, Any], size: tuple[int, int], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Flow map (B, 2, T, H, W) of every clip, as the motion ControlNet wants it drawn; every clip has one."""
        device, points, visible = self.unet.device, batch["points"], batch["visible"]
        if self.trajectories != "dense":  # Before they are on the GPU, which would have to be waited for.
            distinct = self.trajectories == "distinct"
            shown = sample_sparse(points, visible, self.max_tracks, generators, distinct=distinct)
            visible = visible & shown[..., None]
        sent = send(points, device), send(visible, device)
        return flow_map(*sent, size, self.motion_controlnet.flow_convention), None
