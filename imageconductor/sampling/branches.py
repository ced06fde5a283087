"""Which evaluations a guided step needs, and how they share work.

| depends on | evaluated |
|---|---|
| UNet encoder: (x_t, t, text), and with gates (boxes, first frame) | once per video and distinct `for_encoder` |
| image ControlNet: (t, text, image) | once per condition and distinct text, whatever the number of videos |
| motion ControlNet: (t, text, trajectories, adapters) | once per condition and distinct (text, adapters) |
| UNet decoder | once per video and branch; those of a single video together, as many at a time as it has texts |
| what stands before the first cross-attention: all but the text | once for both texts |

ControlNet outputs can be kept between calls (`residual_cache`): each row of the table whose key is kept is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from typing import Any, Literal, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from imageconductor.diffusion.guidance import (
    camera_free_guidance,
    classifier_free_guidance,
    mixed_guidance,
    scene_guidance,
    trajectory_guidance,
)
from imageconductor.models.adapters import merge_copy
from imageconductor.models.controlnets import ADAPTERS, Control, MotionControlNet, Residuals
from imageconductor.models.denoiser import Condition, Denoiser, add
from imageconductor.models.gating import Gating
from imageconductor.models.motion_unet import UNetFeatures
from imageconductor.models.shared_start import rows_repeated
from imageconductor.sampling.residual_cache import CallCache, Content

Text = Literal["uncond", "prompt", "no_scene"]
"""Negative prompt, prompt, and negative prompt without what the gates read."""

Adapters = tuple[str, ...] | None


@dataclass(frozen=True)
class Branch:
    """One evaluation of the model: its text, its motion control, and its weight in the guided prediction.

    Attributes:
        text: What the evaluation is given.
        adapters: Active LoRAs of the motion ControlNet, () for theta_0; None leaves that network out.
        weight: Coefficient; the coefficients of a step sum to 1.
    """

    text: Text
    adapters: Adapters
    weight: float


def plan(
    control: Control,
    guidance_scale: float,
    camera_free_scale: float | None = None,
    trajectory_guidance_scale: float = 1.0,
    has_trajectories: bool = True,
    mix: Mapping[Control, float] | None = None,
    scene_guidance_scale: float = 1.0,
) -> tuple[Branch, ...]:
    """Branches of one guided step; one whose coefficient is zero is not among them.

    | reads boxes and the gates' first frame | shared by |
    |---|---|
    | the UNet's first half | branches of the same text; "no_scene" has one of its own |
    | both ControlNets: no | "no_scene" has those of "uncond" |

    Args:
        control: What the trajectories move.
        guidance_scale: lambda_cfg, 1 = off.
        camera_free_scale: lambda_trajs of Eq. 5; None = classifier-free guidance under the control's adapter, as the
            release does.
        trajectory_guidance_scale: Away from what the model does without the trajectories, 1 = off.
        has_trajectories: False = plain image-to-video, without the motion ControlNet.
        mix: Weight of each motion control in `mixed_guidance`, in place of one control and the two scales above.
        scene_guidance_scale: Away from what the model does without boxes and the gates' first frame, 1 = off.

    Raises:
        ValueError: Camera-free guidance is asked for where it has no meaning, or beside a mix.
    """
    if mix is not None:
        if camera_free_scale is not None or trajectory_guidance_scale != 1:
            raise ValueError(
                f"mix has a weight for each control, so it excludes camera_free_scale ({camera_free_scale}) and "
                f"trajectory_guidance_scale ({trajectory_guidance_scale}); leave them out"
            )
        return _plan_mix(mix if has_trajectories else {}, guidance_scale, scene_guidance_scale)
    if camera_free_scale is not None and control is not Control.OBJECT:
        raise ValueError(
            f"camera_free_scale removes camera motion, so it goes with control 'object', not {control.value!r}"
        )
    adapters = ADAPTERS[control] if has_trajectories else None
    of_scene = () if has_trajectories and camera_free_scale is not None else adapters
    evaluations: list[tuple[Text, Adapters]] = [("uncond", adapters), ("prompt", adapters), ("no_scene", of_scene)]
    if has_trajectories:
        evaluations += [("uncond", ()), ("prompt", ()), ("prompt", None)]
    # Guidance is linear, so its value at the unit vectors is the weight of each evaluation.
    uncond, prompt, without, *others = torch.eye(len(evaluations)).double()
    weights = classifier_free_guidance(uncond, prompt, guidance_scale)
    if others:
        base_uncond, base, undrawn = others
        if camera_free_scale is not None:
            uncond = base_uncond
            weights = camera_free_guidance(uncond, base, prompt, guidance_scale, camera_free_scale)
        weights = trajectory_guidance(weights, prompt, undrawn, trajectory_guidance_scale)
    return _weighted(evaluations, scene_guidance(weights, uncond, without, scene_guidance_scale))


def _plan_mix(mix: Mapping[Control, float], guidance_scale: float, scene_guidance_scale: float) -> tuple[Branch, ...]:
    evaluations: list[tuple[Text, Adapters]] = [("uncond", None), ("no_scene", None), ("prompt", None)]
    evaluations.extend(("prompt", ADAPTERS[control]) for control in mix)
    uncond, without, undrawn, *drawn = torch.eye(len(evaluations)).double()
    weights = mixed_guidance(uncond, undrawn, drawn, guidance_scale, list(mix.values()))
    return _weighted(evaluations, scene_guidance(weights, uncond, without, scene_guidance_scale))


def _weighted(evaluations: Sequence[tuple[Text, Adapters]], weights: Tensor) -> tuple[Branch, ...]:
    pairs = zip(evaluations, weights.tolist(), strict=True)
    return tuple(Branch(*evaluation, weight) for evaluation, weight in pairs if abs(weight) > 1e-12)


@dataclass(frozen=True)
class _Part:
    """What the decoder reads for one branch; residuals are None where no ControlNet acts."""

    key: tuple[Text, Adapters]
    features: UNetFeatures
    residuals: Residuals | None


class MergedCopy:
    """The motion ControlNet with LoRAs merged, for all guided steps of a call that ask for the same; one at a time."""

    def __init__(self) -> None:
        self._names: Adapters = None
        self._network: MotionControlNet | None = None

    def of(self, network: MotionControlNet, names: tuple[str, ...]) -> MotionControlNet:
        """The copy under these LoRAs, made where the last one asked for had others."""
        if self._network is None or names != self._names:
            self._network = None  # no two of them at a time
            self._names, self._network = names, merge_copy(network, *names)
        return self._network


class GuidedDenoiser:
    """Guided prediction `denoise(x_t, t)` for P conditions, built once for all steps of a call.

    LoRAs that act wherever any do are merged into a copy of the motion ControlNet (docs/decisions.md, 29).

    Args:
        denoiser: The networks, the motion ControlNet with the adapters that the branches name.
        branches: From `plan`.
        conditions: For the negative prompt and the prompt, that of P videos; pictures may be of P*K videos, K for each.
        cache: Of ControlNet outputs, as this call uses it; None = all are evaluated.
        holds_residuals: Whether outputs of the ControlNets are kept for steps that reuse them.
        merged: The copy with merged LoRAs of other steps of the call; None = one of its own.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        branches: Sequence[Branch],
        conditions: Mapping[Text, Condition],
        cache: CallCache | None = None,
        holds_residuals: bool = False,
        merged: MergedCopy | None = None,
    ):
        self.denoiser, self.branches, self.cache = denoiser, branches, cache
        self.holds_residuals = holds_residuals
        self.texts: list[Text] = list(dict.fromkeys(branch.text for branch in branches))
        self._of_text: dict[Text, Condition] = {**conditions, "no_scene": conditions["uncond"].without_scene()}
        # What the ControlNets read, which see neither boxes nor the gates' first frame.
        self._control_texts: list[Text] = list(dict.fromkeys(_control_text(name) for name in self.texts))
        self._gating: tuple[tuple[int, int], Gating | None] | None = None
        self._stacked: dict[tuple[Text, ...], Condition] = {}
        self.conditions = self._stack(self.texts)
        self.num_conditions = len(self.conditions.text) // len(self.texts)
        # Branches under the same adapters are one evaluation of the motion ControlNet.
        self.groups = {branch.adapters: [b for b in branches if b.adapters == branch.adapters] for branch in branches}
        sets = [adapters for adapters in self.groups if adapters]
        self.merges = len(sets) == 1 and _can_merge(denoiser.motion_controlnet)
        self._merged_set = sets[0] if self.merges else None
        self._merged = merged or MergedCopy()
        self._contents: dict[tuple[Adapters, tuple[Text, ...]], Content] = {}
        self._held: dict[tuple[Any, ...], Residuals | None] = {}

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Weighted sum of the branches' predictions.

        Args:
            x_t: (P*K, C, T, h, w): K videos of each condition, next to each other.
            t: () int64.

        Returns:
            (P*K, C, T, h, w), eps or v, as the model predicts.
        """
        return self.guide(self.predict(x_t, t))

    def guide(self, predictions: Mapping[tuple[Text, Adapters], Tensor]) -> Tensor:
        """Weighted sum (P*K, C, T, h, w) float32 of what `predict` gave; large weights cancel in it."""
        branches = [branch for group in self.groups.values() for branch in group]
        first = predictions[branches[0].text, branches[0].adapters]
        total = torch.zeros_like(first, dtype=torch.float32)
        for branch in branches:
            total = total + branch.weight * predictions[branch.text, branch.adapters].float()
        return total

    def predict(
        self,
        x_t: Tensor,
        t: Tensor,
        time: float | None = None,
        also: Sequence[Adapters] = (),
        reuses: bool = False,
    ) -> dict[tuple[Text, Adapters], Tensor]:
        """Prediction (P*K, C, T, h, w) of each branch, by text and adapters.

        Args:
            x_t: (P*K, C, T, h, w): K videos of each condition, next to each other.
            t: () int64.
            time: t as a number of the host, which spares waiting for the device where a cache asks for it.
            also: Adapters under which the prompt is evaluated besides, where no branch does it.
            reuses: Whether held outputs of the ControlNets are taken, where there are some.
        """
        if not reuses:
            self._held.clear()
        videos, num_frames = x_t.shape[0], x_t.shape[2]
        per_condition = videos // self.num_conditions
        if self.cache is not None and time is None:
            time = float(t)

        # Boxes and the gates' first frame are the same in all branches of a text, so that these share the encoder.
        condition = self.conditions.for_encoder(per_condition)
        gating = self._gating_of(condition, num_frames)
        with rows_repeated(self.denoiser.unet, self._repetitions(self.texts, "input_frame")):
            features = self.denoiser.encode(x_t.repeat(len(self.texts), 1, 1, 1, 1), t, condition, gating)
        image = self._hold((), lambda: self._image_residuals(t, time))

        def rows_of(residuals: Residuals | None, texts: Sequence[Text], name: Text) -> Residuals | None:
            if residuals is None:
                return None
            count, row = len(residuals.mid) // (num_frames * len(texts)), texts.index(name)
            rows = residuals.videos(row * count, (row + 1) * count, num_frames)
            return rows.repeat_videos(videos // count, num_frames)

        def parts(evaluations: Sequence[tuple[Adapters, tuple[Text, ...]]]) -> Iterator[_Part]:
            for adapters, texts in evaluations:
                read: tuple[Text, ...] = tuple(dict.fromkeys(_control_text(name) for name in texts))
                motion = self._hold((adapters, read), partial(self._motion_residuals, adapters, read, t, time))
                for name in texts:
                    row, control = self.texts.index(name), _control_text(name)
                    of_image = rows_of(image, self._control_texts, control)
                    residuals = add(of_image, rows_of(motion, read, control))
                    yield _Part((name, adapters), features.videos(row * videos, (row + 1) * videos), residuals)

        # By themselves, the branches stay what they are, whatever else is asked for.
        return {
            key: output
            for evaluations in (self._evaluations, self._more_evaluations(also))
            for key, output in self._decode(parts(evaluations), max(1, len(self.texts) // videos))
        }

    def _hold(self, key: tuple[Any, ...], evaluate: Callable[[], Residuals | None]) -> Residuals | None:
        """What a ControlNet gave under this key before, or gives now."""
        if key in self._held:
            return self._held[key]
        residuals = evaluate()
        if self.holds_residuals:
            self._held[key] = residuals
        return residuals

    def _decode(self, parts: Iterator[_Part], count: int) -> Iterator[tuple[tuple[Text, Adapters], Tensor]]:
        """Predictions of the parts, `count` of them in a call; no more are put together before they are needed."""
        for _, alike in groupby(parts, lambda part: part.residuals is None):
            while together := list(islice(alike, count)):
                features = UNetFeatures.stack([part.features for part in together])
                given = [part.residuals for part in together if part.residuals is not None]
                outputs = self.denoiser.decode(features, Residuals.stack(given) if given else None)
                yield from zip([part.key for part in together], outputs.chunk(len(together)), strict=True)
                del together, given, features

    @property
    def _evaluations(self) -> list[tuple[Adapters, tuple[Text, ...]]]:
        """Texts that are evaluated under each set of adapters."""
        return [(adapters, tuple(branch.text for branch in group)) for adapters, group in self.groups.items()]

    def _more_evaluations(self, also: Sequence[Adapters]) -> list[tuple[Adapters, tuple[Text, ...]]]:
        """The prompt under further adapters, where no branch has it."""
        done = {adapters for adapters, group in self.groups.items() if any(one.text == "prompt" for one in group)}
        return [(adapters, ("prompt",)) for adapters in also if adapters not in done]

    def _gating_of(self, condition: Condition, num_frames: int) -> Gating | None:
        """What the gates do, which is the same in every step."""
        size = len(condition.text), num_frames
        if self._gating is None or self._gating[0] != size:
            self._gating = size, self.denoiser.gating(condition, num_frames)
        return self._gating[1]

    def _image_residuals(self, t: Tensor, time: float | None) -> Residuals | None:
        """Of all texts' conditions, stacked."""
        if self.cache is None or time is None or self.conditions.keyframes is None:
            return self._evaluate_image(t)
        key = None, tuple(self._control_texts)
        if key not in self._contents:
            self._contents[key] = self.cache.image_content([self._of_text[name] for name in self._control_texts])
        evaluate = cast(Callable[[], Residuals], lambda: self._evaluate_image(t))
        return self.cache.residuals(self._contents[key], time, evaluate)

    def _evaluate_image(self, t: Tensor) -> Residuals | None:
        if self.conditions.keyframes is None:
            return None
        condition = self._stack(self._control_texts)
        each = len(self.conditions.keyframes) // len(self.conditions.text)  # pictures of each condition
        condition = replace(condition, text=condition.text.repeat_interleave(each, dim=0))
        with rows_repeated(self.denoiser.image_controlnet, self._repetitions(self._control_texts, "keyframes", "mask")):
            return self.denoiser.image_residuals(t, condition)

    def _repetitions(self, texts: Sequence[Text], *names: str) -> int:
        """How often a batch of these texts repeats what it reads beside them; 1 if the conditions differ there."""
        fields = [[id(getattr(self._of_text[text], name)) for name in names] for text in texts]
        return len(texts) if all(one == fields[0] for one in fields) else 1

    def _motion_residuals(
        self, adapters: Adapters, texts: tuple[Text, ...], t: Tensor, time: float | None
    ) -> Residuals | None:
        """Of these texts' conditions, stacked, under the adapters; None where the motion ControlNet is left out."""
        if adapters is None or self.conditions.flow is None:
            return None
        is_merged = self.merges and adapters == self._merged_set

        def evaluate() -> Residuals:
            condition = self._stack(texts)
            denoiser, acting = (self.merged_denoiser, None) if is_merged else (self.denoiser, adapters)
            with rows_repeated(denoiser.motion_controlnet, self._repetitions(texts, "flow")):
                return denoiser.motion_residuals(t, condition, acting)

        if self.cache is None or time is None:
            return evaluate()
        key = adapters, texts
        if key not in self._contents:
            conditions = [self._of_text[name] for name in texts]
            self._contents[key] = self.cache.motion_content(conditions, adapters, is_merged)
        return self.cache.residuals(self._contents[key], time, evaluate)

    def prepare(self) -> None:
        """Does now what the first step would do once for all."""
        if self.merges:
            _ = self.merged_denoiser

    @property
    def merged_denoiser(self) -> Denoiser:
        """The networks with the copy in which LoRAs are merged; it is made when it is first evaluated."""
        copy = self._merged.of(self.denoiser.motion_controlnet, self._merged_set or ())
        return replace(self.denoiser, motion_controlnet=copy)

    def _stack(self, texts: Sequence[Text]) -> Condition:
        """The conditions of these texts one after the other, put together once for all steps."""
        texts = tuple(texts)
        if texts not in self._stacked:
            self._stacked[texts] = Condition.stack([self._of_text[name] for name in texts])
        return self._stacked[texts]


def _control_text(name: Text) -> Text:
    """The text that the ControlNets read in an evaluation."""
    return "uncond" if name == "no_scene" else name


def _can_merge(network: MotionControlNet) -> bool:
    """Whether LoRAs may be merged into a copy: one of a compiled network is not compiled, of an offloaded not moved."""
    modules = list(network.modules())
    hooked = any(hasattr(module, name) for module in modules for name in ("_hf_hook", "_diffusers_hook"))
    is_merged = any(isinstance(module, BaseTunerLayer) and module.merged for module in modules)
    return not (hooked or is_merged or network._compiled_call_impl)
