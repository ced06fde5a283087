"""Encodes the clips of shards or folders once before training: VAE moments and text embeddings.

Writes shards with the same keys, but with KEY.latents.npz and KEY.text.npz in place of KEY.mp4; train with
data=[OUTPUT]. After an interruption, the same command continues with the missing shards. Several processes can divide
the work: each makes one `part`, e.g. part=0 parts=8.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from imageconductor.command_line import parse_command_line
from imageconductor.files import atomic_path, remove_partial


@dataclass
class CacheConfig:
    """Settings of the cache."""

    data: list[str] = field(default_factory=list)  # shards or folders of clips, as in the training settings
    output: str = "cache"  # folder that receives the new shards
    model: str = (
        "models/sprites"  # model folder whose autoencoder and text encoder encode the clips; the same as in training
    )
    size: tuple[int, int] = (384, 256)  # (W, H) in pixels to which clips are resized and cropped
    clips_per_shard: int = 200  # clips in each new shard
    frames_per_batch: int = 32  # frames that the autoencoder encodes at a time
    dtype: str = "float16"  # of the stored arrays; float32 is exact at twice the size
    device: str | None = None  # of the networks, such as cuda:0; null = cuda if available
    part: int = 0  # number of the part that this process makes, from 0 to parts - 1
    parts: int = 1  # number of parts into which the work is divided

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data must name at least one shard or folder of clips")
        if self.dtype not in ("float16", "float32"):
            raise ValueError(f"dtype must be float16 or float32, got {self.dtype!r}")
        for name in ("clips_per_shard", "frames_per_batch", "parts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.part < self.parts:
            raise ValueError(f"part must lie in 0..{self.parts - 1}, got {self.part}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 for bad input."""
    config, _ = parse_command_line(CacheConfig, __doc__ or "", argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        cache(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(config.output)
    return 0


def cache(config: CacheConfig) -> None:
    """Writes the missing shards of this process's part."""
    import torch
    from tqdm.auto import tqdm
    from webdataset.writer import TarWriter

    from imageconductor.data.clips import find_clips
    from imageconductor.models.networks import Networks

    records = [record for shard in find_clips(config.data) for record in shard]
    networks = Networks.load(config.model)
    factor = networks.vae_scale_factor
    if config.size[0] % factor or config.size[1] % factor:
        raise ValueError(f"size must be in multiples of {factor} for this model, got {config.size}")
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for network in (networks.vae, networks.text_encoder):
        cast("Any", network).to(device)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    if config.parts == 1:  # Otherwise other processes may be writing there.
        remove_partial(output)
    starts = range(0, len(records), config.clips_per_shard)
    mine = list(enumerate(starts))[config.part :: config.parts]
    bar = tqdm(total=sum(len(records[s : s + config.clips_per_shard]) for _, s in mine), unit="clip")
    skipped = 0
    for number, start in mine:
        shard = output / f"clips-{number:06d}.tar"
        chosen = records[start : start + config.clips_per_shard]
        if not shard.exists():
            with atomic_path(shard) as path, TarWriter(str(path)) as writer:
                for record in chosen:
                    try:
                        writer.write(_encode(record, networks, config, device))
                    except Exception as error:  # Decoders report damage by many kinds of exceptions.
                        skipped += 1
                        logging.warning("skipped %s: %s", record.key, error)
                    bar.update()
        else:
            bar.update(len(chosen))
    bar.close()
    if skipped:
        logging.warning("%d of %d clips could not be encoded", skipped, len(records))


def _encode(record: Any, networks: Any, config: CacheConfig, device: str) -> dict[str, Any]:
    """One record of the cache, in the form that WebDataset writes."""
    import numpy as np
    import torch

    from imageconductor.data.clips import Video, fit_to_size

    info, video = record.info(), Video(record)
    pixels, tracks = fit_to_size(video.frames(range(len(video))), record.tracks(video.size), config.size)
    if tracks.num_frames != len(video):
        raise ValueError(f"{len(video)} frames but tracks over {tracks.num_frames}")
    with torch.no_grad():
        batches = pixels.transpose(0, 1).to(device).split(config.frames_per_batch)
        posteriors = [networks.vae.encode(batch).latent_dist for batch in batches]
        text = networks.text_encoder(networks.tokenize([info["caption"]]).to(device)).last_hidden_state[0]

    def to_npz(**values: Any) -> bytes:
        file = io.BytesIO()
        np.savez(file, **values)
        return file.getvalue()

    def to_numpy(values: Any) -> Any:
        return values.float().cpu().numpy().astype(config.dtype)

    return {
        "__key__": record.key,
        "latents.npz": to_npz(
            mean=to_numpy(torch.cat([p.mean for p in posteriors])),
            std=to_numpy(torch.cat([p.std for p in posteriors])),
            size=np.array(config.size),
        ),
        "text.npz": to_npz(text=to_numpy(text)),
        "tracks.npz": to_npz(points=tracks.points.numpy().astype(np.float32), visible=tracks.visible.numpy()),
        "json": json.dumps(info).encode(),
    }


if __name__ == "__main__":
    sys.exit(main())
