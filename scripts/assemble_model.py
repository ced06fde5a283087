"""Makes a model folder from downloaded parts, once; or writes the networks of a folder as the authors' files.

    python scripts/assemble_model.py --config configs/model/image_conductor_v1.yaml --output models/image_conductor_v1
    python scripts/assemble_model.py --export published --model models/sprites --output exported

docs/weights.md says which files to download. A part that does not fit is refused with every key that is missing, left
over or mis-shaped, and nothing is written. The folder's sources.json records each file's SHA-256.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from imageconductor import config as config_file


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 2 = bad input, told in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe; configs/model holds those we know")
    parser.add_argument("--export", choices=["published"], help="write a folder's networks under the published names")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="with --export: the model folder")
    parser.add_argument("--format", choices=["safetensors", "ckpt"], default="safetensors", help="with --export")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes one setting of the recipe")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if args.output.exists():
            raise ValueError(f"{args.output} exists; name another --output")
        if bool(args.export) != bool(args.model) or bool(args.export) == bool(args.config):
            raise ValueError("give --config FILE to assemble, or --export published --model FOLDER to export")
        write = export(args.model, args.format) if args.export else assembled(args.config, args.overrides)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    temporary = args.output.with_name(f".{args.output.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        temporary.rename(args.output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(args.output)
    return 0


def assembled(path: Path, overrides: list[str]) -> Any:
    """Checks and loads every part; returns what writes the folder."""
    from imageconductor.models.assembly import AssemblyConfig, assemble

    config = config_file.load(AssemblyConfig, path, overrides)
    networks, sources = assemble(config)
    for name, source in sources.items():
        print(f"{name}: {source.keys} tensors from {source.path}")

    def write(folder: Path) -> None:
        from imageconductor.sampling.pipeline import ImageConductorPipeline

        ImageConductorPipeline(**vars(networks), sampling_defaults=config.sampling).save_pretrained(folder)
        record = {"recipe": asdict(config), "sources": {name: asdict(source) for name, source in sources.items()}}
        (folder / "sources.json").write_text(json.dumps(record, indent=1))

    return write


def export(model: Path, form: str) -> Any:
    """Loads a model folder; returns what writes the three published files and the LoRAs."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from imageconductor.models.checkpoints import to_published
    from imageconductor.models.lora import Adapter, attached_adapters
    from imageconductor.sampling.pipeline import ImageConductorPipeline

    ImageConductorPipeline.read_sampling_defaults(model)
    with safe_open(next((model / "unet").glob("*.safetensors")), "pt") as file:
        dtype = file.get_tensor("conv_in.weight").dtype
    pipe = cast(Any, ImageConductorPipeline.from_pretrained(model, torch_dtype=dtype))
    adapters = [adapter for adapter in Adapter if adapter in attached_adapters(pipe.motion_controlnet)]
    states = {
        "unet": to_published(pipe.unet),
        "image_controlnet": to_published(pipe.image_controlnet),
        "flow_controlnet": to_published(pipe.motion_controlnet, adapters),
    }

    def write(folder: Path) -> None:
        for name, state in states.items():
            tensors = {key: value.contiguous().clone() for key, value in state.items()}
            if form == "ckpt":
                torch.save({"state_dict": tensors}, folder / f"{name}.ckpt")
            else:
                save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        for adapter in adapters:
            source = model / f"{adapter.value}_lora" / "adapter_model.safetensors"
            shutil.copyfile(source, folder / f"{adapter.value}_lora.safetensors")

    return write


if __name__ == "__main__":
    sys.exit(main())
