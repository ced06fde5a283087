"""Makes a model folder from its parts; writes its networks as the authors' files, or a LoRA of it; or uploads it.

    imageconductor assemble --config configs/model/image_conductor_v1.yaml --output models/image_conductor_v1
    imageconductor assemble --config configs/model/trained.yaml --output models/mine
    imageconductor assemble --export published --model models/mine --output exported
    imageconductor assemble --export animatediff --model models/mine --lora runs/md --output motion.ckpt
    imageconductor assemble --push-to-hub organisation/name --model models/mine --results results/results.json

docs/weights.md says which files to download. A part that does not fit is refused with every key that is missing, left
over or mis-shaped, and nothing is written. The folder's sources.json records each file's SHA-256, its README.md is a
model card.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imageconductor import config as config_file
from imageconductor.command_line import run_command
from imageconductor.files import atomic_folder, check_writable, find_shipped, read_text

if TYPE_CHECKING:
    from imageconductor.checkpoints.assembly import Assembly


LORA_FORMATS = ("animatediff", "diffusers", "kohya")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code: see `run_command`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=find_shipped, metavar="FILE", help="recipe; configs/model holds those we know")
    parser.add_argument(
        "--export",
        choices=["published", *LORA_FORMATS],
        help="write a folder's networks under the published names, or a LoRA of its UNet in another tool's format",
    )
    parser.add_argument(
        "--lora",
        type=Path,
        metavar="PATH",
        help="with --export animatediff, diffusers or kohya: a LoRA's file or folder, a run of motion_director, or a "
        "checkpoint in it",
    )
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload a folder, with a card that sums it up")
    parser.add_argument("--model", type=find_shipped, metavar="FOLDER", help="with --export and --push-to-hub")
    parser.add_argument("--format", choices=["safetensors", "ckpt"], help="with --export published; safetensors")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="with --push-to-hub: imageconductor evaluate's figures"
    )
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: a new repository is private")
    parser.add_argument("--output", type=Path, metavar="PATH", help="new folder; new file of a LoRA")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes one setting of the recipe")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_command(lambda: act(args))


def act(args: argparse.Namespace) -> None:
    """Does what the options ask for, and prints where the result is."""
    output: Path | None = args.output
    if [bool(args.config), bool(args.export), bool(args.push_to_hub)].count(True) != 1:
        raise ValueError("give one of --config FILE, --export FORMAT and --push-to-hub ORG/NAME")
    if bool(args.model) == bool(args.config):
        raise ValueError("--model FOLDER goes with --export and --push-to-hub")
    if bool(args.lora) != (args.export in LORA_FORMATS):
        raise ValueError(f"--lora PATH goes with --export {', '.join(LORA_FORMATS)}")
    if args.format and args.export != "published":
        raise ValueError("--format goes with --export published; the suffix of --output tells that of a LoRA")
    if (args.results or args.private) and not args.push_to_hub:
        raise ValueError("--results FILE and --private go with --push-to-hub ORG/NAME")
    if args.overrides and not args.config:
        raise ValueError(f"{' '.join(args.overrides)}: settings of a recipe go with --config FILE")
    if args.push_to_hub and output is not None:
        raise ValueError(f"--output {output}: --push-to-hub writes no folder; leave it out")
    if args.push_to_hub:
        print(push(args.model, args.push_to_hub, args.results, args.private))
        return
    if output is None:
        raise ValueError("--output DIR is missing")
    if output.exists():
        raise ValueError(f"{output} exists; name another --output")
    check_writable(output)
    if args.export == "published":
        export(args.model, args.format or "safetensors", output)
    elif args.export:
        export_lora(args.model, args.lora, args.export, output)
    else:
        assemble_folder(args.config, args.overrides, output)
    print(output)


def assemble_folder(path: Path, overrides: list[str], output: Path) -> None:
    """Checks and loads every part of a recipe, and writes the model folder."""
    from imageconductor.checkpoints.assembly import AssemblyConfig, assemble

    assembly = assemble(config_file.load(AssemblyConfig, path, overrides))
    for name, source in json.loads(assembly.provenance["sources.json"])["sources"].items():
        print(f"{name}: {source['keys']} tensors from {source['path']}")
    write_model_folder(assembly, output)


def export(model: Path, form: str, output: Path) -> None:
    """Writes the three published files of a model folder, and its LoRAs; says what these files do not hold.

    Raises:
        ValueError: The model has no ControlNets, or something else that the published layout has no place for.
    """
    import torch
    from safetensors.torch import save_file

    from imageconductor.checkpoints.model_folder import check_controlnets
    from imageconductor.checkpoints.published import PUBLISHED_ADAPTERS, scaled_pairs, to_published
    from imageconductor.models.adapters import attached_adapters
    from imageconductor.models.lora_files import PEFT_PREFIX

    check_controlnets(model, "--export published")
    pipe = load(model)
    attached = attached_adapters(pipe.motion_controlnet)
    adapters = [name for name in PUBLISHED_ADAPTERS.values() if name in attached]
    states = {
        "unet": to_published(pipe.unet),
        "image_controlnet": to_published(pipe.image_controlnet),
        "flow_controlnet": to_published(pipe.motion_controlnet, adapters),
    }
    for fact in _unpublished(pipe):
        logging.info("not in these files: %s", fact)
    with atomic_folder(output) as folder:
        for name, state in states.items():
            tensors = {key: value.contiguous().clone() for key, value in state.items()}
            if form == "ckpt":
                torch.save({"state_dict": tensors}, folder / f"{name}.ckpt")
            else:
                save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        for name in adapters:
            tensors = {}
            for layer, (down, up) in scaled_pairs(pipe.motion_controlnet, name).items():
                tensors |= {f"{PEFT_PREFIX}{layer}.lora_A.weight": down, f"{PEFT_PREFIX}{layer}.lora_B.weight": up}
            save_file(tensors, folder / f"{name}_lora.safetensors", metadata={"format": "pt"})


def _unpublished(pipe: Any) -> list[str]:
    """What a model has and the published files have no place for."""
    from imageconductor.checkpoints.published import PUBLISHED_ADAPTERS
    from imageconductor.conditioning.flow_map import FlowMapConvention
    from imageconductor.models.adapters import attached_adapters
    from imageconductor.models.networks import GATES

    facts = []
    if (convention := pipe.motion_controlnet.flow_convention) != FlowMapConvention():
        facts.append(f"how trajectories are drawn for the motion ControlNet, {convention}")
    if (predicted := pipe.scheduler.config["prediction_type"]) != "epsilon":
        facts.append(f"the UNet predicts {predicted}, and the authors' code takes it for epsilon")
    others = [name for name in attached_adapters(pipe.motion_controlnet) if name not in PUBLISHED_ADAPTERS.values()]
    facts += [f"the motion ControlNet's LoRA {name}" for name in others]
    facts += [name for name in GATES if getattr(pipe, name) is not None]
    facts += list(pipe.lora_folders)
    if pipe.domain_adapter is not None:
        facts.append(f"the domain adapter by itself; the UNet holds it with scale {pipe.domain_adapter.merged_scale}")
    return facts


def export_lora(model: Path, lora: Path, form: str, output: Path) -> None:
    """Writes a LoRA of a folder's UNet for another tool.

    Args:
        model: Folder of the model that it is for; no weights are read.
        lora: File or folder; a run of motion_director stands for its motion LoRA in AnimateDiff's format, and for its
            appearance LoRA in kohya's.
        form: One of `LORA_FORMATS`.
        output: New file.

    Raises:
        FileNotFoundError: There is no such LoRA.
        ValueError: It does not fit the model, the format is not for its layers, or a run has two.
    """
    from imageconductor.checkpoints.model_folder import read_sampling_defaults
    from imageconductor.checkpoints.motion_director import export_appearance_lora, export_motion_lora
    from imageconductor.checkpoints.personalise import networks_without_weights, read_motion_lora, read_style_lora
    from imageconductor.checkpoints.reference_run import find_reference_lora

    read_sampling_defaults(model)
    if form == "diffusers" and (parts := sorted(part.name for part in lora.glob("*_lora"))):
        raise ValueError(f"{lora} holds {' and '.join(parts)}; name one of them, --lora {lora / parts[0]}")
    is_motion = form == "animatediff"
    path = find_reference_lora(lora, "motion" if is_motion else "appearance")
    fitted = (read_motion_lora if is_motion else read_style_lora)(networks_without_weights(model), path)
    if others := fitted.keys() - {"unet"}:
        raise ValueError(f"{path} has layers of the {others.pop()}, which are not written; it can be used as it is")
    pairs = fitted["unet"]
    if form == "kohya":
        export_appearance_lora(output, pairs, "kohya")
    elif is_motion:
        export_motion_lora(output, pairs)
    elif any(".attentions." in layer for layer in pairs):
        export_appearance_lora(output, pairs)
    else:
        export_motion_lora(output, pairs, "diffusers")


def load(model: Path) -> Any:
    """The pipeline of a folder, in the precision of its files."""
    from imageconductor.checkpoints.model_folder import read_dtype, read_sampling_defaults
    from imageconductor.sampling.pipeline import ImageConductorPipeline

    read_sampling_defaults(model)
    return ImageConductorPipeline.from_pretrained(model, dtype=read_dtype(model))


def push(model: Path, repository: str, results: Path | None, private: bool) -> str:
    """Uploads a model folder; returns the commit's address."""
    if results is not None:
        if not results.is_file():
            raise FileNotFoundError(f"no file at {results}")
        if "intervals" not in json.loads(read_text(results)):
            raise ValueError(
                f"{results} is not of an evaluation of trajectories, whose figures the card shows; leave --results out"
            )
    pipe = load(model)
    if results is not None:
        pipe.provenance["results.json"] = read_text(results)
    return str(pipe.push_to_hub(repository, private=private or None))


def write_model_folder(assembly: Assembly, output: Path, replace: bool = False) -> None:
    """Writes what a recipe describes as a model folder, which stands at `output` when it is complete.

    Args:
        assembly: From `assemble`.
        output: The folder.
        replace: Whether one that is there gives way.

    Raises:
        FileExistsError: Something is there.
    """
    from imageconductor.sampling.pipeline import ImageConductorPipeline

    with atomic_folder(output, replace) as folder:
        ImageConductorPipeline.from_assembly(assembly).save_pretrained(folder)
        for name, source in assembly.carried.items():
            shutil.copytree(source, folder / name)
