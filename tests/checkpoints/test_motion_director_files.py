"""MotionDirector's LoRA files: what the published ones compute here, and what other tools make of ours."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import AnimateDiffPipeline, UNetMotionModel
from parity import TOLERANCE, relative_error
from parity_md import ANIMATEDIFF, FOLDER, MODELSCOPE, animatediff_unet, modelscope_unet
from safetensors.torch import load_file

from imageconductor.checkpoints.motion_director import (
    export_appearance_lora,
    export_motion_lora,
    read_published_list,
)
from imageconductor.checkpoints.personalise import load_motion_lora, load_style_lora, read_motion_lora, read_style_lora
from imageconductor.checkpoints.published import rename_motion_modules
from imageconductor.commands import assemble
from imageconductor.models.adapters import (
    DIFFUSERS_WEIGHTS_NAME,
    active,
    adapter_pairs,
    adapter_parameters,
    add_adapter,
    attach_adapter,
    lora_targets,
)
from imageconductor.models.lora_files import LoraPair, read_lora
from imageconductor.models.weights import read_checkpoint

AD = FOLDER / "ad_checkpoint"
PORT_MOTION, PORT_SPATIAL = AD / "temporal_motion_lora_format.safetensors", AD / "spatial_format.safetensors"
OFFICIAL = AD / "official_motion_lora_format_attention_only.safetensors"
OFFICIAL_PREDICTION = "ad/official_motion_lora_attention_only_alpha0.6_F"
LISTS = FOLDER / "checkpoint"
LAYOUT = json.loads((LISTS / "layout.json").read_text())
NUM_CLIPS = LAYOUT["spatial_one_per_clip_file"]["clips"]


@pytest.fixture(scope="module")
def unet():
    return animatediff_unet()


@pytest.fixture(scope="module")
def unet3d():
    return modelscope_unet()


@pytest.fixture(scope="module")
def pipe(unet):
    """As much of a pipeline as the readers look at."""
    return SimpleNamespace(unet=unet, text_encoder=torch.nn.Module())


@torch.no_grad()
def error(network, family, name, **scales):
    """How far the prediction under these of the attached adapters is from the recorded one."""
    recorded, x = family.expected(), family.inputs()
    noisy = recorded["ad/noisy" if family is ANIMATEDIFF else "step/noisy"]
    for module in network.modules():
        for adapter in scales.keys() & getattr(module, "scaling", {}).keys():
            module.set_scale(adapter, scales[adapter])
    with active(network, *scales):
        return relative_error(network(noisy, x["timestep"], x["text"]).sample, recorded[name])


def ours(name):
    return rename_motion_modules(f"{name}.").removesuffix(".")


def recorded_layers(file):
    """What the layout says: sides of a layer of ours by published key."""
    keys = json.loads((AD / "layout.json").read_text())[file]["key_to_[module/part]"]
    return {key: (ours(value.rpartition("/")[0]), value.rpartition("/")[2]) for key, value in keys.items()}


def lost_layers():
    """The port trains them and forgets to write them."""
    return [
        ours(x)
        for x in json.loads((AD / "layout.json").read_text())["spatial_format"]["trained_modules_missing_from_file"]
    ]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for layer, pair in expected.items():
        assert torch.equal(found[layer].down.reshape(pair.down.shape), pair.down), layer
        assert torch.equal(found[layer].up.reshape(pair.up.shape), pair.up), layer
        assert found[layer].alpha == pair.alpha, layer


# Files of the AnimateDiff port and of AnimateDiff


@pytest.mark.parametrize(("read", "path"), [(read_motion_lora, PORT_MOTION), (read_style_lora, PORT_SPATIAL)])
def test_every_key_of_the_ports_files_finds_its_layer(read, path, pipe):
    state, pairs = load_file(path), read(pipe, path)["unet"]
    layers = recorded_layers(path.stem)
    assert layers.keys() == state.keys()
    assert {layer for layer, _ in layers.values()} == pairs.keys()
    for key, (layer, side) in layers.items():
        assert torch.equal(getattr(pairs[layer], side), state[key]), key


def test_the_motion_files_hold_the_seeded_lora(pipe):
    motion = ANIMATEDIFF.lora_state("temporal", lora_targets(pipe.unet, "motion"))
    assert_same(read_motion_lora(pipe, PORT_MOTION)["unet"], motion)
    attention = {layer: pair for layer, pair in motion.items() if ".attn" in layer}
    assert_same(read_motion_lora(pipe, OFFICIAL)["unet"], attention)


@pytest.fixture(scope="module")
def port(unet, pipe):
    """The UNet with what the port's files hold, in parts, and with what the port forgot to write."""
    spatial = read_style_lora(pipe, PORT_SPATIAL)["unet"]
    by_rule = {layer: spatial.pop(layer) for layer in lora_targets(unet, "appearance")}
    loras = {"motion": read_motion_lora(pipe, PORT_MOTION)["unet"], "by_rule": by_rule, "rest": spatial}
    for name, pairs in {**loras, "lost": ANIMATEDIFF.lora_state("spatial", lost_layers())}.items():
        attach_adapter(unet, name, pairs)
    return unet


def test_the_ports_files_give_the_recorded_predictions_by_motion_directors_rule(port):
    for name, scales in {
        "base_F": {},
        "md_rule/temporal_only_F": {"motion": 1.0},
        "md_rule/both_pred_F": {"motion": 1.0, "by_rule": 1.0},
        "md_rule/spatial0.5_temporal0.8_F": {"motion": 0.8, "by_rule": 0.5},
    }.items():
        assert error(port, ANIMATEDIFF, f"ad/{name}", **scales) <= TOLERANCE, name


def test_the_ports_files_give_its_own_predictions_but_for_what_it_forgot_to_write(port):
    for name, motion, spatial in (("both_pred_F", 1.0, 1.0), ("spatial0.5_temporal0.8_F", 0.8, 0.5)):
        scales = {"motion": motion, "by_rule": spatial, "rest": spatial}
        assert error(port, ANIMATEDIFF, f"ad/port_rule/{name}", **scales) > 1000 * TOLERANCE, name
        assert error(port, ANIMATEDIFF, f"ad/port_rule/{name}", **scales, lost=spatial) <= TOLERANCE, name


def test_animatediffs_own_file_gives_the_recorded_prediction(unet, pipe):
    attach_adapter(unet, "official", read_motion_lora(pipe, OFFICIAL)["unet"])
    assert error(unet, ANIMATEDIFF, OFFICIAL_PREDICTION, official=0.6) <= TOLERANCE


# The published lists


def spatial_of_clip(network, clip):
    path = LISTS / "spatial_one_per_clip_unet.pt"
    return read_published_list(path, network, "appearance", clip=clip, num_clips=NUM_CLIPS)


@pytest.mark.parametrize(("kind", "lora"), [("motion", "temporal"), ("appearance", "spatial")])
def test_a_published_list_is_read_in_the_recorded_order(kind, lora, unet3d):
    pairs = read_published_list(LISTS / f"{lora}_unet.pt", unet3d, kind)
    in_file_order = [
        (layer, side, list(getattr(pair, side).shape)) for layer, pair in pairs.items() for side in ("up", "down")
    ]
    assert in_file_order == [tuple(entry) for entry in LAYOUT[lora]]
    assert_same(pairs, MODELSCOPE.lora_state(lora, pairs))


def test_each_clip_has_its_lora_in_the_list(unet3d):
    for clip in range(NUM_CLIPS):
        pairs = spatial_of_clip(unet3d, clip)
        assert_same(pairs, MODELSCOPE.lora_state(f"spatial_clip{clip}", pairs))


def test_the_published_lists_give_the_recorded_predictions(unet3d):
    attach_adapter(unet3d, "motion", read_published_list(LISTS / "temporal_unet.pt", unet3d, "motion"))
    attach_adapter(unet3d, "spatial", read_published_list(LISTS / "spatial_unet.pt", unet3d, "appearance"))
    attach_adapter(unet3d, "clip1", spatial_of_clip(unet3d, 1))
    for name, scales in {
        "base_F": {},
        "temporal_only_F": {"motion": 1.0},
        "temporal_only_scale_F": {"motion": MODELSCOPE.config["scale"]},
        "spatial_only_F": {"spatial": 1.0},
        "both_F": {"motion": 1.0, "spatial": 1.0},
        "spatial_one_per_clip_clip1_active_F": {"clip1": 1.0},
    }.items():
        assert error(unet3d, MODELSCOPE, f"unet3d/{name}", **scales) <= TOLERANCE, name


def test_the_layers_are_named_without_weights(unet3d, tmp_path):
    with torch.device("meta"):
        layout = type(unet3d).from_config(unet3d.config)
    path = LISTS / "temporal_unet.pt"
    motion = read_published_list(path, layout, "motion")
    assert_same(motion, read_published_list(path, unet3d, "motion"))
    export_motion_lora(tmp_path / "motion.safetensors", motion, "diffusers")
    named = {layer.removeprefix("unet."): pair for layer, pair in read_lora(tmp_path / "motion.safetensors").items()}
    assert_same(named, motion)


def test_a_list_that_does_not_fit_says_why(unet, unet3d, tmp_path):
    motion, spatial = LISTS / "temporal_unet.pt", LISTS / "spatial_unet.pt"
    one_per_clip = LISTS / "spatial_one_per_clip_unet.pt"
    cut, wide, strange = (tmp_path / f"{name}.pt" for name in ("cut", "wide", "strange"))
    tensors = torch.load(spatial, weights_only=True)
    torch.save(tensors[:-2], cut)
    torch.save([torch.cat([tensor] * 2, dim=tensor.shape.index(max(tensor.shape))) for tensor in tensors], wide)
    torch.save([*tensors[:-1], 3], strange)
    for said, arguments in {
        rf"not \d+ for .* those of a LoRA for each clip fit with num_clips={NUM_CLIPS}, in Python": (
            one_per_clip,
            unet3d,
            "appearance",
        ),
        "as many as a LoRA for motion has": (motion, unet3d, "appearance"),
        "as many as a LoRA for appearance has": (spatial, unet3d, "motion"),
        "which no number of clips explains": (cut, unet3d, "appearance"),
        r"is for another base: .* is \(\d+, \d+\), here it must be": (wide, unet3d, "appearance"),
        "is no list of tensors": (strange, unet3d, "appearance"),
        "fit a UNet3DConditionModel only, and this network is a MotionUNet": (motion, unet, "motion"),
        "no set of LoRA targets is called 'temporal'": (motion, unet3d, "temporal"),
    }.items():
        with pytest.raises(ValueError, match=said) as refused:
            read_published_list(*arguments)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=f"clip {NUM_CLIPS} does not exist"):
        spatial_of_clip(unet3d, NUM_CLIPS)
    with pytest.raises(ValueError, match=r"temporal_unet\.pt .* is a list without names"):
        read_checkpoint(motion)


# Our files in other tools


def merge_as_animatediff(path, scale=1.0):
    """The network after AnimateDiff's own loader: the layer of each "down" key grows by scale * up @ down.

    ComfyUI-AnimateDiff-Evolved names layers by the same rule.
    """
    state, weights = torch.load(path, weights_only=True), ANIMATEDIFF.weights()
    for key in (key for key in state if "up." not in key):
        layer = re.sub(r"processor\.|_lora|down\.", "", key).replace("to_out.", "to_out.0.")
        weights[layer] += scale * state[key.replace(".down.", ".up.")] @ state[key]
    return animatediff_unet(weights)


def test_our_motion_lora_plays_in_animatediff(pipe, tmp_path):
    motion = ANIMATEDIFF.lora_state("temporal", lora_targets(pipe.unet, "motion"))
    export_motion_lora(tmp_path / "all.ckpt", motion)
    merged = merge_as_animatediff(tmp_path / "all.ckpt")
    assert error(merged, ANIMATEDIFF, "ad/md_rule/temporal_only_F") <= TOLERANCE
    export_motion_lora(tmp_path / "attention.ckpt", motion, attention_only=True)
    merged = merge_as_animatediff(tmp_path / "attention.ckpt", scale=0.6)
    assert error(merged, ANIMATEDIFF, OFFICIAL_PREDICTION) <= TOLERANCE
    torch.save(load_file(PORT_MOTION), tmp_path / "port.ckpt")
    with pytest.raises(KeyError, match=r"to_out\.0\.0\.weight"):
        merge_as_animatediff(tmp_path / "port.ckpt")


def test_our_motion_lora_is_written_as_animatediffs_are(pipe, tmp_path):
    motion = ANIMATEDIFF.lora_state("temporal", lora_targets(pipe.unet, "motion"))
    export_motion_lora(tmp_path / "attention.safetensors", motion, attention_only=True)
    written, official = load_file(tmp_path / "attention.safetensors"), load_file(OFFICIAL)
    assert written.keys() == official.keys()
    assert all(torch.equal(written[key], value) for key, value in official.items())
    for suffix in ("safetensors", "ckpt"):
        export_motion_lora(tmp_path / f"all.{suffix}", motion)
        assert_same(read_motion_lora(pipe, tmp_path / f"all.{suffix}")["unet"], motion)


def uneven_lora(network, target_set):
    """A LoRA of two ranks and three alphas."""
    layers, generator = lora_targets(network, target_set), torch.Generator().manual_seed(0)
    pairs = {}
    for number, layer in enumerate(layers):
        out, into = network.get_submodule(layer).weight.shape
        rank, alpha = (2, 2.0) if number % 3 else (3, 1.5)
        alpha = 0.5 if layer == layers[0] else alpha
        down, up = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
        pairs[layer] = LoraPair(down, up, alpha)
    return pairs


def assert_acts_as(network, pairs, name="one"):
    """The adapter adds alpha / r * up @ down to each layer of the pairs, and to no other."""
    found = {layer for layer, module in network.named_modules() if name in getattr(module, "lora_A", ())}
    assert found == pairs.keys()
    for layer, pair in pairs.items():
        delta = network.get_submodule(layer).get_delta_weight(name)
        torch.testing.assert_close(delta, pair.alpha / pair.rank * pair.up @ pair.down)


EXPORTS = {
    "animatediff": ("motion", export_motion_lora, load_motion_lora),
    "diffusers": ("motion", export_motion_lora, load_motion_lora),
    "diffusers, appearance": ("appearance", export_appearance_lora, load_style_lora),
    "kohya": ("appearance", export_appearance_lora, load_style_lora),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_what_we_write_acts_alike_here_and_in_diffusers(name, tmp_path):
    target_set, export, load = EXPORTS[name]
    form, path, pipe = name.partition(",")[0], tmp_path / "lora.safetensors", tiny_pipeline()
    pairs = uneven_lora(pipe.unet, target_set)
    export(path, pairs, form)
    load(pipe, path, "one")
    assert_acts_as(pipe.unet, pairs)
    if form == "animatediff":
        return  # Of diffusers' own pipelines none reads these keys.
    pipe = tiny_pipeline()
    parts = {part: pipe.components[part] for part in ("vae", "text_encoder", "tokenizer", "scheduler")}
    unet = UNetMotionModel.from_config(
        {k: v for k, v in pipe.unet.config.items() if k not in ("motion_norm_num_groups", "first_frame_warp")}
    )
    for each in (pipe, AnimateDiffPipeline(**parts, unet=unet, motion_adapter=None)):
        each.load_lora_weights(path, adapter_name="one")
        assert_acts_as(each.unet, pairs)


def test_a_trained_adapter_is_exported_as_it_acts(tmp_path):
    pipe = tiny_pipeline()
    for number, (target_set, export) in enumerate(
        {"motion": export_motion_lora, "appearance": export_appearance_lora}.items()
    ):
        layers = lora_targets(pipe.unet, target_set)
        add_adapter(pipe.unet, target_set, rank=2, alpha=3, dropout=0.1, targets=layers, seed=number)
        for parameter in adapter_parameters(pipe.unet, target_set).values():
            parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
        pairs = adapter_pairs(pipe.unet, target_set)
        assert_acts_as(pipe.unet, pairs, target_set)
        export(tmp_path / f"{target_set}.safetensors", pairs)
        assert {pair.alpha for pair in pairs.values()} == {3}
    other = tiny_pipeline()
    load_motion_lora(other, tmp_path / "motion.safetensors", "motion")
    load_style_lora(other, tmp_path / "appearance.safetensors", "appearance")
    for target_set in ("motion", "appearance"):
        assert_acts_as(other.unet, adapter_pairs(pipe.unet, target_set), target_set)
    with pytest.raises(ValueError, match="has no third LoRA"):
        adapter_pairs(pipe.unet, "third")


def test_the_command_writes_the_loras_of_a_run_and_of_its_checkpoints(tiny_model, tmp_path, capsys):
    pipe = tiny_pipeline()
    pairs = {kind: uneven_lora(pipe.unet, kind) for kind in ("motion", "appearance")}
    run = tmp_path / "run"
    for folder in (run, run / "checkpoint-00000002"):
        for kind, export in (("motion", export_motion_lora), ("appearance", export_appearance_lora)):
            (folder / f"{kind}_lora").mkdir(parents=True)
            export(folder / f"{kind}_lora" / DIFFUSERS_WEIGHTS_NAME, pairs[kind], "diffusers")

    def export(form, lora, output, code=0):
        given = ["--export", form, "--model", str(tiny_model), "--lora", str(lora), "--output", str(tmp_path / output)]
        assert assemble.main(given) == code
        return tmp_path / output if code == 0 else capsys.readouterr().err

    for form, lora, output, kind in (
        ("animatediff", run, "motion.ckpt", "motion"),
        ("animatediff", run / "checkpoint-00000002", "half.safetensors", "motion"),
        ("kohya", run, "look.safetensors", "appearance"),
        ("diffusers", run / "motion_lora", "theirs.safetensors", "motion"),
        ("diffusers", tmp_path / "look.safetensors", "again.safetensors", "appearance"),
    ):
        path, fresh = export(form, lora, output), tiny_pipeline()
        (load_motion_lora if kind == "motion" else load_style_lora)(fresh, path, "one")
        assert_acts_as(fresh.unet, pairs[kind])
    for form, lora, output, said in (
        ("diffusers", run, "a.safetensors", "holds appearance_lora and motion_lora; name one of them"),
        ("kohya", run / "motion_lora", "a.safetensors", "is no layer of a spatial transformer"),
        ("animatediff", run / "appearance_lora", "a.ckpt", "is no motion LoRA"),
        ("kohya", run, "a.ckpt", "must end with .safetensors"),
        ("kohya", tmp_path / "nothing", "a.safetensors", "no file at"),
        ("kohya", run, "look.safetensors", "exists; name another --output"),
    ):
        assert said in export(form, lora, output, code=2)
    assert assemble.main(["--export", "kohya", "--model", str(tiny_model), "--output", str(tmp_path / "b")]) == 2
    assert "--lora PATH goes with --export animatediff, diffusers, kohya" in capsys.readouterr().err
    assert not (tmp_path / "a.safetensors").exists()


def test_what_a_format_has_no_place_for_is_refused(unet, unet3d, tmp_path):
    motion, appearance = (uneven_lora(unet, target_set) for target_set in ("motion", "appearance"))
    for said, export, arguments in (
        (
            f"attn1.to_q is no layer of a motion module; {len(appearance)} of {len(appearance)}",
            export_motion_lora,
            ("x.ckpt", appearance),
        ),
        ("transformer_in.* is no layer of a motion", export_motion_lora, ("x.ckpt", uneven_lora(unet3d, "motion"))),
        ("is no layer of a spatial transformer", export_appearance_lora, ("x.safetensors", motion)),
        (r"must end with \.safetensors, not with \.ckpt", export_appearance_lora, ("x.ckpt", appearance)),
        (r"must end with \.safetensors or \.ckpt, not with no suffix", export_motion_lora, ("x", motion)),
        ("there is no layer of a .* to write", export_appearance_lora, ("x.safetensors", {}, "kohya")),
        ("there is no layer of a .* to write", export_motion_lora, ("x.safetensors", {}, "diffusers")),
        ("no format 'kohya' .* only animatediff and diffusers", export_motion_lora, ("x.ckpt", motion, "kohya")),
        ("no format 'animatediff'", export_appearance_lora, ("x.safetensors", appearance, "animatediff")),
    ):
        with pytest.raises(ValueError, match=said):
            export(tmp_path / arguments[0], *arguments[1:])
    assert not list(tmp_path.iterdir())
