"""Encodes the clips of shards or folders once before training: VAE moments and text embeddings.

Writes shards with the same keys, but with KEY.latents.npz and KEY.text.npz in place of KEY.mp4; train with
data=[OUTPUT]. After an interruption, the same command continues with the missing shards. Several commands can divide
the work: each makes one `part`, e.g. part=0 parts=8, and the parts take the GPUs of a machine in turn.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from webdataset.writer import TarWriter

from imageconductor.checkpoints.assembly import sha256
from imageconductor.checkpoints.model_folder import locate_model, read_vae_scale_factor
from imageconductor.command_line import parse_command_line
from imageconductor.conditioning import Trajectories
from imageconductor.data.batches import scale_pixels
from imageconductor.data.clip_index import CACHE_RECORD, ClipList, find_clips, write_index
from imageconductor.data.clip_records import encode_tracks
from imageconductor.data.clips import fit_to_size, open_video
from imageconductor.files import atomic_path, check_record, check_writable, remove_partial, write_record
from imageconductor.models.networks import Encoders


@dataclass
class CacheConfig:
    """Settings of the cache."""

    data: list[str] = field(default_factory=list)  # shards or folders of clips, as in the training settings
    output: str = "cache"  # folder that receives the new shards
    model: str = "models/sprites"  # folder of the model that will be trained, whose encoders are used
    size: tuple[int, int] = (384, 256)  # (W, H) in pixels to which clips are resized and cropped
    clips_per_shard: int = 200  # clips in each new shard
    frames_per_batch: int = 32  # frames that the autoencoder encodes at a time
    dtype: str = "float16"  # of the stored arrays; float32 is exact at twice the size
    num_workers: int = 4  # processes that decode clips for the one that encodes them; 0 = none
    device: str | None = None  # of the networks, such as cuda:0; null = GPU number `part`, or the CPU if there is none
    part: int = 0  # number of the part that this command makes, from 0 to parts - 1
    parts: int = 1  # number of parts into which the work is divided

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data must name at least one shard or folder of clips")
        if self.dtype not in ("float16", "float32"):
            raise ValueError(f"dtype must be float16 or float32, got {self.dtype!r}")
        for name in ("clips_per_shard", "frames_per_batch", "parts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {self.num_workers}")
        if not 0 <= self.part < self.parts:
            raise ValueError(f"part must lie in 0..{self.parts - 1}, got {self.part}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if the machine failed, or 2 for bad input."""
    config, _ = parse_command_line(CacheConfig, __doc__ or "", argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        cache(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # A full GPU, or a decoding process that was killed.
        reason = str(error).strip().splitlines()[0]
        print(f"error: {reason}; once that is solved, the same command continues from here", file=sys.stderr)
        return 1
    print(config.output)
    return 0


def cache(config: CacheConfig) -> None:
    """Writes the missing shards of this command's part.

    Raises:
        FileNotFoundError: The clips, or a part of the model that is needed, are missing.
        ValueError: The clips are encoded already, the model cannot encode `size`, or the output cannot be written.
    """
    output = Path(config.output)
    check_writable(output)
    records = ClipList(find_clips(config.data))
    if records[0].is_cached:
        raise ValueError(f"data={config.data}: holds latents already")
    factor = read_vae_scale_factor(Encoders.check_folder(config.model))
    if config.size[0] % factor or config.size[1] % factor:
        raise ValueError(f"size must be in multiples of {factor} for this model, got {config.size}")
    output.mkdir(parents=True, exist_ok=True)
    record, made_with = output / CACHE_RECORD, _made_with(config, records)
    if is_new := not any(output.glob("clips-*.tar")):
        record.unlink(missing_ok=True)  # of shards that somebody has deleted
    check_record(record, made_with)
    if config.parts == 1:  # Otherwise other processes may be writing there.
        remove_partial(output)
    starts = list(enumerate(range(0, len(records), config.clips_per_shard)))
    mine = [
        (output / f"clips-{number:06d}.tar", range(start, min(start + config.clips_per_shard, len(records))))
        for number, start in starts[config.part :: config.parts]
    ]
    todo = [(shard, clips) for shard, clips in mine if not shard.exists()]
    total, remaining = (sum(len(clips) for _, clips in shards) for shards in (mine, todo))
    skipped: list[str] = []
    # The processes start before this one touches a GPU.
    decoded = iter(_load_decoded(records, [clip for _, clips in todo for clip in clips], config))
    encoders, device = Encoders.load(config.model), _choose_device(config)
    for network in encoders.modules.values():
        network.to(device)
    with tqdm(total=total, initial=total - remaining, unit="clip") as bar:
        for shard, clips in todo:
            with atomic_path(shard) as path, TarWriter(str(path)) as writer:
                for clip in itertools.islice(decoded, len(clips)):
                    if isinstance(clip, str):
                        skipped.append(clip)
                        logging.warning("skipped %s", clip)
                    else:
                        writer.write(_encode(clip, encoders, config, device))
                    bar.update()
                if is_new and not record.exists():
                    write_record(record, made_with)
            write_index(shard)
    if skipped and len(skipped) == remaining:
        raise ValueError(f"data={config.data}: none of the {remaining} clips can be decoded, such as {skipped[0]}")
    if skipped:
        logging.warning("%d of %d clips could not be decoded", len(skipped), remaining)


def _made_with(config: CacheConfig, records: ClipList) -> dict[str, Any]:
    """What the shards depend on: another model, size or list of clips makes other ones.

    Clips of the same names whose files have other places or sizes in the shards are other clips, such as those of a
    second curation of the same footage.
    """
    folder, clips = locate_model(config.model), hashlib.sha256()
    for shard in records.shards:
        clips.update(shard.clips.tobytes())
    weights = sorted(path for part in ("vae", "text_encoder") for path in folder.glob(f"{part}/*.safetensors"))
    return {
        "model": {f"{path.parent.name}/{path.name}": sha256(path) for path in weights},
        "size": list(config.size),
        "dtype": config.dtype,
        "clips_per_shard": config.clips_per_shard,
        "clips": f"{len(records)} clips, sha256 of names, offsets and sizes {clips.hexdigest()}",
        "num_shards": math.ceil(len(records) / config.clips_per_shard),
    }


def _choose_device(config: CacheConfig) -> str:
    """The device that the settings name, or one of this machine's GPUs in turn."""
    count = torch.cuda.device_count()
    return config.device or (f"cuda:{config.part % count}" if count else "cpu")


def _load_decoded(records: ClipList, clips: Sequence[int], config: CacheConfig) -> Iterable[DecodedClip | str]:
    """The decoded clips of these numbers, in order, or why one cannot be decoded."""
    return DataLoader(
        _DecodedClips(records, config.size),
        sampler=clips,
        batch_size=None,
        collate_fn=_keep,
        num_workers=config.num_workers,
        prefetch_factor=1 if config.num_workers else None,  # Waiting clips fill shared memory; containers have little.
    )


class DecodedClip(NamedTuple):
    """A clip at the size of the cache: pixels (3, T, H, W) uint8, and its tracks and JSON."""

    key: str
    pixels: Tensor
    tracks: Trajectories
    info: dict[str, Any]


class _DecodedClips(Dataset[Any]):
    """Clips by number, decoded."""

    def __init__(self, records: ClipList, size: tuple[int, int]):
        self.records, self.size = records, size

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> DecodedClip | str:
        record = self.records[number]
        try:
            info, video, (points, visible) = record.info(), open_video(record), record.tracks()
            if points.shape[1] != len(video):
                raise ValueError(f"{len(video)} frames but tracks over {points.shape[1]}")
            pixels, tracks = fit_to_size(video.frames(range(len(video))), points, visible, self.size)
        except Exception as error:  # Decoders report damage by many kinds of exceptions.
            return f"{record.key}: {error}"
        return DecodedClip(record.key, pixels, tracks, info)


def _keep(clip: Any) -> Any:
    return clip


@torch.no_grad()
def _encode(clip: DecodedClip, encoders: Encoders, config: CacheConfig, device: str) -> dict[str, Any]:
    """One record of the cache, in the form that WebDataset writes."""
    batches = clip.pixels.transpose(0, 1).split(config.frames_per_batch)
    posteriors = [encoders.vae.encode(scale_pixels(batch.to(device))).latent_dist for batch in batches]
    text = encoders.text_encoder(encoders.tokenize([clip.info["caption"]]).to(device)).last_hidden_state[0]

    def to_npz(**values: Any) -> bytes:
        file = io.BytesIO()
        np.savez(file, **values)
        return file.getvalue()

    def to_numpy(values: Any) -> Any:
        return values.float().cpu().numpy().astype(config.dtype)

    tracks = clip.tracks
    return {
        "__key__": clip.key,
        "latents.npz": to_npz(
            mean=to_numpy(torch.cat([p.mean for p in posteriors])),
            std=to_numpy(torch.cat([p.std for p in posteriors])),
            size=np.array(config.size),
        ),
        "text.npz": to_npz(text=to_numpy(text)),
        "tracks.npz": encode_tracks(tracks.points.numpy(), tracks.visible.numpy()),
        "json": json.dumps(clip.info).encode(),
    }


if __name__ == "__main__":
    sys.exit(main())
