"""Recipes of model folders: what they refuse, what they download, and what a trained model keeps."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from huggingface_hub.utils import filter_repo_objects
from parity import CONFIG
from safetensors.torch import load_file, save_file

from imageconductor import config as config_file
from imageconductor.checkpoints import assembly
from imageconductor.checkpoints.model_folder import UNET_LORA_FOLDERS
from imageconductor.checkpoints.recipe import AssemblyConfig, locate_parts
from imageconductor.commands import assemble
from imageconductor.models.adapters import DIFFUSERS_WEIGHTS_NAME
from imageconductor.models.networks import Networks
from imageconductor.sampling.pipeline import ImageConductorPipeline

PARTS = {
    "published": {
        "stable_diffusion": "sd",
        "unet": "unet.ckpt",
        "image_controlnet": "image_controlnet.ckpt",
        "motion_controlnet": "flow_controlnet.ckpt",
    },
    "animatediff": {"stable_diffusion": "sd", "motion_module": "mm.ckpt", "image_controlnet": "sparsectrl.ckpt"},
    "trained": {"model": "models/base"},
}


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("published", ["camera_lora", "object_lora", "object_gates"]),
        ("published", ["scene_gates", "scene_lora"]),
        ("published", ["model", "motion_module"]),
        ("animatediff", ["unet", "motion_controlnet"]),
        ("trained", ["stable_diffusion", "unet", "image_controlnet", "motion_module", "domain_adapter"]),
    ],
)
def test_parts_that_a_recipe_does_not_read_are_refused(recipe, parts):
    with pytest.raises(ValueError, match=f"recipe {recipe} does not read ") as error:
        AssemblyConfig(recipe, **PARTS[recipe], **dict.fromkeys(parts, "folder"))
    assert all(f"{name}=folder" in str(error.value) for name in parts)


@pytest.mark.parametrize("recipe", PARTS)
def test_parts_that_a_recipe_reads_are_taken(recipe):
    carried = {"style_lora": "style", "few_step_lora": "few"}
    more = {"trained": {"motion_controlnet": "m", "object_gates": "o", "scene_gates": "s", "scene_lora": "l"}}
    AssemblyConfig(recipe, **PARTS[recipe], **carried, **more.get(recipe, {"domain_adapter": "adapter.ckpt"}))


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ("{steps: 5}", r"sampling has no steps, only width, height, .*num_inference_steps"),
        ("{width: wide}", r"sampling\.width must be of type int, got 'wide'"),
        ("{width: 0}", r"sampling\.width must be at least 1, got 0"),
        ("{guidance_scale: true}", r"sampling\.guidance_scale must be of type float, got True"),
        ("{control: sideways}", r"sampling\.control must be one of camera, object, mixed, base, got 'sideways'"),
    ],
)
def test_defaults_of_sampling_are_checked_with_the_recipe(sampling, said):
    with pytest.raises(ValueError, match=said):
        config_file.load(AssemblyConfig, None, ["recipe=trained", "model=there", f"sampling={sampling}"])
    config_file.load(AssemblyConfig, None, ["recipe=trained", "model=there", "sampling={guidance_scale: 3}"])


@pytest.mark.parametrize(
    ("recipe", "parts", "said"),
    [
        ("animatediff", {"domain_adapter": "nowhere.ckpt"}, "no file or folder at nowhere.ckpt"),
        ("animatediff", {"image_controlnet": "empty"}, "empty holds no weights"),
        ("trained", {"camera_lora": "empty"}, "camera_lora=.*empty: no folder with adapter_model.safetensors"),
        ("trained", {"style_lora": "empty"}, f"style_lora=.*empty: no folder with {DIFFUSERS_WEIGHTS_NAME}"),
        ("trained", {"object_gates": "nowhere"}, "no file or folder at nowhere"),
        ("trained", {"scene_gates": "empty"}, "empty holds no weights"),
    ],
)
def test_all_parts_are_looked_for_before_weights_are_read(
    recipe, parts, said, tiny_model, animatediff, stable_diffusion, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(assembly, "read_checkpoint", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(Networks, "load", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(assembly, "load_network", lambda *_: pytest.fail("weights were read"))
    given = {
        "animatediff": {
            "stable_diffusion": stable_diffusion,
            "motion_module": animatediff / "v3_sd15_mm.ckpt",
            "image_controlnet": animatediff / "sparsectrl_rgb.ckpt",
        },
        "trained": {"model": tiny_model},
    }[recipe]
    config = AssemblyConfig(recipe, **{name: str(value) for name, value in {**given, **parts}.items()})
    with pytest.raises(FileNotFoundError, match=said):
        assembly.assemble(config)


@pytest.fixture
def hub(stable_diffusion, tmp_path, monkeypatch):
    """A repository "lab/sd" with all that Stable Diffusion 1.5's has; gives its folder and that of what is downloaded.

    A local folder of the organisation's name is there, too.
    """
    repository, local = tmp_path / "hub" / "lab" / "sd", tmp_path / "cache"
    shutil.copytree(stable_diffusion, repository)
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        for kind in ("fp16.safetensors", "non_ema.safetensors", "fp16.bin", "bin"):
            (repository / f"{name.replace('text_encoder/', 'text_encoder/pytorch_')}.{kind}").touch()
    (repository / "safety_checker").mkdir()
    for name in ("v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "safety_checker/model.safetensors", "README.md"):
        (repository / name).touch()

    def download(name, allow_patterns):
        root = tmp_path / "hub" / name
        paths = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        for path in filter_repo_objects(paths, allow_patterns=allow_patterns):
            (local / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / path, local / path)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "here" / "lab").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return repository, local


def downloaded(recipe, local, animatediff, published):
    """The files of the local copy of Stable Diffusion under a recipe."""
    parts = {
        "published": {name: published / path for name, path in PARTS["published"].items()},
        "animatediff": {
            "motion_module": animatediff / "diffusers_module",
            "image_controlnet": animatediff / "sparsectrl_rgb.ckpt",
        },
    }[recipe]
    config = AssemblyConfig(recipe, **{**{k: str(v) for k, v in parts.items()}, "stable_diffusion": "lab/sd"})
    assert locate_parts(config)["stable_diffusion"] == local
    return {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}


def test_only_what_is_read_of_a_repository_is_downloaded(hub, animatediff, published):
    repository, local = hub
    expected = {f"tokenizer/{path.name}" for path in (repository / "tokenizer").iterdir()}
    expected |= {"unet/config.json", "vae/config.json", "text_encoder/config.json"}
    expected |= {"vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert downloaded("published", local, animatediff, published) == expected
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert downloaded("animatediff", local, animatediff, published) == {*expected, unet}
    for kind in ("fp16.safetensors", "bin"):  # and only what is read of a folder is hashed and noted
        shutil.copyfile(local / unet, (local / unet).with_suffix(f".{kind}"))
    assert list(assembly._source(local / "unet", 1).sha256) == [Path(unet).name]


def test_pickled_weights_are_downloaded_where_there_are_no_others(hub, animatediff, published):
    repository, local = hub
    weights = repository / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    found = downloaded("published", local, animatediff, published)
    assert {name for name in found if name.startswith("vae/")} == {"vae/config.json", "vae/diffusion_pytorch_model.bin"}
    assert "text_encoder/pytorch_model.bin" not in found


def animatediff_config(animatediff, stable_diffusion, dtype):
    parts = {"stable_diffusion": stable_diffusion, "motion_module": animatediff / "v3_sd15_mm.ckpt"}
    parts |= {"image_controlnet": animatediff / "sparsectrl_rgb.ckpt"}
    parts |= {"domain_adapter": animatediff / "v3_sd15_adapter.ckpt"}
    heads = {"motion_num_attention_heads": CONFIG["motion_heads"]}
    return AssemblyConfig("animatediff", **{k: str(v) for k, v in parts.items()}, **heads, dtype=dtype)


@pytest.mark.parametrize("recipe", ["animatediff", "trained"])
def test_networks_are_loaded_in_the_precision_of_the_folder(
    recipe, gated_model, animatediff, stable_diffusion, monkeypatch
):
    """With weights equal to those that are loaded in float32 and rounded then; the domain adapter is merged before."""
    made = {}
    monkeypatch.setattr(Networks, "to", lambda *_: None)
    for dtype in ("float16", "float32"):
        trained = AssemblyConfig("trained", model=str(gated_model), dtype=dtype)
        config = trained if recipe == "trained" else animatediff_config(animatediff, stable_diffusion, dtype)
        made[dtype] = assembly.assemble(config).networks
    for name, network in made["float16"].modules.items():
        expected = made["float32"].modules[name].half().state_dict()
        if (recipe, name) != ("animatediff", "motion_controlnet"):  # a copy of the UNet, cast as it is finished
            assert {value.dtype for value in network.parameters()} == {torch.float16}, name
        found = network.half().state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items()), name


def test_a_trained_model_keeps_what_its_model_had(tiny_model, tmp_path, caplog):
    """LoRAs of the UNet and the scheduler's class; a few-step LoRA is left out by name where its teacher changed."""
    root = tmp_path / "root"
    shutil.copytree(tiny_model, root)
    scheduler = json.loads((root / "scheduler" / "scheduler_config.json").read_text())
    DPMSolverMultistepScheduler.from_config(scheduler).save_pretrained(root / "scheduler")
    for name in UNET_LORA_FOLDERS:
        (root / name).mkdir()
        save_file({name: torch.ones(1)}, root / name / DIFFUSERS_WEIGHTS_NAME)
    recipe = ["--config", "configs/model/trained.yaml", f"model={root}", "object_lora=null", "dtype=float32"]
    for output, parts, left in (
        ("same", ["motion_controlnet=null", "camera_lora=null"], set()),
        ("other", ["motion_controlnet=null", f"camera_lora={root / 'camera_lora'}"], {"few_step_lora"}),
    ):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert assemble.main([*recipe, *parts, "--output", str(tmp_path / output)]) == 0
        kept = {path.parent.name for path in (tmp_path / output).glob(f"*/{DIFFUSERS_WEIGHTS_NAME}")}
        assert kept == set(UNET_LORA_FOLDERS) - left
        told = {record.args[0] for record in caplog.records if "is left out: " in record.getMessage()}
        assert told == left
        pipe = ImageConductorPipeline.from_pretrained(tmp_path / output)
        assert type(pipe.scheduler) is DPMSolverMultistepScheduler


def test_a_text_to_video_model_takes_no_motion_controlnet(tiny_model, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(tiny_model, root)
    index = root / "unet" / "config.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "UNet3DConditionModel"}))
    config = AssemblyConfig("trained", model=str(root), camera_lora=str(root / "camera_lora"))
    with pytest.raises(ValueError, match=r"needs ControlNets, and .* is a text-to-video model"):
        assembly.assemble(config)
    assert assemble.main(["--export", "published", "--model", str(root), "--output", str(tmp_path / "out")]) == 2
