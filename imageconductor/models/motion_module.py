"""The temporal transformer of AnimateDiff, normalised the way AnimateDiff and the published weights do."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from einops import rearrange
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

MOST_SEQUENCES = 32768
"""Sequences that temporal attention takes at a time: CUDA's fused kernels refuse 65536 (pytorch, issue 146704).

There is one for each place of each video under each text: 512x512 has 8192 a video under two texts.
"""


class TemporalBlock(BasicTransformerBlock):
    """diffusers' block of attention and feed-forward layers, for any number of sequences."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As diffusers' class without a second input; (N, T, C), of which each sequence is computed by itself."""
        if len(hidden_states) <= MOST_SEQUENCES:
            return super().forward(hidden_states, *args, **kwargs)
        parts = hidden_states.split(MOST_SEQUENCES)
        return torch.cat([super(TemporalBlock, self).forward(part, *args, **kwargs) for part in parts])


class MotionModule(AnimateDiffTransformer3D):
    """Temporal self-attention whose group norm sees each frame alone.

    diffusers' class takes the statistics across frames, which is off by 20-50 % on the published weights, and calls
    its projections by the keyword `input`, which peft's LoRA layers do not take. Parameters and their names are the
    same.
    """

    is_bypassed = False  # True: the features pass unchanged, see `motion_modules_bypassed`
    first_frame_warp: nn.Module | None  # acts first; of the up path of small UNets that have it

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        timestep: None = None,
        class_labels: None = None,
        num_frames: int = 1,
        cross_attention_kwargs: None = None,
    ) -> Tensor:
        """Features with information exchanged between frames.

        Args:
            hidden_states: (B*T, C, h, w), the frames of one video next to each other.
            encoder_hidden_states: Not read, nor are the rest; diffusers' blocks pass them, some by position.
            timestep: Not read.
            class_labels: Not read.
            num_frames: T.
            cross_attention_kwargs: Not read.

        Returns:
            (B*T, C, h, w).
        """
        del encoder_hidden_states, timestep, class_labels, cross_attention_kwargs
        if self.is_bypassed:
            return hidden_states
        if self.first_frame_warp is not None:
            hidden_states = self.first_frame_warp(hidden_states, num_frames)
        height, width = hidden_states.shape[-2:]
        sequence = rearrange(self.norm(hidden_states), "(b t) c h w -> (b h w) t c", t=num_frames)
        sequence = self.proj_in(sequence)
        for block in self.transformer_blocks:
            sequence = block(sequence)
        sequence = self.proj_out(sequence)
        return hidden_states + rearrange(sequence, "(b h w) t c -> (b t) c h w", h=height, w=width)


def adopt_motion_modules_(model: nn.Module, norm_num_groups: int | None = None) -> None:
    """Turns every motion module that diffusers built inside `model` into ours, in place and with its weights.

    Args:
        model: A diffusers motion UNet or SparseCtrl network.
        norm_num_groups: Groups of the motion modules' norm; None keeps those of the spatial layers.

    Raises:
        ValueError: The groups do not divide a motion module's channels.
    """
    for name, module in model.named_modules():
        if not isinstance(module, AnimateDiffTransformer3D):
            continue
        # The classes differ in `forward` alone, so the instance can change class and keep its parameters.
        module.__class__ = MotionModule
        cast(Any, module).first_frame_warp = None
        _split_blocks_(module)
        if norm_num_groups is not None:
            channels = module.norm.num_channels
            if channels % norm_num_groups:
                raise ValueError(f"{name}: {channels} channels cannot be normalised in {norm_num_groups} groups")
            module.norm.num_groups = norm_num_groups


class TemporalTransformer(TransformerTemporalModel):
    """ModelScope's counterpart of a motion module, which can be bypassed."""

    is_bypassed = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' class, for callers that take a tuple; what gates do is not for temporal attention."""
        kwargs.pop("cross_attention_kwargs", None)
        return (hidden_states,) if self.is_bypassed else super().forward(hidden_states, *args, **kwargs)


class TemporalConvolution(TemporalConvLayer):
    """ModelScope's convolution over frames, which can be bypassed."""

    is_bypassed = False

    def forward(self, hidden_states: Tensor, num_frames: int = 1) -> Tensor:
        """As diffusers' class."""
        return hidden_states if self.is_bypassed else super().forward(hidden_states, num_frames)


def adopt_temporal_layers_(model: nn.Module) -> None:
    """Turns the temporal layers of a `UNet3DConditionModel` into ours, in place and with their weights."""
    ours = {TransformerTemporalModel: TemporalTransformer, TemporalConvLayer: TemporalConvolution}
    for module in list(model.modules()):
        module.__class__ = ours.get(type(module), type(module))
        if isinstance(module, TemporalTransformer):
            _split_blocks_(module)


def _split_blocks_(module: nn.Module) -> None:
    for block in cast(Any, module).transformer_blocks:
        block.__class__ = TemporalBlock


_TEMPORAL = (MotionModule, TemporalTransformer, TemporalConvolution)


@contextmanager
def motion_modules_bypassed(network: nn.Module, bypasses: bool = True) -> Iterator[None]:
    """Inside the block all temporal layers change nothing: a video UNet is the image model that it was made from.

    MotionDirector trains appearance on single frames in this way. A motion module is no identity at one frame.
    """
    modules: list[Any] = [module for module in network.modules() if isinstance(module, _TEMPORAL)]
    before = [module.is_bypassed for module in modules]
    for module in modules:
        module.is_bypassed = bypasses
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.is_bypassed = value


LAYERS = (  # lists of layers in diffusers' blocks
    "resnets",
    "attentions",
    "motion_modules",
    "temp_convs",
    "temp_attentions",
    "downsamplers",
    "upsamplers",
)


def run_block(model: Any, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Output of one block of `model`, each of whose layers is run as by `run_layer`."""
    if not (model.checkpoint_blocks and torch.is_grad_enabled()):
        return block(*args, **kwargs)
    if torch.compiler.is_compiling():
        return checkpoint(block, *args, use_reentrant=False, **kwargs)
    layers = [layer for name in LAYERS for layer in getattr(block, name, None) or ()]
    for layer in layers:
        layer.forward = functools.partial(run_layer, model, layer, layer.forward)
    try:
        return block(*args, **kwargs)
    finally:
        for layer in layers:
            del layer.forward


def run_layer(model: Any, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Output of one layer's `forward`, computed again in the backward pass where `model.checkpoint_blocks` says so.

    It is computed again as it is now: with the LoRAs that act, those that learn, and the temporal layers in place. Only
    the inputs of layers are kept then, about a third of what is kept where whole blocks are computed again.
    """
    if not (model.checkpoint_blocks and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    again = None if torch.compiler.is_compiling() else _remember(layer)
    contexts = noop_context_fn if again is None else lambda: (nullcontext(), again())
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _remember(layer: nn.Module) -> Callable[[], Any] | None:
    """A context that puts a layer into its present state, and then back into that in which it was found.

    None for a layer whose state never changes: without LoRAs, and with its temporal layers in place.
    """
    modules: list[Any] = list(layer.modules())
    places = [(m, name) for m in modules for name in _STATE if isinstance(m, (BaseTunerLayer, *_TEMPORAL))]
    places = [(m, name) for m, name in places if hasattr(m, name)]
    places += [(parameter, "requires_grad") for parameter in layer.parameters()]
    state = [(owner, name, getattr(owner, name)) for owner, name in places]
    if not any(name != "requires_grad" and (name != "is_bypassed" or value) for _, name, value in state):
        return None

    @contextmanager
    def again() -> Iterator[None]:
        found = [(owner, name, getattr(owner, name)) for owner, name in places]
        _put(state)
        try:
            yield
        finally:
            _put(found)

    return again


_STATE = ("_disable_adapters", "_active_adapter", "is_bypassed")  # of peft's layers, and of temporal layers


def _put(state: Sequence[tuple[Any, str, Any]]) -> None:
    for owner, name, value in state:
        setattr(owner, name, value)


def attention_arguments(text: Tensor, gating: Any = None) -> dict[str, Any]:
    """Keyword arguments of diffusers' blocks with spatial attention: text (B or B*T, L, D), and what gates do."""
    arguments: dict[str, Any] = {"encoder_hidden_states": text}
    if gating is not None:
        arguments["cross_attention_kwargs"] = {"gligen": {"objs": gating}}  # what diffusers hands to the fuser
    return arguments


def run_down_path(
    model: Any, hidden: Tensor, emb: Tensor, attends: dict[str, Any], num_frames: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Last features and all skip connections of a down path; UNet and ControlNets have the same.

    `attends` are the `attention_arguments` of its blocks with attention.
    """
    skips: tuple[Tensor, ...] = (hidden,)
    for block in model.down_blocks:
        arguments = attends if getattr(block, "has_cross_attention", False) else {}
        hidden, outputs = run_block(model, block, hidden_states=hidden, temb=emb, num_frames=num_frames, **arguments)
        skips += outputs
    return hidden, skips


def signature_with(base: Any, **extra: Any) -> inspect.Signature:
    """Signature of `base` with further keyword arguments and their defaults.

    diffusers reads a model's config keys from the signature of `__init__`, so a subclass that only adds a setting
    has to show the arguments of its parent as well.
    """
    parameters = [p for p in inspect.signature(base).parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in extra.items()]
    return inspect.Signature([*parameters, *added])


class Float32Attention(AttnProcessor2_0):
    """Attention computed in float32 inside an autocast region.

    On CPUs the bf16 backward pass of fused attention takes six times as long as the float32 one, and was 45 % of a
    training step of the bundled model; everything around it is faster in bf16.
    """

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of diffusers' processor with `scaled_dot_product_attention` in float32."""
        with _Float32Sdpa():
            return super().__call__(attn, hidden_states, *args, **kwargs)


class _Float32Sdpa(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (x.float() for x in args[:3])
        with torch.autocast(query.device.type, enabled=False):
            return func(query, key, value, *args[3:], **kwargs).to(args[0].dtype)
