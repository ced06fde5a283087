"""Stand-ins for ComfyUI: the modules that nodes call, two of its own nodes, and its rules for running a workflow."""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

SIZE = (32, 32)
"""(W, H) of the tiny model's videos."""

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"


class InterruptedByUserError(Exception):
    """As `comfy.model_management.InterruptProcessingException`."""


class Host:
    """ComfyUI's modules with the signatures that the nodes rely on; records progress and interrupts on demand."""

    def __init__(self, monkeypatch, root: Path):
        self.progress: list[tuple[int, int]] = []
        self.interrupt_at: int | None = None
        self.freed: list[float] = []
        self.root, self.files = root, {}
        host = self

        class ProgressBar:
            def __init__(self, total, node_id=None):  # noqa: ARG002
                self.total = total

            def update_absolute(self, value, total=None, preview=None):  # noqa: ARG002
                host.progress.append((value, self.total if total is None else total))

        def throw_exception_if_processing_interrupted():
            if host.interrupt_at is not None and len(host.progress) >= host.interrupt_at:
                host.interrupt_at = None
                raise InterruptedByUserError

        def get_full_path(folder_name, filename):
            return host.files.get((folder_name, filename))

        modules = {
            "comfy": {},
            "comfy.utils": {"ProgressBar": ProgressBar},
            "comfy.model_management": {
                "get_torch_device": lambda: torch.device("cpu"),
                "free_memory": lambda memory_required, device, keep_loaded=(): self.freed.append(memory_required),  # noqa: ARG005
                "throw_exception_if_processing_interrupted": throw_exception_if_processing_interrupted,
            },
            "folder_paths": {
                "models_dir": str(root / "models"),
                "folder_names_and_paths": {"image_conductor": ([str(root / "more")], set())},
                "get_folder_paths": {"image_conductor": [str(root / "more")]}.__getitem__,
                "get_full_path": get_full_path,
            },
        }
        for name, members in modules.items():
            module = ModuleType(name)
            module.__path__ = []  # a package, for `import comfy.utils`
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)


class LoadImage:
    """ComfyUI's node of that name; its last widget is the button that uploads."""

    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load_image"
    folder = Path()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": (sorted(path.name for path in cls.folder.glob("*.png")), {"image_upload": True})}}

    def load_image(self, image):
        pixels = np.asarray(Image.open(self.folder / image).convert("RGB"), np.float32) / 255
        return torch.from_numpy(pixels)[None], torch.zeros(1, *pixels.shape[:2])


class SaveAnimatedWEBP:
    """ComfyUI's node of that name; it keeps what it gets."""

    RETURN_TYPES = ()
    FUNCTION = "save_images"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "images": ("IMAGE",),
                "filename_prefix": ("STRING", {"default": "ComfyUI"}),
                "fps": ("FLOAT", {"default": 6.0, "min": 0.01, "max": 1000.0}),
                "lossless": ("BOOLEAN", {"default": True}),
                "quality": ("INT", {"default": 80, "min": 0, "max": 100}),
                "method": (["default", "fastest", "slowest"],),
            }
        }

    def save_images(self, images, filename_prefix, fps, **_):
        return {"ui": {"saved": (filename_prefix, images, fps)}}


def load_nodes() -> Any:
    """The package, imported from its folder as ComfyUI does."""
    spec = importlib.util.spec_from_file_location("custom_nodes_image_conductor", FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def declared_inputs(node: Any) -> dict[str, tuple]:
    """Name -> (type, options) of a node's inputs in the order of its widgets."""
    types = node.INPUT_TYPES()
    return {
        name: (entry[0], entry[1] if len(entry) > 1 else {}) for part in types.values() for name, entry in part.items()
    }


def check_prompt(nodes: dict[str, Any], prompt: dict[str, Any]) -> list[str]:
    """What the server answers to a prompt in API format that it refuses, a line each."""
    errors = []
    for key, entry in prompt.items():
        node = nodes[entry["class_type"]]
        declared, given = declared_inputs(node), entry["inputs"]
        own = set(inspect.getfullargspec(node.VALIDATE_INPUTS).args) if hasattr(node, "VALIDATE_INPUTS") else set()
        missing = node.INPUT_TYPES()["required"].keys() - given.keys()
        errors += [f"{key}: {name} is missing" for name in missing]
        errors += [f"{key}: {name} does not exist" for name in given.keys() - declared.keys()]
        for name, value in given.items():
            kind, options = declared.get(name, ("*", {}))
            if isinstance(value, list):
                source = nodes[prompt[value[0]]["class_type"]]
                if source.RETURN_TYPES[value[1]] != kind:
                    errors.append(f"{key}: {name} is a {kind}, linked to a {source.RETURN_TYPES[value[1]]}")
            elif name not in own:
                numbers = kind in ("INT", "FLOAT")
                if isinstance(kind, list) and value not in kind:
                    errors.append(f"{key}: {name}: {value!r} is not in the list")
                if numbers and not options.get("min", value) <= value <= options.get("max", value):
                    errors.append(f"{key}: {name}: {value!r} is out of range")
        if own:
            constants = {name: value for name, value in given.items() if name in own and not isinstance(value, list)}
            answer = node.VALIDATE_INPUTS(**constants)
            errors += [] if answer is True else [f"{key}: {answer}"]
    return errors


def run_prompt(nodes: dict[str, Any], prompt: dict[str, Any]) -> SimpleNamespace:
    """Runs a prompt in API format as the server's executor does: under inference mode, inputs by keyword."""
    outputs, saved = {}, {}

    def result_of(key: str) -> Any:
        if key not in outputs:
            entry = prompt[key]
            node = nodes[entry["class_type"]]()
            inputs = {
                name: result_of(value[0])[value[1]] if isinstance(value, list) else value
                for name, value in entry["inputs"].items()
            }
            if hasattr(node, "IS_CHANGED"):
                node.IS_CHANGED(**entry["inputs"])
            outputs[key] = getattr(node, node.FUNCTION)(**inputs)
            if isinstance(outputs[key], dict):
                name, images, fps = outputs[key]["ui"]["saved"]
                saved[name] = (images, fps)
            else:
                assert len(outputs[key]) == len(node.RETURN_TYPES)
        return outputs[key]

    with torch.inference_mode():
        for key in prompt:
            result_of(key)
    return SimpleNamespace(outputs=outputs, saved=saved)


def run_node(package, name, **given):
    """Outputs of a node, whose inputs are the defaults of its widgets where they are not given."""
    node = package.NODE_CLASS_MAPPINGS[f"ImageConductor{name}"]
    inputs = {}
    for key, (kind, options) in declared_inputs(node).items():
        if isinstance(kind, list):
            inputs[key] = kind[0]
        elif "default" in options:
            inputs[key] = options["default"]
    with torch.inference_mode():
        return getattr(node(), node.FUNCTION)(**inputs | given)


def sample(package, pipe, **given):
    """Outputs of the sampling node in two steps."""
    return run_node(package, "SampleVideo", model=pipe, prompt="a red star", steps=2, **given)


def picture(count=1, channels=3):
    """A batch of ComfyUI's images."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *SIZE, channels), generator=generator).float() / 255
