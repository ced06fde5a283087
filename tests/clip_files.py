"""Clip records of the sprite world, and the files that hold them."""

import io
import json
import tarfile

import imageio.v3 as iio

from imageconductor.data.clip_records import encode_tracks
from imageconductor.data.sprite_world import SpriteSet, SpriteWorldConfig
from imageconductor.data.sprites import SpriteDataset

SIZE = (32, 32)
WORLD = SpriteWorldConfig(size=SIZE, num_frames=8, kind=SpriteSet.MIXED, seed=3, grid=3)


def record(index, caption=None):
    """The files of a clip record, by extension."""
    clip = SpriteDataset(WORLD)[index]
    frames = clip["pixel_values"].permute(1, 2, 3, 0).numpy()
    video = iio.imwrite(
        "<bytes>", frames, extension=".mp4", plugin="FFMPEG", fps=8, codec="libx264", quality=10, macro_block_size=2
    )
    tracks = encode_tracks(clip["points"].numpy(), clip["visible"].numpy())
    info = {"caption": clip["caption"] if caption is None else caption}
    return {"mp4": video, "tracks.npz": tracks, "json": json.dumps(info).encode()}


def write_folder(folder, records):
    folder.mkdir(parents=True)
    for key, parts in records.items():
        for extension, content in parts.items():
            (folder / f"{key}.{extension}").write_bytes(content)
    return folder


def write_shard(path, records):
    with tarfile.open(path, "w") as tar:
        for key, parts in records.items():
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path
