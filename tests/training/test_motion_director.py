"""MotionDirector's stage: its step against stored outputs, what each loss teaches, its files and its refusals."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from parity_md import ANIMATEDIFF, MODELSCOPE, animatediff_unet, modelscope_unet, one_temporal_layer_left
from PIL import Image
from safetensors.torch import load_file
from test_parity_md import ANIMATEDIFF_SCHEDULER, MODELSCOPE_SCHEDULER

from imageconductor.checkpoints.reference_run import find_reference_lora, load_noise_prior, save_noise_prior
from imageconductor.commands import train as train_command
from imageconductor.data.reference_clips import read_frames
from imageconductor.models.adapters import DIFFUSERS_WEIGHTS_NAME, adapter_parameters, lora_targets
from imageconductor.models.motion_unet import TextToVideoUNet
from imageconductor.models.networks import Networks
from imageconductor.sampling.job import SampleJob, prepare
from imageconductor.sampling.loras import find_job_loras
from imageconductor.sampling.preview import VideoPreview
from imageconductor.training.engines import refuse_parts
from imageconductor.training.loop import train
from imageconductor.training.run import check_inputs, run_stage
from imageconductor.training.stages.motion_director import MotionDirectorStage, ReferenceCondition


@pytest.fixture(params=[ANIMATEDIFF, MODELSCOPE], ids=["animatediff", "modelscope"])
def family(request):
    """The reference network: this project's base, or MotionDirector's own."""
    return request.param


@pytest.fixture
def stage(configure, family):
    return build_stage(configure, family)


def build_stage(configure, family):
    """The stage on the seeded UNet, with the seeded LoRAs and without dropout."""
    config = configure("motion_director", appearance="shared", lora_rank=family.config["rank"], lora_dropout=0.0)
    if family is ANIMATEDIFF:
        own = {"unet": animatediff_unet(), "scheduler": ANIMATEDIFF_SCHEDULER}
    else:
        own = {"unet": modelscope_unet(TextToVideoUNet), "scheduler": MODELSCOPE_SCHEDULER}
        own |= {"image_controlnet": None, "motion_controlnet": None}
    stage = MotionDirectorStage(replace(Networks.load(config.model), **own), config)
    for lora, name in (("spatial", "appearance"), ("temporal", "motion")):
        parameters = adapter_parameters(stage.unet, name)
        for layer, pair in family.lora_state(lora, {key.partition(".lora_")[0] for key in parameters}).items():
            parameters[f"{layer}.lora_A.weight"].data.copy_(pair.down)
            parameters[f"{layer}.lora_B.weight"].data.copy_(pair.up)
    return stage


def step_of(family):
    """The recorded step, and frame and anchor that were drawn for it."""
    step = family.meta["step"]
    drawn = {**family.config, **step}
    return step.get("md_rule", step), drawn["spatial_frame"], drawn["anchor"]


def losses_of(stage, family, **drawn):
    x, (_, frame, anchor) = family.inputs(), step_of(family)
    condition = ReferenceCondition(x["text"], frame=frame, anchor=torch.tensor([anchor]), **drawn)
    return stage.loss_terms(x["latents"], x["timestep"].view(1), x["noise"], condition)


def gradients(stage, family, adapter):
    """Norms of an adapter's gradients by the published names of its parts."""
    norms = {}
    for key, parameter in adapter_parameters(stage.unet, adapter).items():
        layer, side = key.removesuffix(".weight").split(".lora_")
        name = f"{family.published_names[layer]}/{'down' if side == 'A' else 'up'}"
        norms[name] = 0.0 if parameter.grad is None else parameter.grad.norm().item()
    return norms


def recorded(record, beginning):
    """Recorded norms of a loss's gradients, by the names of the parts."""
    (found,) = [norms for key, norms in record.items() if key.startswith(beginning)]
    return {name.removeprefix("spatial/").removeprefix("temporal/"): norm for name, norm in found.items()}


def total(norms):
    return sum(norm**2 for norm in norms.values()) ** 0.5


@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "computed again"])
def test_one_step_is_the_published_one(stage, family, checkpoints):
    """Losses and gradients; each loss reaches its own path alone, also where blocks are computed again."""
    record, _, _ = step_of(family)
    stage.unet.checkpoint_blocks = checkpoints
    terms = losses_of(stage, family)
    assert terms["spatial"].item() == pytest.approx(record["L_sp"], rel=1e-5)
    assert (terms["temporal"] + terms["debiased"]).item() == pytest.approx(record["L_temp"], rel=1e-5)
    for term, name in (("temporal", "L_org"), ("debiased", "L_ad")):
        assert name not in record or terms[term].item() == pytest.approx(record[name], rel=1e-5), name
    terms["spatial"].backward()
    spatial = gradients(stage, family, "appearance")
    assert total(spatial) == pytest.approx(record["grad_norm_Lsp_on_spatial"], rel=1e-4)
    for name, norm in recorded(record, "grad_norms_Lsp_spatial").items():
        assert spatial[name] == pytest.approx(norm, rel=1e-4, abs=1e-7), name
    assert total(gradients(stage, family, "motion")) == record["grad_norm_Lsp_on_temporal"] == 0
    (terms["temporal"] + terms["debiased"]).backward()
    temporal = gradients(stage, family, "motion")
    assert total(temporal) == pytest.approx(record["grad_norm_Ltemp_on_temporal"], rel=1e-4)
    for name, norm in recorded(record, "grad_norms_Ltemp_temporal").items():
        assert temporal[name] == pytest.approx(norm, rel=1e-4, abs=1e-7), name
    assert gradients(stage, family, "appearance") == spatial, "L_temp must not teach the appearance LoRA"


@pytest.mark.parametrize("family", [ANIMATEDIFF], ids=["animatediff"], indirect=True)
def test_one_step_with_the_layers_of_its_port(configure, family, monkeypatch):
    """The port puts the appearance LoRA on every layer of the spatial transformers; its losses are the same."""
    monkeypatch.setattr(
        "imageconductor.training.stages.motion_director.lora_targets",
        lambda unet, kind: family.ported_layers if kind == "appearance" else lora_targets(unet, kind),
    )
    stage, record = build_stage(configure, family), family.meta["step"]["port_rule"]
    terms = losses_of(stage, family)
    for term, name in (("spatial", "L_sp"), ("temporal", "L_org"), ("debiased", "L_ad")):
        assert terms[term].item() == pytest.approx(record[name], rel=1e-5), name
    assert (terms["temporal"] + terms["debiased"]).item() == pytest.approx(record["L_temp"], rel=1e-5)
    terms["spatial"].backward()
    spatial = total(gradients(stage, family, "appearance"))
    assert spatial == pytest.approx(record["grad_norm_Lsp_on_spatial"], rel=1e-4)
    assert total(gradients(stage, family, "motion")) == record["grad_norm_Lsp_on_temporal"] == 0
    (terms["temporal"] + terms["debiased"]).backward()
    motion = total(gradients(stage, family, "motion"))
    assert motion == pytest.approx(record["grad_norm_Ltemp_on_temporal"], rel=1e-4)
    # In the port L_temp has a gradient on the spatial LoRA as well (`grad_norm_Ltemp_on_spatial`); here it has none.
    assert total(gradients(stage, family, "appearance")) == spatial
    without = losses_of(stage, family, drops_appearance=True)
    for value, name in ((without["temporal"] + without["debiased"], "L_temp"), (without["temporal"], "L_org")):
        assert value.item() == pytest.approx(record["spatial_dropped"][name], rel=1e-5), name


def test_a_step_without_the_appearance_path(stage, family):
    record = step_of(family)[0]["spatial_dropped"]
    terms = losses_of(stage, family, drops_appearance=True)
    assert terms["spatial"].item() == 0
    assert not terms["spatial"].requires_grad
    assert (terms["temporal"] + terms["debiased"]).item() == pytest.approx(record["L_temp"], rel=1e-5)


@pytest.mark.parametrize("family", [MODELSCOPE], ids=["modelscope"], indirect=True)
def test_a_step_that_predicts_v(stage, family):
    record = step_of(family)[0]["v_prediction"]
    stage.scheduler = DDIMScheduler.from_config(MODELSCOPE_SCHEDULER.config, prediction_type="v_prediction")
    terms = losses_of(stage, family)
    assert terms["spatial"].item() == pytest.approx(record["L_sp"], rel=1e-5)
    assert (terms["temporal"] + terms["debiased"]).item() == pytest.approx(record["L_temp"], rel=1e-5)


@pytest.mark.parametrize("family", [MODELSCOPE], ids=["modelscope"], indirect=True)
def test_a_step_on_images_differs_from_the_published_one_by_a_layer_that_it_forgets(stage, family, monkeypatch):
    record = step_of(family)[0]
    assert losses_of(stage, family)["spatial"].item() == pytest.approx(record["L_sp"], rel=1e-5)
    module = "imageconductor.training.stages.motion_director.motion_modules_bypassed"
    monkeypatch.setattr(module, one_temporal_layer_left)
    found = losses_of(stage, family)["spatial"].item()
    assert found == pytest.approx(record["image_mode_no_temporal"]["L_sp"], rel=1e-5)


def test_a_clip_teaches_its_own_appearance_lora(configure, build):
    """Chosen by the clip's key, whatever the order; those of other clips get no gradient."""
    stage, data = build(configure("motion_director", appearance_dropout=0.0))
    stage.begin(data)
    assert list(stage.appearance_of) == ["left", "right"]
    for number, key in ((1, "right"), (0, "left"), (2, "left"), (3, "right"), (1, "right")):
        stage.zero_grad(set_to_none=True)
        batch = data[number]
        assert batch["key"] == [key]
        x_0, condition = stage.encode(batch, [torch.Generator().manual_seed(number)])
        sum(stage(x_0, torch.tensor([500]), torch.randn_like(x_0), condition).values()).backward()
        for name in ("left", "right"):
            parameters = adapter_parameters(stage.unet, f"appearance_{name}").values()
            assert any(p.grad is not None for p in parameters) == (name == key)


def test_windows_of_one_video_share_its_appearance(configure, build, reference_clips):
    stage, _ = build(configure("motion_director", data=[f"{reference_clips}/left.mp4"], num_frames=3))
    assert stage.appearance_of == {"left-0": "appearance", "left-1": "appearance"}
    both = [f"{reference_clips}/{name}.mp4" for name in ("left", "right")]
    stage, _ = build(configure("motion_director", data=both, num_frames=3))
    assert stage.appearances == ["appearance_left-0", "appearance_right-0"]
    assert stage.appearance_of["right-1"] == "appearance_right-0"


def test_copies_in_other_colours_have_a_look_of_their_own_and_no_noise_prior(configure, build, reference_clips):
    config = configure("motion_director", data=[f"{reference_clips}/left.mp4"], recolour=True, first_frame=True)
    stage, data = build(config)
    assert stage.appearances == [f"appearance_left{copy}" for copy in ("", "-rbg", "-grb", "-gbr", "-brg", "-bgr")]
    stage.begin(data)
    true, copy = (data[number]["latent_mean"] for number in (0, 1))
    assert not torch.allclose(true, copy, atol=1e-3)
    run_stage(replace(config, noise_prior=0.5, inversion_steps=2, max_steps=1))
    assert list(load_noise_prior(Path(config.output))) == ["left"]
    previews = type(stage).read_held_out(replace(config, preview_prompts=["a", "b"]))
    assert torch.equal(previews[0]["first_frame"], previews[1]["first_frame"])


@pytest.mark.parametrize("prompt", ["a red square", "a square"])
def test_captions_that_other_colours_make_wrong_are_told(configure, prompt, caplog):
    check_inputs(configure("motion_director", recolour=True, prompt=prompt))
    assert ("'a red square' names a colour" in caplog.text) == (prompt == "a red square")


def test_a_checkpoint_holds_the_loras_of_its_step_ready_to_be_played(configure, tiny_model, tmp_path):
    settings = {"save_every": 2, "ema_decay": 0.5, "appearance": "shared"}
    long = configure("motion_director", output=str(tmp_path / "long"), max_steps=4, **settings)
    short = configure("motion_director", output=str(tmp_path / "short"), max_steps=2, **settings)
    for config in (long, short):
        run_stage(config)
    half = tmp_path / "long" / "checkpoint-00000002"
    for kind in ("motion", "appearance"):
        path = find_reference_lora(half, kind)
        assert path == half / f"{kind}_lora"
        found, expected = (
            load_file(folder / DIFFUSERS_WEIGHTS_NAME) for folder in (path, tmp_path / "short" / path.name)
        )
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
    shown = {"model": str(tiny_model), "prompt": "a", "steps": 1, "num_frames": 4, "device": "cpu"}
    job = prepare(SampleJob(**shown, motion_lora=[f"{half}:0.5"], appearance_lora=[str(half)])).job
    assert find_job_loras(job) == ([(str(half / "appearance_lora"), 1.0)], [(str(half / "motion_lora"), 0.5)])
    shutil.rmtree(half / "motion_lora")
    with pytest.raises(FileNotFoundError, match="holds no motion LoRA"):
        find_reference_lora(half, "motion")


def test_other_clips_get_another_noise_prior(configure, reference_clips, tmp_path):
    settings = {"noise_prior": 0.5, "inversion_steps": 2, "max_steps": 1}
    run_stage(configure("motion_director", data=[f"{reference_clips}/left.mp4"], **settings))
    shutil.rmtree(tmp_path / "run" / "checkpoint-00000001")
    run_stage(configure("motion_director", data=[f"{reference_clips}/right.mp4"], **settings))
    assert list(load_noise_prior(tmp_path / "run")) == ["right"]


def test_noise_that_is_not_finite_is_not_stored(tmp_path):
    with pytest.raises(ValueError, match="clip a"):
        save_noise_prior(tmp_path, {"a": torch.full((4, 2, 2, 2), float("nan"))}, "")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "held"), [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_half_precision_learns_too(configure, build, precision, held):
    config = configure("motion_director", mixed_precision=precision, noise_prior=0.5, inversion_steps=2, max_steps=4)
    stage, data = build(config)
    assert all(value == value for value in train(stage, data, config).losses.values())
    assert {p.dtype for p in stage.unet.parameters() if not p.requires_grad} == {held}, "LoRAs are in float32"
    saved = load_file(Path(config.output) / "motion_lora" / "pytorch_lora_weights.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert any(value.any() for key, value in saved.items() if "lora_B" in key)


def test_what_is_drawn_for_a_step_depends_on_its_generator_alone(configure, build):
    stage, data = build(configure("motion_director"))
    stage.begin(data)
    first, second, other = (stage.encode(data[0], [torch.Generator().manual_seed(s)]) for s in (1, 1, 2))
    assert torch.equal(first[0], second[0])
    assert (first[1].frame, first[1].dropout_seed) == (second[1].frame, second[1].dropout_seed)
    assert not torch.equal(first[0], other[0])
    conditions = [stage.encode(data[0], [torch.Generator().manual_seed(s)])[1] for s in range(200)]
    assert {c.frame for c in conditions} == {int(c.anchor) for c in conditions} == set(range(4))
    assert any(c.frame != int(c.anchor) for c in conditions), "anchor and frame are drawn apart"
    assert sum(c.drops_appearance for c in conditions) == pytest.approx(40, abs=20)


@pytest.mark.parametrize("checkpoints", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_that_goes_on_equals_one_that_was_never_stopped(configure, tmp_path, checkpoints):
    """Dropout of the LoRAs included."""
    small = {"gradient_checkpointing": checkpoints, "noise_prior": 0.5, "inversion_steps": 2}
    runs = {name: configure("motion_director", output=str(tmp_path / name), **small) for name in ("once", "twice")}
    run_stage(replace(runs["once"], max_steps=4))
    run_stage(replace(runs["twice"], max_steps=2))
    run_stage(replace(runs["twice"], max_steps=4))
    for name in ("motion_lora", "appearance_lora/left", "appearance_lora/right"):
        once, twice = (load_file(tmp_path / run / name / "pytorch_lora_weights.safetensors") for run in runs)
        assert once.keys() == twice.keys()
        assert all(torch.equal(value, twice[key]) for key, value in once.items())
    prior = load_noise_prior(tmp_path / "twice")
    assert {key: tuple(value.shape) for key, value in prior.items()} == dict.fromkeys(("left", "right"), (4, 4, 16, 16))


def test_dropout_is_on_in_training_and_off_in_previews(configure, build):
    stage, data = build(configure("motion_director", lora_dropout=0.5, appearance_dropout=0.0, max_steps=4))
    train(stage, data, configure("motion_director", lora_dropout=0.5, appearance_dropout=0.0, max_steps=4))
    batch = stage.encode(data[0], [torch.Generator().manual_seed(0)])
    eps, t = torch.randn_like(batch[0]), torch.tensor([500])

    def loss(seed):
        return stage(batch[0], t, eps, replace(batch[1], dropout_seed=seed))["temporal"].item()

    assert loss(1) == loss(1) != loss(2)
    with stage.previewing(), torch.no_grad():
        first, second = (stage.denoise(batch[0], t, batch[1]) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_frames": 7}, ["left.mp4", "6"]),
        ({"data": ["nowhere.mp4"]}, ["nowhere.mp4"]),
        ({"data": ["{image}"], "prompt": "a"}, ["image.png", "learns_motion=false"]),
    ],
)
def test_clips_that_cannot_be_learned_from_are_refused_before_weights_are_read(configure, tmp_path, changes, words):
    image = tmp_path / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    if "data" in changes:
        changes = changes | {"data": [str(image) if path == "{image}" else path for path in changes["data"]]}
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        check_inputs(configure("motion_director", **changes))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": []}, "data must name"),
        ({"batch_size": 2}, "gradient_accumulation_steps"),
        ({"validation_every": 5}, "validation_every"),
        ({"learns_motion": False, "noise_prior": 0.3}, "learns_motion"),
        ({"learns_motion": False, "first_frame": True}, "learns_motion"),
        ({"learns_motion": False, "recolour": True}, "learns_motion"),
        ({"inversion_steps": 1}, "inversion_steps"),
        ({"inversion_steps": 1000}, "inversion_steps must be at most 500"),
        ({"debiasing_beta": -1.0}, "debiasing_beta"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"appearance_weight_decay": -0.1}, "appearance_weight_decay"),
        ({"appearance_learning_rate": 0.0}, "appearance_learning_rate"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"torch_compile": True}, "torch_compile"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(configure, changes, words):
    with pytest.raises(ValueError, match=words):
        configure("motion_director", **changes)


def test_previews_need_no_clip(configure, tmp_path):
    config = configure("motion_director", preview_every=2, preview_steps=1, preview_prompts=["a", "b"])
    run_stage(config, VideoPreview)
    assert sorted(path.name for path in (tmp_path / "run" / "previews").iterdir()) == [
        "step-00000002-0.mp4",
        "step-00000002-1.mp4",
        "step-00000002.png",
    ]


def test_previews_of_a_run_with_first_frames_begin_with_them(configure, build, tmp_path):
    stage, _ = build(configure("motion_director", first_frame=True, preview_prompts=["a", "b", "c"]))
    shown = stage.read_held_out(stage.config)
    clips = [next(read_frames(clip))[:, 0] for clip in stage.clips]
    assert not torch.equal(*clips)
    assert [item["caption"] for item in shown] == ["a", "b", "c"]
    assert all(torch.equal(item["first_frame"], clips[n % 2]) for n, item in enumerate(shown))
    given = {}

    def sample(**arguments):
        given.update(arguments)
        return SimpleNamespace(frames=[None])

    VideoPreview(shown, None, tmp_path, {})._sample(sample, shown[1], None, None, seed=0)
    assert np.array_equal(given["image"], clips[1].permute(1, 2, 0))


@pytest.mark.slow
def test_two_processes_equal_one_that_accumulates(tiny_model, reference_clips, tmp_path):
    """Clips of a step lie on different processes then, and so do the appearance LoRAs that get a gradient."""
    common = ["stage=motion_director", f"model={tiny_model}", f"data=[{reference_clips}]", "size=[32,32]"]
    common += ["num_frames=4", "fps=null", "lora_rank=2", "lora_dropout=0", "max_steps=3", "learning_rate=0.01"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = [*launcher, *common, f"output={tmp_path}/two"]
    subprocess.run(two, env=environment, check=True, capture_output=True, timeout=300)
    one = [*common, "gradient_accumulation_steps=2", f"output={tmp_path}/one"]
    assert train_command.main(one) == 0
    for name in ("motion_lora", "appearance_lora/left", "appearance_lora/right"):
        first, second = (
            load_file(tmp_path / run / name / "pytorch_lora_weights.safetensors") for run in ("one", "two")
        )
        assert all(torch.allclose(value, second[key], atol=1e-4) for key, value in first.items()), name


def test_sharding_is_refused(configure, build):
    stage, _ = build(configure("motion_director"))
    with pytest.raises(ValueError, match="fits on one GPU"):
        refuse_parts("FSDP", stage)
