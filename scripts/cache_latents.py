"""Encodes the clips of shards or folders once, so that training need not: VAE moments and text embeddings.

Writes shards of the same keys with KEY.latents.npz and KEY.text.npz in place of KEY.mp4; train with data=[OUTPUT].
Run it again after an interruption: shards that are there are not made again. To share the work, give every process its
`part`, e.g. part=0 parts=8.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from imageconductor import config as config_file


@dataclass
class CacheConfig:
    """What is encoded, with which networks, and where it goes."""

    data: list[str] = field(default_factory=list)  # shards or folders of clips, as the training settings'
    output: str = "cache"  # folder of the new shards
    model: str = "models/sprites"  # model folder whose autoencoder and text encoder the training will use
    size: tuple[int, int] = (384, 256)  # (W, H) that clips are resized and cropped to
    clips_per_shard: int = 200
    frames_per_batch: int = 32  # encoded at a time
    dtype: str = "float16"  # of what is stored; float32 doubles the size and is exact
    device: str | None = None  # None = cuda where there is one
    part: int = 0  # of `parts`, which this process makes
    parts: int = 1

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
    """Runs the command; 2 = bad input."""
    config, _ = config_file.command_line(CacheConfig, __doc__ or "", argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        cache(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(config.output)
    return 0


def cache(config: CacheConfig) -> None:
    """Writes the shards."""
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
    starts = range(0, len(records), config.clips_per_shard)
    mine = list(enumerate(starts))[config.part :: config.parts]
    bar = tqdm(total=sum(len(records[s : s + config.clips_per_shard]) for _, s in mine), unit="clip")
    skipped = 0
    for number, start in mine:
        shard = output / f"clips-{number:06d}.tar"
        chosen = records[start : start + config.clips_per_shard]
        if not shard.exists():
            temporary = shard.with_name(f".{shard.name}")
            with TarWriter(str(temporary)) as writer:
                for record in chosen:
                    try:
                        writer.write(_encoded(record, networks, config, device))
                    except Exception as error:  # Damage shows in as many ways as there are decoders.
                        skipped += 1
                        logging.warning("skipped %s: %s", record.key, error)
                    bar.update()
            temporary.rename(shard)
        else:
            bar.update(len(chosen))
    bar.close()
    if skipped:
        logging.warning("%d of %d clips could not be encoded", skipped, len(records))


def _encoded(record: Any, networks: Any, config: CacheConfig, device: str) -> dict[str, Any]:
    """One record of the cache, as WebDataset writes it."""
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

    def arrays(**values: Any) -> bytes:
        file = io.BytesIO()
        np.savez(file, **values)
        return file.getvalue()

    def stored(values: Any) -> Any:
        return values.float().cpu().numpy().astype(config.dtype)

    return {
        "__key__": record.key,
        "latents.npz": arrays(
            mean=stored(torch.cat([p.mean for p in posteriors])),
            std=stored(torch.cat([p.std for p in posteriors])),
            size=np.array(config.size),
        ),
        "text.npz": arrays(text=stored(text)),
        "tracks.npz": arrays(points=tracks.points.numpy().astype(np.float32), visible=tracks.visible.numpy()),
        "json": json.dumps(info).encode(),
    }


if __name__ == "__main__":
    sys.exit(main())
