"""A device that pretends to be a GPU: it computes on the CPU, and refuses to mix its tensors with those of the CPU.

`DEVICE` is PyTorch's "private use" device with kernels in Python. It is registered for the whole process and for good,
so `test_pretended_gpu.py` runs this file in processes of their own: `python pretended_gpu.py FOLDER NAME` does the work
of that name, below. That finds what a real GPU would refuse: a tensor that was left behind on the CPU, a generator or a
mask of the other device. It does not tell a kernel that a GPU has not, nor speed or memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._device
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend("pretended", _Backend())
DEVICE = torch.device("pretended:0")
_ops = torch.ops.aten
_CROSSING = {_ops.copy_.default, _ops._to_copy.default}
_INDEXING = {_ops.index.Tensor, _ops.index_put.default, _ops.index_put_.default, _ops._index_put_impl_.default}


class Pretended(torch.Tensor):
    """A tensor of `DEVICE`, whose values are in `held`, a tensor of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        new = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        new.held = held
        return new

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    # What PyTorch does past its dispatcher; pickled as a tensor of the CPU.

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)

    def tolist(self):
        return self.held.tolist()

    def new_tensor(self, data, **kwargs):
        return self.held.new_tensor(data, **kwargs).to(self.device)

    def __getitem__(self, index):
        return super().__getitem__(_index(index))

    def __setitem__(self, index, value):
        super().__setitem__(_index(index), value)


def _index(index):
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _run(func, args, kwargs):
    """An operation on what the tensors hold; those of the CPU may be among them as a GPU's kernels allow it."""
    is_here = any(isinstance(value, Pretended) for value in tree_leaves((args, kwargs)))
    if is_here and func not in _CROSSING:
        for value in tree_leaves(((args[0], args[2:]) if func in _INDEXING else args, kwargs)):
            if isinstance(value, torch.Tensor) and not isinstance(value, Pretended) and value.dim():
                raise RuntimeError(f"{func}: a tensor {tuple(value.shape)} of the CPU among those of {DEVICE}")
    if func is _ops.copy_.default:
        is_here = isinstance(args[0], Pretended)
    elif kwargs.get("device") is not None:
        is_here = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    known: dict[int, Pretended] = {}

    def unwrap(value):
        if not isinstance(value, Pretended):
            return value
        known[id(value.held)] = value
        return value.held

    def wrap(value):
        if not isinstance(value, torch.Tensor) or not is_here:
            return value
        return known[id(value)] if id(value) in known else Pretended(value)  # an operation in place gives its argument

    return tree_map(wrap, func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)))


_kernels = torch.library.Library("_", "IMPL")
_kernels.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")


def _on_cpu_first(make):
    def on_cpu_first(*args, device=None, **kwargs):
        is_here = device is not None and torch.device(device).type == DEVICE.type
        kwargs |= {} if is_here or device is None else {"device": device}
        made = make(*args, **kwargs)
        return made.to(device) if is_here else made

    return on_cpu_first


# Those that PyTorch makes past its dispatcher, or of no size at first.
torch.utils._device._device_constructors()  # keeps the list of them as they are
for _name in ("tensor", "as_tensor", "eye", "arange", "linspace"):
    setattr(torch, _name, _on_cpu_first(getattr(torch, _name)))
torch.inference_mode = lambda mode=True: torch.set_grad_enabled(not mode)  # which such tensors do not know


# -- the work


def refusal(folder: Path) -> None:
    """What a GPU refuses is refused here, and what it allows is not."""
    here, number = torch.ones(3, 4).to(DEVICE), torch.tensor(2.0)
    values = here * number, here[torch.tensor([0, 2])], here @ torch.ones(4, 2, device=DEVICE), here.to("cpu") + 1
    assert [value.device.type for value in values] == [DEVICE.type, DEVICE.type, DEVICE.type, "cpu"]
    for left_behind in (lambda: here + torch.ones(4), lambda: here.where(torch.ones(4) > 0, here)):
        try:
            left_behind()
        except RuntimeError as error:
            assert "of the CPU among those of pretended:0" in str(error)  # noqa: PT017
        else:
            raise AssertionError("a tensor of the CPU was taken")


def sampling(folder: Path) -> None:
    """Videos in every way that a call can be made, by one pipeline on the CPU and one on `DEVICE`."""
    from conftest import tiny_gates, tiny_pipeline
    from PIL import Image

    from imageconductor.conditioning import Boxes, Trajectories, camera_preset
    from imageconductor.sampling.residual_cache import ResidualCache

    pipes = tiny_pipeline(), tiny_pipeline()
    for pipe in pipes:
        pipe.object_gates, pipe.scene_gates = tiny_gates(pipe.unet)
    pipes[1].to(DEVICE)
    image, tracks = Image.linear_gradient("L").resize((32, 32)).convert("RGB"), camera_preset("pan-left", (32, 32), 4)
    track = Trajectories.from_tracks([[[8, 8], [20, 16]]], (32, 32), 4)
    boxes = Boxes.from_tracks(track, (10, 8), ["star"])
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "camera": {"control": "camera", "prompt": ["red", "blue"], "seed": [1, 2]},
        "camera-free": {"control": "object", "camera_free_scale": 1.5},
        "guided by trajectories": {"trajectory_guidance_scale": 2.0},
        "mix": {"mix": {"camera": 1.0, "object": 0.5}},
        "no image": {"image": None},
        "two pictures": {"image": {0: image, -1: image}},
        "no trajectories": {"trajectories": None},
        "noise within steps": {"eta": 0.5},
        "windows": {"num_frames": 6, "window_frames": 4, "trajectories": camera_preset("pan-left", (32, 32), 6)},
        "boxes": {"boxes": boxes, "scene_guidance_scale": 2.0},
        "shortcuts": {"guidance_interval": (0, 0.5), "controlnet_interval": 2},
        "noise prior": {"noise_prior": ([torch.ones(4, 4, 16, 16)], 0.5)},
        "latents": {"keep_latents": True},
    }

    def call(pipe, **how):
        return pipe(
            **(
                {
                    "image": image,
                    "trajectories": tracks,
                    "prompt": "a star",
                    "seed": 3,
                    "num_inference_steps": 2,
                    "output_type": "pt",
                }
                | how
            )
        )

    for name, how in ways.items():
        compare(name, *(call(pipe, **how).frames for pipe in pipes))
    caches = [ResidualCache(), ResidualCache()]
    for seed in (1, 2):
        made = [call(pipe, seed=seed, residual_cache=cache) for pipe, cache in zip(pipes, caches, strict=True)]
        compare("kept residuals", *(one.frames for one in made))
    kept = [call(pipe, keep_latents=True).latents[1] for pipe in pipes]
    made = [call(pipe, latents=latents, resume_from=1).frames for pipe, latents in zip(pipes, kept, strict=True)]
    compare("resumed", *made)


def training(folder: Path) -> None:
    """A step of each stage on `DEVICE`, with all that happens in a run: validation apart, and the stage's own files."""
    import imageio.v3 as iio
    import numpy as np
    from accelerate import PartialState
    from conftest import TINY_WORLD, tiny_gates, tiny_networks, tiny_pipeline

    from imageconductor.training.run import run_stage
    from imageconductor.training.stages.registry import find_stage

    model, clips, gates = folder / "model", folder / "clips", folder / "object_gates"
    tiny_pipeline().save_pretrained(model)
    tiny_gates(tiny_networks().unet)[0].save_pretrained(gates)
    clips.mkdir()
    pictures = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), np.uint8)
    iio.imwrite(clips / "clip.mp4", pictures, plugin="FFMPEG", fps=8, codec="libx264", macro_block_size=2)
    of_worlds = {"world": TINY_WORLD}
    of_gates = of_worlds | {"max_objects": 4}
    stages: dict[str, dict[str, Any]] = {
        "motion_controlnet": {**of_worlds, "trajectories": "dense", "ema_decay": 0.9},
        "camera_lora": {**of_worlds, "trajectories": "sparse", "optimizer": "muon"},
        "object_lora": {**of_worlds, "gradient_accumulation_steps": 2},
        "style_lora": of_worlds,
        "foundation": of_worlds,
        "few_step": of_worlds,
        "object_gates": of_gates,
        "scene_gates": {**of_gates, "object_gates": str(gates), "encoder_channels": [8, 16], "encoder_blocks": 1},
        "motion_director": {"data": [str(clips)], "prompt": "a star", "size": (32, 32), "num_frames": 4, "fps": None},
    }
    usual = {"model": str(model), "max_steps": 1, "batch_size": 1, "num_workers": 0}
    PartialState()
    PartialState._shared_state["device"] = DEVICE
    for name, how in stages.items():
        stage = find_stage(name)
        rank = {"lora_rank": 2} if hasattr(stage.Config, "lora_rank") else {}
        with patch.object(stage, "save", lambda *_: None):  # Libraries look into the memory of what they save.
            run_stage(stage.Config(**usual | rank | how, output=str(folder / name)))
        print(name)


def evaluation(folder: Path) -> None:
    """Metrics by networks with weights, and curation's tracker, on the CPU and on `DEVICE`."""
    import importlib.util

    import numpy as np
    from footage import write_cotracker
    from transformers import ViTConfig, ViTModel

    from imageconductor.data.trackers import CoTracker
    from imageconductor.evaluation.metrics.appearance import ClipScorer, DinoEncoder
    from imageconductor.evaluation.metrics.frechet import collect_statistics
    from imageconductor.evaluation.metrics.inception import Inception

    found: Any = importlib.util.spec_from_file_location(
        "of_evaluation", Path(__file__).parent / "evaluation/conftest.py"
    )
    conftest = importlib.util.module_from_spec(found)
    found.loader.exec_module(conftest)
    inception, clone, dino = folder / "inception.pth", folder / "cotracker", folder / "dino"
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **small), add_pooling_layer=False).save_pretrained(dino)
    clip = conftest.write_clip(folder / "clip")
    torch.save(Inception().state_dict(), inception)
    write_cotracker(clone)
    video = np.random.default_rng(0).integers(0, 255, (4, 40, 40, 3), np.uint8)
    places = ("cpu", str(DEVICE))
    compare("CLIP", *(ClipScorer(str(clip), place).embed_frames(video) for place in places))
    compare("CLIP's texts", *(ClipScorer(str(clip), place).embed_text("a red circle") for place in places))
    compare("DINO", *(DinoEncoder(str(dino), place).embed_frames(video) for place in places))
    for name, weights in (("frechet_small", None), ("fid", inception)):
        sums = [collect_statistics(name, [video], weights, 4, place).total for place in places]
        torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-4)
    points = np.full((3, 2), 8.0)
    tracks = [CoTracker(str(clone), device=place).track(video, points)[0] for place in places]
    np.testing.assert_allclose(*tracks, rtol=1e-5)


def compare(name: str, expected: Any, found: Any) -> None:
    """That the second of two results is on `DEVICE`, and both hold the same."""
    if found.device != DEVICE:
        raise AssertionError(f"{name}: the result is on {found.device}")
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")
    print(name)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    globals()[sys.argv[2]](Path(sys.argv[1]))
