"""Videos as another method would hand them in, and a CLIP with random weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from imageconductor.evaluation.drawn_motion.config import EvaluateConfig
from imageconductor.evaluation.drawn_motion.requests import build_requests
from imageconductor.models.small_model import build_tokenizer
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


def write_clip(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Saves a CLIP for pictures of 32 px and texts of 12 tokens, in the files of the real ones."""
    tokenizer = build_tokenizer(["a red circle"], 12)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**small, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 12},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def save_clip() -> Callable[..., Path]:
    """`write_clip`, for tests that cannot import it."""
    return write_clip
