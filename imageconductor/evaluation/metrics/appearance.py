"""Metrics of the frames: SSIM of the first one, similarities by CLIP and DINO, and PickScore of all."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from imageconductor.evaluation.learned_motion.config import FramePairs

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # mean of the pixels that CLIP was trained on
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pixels that DINO was trained on


def ssim(image: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Structural similarity of two images (H, W, 3), at most 1, with torchmetrics' 11x11 Gaussian window.

    Raises:
        ValueError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ValueError("SSIM needs torchmetrics: pip install -e '.[metrics]'") from error
    ours, other = (
        torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)[None].double() / 255 for x in (image, reference)
    )
    value: Any = structural_similarity_index_measure(ours, other, data_range=1.0)
    return float(value)


class ClipEncoder:
    """Unit vectors of frames and prompts, by a CLIP model of transformers that the user has.

    Frames are resized (bicubic, shorter side), centre-cropped to the network's size and normalised as CLIP was trained.
    Weights of any precision are computed with in float32.

    Args:
        name: Folder or hub name of a CLIP model with tokenizer, e.g. openai/clip-vit-large-patch14.
        device: Device of the network.
        setting: Name of the setting in messages.

    Raises:
        FileNotFoundError: There is no such model.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu", setting: str = "clip"):
        from transformers import AutoTokenizer, CLIPModel

        try:
            loaded: Any = CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
            model, found = loaded
            if missing := sorted(found["missing_keys"]):  # transformers would fill them at random.
                raise ValueError(f"it lacks {len(missing)} weights, such as {missing[0]}")
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise FileNotFoundError(f"{setting}: no CLIP model with tokenizer at {name}: {reason}") from error
        self.device = torch.device(device)
        self.model: Any = model.to(self.device).eval()

    @torch.inference_mode()
    def embed_frames(self, frames: NDArray[np.uint8]) -> Tensor:
        """(T, D) of frames (T, H, W, 3)."""
        pixels = _crop_and_normalise(frames, self.model.config.vision_config.image_size, _CLIP_MEAN, _CLIP_STD)
        vision = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return F.normalize(self.model.visual_projection(vision), dim=-1)

    @torch.inference_mode()
    def embed_text(self, prompt: str) -> Tensor:
        """(1, D)."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            [prompt], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        text = self.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return F.normalize(self.model.text_projection(text), dim=-1)


class DinoEncoder:
    """Unit vectors of frames, by a vision transformer of DINO or DINOv2 that the user has.

    Frames are resized (bicubic, shorter side), centre-cropped to the network's size and normalised as ImageNet's. A
    frame's vector is the network's output at the class token.

    Args:
        name: Folder or hub name, e.g. facebook/dino-vits16.
        device: Device of the network.

    Raises:
        FileNotFoundError: There is no such model.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        from transformers import AutoModel

        try:
            loaded: Any = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
            model, found = loaded
            # A pooler that no checkpoint of DINO has is not used.
            if missing := sorted(key for key in found["missing_keys"] if not key.startswith("pooler.")):
                raise ValueError(f"it lacks {len(missing)} weights, such as {missing[0]}")
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"dino: no model at {name}: {str(error).strip().splitlines()[0]}") from error
        self.device = torch.device(device)
        self.model: Any = model.to(self.device).eval()

    @torch.inference_mode()
    def embed_frames(self, frames: NDArray[np.uint8]) -> Tensor:
        """(T, D) of frames (T, H, W, 3)."""
        pixels = _crop_and_normalise(frames, self.model.config.image_size, _IMAGENET_MEAN, _IMAGENET_STD)
        return F.normalize(self.model(pixel_values=pixels.to(self.device)).last_hidden_state[:, 0], dim=-1)


class FrameEncoder(Protocol):
    """Unit vectors of frames."""

    def embed_frames(self, frames: NDArray[np.uint8]) -> Tensor:
        """(T, D) of frames (T, H, W, 3)."""
        ...


class ClipScorer(ClipEncoder):
    """CLIP similarities of a video: of the prompt and each frame, and of its frames.

    Args:
        name, device: As `ClipEncoder`.
        pairs: The frames whose similarity is averaged, see `frame_consistency`.

    Raises:
        FileNotFoundError: There is no such model.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu", pairs: FramePairs = "consecutive"):
        super().__init__(name, device)
        self.pairs: FramePairs = pairs

    def __call__(self, frames: NDArray[np.uint8], prompt: str) -> tuple[float, float]:
        """Text similarity and frame consistency of frames (T, H, W, 3): mean cosines in [-1, 1]."""
        images = self.embed_frames(frames)
        return float((images @ self.embed_text(prompt).T).mean()), frame_consistency(images, self.pairs)


class PickScorer(ClipEncoder):
    """PickScore: which picture people would prefer for a prompt; 20 to 22 is usual.

    Args:
        name: Folder of PickScore_v1, a CLIP ViT-H/14 that was trained further on people's choices.
        device: Device of the network.

    Raises:
        FileNotFoundError: There is no such model.

    Source: Kirstain et al., Pick-a-Pic (2023); the model card of yuvalkirstain/PickScore_v1, where the score is
    `logit_scale.exp()`, about 100, times the cosine of text and picture, truncated at 77 tokens.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        super().__init__(name, device, "pick_score")

    @torch.inference_mode()
    def __call__(self, frames: NDArray[np.uint8], prompt: str) -> float:
        """Mean over frames (T, H, W, 3) of their scores."""
        cosines = self.embed_frames(frames) @ self.embed_text(prompt).T
        return float(self.model.logit_scale.exp() * cosines.mean())


def first_frame_fidelity(encoder: FrameEncoder, frames: NDArray[np.uint8], first: NDArray[np.uint8]) -> float:
    """Mean cosine, in [-1, 1], of frames (T, H, W, 3) with the first frame (1, H, W, 3) that they were made from.

    Source: FFF-CLIP and FFF-DINO of SMCD (arXiv 2403.10179).
    """
    return float((encoder.embed_frames(frames) @ encoder.embed_frames(first).T).mean())


def _crop_and_normalise(
    frames: NDArray[np.uint8], side: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """(T, 3, side, side) of frames (T, H, W, 3)."""
    height, width = frames.shape[1:3]
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    pixels = pixels[..., top : top + side, left : left + side]
    shift, spread = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (pixels - shift) / spread


def frame_consistency(images: Tensor, pairs: FramePairs = "consecutive") -> float:
    """Mean cosine of pairs of frames, in [-1, 1]; NaN of a single frame.

    Args:
        images: (T, D), unit vectors of the frames.
        pairs: "consecutive": each frame and the next. "all": every two different frames, which tells slow drift too.
    """
    if pairs == "consecutive":
        return float((images[1:] * images[:-1]).sum(-1).mean())
    others = ~torch.eye(len(images), dtype=torch.bool, device=images.device)
    return float((images @ images.T)[others].mean())
