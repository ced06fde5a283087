"""Layers that run once for several texts: what stands before the first cross-attention sees no text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


@contextmanager
def rows_repeated(network: nn.Module, count: int) -> Iterator[None]:
    """Inside the block a batch is `count` times the same but for its text, one repetition after the other.

    Layers before the first cross-attention then run on the first repetition, and their output is repeated: at full
    size the first residual block and the first self-attention, those with the most tokens. A compiled network runs as
    it is.

    Args:
        network: A UNet or ControlNet of this package.
        count: Repetitions; 1 changes nothing.
    """
    layers = [] if count == 1 or _is_compiled(network) else list(_layers_before_text(network))
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_run_once, layer.forward, count)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:  # a hook of accelerate's
                layer.forward = forward


def _is_compiled(network: Any) -> bool:
    return network._compiled_call_impl is not None or "encode" in vars(network)


def _layers_before_text(network: Any) -> Iterator[Any]:
    """In the order in which they run; cheap ones, such as the norms inside a transformer, are not among them."""
    if hasattr(network, "controlnet_cond_embedding"):
        yield network.controlnet_cond_embedding
    for block in network.down_blocks:
        attentions = getattr(block, "attentions", None)
        if attentions:
            yield block.resnets[0]
            yield attentions[0].proj_in
            yield attentions[0].transformer_blocks[0].attn1
            return
        for name in ("resnets", "temp_convs", "motion_modules", "downsamplers"):
            yield from getattr(block, name, None) or ()


def _run_once(forward: Callable[..., Tensor], count: int, *args: Any, **kwargs: Any) -> Tensor:
    def first(value: Any) -> Any:
        return value[: len(value) // count] if isinstance(value, Tensor) else value

    output = forward(*map(first, args), **{name: first(value) for name, value in kwargs.items()})
    return output.repeat(count, *[1] * (output.ndim - 1))
