"""Video files with known cuts and known motion, and a stand-in for CoTracker."""

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

SIZE = (192, 128)  # (W, H)


def texture(seed, size=SIZE, margin=200):
    """A picture with structure at several scales, `margin` pixels larger than the frame on each side."""
    random = np.random.default_rng(seed)
    width, height = size[0] + 2 * margin, size[1] + 2 * margin
    picture = np.zeros((height, width, 3), np.float32)
    for cell, weight in ((64, 60), (24, 45), (9, 30)):
        small = random.uniform(-1, 1, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        picture += weight * cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return (picture + random.uniform(90, 165, 3)).clip(0, 255).astype(np.uint8)


def pan(seed, num_frames, velocity, size=SIZE, margin=200):
    """(T, H, W, 3): a texture whose points move by `velocity` (x, y) pixels per frame."""
    picture = texture(seed, size, margin)
    centre = np.array([picture.shape[1], picture.shape[0]]) / 2 - 0.5
    middle = (num_frames - 1) / 2
    frames = []
    for t in range(num_frames):
        x, y = centre - np.asarray(velocity, float) * (t - middle)
        frames.append(cv2.getRectSubPix(picture, size, (float(x), float(y))))
    return np.stack(frames)


def write(path, frames, fps=25, times=None, codec="libx264", **options):
    """Writes a video file; `times` in milliseconds make its frame rate variable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "16", **options})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if times is not None:
                picture.pts, picture.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def write_sound(path):
    """Writes a file with sound but no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return path


def write_cotracker(clone: Path, dtype: str = "float32") -> None:
    """Writes a repository like CoTracker's, whose network has weights of `dtype` and buffers.

    The network moves every point by (1, 1) per frame, and from frame 1 on also by the value of the video's first pixel.
    """
    clone.mkdir()
    (clone / "hubconf.py").write_text(
        "import torch\n"
        "class Tracker(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.step = torch.nn.Linear(1, 2)\n"
        "        self.norm = torch.nn.BatchNorm1d(1, eps=0)\n"
        "        self.step.weight.data.fill_(1)\n"
        "        self.step.bias.data.fill_(0)\n"
        "    def forward(self, video, queries):\n"
        "        assert len(video) == 1\n"
        "        assert video.dtype == queries.dtype == self.step.weight.dtype\n"
        "        assert video.device == queries.device == self.step.weight.device\n"
        "        frames = torch.arange(video.shape[1], dtype=video.dtype, device=video.device)[None, :, None, None]\n"
        "        first = self.norm(video[:, 0, 0, 0, :1])[:, None, None]\n"
        "        tracks = queries[:, None, :, 1:] + self.step(frames)\n"
        "        return tracks + frames.clamp(max=1) * first, tracks[..., 0] < 30\n"
        "def cotracker3_offline():\n"
        f"    return Tracker().to(torch.{dtype})\n"
    )
