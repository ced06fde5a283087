"""Model folders from parts in the layouts that people download, and back; small files with the real key names."""

import importlib
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conftest import tiny_networks
from diffusers import DDIMScheduler
from parity import CONFIG, model_config, published_scheduler, weights
from PIL import Image
from safetensors.torch import load_file, save_file

from imageconductor import config as config_file
from imageconductor.checkpoints import assembly
from imageconductor.checkpoints.domain_adapter import DomainAdapter
from imageconductor.checkpoints.personalise import personalise
from imageconductor.checkpoints.published import from_published, load_published, to_published
from imageconductor.commands import assemble
from imageconductor.conditioning import camera_preset
from imageconductor.models.adapters import Adapter, adapter_parameters, add_adapter, save_adapter
from imageconductor.models.controlnets import MotionControlNet
from imageconductor.models.networks import Networks
from imageconductor.sampling.pipeline import ImageConductorPipeline

ROOT = Path(__file__).parents[2]
HEADS = CONFIG["motion_heads"]
PUBLISHED = {"unet": "unet", "image_controlnet": "image_controlnet", "motion_controlnet": "flow_controlnet"}


def command(*arguments):
    return assemble.main([str(argument) for argument in arguments])


def published_recipe(folder, stable_diffusion, suffix=".ckpt"):
    return [
        *("--config", "configs/model/image_conductor_v1.yaml", f"stable_diffusion={stable_diffusion}"),
        *(f"{ours}={folder / theirs}{suffix}" for ours, theirs in PUBLISHED.items()),
        f"motion_num_attention_heads={HEADS}",
        "dtype=float32",
    ]


@pytest.fixture(scope="module")
def assembled(published, stable_diffusion, tmp_path_factory):
    output = tmp_path_factory.mktemp("models") / "image_conductor"
    assert command(*published_recipe(published, stable_diffusion), "--output", output) == 0
    return output


def test_the_folder_holds_the_published_networks(assembled, stable_diffusion):
    expected = load_published(*(weights(name) for name in PUBLISHED.values()), **model_config())
    pipe = ImageConductorPipeline.from_pretrained(assembled)
    for network, ours in zip(expected, (pipe.unet, pipe.image_controlnet, pipe.motion_controlnet), strict=True):
        found = ours.state_dict()
        for key, value in network.state_dict().items():
            assert torch.equal(found[key], value), key
        assert type(network) is type(ours)
        assert network.config["motion_norm_num_groups"] == ours.config["motion_norm_num_groups"] == 32
    assert pipe.sampling_defaults["guidance_scale"] == 8.5
    ours, theirs = (
        {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        for scheduler in (pipe.scheduler, published_scheduler())
    )
    assert (type(pipe.scheduler), ours) == (DDIMScheduler, theirs)
    betas = torch.linspace(0.00085, 0.012, 1000)
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, (1 - betas).cumprod(0))
    assert (pipe.scheduler.final_alpha_cumprod, pipe.scheduler.config["clip_sample"]) == (1, False)
    pipe.scheduler.set_timesteps(25)
    assert pipe.scheduler.timesteps.tolist() == list(range(961, 0, -40))
    record = json.loads((assembled / "sources.json").read_text())["sources"]
    assert record["motion_controlnet"]["keys"] == len(weights("flow_controlnet"))
    assert len(record["vae"]["sha256"]["diffusion_pytorch_model.safetensors"]) == 64


def test_parts_are_mapped_and_converted_one_after_the_other(published, stable_diffusion, monkeypatch):
    """What a file held is gone before the next is read, and no network is ever held in float32."""
    read, states = assembly.read_checkpoint, []

    def read_next(path):
        assert not any(tensor() for tensor in states)
        state = read(path)
        assert str(path) in Path("/proc/self/maps").read_text()
        states.append(weakref.ref(next(iter(state.values()))))
        return state

    monkeypatch.setattr(assembly, "read_checkpoint", read_next)
    monkeypatch.setattr(Networks, "to", lambda *_: None)
    recipe = published_recipe(published, stable_diffusion)
    config = config_file.load(assembly.AssemblyConfig, Path(recipe[1]), [*recipe[2:-1], "dtype=float16"])
    networks = assembly.assemble(config).networks
    assert len(states) == 3
    for network in (networks.unet, networks.image_controlnet, networks.motion_controlnet):
        plain = {value.dtype for key, value in network.state_dict().items() if ".lora_" not in key}
        assert plain == {torch.float16}


@pytest.mark.slow
def test_it_makes_a_video(assembled):
    pipe = ImageConductorPipeline.from_pretrained(assembled)
    pipe.set_progress_bar_config(disable=True)
    track = camera_preset("pan-left", (64, 64), 4)
    video = pipe(
        Image.new("RGB", (64, 64), "red"),
        track,
        "a red circle",
        control="camera",
        width=64,
        height=64,
        num_frames=4,
        num_inference_steps=2,
        output_type="pt",
    ).frames
    assert video.shape == (1, 4, 3, 64, 64)
    assert video.isfinite().all()


@pytest.mark.parametrize("form", ["safetensors", pytest.param("ckpt", marks=pytest.mark.slow)])
def test_export_gives_the_published_files_back(assembled, stable_diffusion, tmp_path, form):
    output = tmp_path / "exported"
    assert command("--export", "published", "--model", assembled, "--format", form, "--output", output) == 0
    for name in PUBLISHED.values():
        file = output / f"{name}.{form}"
        state = load_file(file) if form == "safetensors" else torch.load(file, weights_only=True)["state_dict"]
        original = weights(name)
        # conv_in has no LoRA in the release's sense that matters, but its files may carry one: nothing may be lost.
        assert state.keys() == original.keys()
        assert all(torch.equal(state[key], value) for key, value in original.items())
    lora = load_file(output / "camera_lora.safetensors")
    assert all(key.endswith(".weight") and ".lora_" in key for key in lora)
    again = tmp_path / "again"
    assert command(*published_recipe(output, stable_diffusion, f".{form}"), "--output", again) == 0
    for file in sorted(assembled.rglob("*.safetensors")):
        first, second = load_file(file), load_file(again / file.relative_to(assembled))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_export_fits_the_authors_code_even_where_a_layer_has_no_lora(tiny_model, tmp_path):
    output = tmp_path / "exported"
    assert command("--export", "published", "--model", tiny_model, "--output", output) == 0
    state = load_file(output / "flow_controlnet.safetensors")
    assert "conv_in.base_layer.weight" in state
    assert not any(key.startswith("conv_in.lora") for key in state)
    networks = Networks.load(tiny_model)
    base, adapters = from_published(state)
    assert set(adapters) == set(Adapter)
    plain = {key: value for key, value in networks.motion_controlnet.state_dict().items() if not key.endswith(".pe")}
    assert base.keys() == plain.keys()
    assert all(torch.equal(base[key], value) for key, value in plain.items())


def test_what_the_published_layout_has_no_place_for_is_refused_or_said(tiny_model, tmp_path, caplog, capsys):
    output = tmp_path / "exported"
    assert command("--export", "published", "--model", ROOT / "models" / "sprites", "--output", output) == 2
    assert "no place for first_frame_warp and first_frame_skips" in capsys.readouterr().err
    assert not output.exists()
    with caplog.at_level("INFO"):
        assert command("--export", "published", "--model", tiny_model, "--output", output) == 0
    said = [record.getMessage() for record in caplog.records if "not in these files" in record.getMessage()]
    assert any("the UNet predicts v_prediction" in line for line in said)


def animatediff_recipe(folder, stable_diffusion, **settings):
    parts = {
        "stable_diffusion": stable_diffusion,
        "motion_module": folder / "v3_sd15_mm.ckpt",
        "image_controlnet": folder / "sparsectrl_rgb.ckpt",
        "domain_adapter": folder / "v3_sd15_adapter.ckpt",
        "motion_num_attention_heads": HEADS,
        "dtype": "float32",
        **settings,
    }
    return ["--config", "configs/model/animatediff_v3.yaml", *(f"{key}={value}" for key, value in parts.items())]


@pytest.mark.slow
def test_the_base_to_train_from(animatediff, stable_diffusion, tmp_path):
    folders = {}
    for name, settings in {
        "original": {},
        "diffusers": {"motion_module": animatediff / "diffusers_module"},
        "half": {"domain_adapter_scale": 0.5},
        "unmerged": {"domain_adapter_scale": 0.0},
        "without": {"domain_adapter": "null"},
    }.items():
        folders[name] = tmp_path / name
        arguments = animatediff_recipe(animatediff, stable_diffusion, **settings)
        assert command(*arguments, "--output", folders[name]) == 0
    units = {name: Networks.load(folder) for name, folder in folders.items()}
    original, spatial = units["original"].unet.state_dict(), units["without"].unet.state_dict()
    same = units["diffusers"].unet.state_dict()
    assert all(torch.equal(value, same[key]) for key, value in original.items())
    published, _ = from_published(weights("unet"))
    plain = load_file(stable_diffusion / "unet" / "diffusion_pytorch_model.safetensors")
    for key, value in spatial.items():
        if not key.endswith(".pe"):
            assert torch.equal(value, published[key] if ".motion_modules." in key else plain[key]), key
    adapter = torch.load(animatediff / "v3_sd15_adapter.ckpt", weights_only=True)["state_dict"]
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    for name, scale in (("original", 1.0), ("half", 0.5)):
        for target, key in ((f"{layer}.to_out.0.weight", "to_out"), (f"{layer}.to_k.weight", "to_k")):
            down, up = (adapter[f"{layer}.processor.{key}_lora.{side}.weight"] for side in ("down", "up"))
            torch.testing.assert_close(units[name].unet.state_dict()[target], plain[target] + scale * up @ down)
    motion = units["original"].motion_controlnet
    assert motion.unshuffle_factor == 8
    residuals = motion(torch.tensor(3), torch.randn(1, 5, CONFIG["cross_attention_dim"]), torch.randn(1, 2, 3, 64, 64))
    assert not any(residual.any() for residual in (*residuals.down, residuals.mid)), "it adds nothing before training"


def sampled(folder, **settings):
    """A short video of a folder, through `sample.py`'s path for the domain adapter."""
    pipe = ImageConductorPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    personalise(pipe, None, [], [], **settings)
    return pipe(
        Image.new("RGB", (64, 64), "red"),
        prompt="a red circle",
        width=64,
        height=64,
        num_frames=2,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames


@pytest.mark.slow
def test_the_domain_adapter_can_be_scaled_afterwards(animatediff, stable_diffusion, tmp_path):
    """Merged at 1 and sampled at 0.3 equals merged at 0 and sampled at 0.3, and survives being saved again."""
    for scale in (1.0, 0.0):
        arguments = animatediff_recipe(animatediff, stable_diffusion, domain_adapter_scale=scale)
        assert command(*arguments, "--output", tmp_path / f"merged{scale}") == 0
    ImageConductorPipeline.from_pretrained(tmp_path / "merged1.0").save_pretrained(tmp_path / "again")
    videos = [sampled(tmp_path / n, domain_adapter_scale=0.3) for n in ("merged1.0", "merged0.0", "again")]
    torch.testing.assert_close(videos[0], videos[1], atol=5e-4, rtol=1e-3)  # guidance amplifies rounding
    assert torch.equal(videos[0], videos[2])
    assert (videos[0] - sampled(tmp_path / "merged0.0")).abs().max() > 1e-3


@pytest.mark.slow
def test_an_animatediff_folder_goes_out_in_the_published_layout_and_comes_back(animatediff, stable_diffusion, tmp_path):
    base, files, back = (tmp_path / name for name in ("base", "files", "back"))
    assert command(*animatediff_recipe(animatediff, stable_diffusion), "--output", base) == 0
    assert command("--export", "published", "--model", base, "--output", files) == 0
    assert sorted(path.name for path in files.iterdir()) == [
        f"{name}.safetensors" for name in sorted(PUBLISHED.values())
    ]
    assert command(*published_recipe(files, stable_diffusion, ".safetensors"), "--output", back) == 0
    assert torch.equal(sampled(back), sampled(base))


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """Run folders of stages 1 and 2 with other weights than the tiny model's."""
    folder = tmp_path_factory.mktemp("runs")
    networks = tiny_networks(seed=5)
    add_adapter(networks.motion_controlnet, Adapter.CAMERA, rank=3)
    save_adapter(networks.motion_controlnet, Adapter.CAMERA, folder / "camera" / "camera_lora")
    tiny_networks(seed=5).motion_controlnet.save_pretrained(folder / "sparse" / "motion_controlnet")
    (folder / "camera" / "config.yaml").write_text("max_steps: 123\nbatch_size: 8\nsets: [camera]\nlora_rank: 3\n")
    return folder


def test_a_trained_lora_joins_the_model_it_was_trained_from(tiny_model, runs, tmp_path):
    recipe = ["--config", "configs/model/trained.yaml", f"model={tiny_model}", "dtype=float32", "object_lora=null"]
    parts = [f"camera_lora={runs}/camera/camera_lora", f"motion_controlnet={runs}/sparse/motion_controlnet"]
    assert command(*recipe, *parts, "--output", tmp_path / "mine") == 0
    before, after = (ImageConductorPipeline.from_pretrained(folder) for folder in (tiny_model, tmp_path / "mine"))
    assert after.sampling_defaults == before.sampling_defaults
    for adapter, same in ((Adapter.CAMERA, False), (Adapter.OBJECT, True)):
        old, new = (adapter_parameters(pipe.motion_controlnet, adapter) for pipe in (before, after))
        assert all(torch.equal(old[key], new[key]) for key in old) == same
    trained = load_file(runs / "sparse" / "motion_controlnet" / "diffusion_pytorch_model.safetensors")
    state = {key.replace(".base_layer", ""): value for key, value in after.motion_controlnet.state_dict().items()}
    assert all(torch.equal(state[key], value) for key, value in trained.items())
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "# mine\n" in card
    assert "| camera_lora | 123 | 8 |" in card
    assert f"{runs}/camera/camera_lora" in card
    again = tmp_path / "again"
    after.save_pretrained(again)
    assert (again / "training" / "camera_lora.yaml").read_text() == (runs / "camera" / "config.yaml").read_text()


def test_a_lora_trained_from_another_model_is_refused(tiny_model, runs, tmp_path, capsys):
    shutil.copytree(runs / "sparse", tmp_path / "other")
    path = tmp_path / "other" / "motion_controlnet"
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"block_out_channels": [16, 48]}))
    MotionControlNet.from_config(MotionControlNet.load_config(path)).save_pretrained(path)
    recipe = ["--config", "configs/model/trained.yaml", f"model={tiny_model}"]
    recipe += ["camera_lora=null", "object_lora=null"]
    assert command(*recipe, f"motion_controlnet={path}", "--output", tmp_path / "mine") == 2
    assert "motion_controlnet is for another model" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def broken(folder, published, name):
    """A copy of the published files with one of them damaged."""
    shutil.copytree(published, folder)
    state = weights("flow_controlnet")
    if name == "truncated":
        save_file(state, folder / "flow_controlnet.safetensors")
        content = (folder / "flow_controlnet.safetensors").read_bytes()
        (folder / "flow_controlnet.ckpt").unlink()
        (folder / "flow_controlnet.ckpt").write_bytes(content[: len(content) // 2])
    elif name == "code":
        torch.save({"state_dict": state, "run": importlib.import_module}, folder / "flow_controlnet.ckpt")
    elif name == "missing key":
        state.pop("conv_in.base_layer.bias")
        torch.save({"state_dict": state}, folder / "flow_controlnet.ckpt")
    elif name == "ranks":
        key = next(key for key in state if key.endswith("lora_A.omcm_weights.weight"))
        state[key] = state[key][:1]
        torch.save({"state_dict": state}, folder / "flow_controlnet.ckpt")
    elif name == "missing file":
        (folder / "flow_controlnet.ckpt").unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("truncated", r"flow_controlnet\.ckpt cannot be read as a checkpoint"),
        ("code", r"flow_controlnet\.ckpt cannot be read as a checkpoint"),
        ("missing key", r"motion ControlNet checkpoint does not fit the model; 1 missing: conv_in\.bias"),
        ("ranks", r"expected one LoRA rank, found"),
        ("missing file", r"no file or folder at .*flow_controlnet\.ckpt"),
    ],
)
def test_a_bad_part_is_named_and_nothing_is_written(name, said, published, stable_diffusion, tmp_path, capsys):
    folder = broken(tmp_path / "parts", published, name)
    assert command(*published_recipe(folder, stable_diffusion), "--output", tmp_path / "model") == 2
    printed = capsys.readouterr().err
    import re

    assert re.search(said, printed), printed
    assert len(printed.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_other_bad_input(published, animatediff, stable_diffusion, tmp_path, capsys):
    xl = tmp_path / "xl"
    shutil.copytree(stable_diffusion, xl)
    config = json.loads((xl / "unet" / "config.json").read_text())
    (xl / "unet" / "config.json").write_text(json.dumps(config | {"addition_embed_type": "text_time"}))
    (tmp_path / "there").mkdir()
    recipe = published_recipe(published, stable_diffusion)
    swapped = {"motion_module": animatediff / "too_much.ckpt"}
    cases = [
        (
            [*published_recipe(published, xl), "--output", tmp_path / "a"],
            "another architecture than Stable Diffusion 1.5",
        ),
        ([*recipe, "--output", tmp_path / "there"], "exists; name another --output"),
        ([*recipe, "unett=x", "--output", tmp_path / "a"], "did you mean 'unet'"),
        ([*recipe, "unet=null", "--output", tmp_path / "a"], "recipe published needs unet"),
        (["--output", tmp_path / "a"], "give one of --config FILE, --export FORMAT"),
        (["--export", "published", "--model", tmp_path, "--output", tmp_path / "a"], "is no model folder"),
        (
            [*animatediff_recipe(animatediff, stable_diffusion, **swapped), "--output", tmp_path / "a"],
            "holds more than motion modules, e.g. conv_in.weight",
        ),
    ]
    for arguments, said in cases:
        assert command(*arguments) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"a.processor.to_q_lora.down.weight": (2, 3), "a.processor.to_q_lora.up.weight": (4, 2)},
            r"is \(4, 4\), its LoRA",
        ),
        ({"b.processor.to_q_lora.down.weight": (2, 4), "b.processor.to_q_lora.up.weight": (4, 2)}, r"has no b\.to_q"),
        ({"a.processor.to_q_lora.down.weight": (2, 4)}, r"a\.to_q\.lora_A\.weight has no counterpart"),
        ({"a.to_q.weight": (2, 4)}, "is no LoRA weight"),
    ],
)
def test_a_domain_adapter_of_another_model_is_refused(content, said, tmp_path):
    torch.save({key: torch.ones(shape) for key, shape in content.items()}, tmp_path / "adapter.ckpt")
    state = {"a.to_q.weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match=said) as error:
        DomainAdapter.read(tmp_path / "adapter.ckpt", 1.0).merge(state)
    assert "adapter.ckpt" in str(error.value)
    assert not state["a.to_q.weight"].any()


def test_layers_that_are_no_networks_keep_their_names():
    assert to_published(torch.nn.Sequential(torch.nn.Linear(2, 2))).keys() == {"0.weight", "0.bias"}
