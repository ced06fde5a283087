"""SMCD's two stages: gates for object boxes, and gates for the first frame.

| stage | learns | frozen | sees |
|---|---|---|---|
| 1 object_gates | object gates, position network | base | single frames, motion modules bypassed; or clips |
| 2 scene_gates | scene gates, first-frame encoder, input branch; LoRA of motion modules | base, object gates | clips |

Both minimise the denoising loss. Gates begin closed, and until they open, only their scalars have a gradient: these
learn at a rate of their own, and how far they are open is logged.

Source: SMCD, "Animate Your Motion" (arXiv 2403.10179); docs/decisions.md, 39.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imageconductor.checkpoints.model_folder import (
    SCENE_LORA_FOLDER,
    check_adapters,
    check_controlnets,
    check_shape,
    find_scene_lora,
    load_adapters,
    read_gate_config,
    read_sampling_defaults,
)
from imageconductor.checkpoints.personalise import read_motion_lora
from imageconductor.conditioning.boxes import Boxes, stack_boxes
from imageconductor.conditioning.flow_map import flow_map
from imageconductor.data.batches import Samples, send
from imageconductor.models.adapters import (
    activate,
    add_adapter,
    freeze_all_but_adapter,
    lora_targets,
    save_for_diffusers,
)
from imageconductor.models.controlnets import ADAPTERS, Control
from imageconductor.models.denoiser import Condition
from imageconductor.models.gated_attention import ObjectGates, SceneGates
from imageconductor.models.gating import gate_scalars, gate_values
from imageconductor.models.lora_files import read_lora
from imageconductor.models.motion_module import motion_modules_bypassed
from imageconductor.models.networks import Networks, load_network
from imageconductor.training import samples
from imageconductor.training.stage_configs import BoxStageConfig, ObjectGatesConfig, SceneGatesConfig
from imageconductor.training.stages.base import ParameterGroup, Stage, draw_kept
from imageconductor.training.stages.gate_settings import check_gates, read_gates, settings_of_fresh_gates

MOTION = "motion"


class BoxStage(Stage):
    """A stage that sees boxes."""

    dropouts = ("text_dropout", "image_dropout", "boxes_dropout", "tracks_prob")
    can_be_split = False  # A gate is called by the UNet and not by its network, and its scalars have no dimension.

    def __init__(self, networks: Networks, config: BoxStageConfig):
        super().__init__(networks, config)
        networks.freeze()
        self.object_gates, self.scene_gates = networks.object_gates, networks.scene_gates
        self.boxes_dropout, self.tracks_prob = config.boxes_dropout, config.tracks_prob
        if self.tracks_prob:
            load_adapters(self.motion_controlnet, config.model)
            activate(self.motion_controlnet, *_usual_adapters(config.model))
        self.gate_learning_rate = config.gate_learning_rate
        self._features: dict[str, Tensor] = {}  # of class names

    @classmethod
    def check(cls, config: Any) -> None:
        """As `Stage.check`, but that ControlNets are needed for tracks alone; objects of sprites must have room."""
        if config.tracks_prob:
            check_controlnets(config.model, f"tracks_prob={config.tracks_prob}")
            check_adapters(config.model, _usual_adapters(config.model), f"tracks_prob={config.tracks_prob}")
        if not config.data and config.world.max_sprites > config.max_objects:
            raise ValueError(
                f"clips have up to world.max_sprites={config.world.max_sprites} objects, more than "
                f"max_objects={config.max_objects}"
            )
        check_shape(config.model, config.clip_size, config.clip_frames)

    @classmethod
    def build_samples(cls, config: BoxStageConfig) -> Samples:
        """Clips with boxes; raises as `samples.build_box_samples`."""
        return samples.build_box_samples(config)

    @classmethod
    def read_held_out(cls, config: BoxStageConfig, previewed: int | None = None) -> list[dict[str, Any]]:
        """The first samples that no step sees; see `samples.read_held_out_boxes`."""
        return samples.read_held_out_boxes(config, previewed)

    def begin(self, data: Any) -> None:
        """Refuses class names that the text encoder cannot read, as far as they are known before clips are read.

        Raises:
            ValueError: There is one; names a clip that has it.
        """
        for name, key in samples.known_class_names(data.samples).items():
            self.networks.check_names([name], f"clip {key}")

    def encode_boxes(self, batch: dict[str, Any], generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Fields of a `Condition`: boxes (B, T, N, 4), present (B, T, N), names (B, N, D).

        Of stages that draw tracks, `flow` and `has_flow` as well.

        Args:
            batch: With `boxes`, `Boxes` of each clip, and their `key`.
            generators: One a clip; they draw whether all of its objects are absent, and which have tracks.

        Raises:
            ValueError: The text encoder cannot read a class name; names the clip.
        """
        clips: Sequence[Boxes] = batch["boxes"]
        told = {
            name: self._name_feature(name, k)
            for k, boxes in zip(batch["key"], clips, strict=True)
            for name in boxes.names
        }
        fields = stack_boxes(clips, told, self.text_encoder.config.hidden_size)
        kept = draw_kept(self.boxes_dropout, generators, fields["boxes"])[:, None]
        drawn: dict[str, Tensor] = {}
        if self.tracks_prob:
            drawn, has_box = self._draw_tracks(clips, fields["names"].shape[1], generators)
            kept = kept * has_box
        fields = {
            "boxes": fields["boxes"] * kept[:, None, :, None],
            "present": fields["present"] * kept[:, None],
            "names": fields["names"] * kept[..., None],
        }
        return drawn | {name: send(x, self.unet.device) for name, x in fields.items()}

    def _draw_tracks(
        self, clips: Sequence[Boxes], count: int, generators: Sequence[torch.Generator]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Fields flow and has_flow of a `Condition`, and (B, N) 0 for objects that have a track in place of a box."""
        has_box = torch.ones(len(clips), count)
        points = torch.zeros(*has_box.shape, clips[0].num_frames, 2)
        visible = torch.zeros(points.shape[:3], dtype=torch.bool)
        for n, (boxes, generator) in enumerate(zip(clips, generators, strict=True)):
            if torch.rand((), generator=generator) >= self.tracks_prob:
                continue
            centres, told = boxes.centres(), torch.randint(3, (boxes.num_objects,), generator=generator)
            points[n, : len(told)] = centres.points  # told: 0, a box; 1, both; 2, a track
            visible[n, : len(told)] = centres.visible & (told > 0)[:, None]
            has_box[n, : len(told)] *= told < 2
        sent = send(points, self.unet.device), send(visible, self.unet.device)
        with torch.autocast(self.unet.device.type, enabled=False):  # Flow maps are pixels; half precision rounds them.
            flow = flow_map(*sent, clips[0].size, self.motion_controlnet.flow_convention)
        return {"flow": flow, "has_flow": sent[1].flatten(1).any(1)}, has_box

    def _name_feature(self, name: str, key: str) -> Tensor:
        """(D,) on the CPU, of a class name in the clip `key`."""
        if name not in self._features:
            self.networks.check_names([name], f"clip {key}")
            (self._features[name],) = self.networks.encode_names([name])
        return self._features[name]

    def measures(self) -> dict[str, float]:
        """The mean of |tanh(scalar)| of each kind of gates: how far they are open."""
        found = {"object": self.object_gates, "scene": self.scene_gates}
        values = {name: gate_values(network).values() for name, network in found.items() if network is not None}
        return {f"{name}_gates": sum(map(abs, own)) / len(own) for name, own in values.items() if own}

    def trainable(self) -> dict[str, ParameterGroup]:
        """What learns; the gates' scalars are a group with a learning rate of their own."""
        networks = [network for network in (self.object_gates, self.scene_gates) if network is not None]
        scalars = {id(p) for network in networks for p in gate_scalars(network).values()}
        learning = {name: p for name, p in self.named_parameters() if p.requires_grad}
        chosen = {name: p for name, p in learning.items() if id(p) in scalars}
        others = {name: p for name, p in learning.items() if id(p) not in scalars}
        return {self.name: ParameterGroup(others), "gates": ParameterGroup(chosen, self.gate_learning_rate, 0.0)}


class ObjectGatesStage(BoxStage):
    """Stage 1: boxes of single frames, or of clips for a base that was trained on nothing else."""

    name = "object_gates"
    Config = ObjectGatesConfig

    def __init__(self, networks: Networks, config: ObjectGatesConfig):
        networks.object_gates = _object_gates(networks, config)
        networks.scene_gates = None
        if not config.first_frame and not config.tracks_prob:
            networks.leave_out_controlnets()
        super().__init__(networks, config)
        assert self.object_gates is not None
        self.object_gates.requires_grad_(True).train()
        self.shows_controlnet, self.is_of_frames = config.first_frame, config.num_frames == 1
        if not config.first_frame:
            self.preview_settings = {"image": None}

    @classmethod
    def check(cls, config: ObjectGatesConfig) -> None:
        """As `BoxStage.check`: gates to go on from, too."""
        super().check(config)
        if config.first_frame:
            check_controlnets(config.model, "first_frame=true")
        check_gates(config)

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], generators: Sequence[torch.Generator]) -> tuple[Tensor, Condition]:
        """Clean latents (B, C, T, h, w), and text, boxes and perhaps the first frame as the condition.

        Args:
            batch: As `Stage.encode`, with `boxes`, `Boxes` of each clip.
            generators: One a clip.
        """
        x_0, mean, _ = self.draw_latents(batch, generators)
        fields = self.draw_keyframes(mean, generators) if self.shows_controlnet else {}
        return x_0, Condition(self.draw_text(batch, generators), **fields, **self.encode_boxes(batch, generators))

    @contextmanager
    def previewing(self) -> Iterator[None]:
        """Inside the block the motion modules are left out, where single frames are learned from."""
        with motion_modules_bypassed(self.unet, self.is_of_frames):
            yield

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `Stage.denoise`; of single frames without the motion modules, which are no identity on them."""
        with motion_modules_bypassed(self.unet, self.is_of_frames):
            return super().denoise(x_t, t, condition)

    def save(self, folder: Path) -> None:
        """Writes object_gates."""
        assert self.object_gates is not None
        self.object_gates.save_pretrained(folder / "object_gates")


class SceneGatesStage(BoxStage):
    """Stage 2: the first frame, with boxes that stage 1 has learned to follow; or both together."""

    name = "scene_gates"
    Config = SceneGatesConfig
    dropouts = (*BoxStage.dropouts, "scene_dropout", "input_dropout")

    def __init__(self, networks: Networks, config: SceneGatesConfig):
        networks.object_gates = _object_gates(networks, config)
        lora = _scene_lora(config)
        learned = {} if lora is None else read_motion_lora(networks, lora)["unet"]
        if networks.scene_gates is None or config.fresh_scene_gates:
            networks.scene_gates = SceneGates.from_unet(
                networks.unet,
                config.places,
                seed=config.seed,
                **settings_of_fresh_gates(config, "scene_gates"),
            )
        super().__init__(networks, config)
        assert self.scene_gates is not None
        assert self.object_gates is not None
        if config.motion_lora_rank:
            targets = lora_targets(self.unet, "motion")
            add_adapter(self.unet, MOTION, rank=config.motion_lora_rank, targets=targets, seed=config.seed)
            parameters = dict(self.unet.named_parameters())
            for layer, pair in learned.items():
                parameters[f"{layer}.lora_A.{MOTION}.weight"].data.copy_(pair.down)
                parameters[f"{layer}.lora_B.{MOTION}.weight"].data.copy_(pair.up * pair.alpha / pair.rank)
            activate(self.unet, MOTION)
            freeze_all_but_adapter(self.unet, MOTION)
        self.scene_gates.requires_grad_(True).train()
        if config.learns_object_gates:
            self.object_gates.requires_grad_(True).train()
        self.saves_objects, self.has_lora = config.learns_object_gates, bool(config.motion_lora_rank)
        self.shows_controlnet = config.first_frame_by == "both"
        self.preview_settings = {"first_frame_by": config.first_frame_by}
        self.scene_dropout, self.input_dropout = config.scene_dropout, config.input_dropout

    @classmethod
    def check(cls, config: SceneGatesConfig) -> None:
        """As `BoxStage.check`: object gates are there unless they learn along, and a ControlNet if it is to act."""
        super().check(config)
        if config.first_frame_by == "both":
            check_controlnets(config.model, "first_frame_by=both")
        has_own = read_gate_config(config.model, "object_gates") is not None
        if config.object_gates is None and not has_own and not config.learns_object_gates:
            raise FileNotFoundError(
                f"{config.model} has no object gates; name those of a run of stage object_gates, object_gates=FOLDER, "
                "or set learns_object_gates=true to train both stages jointly"
            )
        if (lora := _scene_lora(config)) is not None:
            ranks = sorted({pair.rank for pair in read_lora(lora).values()})
            if ranks != [config.motion_lora_rank]:
                raise ValueError(
                    f"the scene gates of {config.model} act with a LoRA of rank {ranks[0]}, with which they go on: set "
                    f"motion_lora_rank={ranks[0]}, or fresh_scene_gates=true to begin both anew"
                )
        check_gates(config)

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], generators: Sequence[torch.Generator]) -> tuple[Tensor, Condition]:
        """As `Stage.encode`, with boxes, and the first frame up to three times, each dropped by itself.

        The image ControlNet reads it if it acts, the gates attend to it, and the input branch adds it.
        """
        x_0, mean, _ = self.draw_latents(batch, generators)
        first = mean[:, :, 0]
        dropouts = {"scene": self.scene_dropout, "input_frame": self.input_dropout}
        fields = {name: first * draw_kept(p, generators, first).view(-1, 1, 1, 1) for name, p in dropouts.items()}
        if self.shows_controlnet:
            fields |= self.draw_keyframes(mean, generators)
        return x_0, Condition(self.draw_text(batch, generators), **fields, **self.encode_boxes(batch, generators))

    def save(self, folder: Path) -> None:
        """Writes scene_gates, scene_lora with the LoRA of the motion modules, and object_gates if they learned."""
        assert self.scene_gates is not None
        self.scene_gates.save_pretrained(folder / "scene_gates")
        if self.saves_objects and self.object_gates is not None:
            self.object_gates.save_pretrained(folder / "object_gates")
        if self.has_lora:
            save_for_diffusers(self.unet, MOTION, folder / SCENE_LORA_FOLDER)


def _scene_lora(config: SceneGatesConfig) -> Path | None:
    """The LoRA of the motion modules of scene gates that go on learning; None where there is none."""
    _, gates = read_gates(config, "scene_gates")
    return None if gates is None else find_scene_lora(config.model)


def _usual_adapters(model: str) -> tuple[str, ...]:
    """LoRAs of the motion ControlNet that act under the control that the model samples with by default."""
    return ADAPTERS[Control(read_sampling_defaults(model)["control"])]


def _object_gates(networks: Networks, config: ObjectGatesConfig | SceneGatesConfig) -> ObjectGates:
    """Object gates of the folder that is named, or the model's, or fresh ones."""
    if config.object_gates is not None:
        return load_network("object_gates", Path(config.object_gates))
    if networks.object_gates is not None and not config.fresh_object_gates:
        return networks.object_gates
    return ObjectGates.from_unet(
        networks.unet,
        config.places,
        max_objects=config.max_objects,
        seed=config.seed,
        **settings_of_fresh_gates(config, "object_gates"),
    )
