"""Training of a small autoencoder, for models that are built from nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from imageconductor.data.batches import sample_generators, scale_pixels
from imageconductor.devices import choose_precision
from imageconductor.training import checkpointing
from imageconductor.training.optimizers import MuonAndAdamW
from imageconductor.training.stopping import Stop, spare_worker


@dataclass
class AutoencoderConfig:
    """Settings of the training of an autoencoder."""

    decoder_only: bool = False  # latents stay as they are, and what was trained on them stays valid
    max_steps: int = 1800  # optimiser steps
    max_minutes: float | None = None  # then the training stops with a checkpoint; null = no limit
    batch_size: int = 16  # crops a step, of all processes together
    frames_per_clip: int = 1  # frames of other clips teach more than others of the same clip
    crop: int = 32  # pixels; many small crops teach more in the same time than few whole frames
    crop_candidates: int = 1  # random crops of a frame, of which the one with the most detail is taken
    whole_frames_from: float = 0.9  # fraction of the steps after which whole frames are seen
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for linear layers and convolutions, AdamW for the rest
    learning_rate: float = 5e-4  # falling by a cosine
    # Fraction of the steps that decode latents between latent pixels, against pixels shifted as far: motion then moves
    # latents without changing them (EQ-VAE, Kouzelis et al., 2025).
    equivariance: float = 0.0
    # Of what such shifted latents differ, in parts of their variance, from those of the shifted pixels: a model that
    # carries content must predict the latter.
    latent_equivariance: float = 0.0
    kl_weight: float = 1e-6  # of the posterior's divergence from a standard normal distribution
    mixed_precision: Literal["no", "bf16", "auto"] = "no"  # auto: bf16 where the device has instructions for it
    seed: int = 0  # of frames, crops, shifts and noise
    save_every: int = 200  # steps between checkpoints

    def __post_init__(self) -> None:
        if self.batch_size % self.frames_per_clip:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of frames_per_clip")
        if self.crop_candidates < 1:
            raise ValueError(f"crop_candidates must be at least 1, got {self.crop_candidates}")
        if not 0 <= self.equivariance <= 1:
            raise ValueError(f"equivariance must lie in [0, 1], got {self.equivariance}")


def train_autoencoder(
    vae: Any, data: Dataset[dict[str, Any]], config: AutoencoderConfig, runs: Path, num_workers: int = 0
) -> int:
    """Trains `vae` in place, continuing what `runs` holds, and then settles its latents and sets their scale, 1 / std.

    Every process has to call it. They share the crops of a step, and end with the same weights.

    Args:
        vae: AutoencoderKL; its parameters are trained, or those of its decoder, with the factor as it was.
        data: Of n processes' shares of a step, (batch_size / frames_per_clip / n, 3, T, H, W) uint8 `pixel_values`,
            item s * n + k is process k's in step s; items behind the last step's judge the latents.
        config: Settings of the training.
        runs: Folder of the checkpoints.
        num_workers: Processes that prepare batches; 0 = this one does.

    Returns:
        The number of steps it has behind it, fewer than `max_steps` where the time was over before.

    Raises:
        FloatingPointError: The loss of a step, or its gradients, are not finite.
        ValueError: Another run trains into `runs`, or its checkpoints cannot be read.
    """
    processes = PartialState()
    device, rank, num_ranks = cast(torch.device, processes.device), processes.process_index, processes.num_processes
    precision = choose_precision(config.mixed_precision, device)
    vae.to(device, memory_format=torch.channels_last).train().requires_grad_(not config.decoder_only)
    vae.decoder.requires_grad_(True)
    parameters = {name: parameter for name, parameter in vae.named_parameters() if parameter.requires_grad}
    optimizer = _build_optimizer(parameters, config)
    start = _restore(runs, vae, optimizer)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=50, num_training_steps=config.max_steps)
    for _ in range(start):
        optimizer._opt_called = True  # type: ignore[attr-defined]
        schedule.step()

    done = start
    steps = range(start, config.max_steps)
    shares = range(start * num_ranks + rank, config.max_steps * num_ranks, num_ranks)
    loader = DataLoader(data, batch_size=None, sampler=shares, num_workers=num_workers, worker_init_fn=spare_worker)
    is_shown = processes.is_main_process
    bar = tqdm(steps, initial=start, total=config.max_steps, desc="autoencoder", unit="step", disable=not is_shown)
    with checkpointing.lock_folder(runs), Stop(config.max_minutes, begun=start) as stop:
        for step, batch in zip(bar, loader, strict=True):
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)  # the same in all processes
            clips = batch["pixel_values"]
            generators = sample_generators(config.seed, (step * num_ranks + rank) * len(clips), len(clips))
            frames, generators = draw_crops(
                clips, config, generators, step >= config.whole_frames_from * config.max_steps
            )
            frames = scale_pixels(frames.to(device, memory_format=torch.channels_last))
            with torch.autocast(frames.device.type, torch.bfloat16, enabled=precision == "bf16"):
                posterior = vae.encode(frames).latent_dist
                noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=one) for one in generators])
                latents = posterior.mean + posterior.std * noise.to(device)
                if is_shifted := bool(torch.rand((), generator=generator) < config.equivariance):
                    latents, frames = shift(latents, frames, generator)
                decoded = vae.decode(latents).sample.float()
                again = vae.encode(frames).latent_dist.mean if is_shifted and config.latent_equivariance else None
            terms = _losses(config, frames, decoded, posterior, latents, again)
            loss = sum(terms.values(), start=torch.zeros((), device=device))
            loss.backward()
            loss = _average_over_processes(parameters.values(), loss.detach())
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            found = torch.stack([loss, norm])
            if not found.isfinite().all():
                value, length = found.tolist()
                raise FloatingPointError(
                    f"autoencoder loss is {value} at step {step}, the length of its gradients {length}; go on from the "
                    "last checkpoint with a lower learning_rate"
                )
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 10 == 0 and not is_shifted:
                psnr = -10 * torch.log10((decoded.detach() - frames).square().mean() / 4)
                bar.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{psnr.item():.1f} dB")
            done = step + 1
            is_over = done == config.max_steps or stop.is_due(done)
            if (done % config.save_every == 0 or is_over) and processes.is_main_process:
                _save(runs, done, vae, optimizer)
            if is_over:
                break

    vae.eval().requires_grad_(False)
    if config.decoder_only:
        return done
    with torch.no_grad():
        clips = torch.cat([data[config.max_steps * num_ranks + i]["pixel_values"] for i in range(8 * num_ranks)])
        frames = scale_pixels(clips.transpose(1, 2).flatten(0, 1).to(device))
        settle_latents_(vae, frames)
        vae.register_to_config(scaling_factor=1 / vae.encode(frames).latent_dist.mean.std().item())
    return done


def _losses(
    config: AutoencoderConfig, frames: Tensor, decoded: Tensor, posterior: Any, latents: Tensor, again: Tensor | None
) -> dict[str, Tensor]:
    """Weighted losses by name; their sum is minimised.

    Args:
        config: Settings of the training.
        frames: (B, 3, H, W) in [-1, 1], pixels that were to be decoded.
        decoded: (B, 3, H, W), pixels that were.
        posterior: From which latents were drawn.
        latents: (B, C, h, w), those that were decoded.
        again: (B, C, h, w), latents of the shifted pixels, which shifted latents ought to be; None = they need not.
    """
    terms = {"absolute": F.l1_loss(decoded, frames), "square": F.mse_loss(decoded, frames)}
    if again is not None:
        terms["latent_equivariance"] = config.latent_equivariance * carrying_error(latents.float(), again.float())
    return {**terms, "kl": config.kl_weight * posterior.kl().mean()}


def _average_over_processes(parameters: Collection[nn.Parameter], loss: Tensor) -> Tensor:
    """Puts the mean gradients of all processes in the place of this one's, and gives the mean of their losses ()."""
    if PartialState().num_processes == 1:
        return loss
    gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
    together = torch.cat([loss.view(1), *(gradient.flatten() for gradient in gradients)])
    loss, *means = cast(Tensor, reduce(together, "mean")).split([1, *(gradient.numel() for gradient in gradients)])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
    return loss.squeeze(0)


_NO_NOISE = -30.0  # log variance; diffusers allows no less


@torch.no_grad()
def settle_latents_(vae: Any, frames: Tensor) -> None:
    """Takes constants and noise out of the latents, in place; what they decode to stays as it is, or nearly so.

    A model that is trained on latents has to predict all of them. Each channel is centred, the posterior loses its
    noise, and channels that were more noise than anything else, which a decoder has learned to leave alone, are zero.

    Args:
        vae: AutoencoderKL.
        frames: (B, 3, H, W) in [-1, 1], on which channels are judged.
    """
    posterior = vae.encode(frames).latent_dist
    mean = posterior.mean.mean((0, 2, 3))
    carries = posterior.mean.var((0, 2, 3)) > posterior.std.square().mean((0, 2, 3))
    carries |= ~carries.any()  # an autoencoder that has hardly learned
    decoding, encoding, count = vae.post_quant_conv, vae.quant_conv, len(mean)
    decoding.bias += decoding.weight.flatten(1) @ mean
    encoding.weight[:count] *= carries.view(-1, 1, 1, 1)
    encoding.bias[:count] = torch.where(carries, encoding.bias[:count] - mean, 0.0)
    encoding.weight[count:] = 0.0
    encoding.bias[count:] = _NO_NOISE


def _save(runs: Path, step: int, vae: Any, optimizer: Any) -> None:
    checkpointing.save(runs, step, {"parameters": vae.state_dict()}, {"autoencoder": optimizer.state_dict()}, keep=1)


def _restore(runs: Path, vae: Any, optimizer: Any) -> int:
    """Puts the latest checkpoint back, and gives its step; 0 without one."""
    checkpoint = checkpointing.latest_agreed(runs)
    if checkpoint is None:
        return 0
    vae.load_state_dict(checkpoint.tensors["parameters"])
    optimizer.load_state_dict(checkpoint.optimizer["autoencoder"])
    return checkpoint.step


def draw_crops(
    clips: Tensor, config: AutoencoderConfig, generators: Sequence[torch.Generator], is_whole: bool
) -> tuple[Tensor, list[torch.Generator]]:
    """Crops of a step (B, 3, H, W) uint8, each with a generator, from clips (N, 3, T, H, W), each with one.

    Of whole frames only as many are taken as have the pixels of the crops.
    """
    chosen = []
    for clip, generator in zip(clips, generators, strict=True):
        chosen.append(clip[:, torch.randperm(clip.shape[1], generator=generator)[: config.frames_per_clip]])
    frames = torch.cat([clip.transpose(0, 1) for clip in chosen])
    each = [generator for generator in generators for _ in range(config.frames_per_clip)]
    if not is_whole:
        return _crop(frames, config.crop, config.crop_candidates, each), each
    every = max(1, frames.shape[-1] * frames.shape[-2] // config.crop**2)
    return frames[::every], each[::every]


def shift(latents: Tensor, frames: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents at places between the latent pixels, linearly interpolated, and the pixels of just those places.

    Args:
        latents: (B, C, h, w).
        frames: (B, 3, H, W), H/h pixels along a latent pixel.
        generator: Draws how many pixels the places lie beside each other, from 0 to a latent pixel, in y and in x.

    Returns:
        (B, C, h - 1, w - 1) and (B, 3, H - H/h, W - W/w).
    """
    for axis in (-2, -1):
        length, factor = latents.shape[axis] - 1, frames.shape[axis] // latents.shape[axis]
        offset = int(torch.randint(factor, (), generator=generator))
        latents = torch.lerp(latents.narrow(axis, 0, length), latents.narrow(axis, 1, length), offset / factor)
        frames = frames.narrow(axis, offset, factor * length)
    return latents, frames


def carrying_error(shifted: Tensor, encoded: Tensor) -> Tensor:
    """Mean square () by which shifted latents differ from those of the shifted pixels, in parts of their variance.

    Args:
        shifted: (B, C, h, w), latents between latent pixels, from `shift`.
        encoded: (B, C, h, w), latents of the pixels there. The outermost are left out: they have seen another border.
    """
    inner = (..., slice(1, -1), slice(1, -1))
    return F.mse_loss(shifted[inner], encoded[inner]) / encoded[inner].var((0, 2, 3)).mean()


def _crop(frames: Tensor, size: int, num_candidates: int, generators: Sequence[torch.Generator]) -> Tensor:
    """A square of each frame: of a few that its generator draws the one whose neighbouring rows differ most."""
    squares = []
    for frame, generator in zip(frames, generators, strict=True):
        found = []
        for _ in range(num_candidates):
            top, left = (
                int(torch.randint(max(1, side - size + 1), (), generator=generator)) for side in frame.shape[1:]
            )
            found.append(frame[:, top : top + size, left : left + size])
        detail = [square.float().diff(dim=1).abs().mean() for square in found]
        squares.append(found[int(torch.stack(detail).argmax())])
    return torch.stack(squares)


def _build_optimizer(parameters: dict[str, nn.Parameter], config: AutoencoderConfig) -> torch.optim.Optimizer:
    if config.optimizer == "muon":
        return MuonAndAdamW([{"params": parameters, "lr": config.learning_rate, "weight_decay": 0.0}])
    return torch.optim.AdamW(parameters.values(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
