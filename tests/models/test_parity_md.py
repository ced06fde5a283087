"""MotionDirector's stored outputs on AnimateDiff's UNet and its own losses, within 1e-4 of their largest value."""

import hashlib
from unittest.mock import Mock

import pytest
import torch
from diffusers import DDIMScheduler
from parity import TOLERANCE, fill, relative_error
from parity_md import ANIMATEDIFF, MODELSCOPE, animatediff_unet, modelscope_unet, one_temporal_layer_left

from imageconductor.diffusion.inversion import ddim_inversion, mix_noise_prior
from imageconductor.diffusion.losses import debias, debiased_loss, denoising_loss
from imageconductor.models.adapters import (
    activate,
    active,
    adapter_parameters,
    add_adapter,
    attach_adapter,
    lora_targets,
)
from imageconductor.models.motion_module import motion_modules_bypassed
from imageconductor.models.motion_unet import TextToVideoUNet
from imageconductor.training.stages.base import Stage

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, "steps_offset": 1}
ANIMATEDIFF_SCHEDULER = DDIMScheduler(beta_schedule="linear", set_alpha_to_one=True, **SCHEDULE)
MODELSCOPE_SCHEDULER = DDIMScheduler(beta_schedule="scaled_linear", set_alpha_to_one=False, **SCHEDULE)


@pytest.fixture(scope="module")
def unet():
    """AnimateDiff's UNet with all LoRAs attached; none acts."""
    unet = animatediff_unet()
    for name, target_set in (("spatial", "appearance"), ("temporal", "motion")):
        attach_adapter(unet, name, ANIMATEDIFF.lora_state(name, lora_targets(unet, target_set)))
    attach_adapter(unet, "ported", ANIMATEDIFF.lora_state("spatial", ANIMATEDIFF.ported_layers))
    activate(unet)
    return unet


@pytest.fixture(scope="module")
def x():
    inputs = ANIMATEDIFF.inputs()
    inputs["noisy"] = ANIMATEDIFF_SCHEDULER.add_noise(inputs["latents"], inputs["noise"], inputs["timestep"])
    return inputs


@pytest.fixture(scope="module")
def reference():
    return ANIMATEDIFF.expected()


@pytest.mark.parametrize("cell", MODELSCOPE.meta["cells"], ids=lambda cell: cell["tag"])
def test_lora_cell(cell):
    """W x + b + scale B A x, at the rank that the layer has room for."""
    tag, into, out, rank = cell["tag"], cell["in_features"], cell["out_features"], cell["used_rank"]
    salt, network = MODELSCOPE.config["salt"], torch.nn.Module()
    network.layer = torch.nn.Linear(into, out, bias=cell["bias"])
    add_adapter(network, "lora", rank=cell["asked_rank"], targets=["layer"], clips_rank=True)
    own = adapter_parameters(network, "lora")
    assert own["layer.lora_A.weight"].shape == (rank, into)
    assert own["layer.lora_B.weight"].abs().max() == cell["up_abs_max_at_init"]
    filled = {"weight": (out, into), "down": (rank, into), "up": (out, rank)} | (
        {"bias": (out,)} if cell["bias"] else {}
    )
    values = {name: fill(salt, f"{tag}/{name}", shape) for name, shape in filled.items()}
    base = network.layer.get_base_layer()
    targets = {"weight": base.weight, "bias": base.bias, "down": own["layer.lora_A.weight"]}
    targets["up"] = own["layer.lora_B.weight"]
    for name, value in values.items():
        targets[name].data.copy_(value)
    activate(network, "lora")
    network.layer.set_scale("lora", cell["scale"])
    output = network.layer(MODELSCOPE.draw(tag, 3, into))
    assert relative_error(output.detach(), MODELSCOPE.expected()[f"cell/{tag}"]) <= TOLERANCE


def test_v_target():
    x = MODELSCOPE.inputs()
    scheduler = DDIMScheduler.from_config(MODELSCOPE_SCHEDULER.config, prediction_type="v_prediction")
    target = Stage.target(Mock(scheduler=scheduler), x["latents"], x["timestep"], x["noise"])
    assert relative_error(target, MODELSCOPE.expected()["step/v_target"]) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "adapters"),
    [("base_F", ()), ("md_rule/temporal_only_F", ("temporal",)), ("md_rule/both_pred_F", ("spatial", "temporal"))],
)
def test_all_frames(unet, x, reference, name, adapters):
    with active(unet, *adapters):
        output = unet(x["noisy"], x["timestep"], x["text"]).sample
    assert relative_error(output, reference[f"ad/{name}"]) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "adapters"),
    [("base_F1", ()), ("md_rule/spatial_pred_F1", ("spatial",)), ("port_rule/spatial_pred_F1", ("ported",))],
)
def test_one_frame_without_motion_modules(unet, x, reference, name, adapters):
    frame = ANIMATEDIFF.config["spatial_frame"]
    one = x["noisy"][:, :, frame : frame + 1]
    with active(unet, *adapters), motion_modules_bypassed(unet):
        output = unet(one, x["timestep"], x["text"]).sample
    assert relative_error(output, reference[f"ad/{name}"]) <= TOLERANCE
    with active(unet, *adapters):
        assert relative_error(unet(one, x["timestep"], x["text"]).sample, output) > 0.1, "no identity at one frame"


@torch.no_grad()
def test_inversion_on_animatediff(unet, x, reference):
    seen = []

    def predict(sample, t):
        seen.append((int(t), sample))
        return unet(sample, t, x["text"]).sample

    noise = ddim_inversion(predict, x["latents"], ANIMATEDIFF_SCHEDULER, 10)
    assert [t for t, _ in seen] == ANIMATEDIFF.meta["ad_inversion"]["timesteps_ascending"]
    assert relative_error(seen[1][1], reference["ad/inversion_after_1_step"]) <= TOLERANCE
    assert relative_error(noise, reference["ad/inversion_10_steps"]) <= TOLERANCE
    assert ANIMATEDIFF_SCHEDULER.final_alpha_cumprod == ANIMATEDIFF.meta["ad_inversion"]["final_alpha_cumprod"]


@torch.no_grad()
@pytest.mark.parametrize(
    "steps", [pytest.param(n, marks=[pytest.mark.slow] * (n > 20)) for n in MODELSCOPE.config["steps"]]
)
def test_inversion_on_modelscope(steps):
    reference, x, unet = MODELSCOPE.expected(), MODELSCOPE.inputs(), modelscope_unet()
    record, seen = MODELSCOPE.meta["inversion"][str(steps)], []

    def predict(sample, t):
        seen.append(int(t))
        return unet(sample, t, x["text"]).sample

    noise = ddim_inversion(predict, x["latents"], MODELSCOPE_SCHEDULER, steps)
    assert seen == record["timesteps_ascending"]
    assert relative_error(noise, reference[f"inversion/{steps}_steps"]) <= TOLERANCE
    assert noise.abs().max().item() == pytest.approx(record["abs_max"], rel=TOLERANCE)
    MODELSCOPE_SCHEDULER.set_timesteps(steps)
    for t in MODELSCOPE_SCHEDULER.timesteps:
        noise = MODELSCOPE_SCHEDULER.step(unet(noise, t, x["text"]).sample, t, noise).prev_sample
    assert relative_error(noise, reference[f"inversion/{steps}_regenerated"]) <= 5 * TOLERANCE  # errors grow on the way
    error = (noise - x["latents"]).abs().max().item()
    assert error == pytest.approx(record["regeneration_max_abs_err"], rel=10 * TOLERANCE)


def test_noise_prior():
    reference, prior = MODELSCOPE.expected(), MODELSCOPE.meta["prior"]
    inverted = reference[prior["z_inv"]]
    for fraction in prior["p"]:
        mixed = mix_noise_prior(MODELSCOPE.draw("prior/noise", *inverted.shape), inverted, fraction)
        assert relative_error(mixed, reference[f"prior/p{fraction}"]) <= TOLERANCE
    for key in (key for key in reference if key.endswith("_resized")):
        expected = reference[key]
        assert list(expected.shape[3:]) == prior["resized_latent_hw"]
        fraction = float(key.removeprefix("prior/p").partition("_")[0])
        mixed = mix_noise_prior(MODELSCOPE.draw("prior/noise_resized", *expected.shape), inverted, fraction)
        assert relative_error(mixed, expected) <= TOLERANCE


def test_losses():
    reference, shape = MODELSCOPE.expected(), MODELSCOPE.config["loss_shape"]
    eps, other = reference["loss/eps"], reference["loss/eps_hat"]
    assert list(eps.shape) == list(shape)
    for record in MODELSCOPE.meta["losses"]:
        anchor, frame = torch.tensor([record["anchor"]]), slice(record["spatial_frame"], record["spatial_frame"] + 1)
        assert relative_error(debias(eps, anchor), reference[f"loss/phi_eps_anchor{record['anchor']}"]) <= TOLERANCE
        found = {"L_org": denoising_loss(other, eps), "L_ad": debiased_loss(other, eps, anchor)}
        found["L_temp"] = found["L_org"] + found["L_ad"]
        found["L_sp"] = denoising_loss(other[:, :, frame], eps[:, :, frame])
        for name, value in found.items():
            assert value.item() == pytest.approx(record[name], rel=1e-5), name


@torch.no_grad()
def test_modelscope_unet_in_two_halves():
    reference, x, config = MODELSCOPE.expected(), MODELSCOPE.inputs(), MODELSCOPE.config
    unet = modelscope_unet(TextToVideoUNet)
    noisy = reference["step/noisy"]
    assert relative_error(MODELSCOPE_SCHEDULER.add_noise(x["latents"], x["noise"], x["timestep"]), noisy) <= TOLERANCE
    assert relative_error(unet(noisy, x["timestep"], x["text"]).sample, reference["unet3d/base_F"]) <= TOLERANCE
    one = noisy[:, :, config["spatial_frame"] :][:, :, :1]
    with motion_modules_bypassed(unet):
        output = unet(one, x["timestep"], x["text"]).sample
    assert relative_error(output, reference["unet3d/base_F1_ckpt"]) <= TOLERANCE
    with one_temporal_layer_left(unet):
        output = unet(one, x["timestep"], x["text"]).sample
    assert relative_error(output, reference["unet3d/base_F1_no_ckpt"]) <= TOLERANCE


def test_random_ranks_have_the_published_spread():
    """A of rank r is drawn with the standard deviation 1 / r; the record is one draw of it."""
    network = torch.nn.Module()
    network.layer = torch.nn.Linear(64, 64)
    add_adapter(network, "lora", rank=8, targets=["layer"], seed=0)
    spread = adapter_parameters(network, "lora")["layer.lora_A.weight"].std().item()
    assert spread == pytest.approx(MODELSCOPE.meta["down_init_std_r8"], rel=0.1)


@pytest.mark.parametrize("family", [ANIMATEDIFF, MODELSCOPE], ids=["animatediff", "modelscope"])
def test_inputs_are_those_of_the_records(family):
    inputs = family.inputs()
    for name, record in family.meta["input_check"].items():
        assert hashlib.sha256(inputs[name].numpy().tobytes()).hexdigest() == record["sha256"], name
    for name, record in family.meta.get("fill_check", {}).items():
        if name.startswith(f"{family.network}/"):
            value = family.weights()[name.removeprefix(f"{family.network}/")]
            assert hashlib.sha256(value.numpy().tobytes()).hexdigest() == record["sha256"], name
