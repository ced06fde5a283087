"""What a model knows of a clip before it denoises: the error of x_0 predicted from pure noise, frame by frame.

One forward pass a clip tells whether motion and content are carried. Content is carried as far as the model's rows come
near the row of the warped first frame; more sampling steps cannot win back what is missing there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imageconductor.conditioning.first_frame import keyframe_condition
from imageconductor.conditioning.flow_map import flow_map
from imageconductor.data.batches import scale_pixels
from imageconductor.data.scenes import Scene
from imageconductor.data.sparse_tracks import sample_sparse
from imageconductor.data.sprite_world import SpriteSet, SpriteWorldConfig
from imageconductor.data.sprites import SpriteDataset
from imageconductor.diffusion.clean_estimate import estimate_x_0
from imageconductor.diffusion.latents import scale_latents
from imageconductor.models.denoiser import Condition
from imageconductor.models.networks import Networks

Errors = dict[str, dict[str, Tensor]]
"""(T,) mean squared error of scaled latents, by region ("everywhere", "on sprites"), then by row."""

_SHOWN_FRAMES = (1, 2, 3, 4, 6, 8, 10, 12, 15)


@torch.no_grad()
def measure_one_step_errors(
    networks: Networks, world: SpriteWorldConfig, num_clips: int = 16, max_tracks: int = 8
) -> Errors:
    """Errors of the first frame copied or warped, and of the model without tracks, with a few and with dense ones.

    Args:
        networks: The model; nothing is learned.
        world: Clips that no stage is trained on, of the mixed and the camera set in turn; its `kind` is replaced.
        num_clips: Number of clips.
        max_tracks: Upper limit of the number of sparse tracks.
    """
    total: dict[str, dict[str, Tensor]] = {}
    counts: dict[str, Tensor] = {}
    sets = [SpriteDataset(SpriteWorldConfig(**{**vars(world), "kind": k})) for k in (SpriteSet.MIXED, SpriteSet.CAMERA)]
    for clip in range(num_clips):
        index, choice = divmod(clip, len(sets))
        scene, sample = sets[choice].scene(index), sets[choice].batch([index])
        generator = torch.Generator().manual_seed(clip)
        x_0, predictions = _predict(networks, scene, sample, max_tracks, generator)
        on_sprites = scene.sources(networks.vae_scale_factor)[1] >= 0  # (T, h, w)
        for region, chosen in (("everywhere", torch.ones_like(on_sprites)), ("on sprites", on_sprites)):
            counts[region] = counts.get(region, 0) + chosen.sum((1, 2))
            rows = total.setdefault(region, {})
            for row, prediction in predictions.items():
                error = (prediction - x_0).square().mean(0).cpu() * chosen
                rows[row] = rows.get(row, 0) + error.sum((1, 2))
    return {
        region: {row: error / counts[region].clamp(min=1) for row, error in rows.items()}
        for region, rows in total.items()
    }


def format_errors(errors: Errors) -> str:
    """A table for each region."""
    num_frames = len(next(iter(errors["everywhere"].values())))
    frames = [t for t in _SHOWN_FRAMES if t < num_frames]
    lines = []
    for region, rows in errors.items():
        lines += [f"| {region}, frame | {' | '.join(map(str, frames))} |", "|---" * (len(frames) + 1) + "|"]
        lines += [f"| {row} | {' | '.join(f'{error[t]:.4f}' for t in frames)} |" for row, error in rows.items()] + [""]
    return "\n".join(lines)


def warp(frame: Tensor, sources: Tensor) -> Tensor:
    """A picture (C, H, W) seen through sources (T, h, w, 2) in its pixels, bilinear, edges repeated: (C, T, h, w)."""
    size = sources.new_tensor(frame.shape[:0:-1])
    grid = (sources + 0.5) / size * 2 - 1
    frames = frame.expand(len(sources), *frame.shape)
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=False).transpose(0, 1)


def _predict(
    networks: Networks, scene: Scene, sample: dict[str, Any], max_tracks: int, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scaled latents (C, T, h, w) of a clip, and predictions of them by row."""
    pixels, device = scale_pixels(sample["pixel_values"][0]), networks.unet.device
    factor = networks.vae_scale_factor
    x_0 = _encode(networks, pixels)
    warped = warp(pixels[:, 0], scene.sources()[0])
    places = (scene.sources(factor)[0] + 0.5) / factor - 0.5
    rows = {
        "frame 0 copied": x_0[:, :1].expand_as(x_0),
        "frame 0 warped": _encode(networks, warped),
        "latents of frame 0 warped": warp(x_0[:, 0], places.to(x_0)),
    }
    eps = torch.randn(x_0.shape, generator=generator).to(x_0)[None]
    points, visible = sample["points"].to(device), sample["visible"].to(device)
    few = visible & sample_sparse(points, visible, max_tracks, [generator])[..., None]
    text = networks.text_encoder(networks.tokenize(sample["caption"]).to(device)).last_hidden_state
    condition = Condition(text, *keyframe_condition(x_0[None, :, :1], (0,), x_0.shape[1]))
    convention = networks.motion_controlnet.flow_convention
    for row, shown in (("model, no tracks", None), (f"model, 1..{max_tracks} tracks", few), ("model, dense", visible)):
        flow = None if shown is None else flow_map(points, shown, scene.size, convention)
        given = Condition(condition.text, condition.keyframes, condition.mask, flow)
        rows[row] = _predict_x_0(networks, x_0[None], eps, given)[0]
    return x_0, rows


def _predict_x_0(networks: Networks, x_0: Tensor, eps: Tensor, condition: Condition) -> Tensor:
    """x_0 as the model predicts it at the noisiest timestep, (B, C, T, h, w)."""
    scheduler = networks.scheduler
    t = torch.tensor([scheduler.config["num_train_timesteps"] - 1], device=x_0.device)
    x_t = scheduler.add_noise(x_0, eps, t)
    prediction = networks.denoiser(x_t, t, condition)
    return estimate_x_0(prediction, x_t, float(scheduler.alphas_cumprod[t.cpu()]), scheduler.config["prediction_type"])


def _encode(networks: Networks, pixels: Tensor) -> Tensor:
    """Scaled latents (C, T, h, w), the posterior's mean, of pixels (3, T, H, W) in [-1, 1]."""
    frames = pixels.transpose(0, 1).to(networks.unet.device)
    return scale_latents(networks.vae.encode(frames).latent_dist.mean, networks.vae.config).transpose(0, 1)
