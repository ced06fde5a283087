"""Videos of a model that is still learning, on the same held-out clips and from the same noise each time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from imageconductor.conditioning import Trajectories
from imageconductor.data.sparse_tracks import sample_sparse
from imageconductor.models.networks import Networks
from imageconductor.sampling.pipeline import ImageConductorOutput, ImageConductorPipeline
from imageconductor.sampling.video import (
    Frames,
    contact_sheet,
    draw_boxes,
    draw_trajectories,
    to_uint8,
    upscale_for_viewing,
    write_mp4,
)

_FPS = 8


class VideoPreview:
    """Writes `FOLDER/step-NNNNNNNN.png`, a contact sheet, and `FOLDER/step-NNNNNNNN-I.mp4`.

    Args:
        clips: Samples that are not trained on: pixel_values (3, T, H, W) uint8, or from a cache latent_mean
            (C, T, h, w) and size; points, visible, caption; `boxes` for a model with object gates. Or prompts for
            text-to-video: caption, size, num_frames; first_frame (3, H, W) uint8 where they are to animate one.
        control: Control under which the videos are made; None = without trajectories.
        folder: Of the files.
        sampling: Arguments of the pipeline's call, such as `num_inference_steps` and `guidance_scale`.
        max_tracks: Trajectories drawn at most on a clip.
    """

    def __init__(
        self,
        clips: Sequence[dict[str, Any]],
        control: str | None,
        folder: Path,
        sampling: dict[str, Any],
        max_tracks: int = 4,
    ):
        self.clips, self.control, self.folder, self.sampling = clips, control, folder, sampling
        self.drawn = [
            None if control is None else _draw_tracks(clip, max_tracks, seed) for seed, clip in enumerate(clips)
        ]

    def __call__(self, step: int, networks: Networks) -> None:
        """Samples every clip with the networks as they are."""
        pipe = ImageConductorPipeline(**networks.parts)
        pipe.set_progress_bar_config(desc=f"preview of step {step}", leave=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        rows: list[tuple[str, Frames]] = []
        for i, (clip, drawn) in enumerate(zip(self.clips, self.drawn, strict=True)):
            truth = _read_frames(clip, networks)
            made = self._sample(pipe, clip, truth, drawn, seed=i)
            shown = {"made": made} if truth is None else {"clip": truth, "made": made}
            for name, frames in shown.items():
                large, factor = upscale_for_viewing(to_uint8(frames))
                if drawn is not None:
                    large = draw_trajectories(large, drawn, factor)
                if "boxes" in clip:
                    large = draw_boxes(large, clip["boxes"], factor)
                rows.append((f"{name}: {clip['caption']}"[:110], large))
            side_by_side = np.concatenate([large for _, large in rows[-len(shown) :]], axis=2)
            write_mp4(self.folder / f"step-{step:08d}-{i}.mp4", side_by_side, _FPS)
        contact_sheet(self.folder / f"step-{step:08d}.png", rows)

    def _sample(
        self,
        pipe: ImageConductorPipeline,
        clip: dict[str, Any],
        truth: NDArray[np.float32] | None,
        drawn: Trajectories | None,
        seed: int,
    ) -> NDArray[np.float32]:
        """A video (T, H, W, 3) of the clip's caption, first frame and tracks, as far as it has them."""
        if truth is None:
            (width, height), num_frames = clip["size"].tolist(), clip["num_frames"]
        else:
            num_frames, height, width = truth.shape[:3]
        first = None if truth is None else to_uint8(truth[0])
        if "first_frame" in clip:
            first = clip["first_frame"].permute(1, 2, 0).numpy()
        given = {
            "image": None if first is None else Image.fromarray(first),
            "trajectories": drawn,
            "prompt": clip["caption"],
            "boxes": clip.get("boxes"),
            "control": self.control or "object",
            "width": width,
            "height": height,
            "num_frames": num_frames,
            "window_frames": max(2, num_frames),  # in one, as the clips are trained on
            **self.sampling,
        }
        output = pipe(**given, seed=seed, output_type="np")
        return cast(ImageConductorOutput, output).frames[0]


@torch.no_grad()
def _read_frames(clip: dict[str, Any], networks: Networks) -> NDArray[np.float32] | None:
    """Frames (T, H, W, 3) of a clip in [0, 1]; those of a cache are decoded, one at a time. None of a prompt."""
    if "num_frames" in clip:
        return None
    if "pixel_values" in clip:
        return (clip["pixel_values"].permute(1, 2, 3, 0).float() / 255).numpy()
    vae = networks.vae
    latents = clip["latent_mean"].to(vae.device, vae.dtype).transpose(0, 1)
    pixels = torch.cat([vae.decode(latent[None]).sample.float().cpu() for latent in latents])
    return ((pixels.permute(0, 2, 3, 1) + 1) / 2).clamp(0, 1).numpy()


def _draw_tracks(clip: dict[str, Any], max_tracks: int, seed: int) -> Trajectories:
    """Moving tracks of a clip, as a person might draw them."""
    points, visible = clip["points"], clip["visible"]
    width, height = clip["size"].tolist() if "size" in clip else reversed(clip["pixel_values"].shape[-2:])
    keep = sample_sparse(points[None], visible[None], max_tracks, [torch.Generator().manual_seed(seed)])[0]
    return Trajectories(points[keep], visible[keep], (width, height))
