"""Captions for footage that has none: BLIP-2 on a few frames (section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imageconductor.curation.curate_config import CurateConfig

_MAX_WORDS = 30


def describe(clips: Sequence[NDArray[np.uint8]], config: CurateConfig) -> list[str]:
    """Captions of clips (T, H, W, 3): the descriptions of `caption_frames` evenly spaced frames, joined by commas.

    A description that several frames share appears once. The frames of all clips form one batch.
    """
    if not clips:
        return []
    processor, network, device = load_blip2(config.blip2, config.device)
    pictures = []
    for clip in clips:
        chosen = np.linspace(0, len(clip) - 1, config.caption_frames + 2).round().astype(int)[1:-1]
        pictures += [Image.fromarray(clip[number]) for number in chosen]
    inputs = processor(images=pictures, return_tensors="pt")
    tokens = network.generate(**inputs.to(device, network.dtype), max_new_tokens=_MAX_WORDS, do_sample=False)
    texts = [" ".join(text.split()) for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    by_clip = (texts[i : i + config.caption_frames] for i in range(0, len(texts), config.caption_frames))
    return [", ".join(dict.fromkeys(text for text in own if text)) for own in by_clip]


@lru_cache(maxsize=1)
def load_blip2(name: str, device: str | None) -> tuple[Any, Any, str]:
    """BLIP-2's processor and network, loaded once per process, and their device.

    Raises:
        ValueError: The folder or hub name `name` holds no BLIP-2, or the device cannot be used.
    """
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    from imageconductor.devices import choose_device

    device = choose_device(device)
    try:
        processor: Any = Blip2Processor.from_pretrained(name)
        loaded: Any = Blip2ForConditionalGeneration.from_pretrained(
            name, dtype=_choose_dtype(device), output_loading_info=True
        )
        network, found = loaded
        if missing := sorted(found["missing_keys"]):  # transformers would fill them at random.
            raise ValueError(f"it lacks {len(missing)} weights, such as {missing[0]}")
    except (OSError, ValueError) as error:
        raise ValueError(f"BLIP-2 cannot be loaded from {name}: {str(error).strip().splitlines()[0]}") from error
    return processor, network.to(device).eval(), device


def _choose_dtype(device: str) -> Any:
    """The precision of BLIP-2's weights on a device; transformers keeps the Q-Former in float32."""
    import torch

    return torch.float16 if device.startswith("cuda") else torch.float32
