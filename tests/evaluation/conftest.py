"""Videos as another method would hand them in."""

from collections.abc import Callable
from pathlib import Path

import pytest

from imageconductor.evaluation.evaluate_config import EvaluateConfig
from imageconductor.evaluation.requests import build_requests
from imageconductor.sampling.video import upscale_for_viewing, write_mp4


@pytest.fixture(scope="session")
def write_videos() -> Callable[..., Path]:
    """A function that writes a video for each request, TASK/KEY.mp4: the true clip, or what `change` makes of it."""

    def write(folder: Path, config: EvaluateConfig, change=lambda request: request.truth) -> Path:
        assert config.size is not None
        assert config.num_frames is not None
        for name, task in config.tasks.items():
            for request in build_requests(config, task.requests, config.size, config.num_frames):
                path = folder / name / f"{request.key}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_mp4(path, upscale_for_viewing(change(request))[0], 8)
        return folder

    return write


@pytest.fixture(scope="session")
def exact(write_videos, tmp_path_factory) -> Path:
    """The true clips of three scenes in their own motions, 16 frames of 64 x 64."""
    folder = tmp_path_factory.mktemp("methods") / "exact"
    config = EvaluateConfig(videos=str(folder), motions="own", num_scenes=3, size=(64, 64), num_frames=16)
    return write_videos(folder, config)
