"""ControlNet outputs that are kept between calls.

Neither ControlNet sees x_t, and the motion ControlNet sees no image. So kept outputs serve every seed; those of the
motion ControlNet serve another image, those of the image ControlNet another drawing. A key is made of contents:

| part | why |
|---|---|
| network and its weights | a LoRA that was trained further, or merged, is another network |
| LoRAs that act | camera, object, both or none |
| text, and pictures with their mask or the flow map | what the network reads, batch by batch as it is evaluated |
| timestep | |

A batch is one entry and not one entry a row, since a row's last bits may depend on the rows beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from imageconductor.models.controlnets import Residuals
from imageconductor.models.denoiser import Condition, Denoiser

Content = tuple[Hashable, ...]
"""All of a key but the timestep."""


@dataclass(frozen=True)
class _Entry:
    """What is kept, and where and in which precision it was computed."""

    kept: Residuals
    device: torch.device
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for x in self.kept.tensors)

    def restore(self) -> Residuals:
        return self.kept.apply(lambda x: x.to(self.device, self.dtype, non_blocking=True))


class ResidualCache:
    """Residuals of ControlNets for later calls of the pipeline: `pipe(..., residual_cache=cache)`.

    A call runs through its timesteps once, and the next one does so in the same order. When memory is short, the
    entry used least recently is therefore the one needed next, so entries that the running call can still use are
    never given up: what does not fit beside them is evaluated and not kept. Entries of other images, drawings, texts or
    timesteps make way, the least recently used first.

    Args:
        max_bytes: Memory that the kept tensors may take.
        device: Where they are kept; None = where they were computed. "cpu" is page-locked memory if that was a GPU.
        dtype: Precision in which they are kept; None = as computed, so that a video does not change by a bit. An entry
            is rounded when it is kept, not when it is evaluated.

    Attributes:
        hits: Evaluations of a ControlNet that were spared.
        misses: Evaluations that were not.
    """

    def __init__(
        self, max_bytes: int = 2 * 2**30, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
        self.max_bytes, self.device, self.dtype = max_bytes, device, dtype
        self.hits = self.misses = 0
        self._entries: dict[tuple[Content, float], _Entry] = {}  # the least recently used first
        self._contents: set[Content] = set()
        self._times: frozenset[float] = frozenset()

    @property
    def num_bytes(self) -> int:
        """Memory that the kept tensors take."""
        return sum(entry.num_bytes for entry in self._entries.values())

    def clear(self) -> None:
        """Gives up every entry; `hits` and `misses` begin again."""
        self._entries.clear()
        self.hits = self.misses = 0

    def begin_call(self, times: Sequence[float]) -> None:
        """Says that a call with these timesteps begins; entries that it does not ask for may make way from now on."""
        self._contents, self._times = set(), frozenset(times)

    def expect(self, content: Content) -> None:
        """Says that the running call will ask for this content at its timesteps."""
        self._contents.add(content)

    def residuals(self, content: Content, time: float, evaluate: Callable[[], Residuals]) -> Residuals:
        """What is kept for a content at a timestep; else the evaluation, which is kept if it fits."""
        key = content, time
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._entries[key] = entry  # as the most recently used
            self.hits += 1
            return entry.restore()
        self.misses += 1
        residuals = evaluate()
        if self._make_room(sum(x.numel() * (self.dtype or x.dtype).itemsize for x in residuals.tensors)):
            self._entries[key] = _Entry(residuals.apply(self._copy), residuals.mid.device, residuals.mid.dtype)
        return residuals

    def _make_room(self, size: int) -> bool:
        """Whether `size` bytes fit, once entries that the call cannot use have made way as far as needed."""
        excess = self.num_bytes + size - self.max_bytes
        given_up: list[tuple[Content, float]] = []
        for key, entry in self._entries.items():
            if excess <= 0:
                break
            if key[0] not in self._contents or key[1] not in self._times:
                given_up.append(key)
                excess -= entry.num_bytes
        if excess > 0:
            return False
        for key in given_up:
            del self._entries[key]
        return True

    def _copy(self, x: Tensor) -> Tensor:
        """A copy of its own: CUDA graphs write their next output where this one lies."""
        device = x.device if self.device is None else torch.device(self.device)
        is_pinned = device.type == "cpu" and x.is_cuda
        copy = torch.empty(x.shape, dtype=self.dtype or x.dtype, device=device, pin_memory=is_pinned)
        return copy.copy_(x.detach(), non_blocking=is_pinned)


class CallCache:
    """A cache as one call of the pipeline uses it: weights are looked at once, and each tensor is hashed once.

    Args:
        cache: Kept between calls.
        networks: Of the call.
        times: All timesteps of the call.
    """

    def __init__(self, cache: ResidualCache, networks: Denoiser, times: Sequence[float]):
        self.cache, self._networks = cache, networks
        self._weights: dict[str, str] = {}
        self._digests: dict[int, tuple[Tensor, str]] = {}  # with the tensor, so that its id stays its own
        cache.begin_call(times)

    def image_content(self, conditions: Sequence[Condition]) -> Content:
        """Of an evaluation of the image ControlNet for these conditions, stacked."""
        read = tuple(self._digest(x) for one in conditions for x in (one.text, one.keyframes, one.mask))
        return self._expect(("image", self._weights_of("image_controlnet"), *read))

    def motion_content(self, conditions: Sequence[Condition], adapters: Sequence[str], is_merged: bool) -> Content:
        """Of an evaluation of the motion ControlNet for these conditions, stacked."""
        read = tuple(self._digest(x) for one in conditions for x in (one.text, one.flow, one.has_flow))
        return self._expect(("motion", self._weights_of("motion_controlnet"), tuple(adapters), is_merged, *read))

    def residuals(self, content: Content, time: float, evaluate: Callable[[], Residuals]) -> Residuals:
        """As `ResidualCache.residuals`."""
        return self.cache.residuals(content, time, evaluate)

    def _expect(self, content: Content) -> Content:
        self.cache.expect(content)
        return content

    def _weights_of(self, name: str) -> str:
        if name not in self._weights:
            self._weights[name] = weights_token(getattr(self._networks, name))
        return self._weights[name]

    def _digest(self, x: Tensor | None) -> str | None:
        """Of dtype, shape, device and values."""
        if x is None:
            return None
        if id(x) not in self._digests:
            digest = hashlib.blake2b(f"{x.dtype} {tuple(x.shape)} {x.device}".encode(), digest_size=16)
            digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self._digests[id(x)] = x, digest.hexdigest()
        return self._digests[id(x)][1]


def weights_token(network: nn.Module) -> str:
    """Text that changes with the weights of a network, wherever they lie, and with the state of its LoRAs.

    It is made of each tensor's count of writes and of its norm, since writes through `.data` are not counted. Moving a
    network to another device and back does not change it.
    """
    named = list(_weights(network))
    norms = [torch.linalg.vector_norm(x, dtype=torch.float32) for _, x in named if x.is_floating_point()]
    values = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else []
    writes = [(name, tuple(x.shape), str(x.dtype), 0 if x.is_inference() else x._version) for name, x in named]
    layers = [cast(Any, module) for module in network.modules() if isinstance(module, BaseTunerLayer)]
    loras = [(sorted(layer.merged_adapters), sorted(layer.scaling.items())) for layer in layers]
    return hashlib.blake2b(repr((writes, values, loras)).encode(), digest_size=16).hexdigest()


def _weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name; those that accelerate offloads one by one lie in a map of the module's hook."""
    for path, module in network.named_modules():
        hook: Any = getattr(module, "_hf_hook", None)
        maps: list[Mapping[str, Tensor]] = [
            one.weights_map for one in getattr(hook, "hooks", [hook]) if getattr(one, "weights_map", None) is not None
        ]
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in own:
            found = next((one[name] for one in maps if tensor.is_meta and name in one), tensor)
            yield f"{path}.{name}", found
