"""What each stage computes; who learns is in test_who_learns.py."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imageconductor.checkpoints.personalise import load_style_lora
from imageconductor.conditioning.first_frame import encode_first_frame
from imageconductor.data.batches import scale_pixels
from imageconductor.models.adapters import active, adapter_parameters
from imageconductor.models.denoiser import Denoiser
from imageconductor.sampling.pipeline import ImageConductorPipeline
from imageconductor.training import checkpointing
from imageconductor.training.run import run_stage

T = torch.tensor([500])


def generators(count=1):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def test_latents_are_shifted_and_scaled_as_sampling_does(configure, build):
    stage, data = build(configure("camera_lora"))
    stage.vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    stage.image_dropout = 0.0
    batch = data[0]
    _, condition = stage.encode(batch, generators())
    given = encode_first_frame(stage.vae, scale_pixels(batch["pixel_values"][:, :, 0]))
    torch.testing.assert_close(condition.keyframes[:, :, 0], given)
    posterior = stage.vae.encode(scale_pixels(batch["pixel_values"][:, :, 0])).latent_dist
    cached = {"latent_mean": posterior.mean[:, :, None], "latent_std": posterior.std[:, :, None]}
    cached["size"] = torch.tensor([[64, 64]])
    mean, std, _ = stage._encode_clips(cached)
    torch.testing.assert_close(mean[:, :, 0], given)
    torch.testing.assert_close(std[:, :, 0], posterior.std * 0.5)


def test_a_loss_is_that_of_the_noise_of_v_or_of_x_0(configure, build):
    stage, data = build(configure("camera_lora"))
    x_0, condition = stage.encode(data[0], generators())
    eps = torch.randn_like(x_0)
    prediction = stage.denoise(stage.scheduler.add_noise(x_0, eps, T), T, condition)
    velocity = stage.scheduler.get_velocity(x_0, eps, T)
    for kind, target in (("epsilon", eps), ("v_prediction", velocity), ("sample", x_0)):
        stage.scheduler.register_to_config(prediction_type=kind)
        expected = (prediction - target).square().mean()
        torch.testing.assert_close(stage.loss_terms(x_0, T, eps, condition), {"denoising": expected})


def test_a_style_lora_is_a_file_that_a_pipeline_takes(configure, build):
    config = configure("style_lora")
    run_stage(config)
    file = Path(config.output) / "style_lora" / "pytorch_lora_weights.safetensors"
    names = {key.partition(".lora_")[0] for key in load_file(file)}
    assert all(".attn" in name and ".motion_modules." not in name for name in names)
    pipe = ImageConductorPipeline.from_pretrained(config.model)
    load_style_lora(pipe, file, "ink")
    layer = sorted(names)[0].removeprefix("unet.")
    x = torch.randn(1, 3, pipe.unet.get_submodule(layer).in_features)
    acting = pipe.unet.get_submodule(layer)(x)
    pipe.unload_lora_weights()
    stage, _ = build(config)
    stage.load_state_dict(checkpointing.latest(Path(config.output)).tensors["parameters"], strict=False)
    torch.testing.assert_close(acting, stage.unet.get_submodule(layer)(x), atol=2e-3, rtol=2e-3)
    assert (acting - pipe.unet.get_submodule(layer)(x)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["style_lora", "foundation"])
def test_a_stage_without_trajectories_draws_no_flow_maps(name, configure, build, monkeypatch):
    stage, data = build(configure(name))
    monkeypatch.setattr(Denoiser, "motion_residuals", lambda *_: pytest.fail("the motion ControlNet was evaluated"))
    x_0, condition = stage.encode(data[0], generators())
    assert condition.flow is None
    stage.loss_terms(x_0, T, torch.randn_like(x_0), condition)


def test_a_foundation_can_learn_with_a_motion_controlnet_that_is_sometimes_absent(configure, build):
    config = configure("foundation", train_motion_controlnet=True, motion_dropout=0.0, batch_size=2)
    stage, data = build(config)
    x_0, condition = stage.encode(data[0], generators(2))
    assert condition.has_flow.tolist() == [True, True]
    plain, _ = build(configure("foundation"))
    condition.has_flow[1] = False
    t = T.repeat(2)
    controlled, without = (
        stage.denoise(x_0, t, condition),
        plain.denoise(x_0, t, plain.encode(data[0], generators(2))[1]),
    )
    assert (controlled[0] - without[0]).abs().max() > 1e-4
    torch.testing.assert_close(controlled[1], without[1])
    run_stage(config)
    assert (Path(config.output) / "motion_controlnet").is_dir()
    nothing, _ = build(configure("foundation", train_motion_controlnet=True, motion_dropout=1.0, batch_size=2))
    assert not nothing.encode(data[0], generators(2))[1].has_flow.any()


def test_the_camera_lora_acts_in_stage_three_and_does_not_learn(configure, build, parameters):
    stage, data = build(configure("object_lora"))
    x_0, condition = stage.encode(data[0], generators())
    terms = stage(x_0, T, torch.randn_like(x_0), condition)
    assert set(terms) == {"denoising", "orthogonal"}
    sum(terms.values()).backward()
    camera = adapter_parameters(stage.motion_controlnet, "camera")
    assert all(parameter.grad is None for parameter in camera.values())
    assert all(parameter.grad is not None for parameter in parameters(stage).values())
    with torch.no_grad():
        with_camera = stage.denoise(x_0, T, condition)
        with active(stage.motion_controlnet, "object"):
            assert (stage.denoise(x_0, T, condition) - with_camera).abs().max() > 1e-4


def test_checkpointed_blocks_give_the_same_gradients(configure, build, parameters):
    found = []
    for checkpointed in (False, True):
        stage, data = build(configure("object_lora"))
        stage.unet.checkpoint_blocks = stage.motion_controlnet.checkpoint_blocks = checkpointed
        x_0, condition = stage.encode(data[0], generators())
        stage.denoise(x_0, T, condition).square().sum().backward()
        found.append([parameter.grad for parameter in parameters(stage).values()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_checkpointed_block_is_computed_again_under_the_loras_that_acted(configure, build, parameters):
    """Two passes under different LoRAs and one backward pass, as a stage with two paths has them."""
    found = []
    for checkpointed in (False, True):
        stage, data = build(configure("object_lora"))
        stage.unet.checkpoint_blocks = stage.motion_controlnet.checkpoint_blocks = checkpointed
        for parameter in parameters(stage).values():
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        x_0, condition = stage.encode(data[0], generators())
        both = stage.denoise(x_0, T, condition).square().sum()
        with active(stage.motion_controlnet, "object"):
            alone = stage.denoise(x_0, T, condition).square().sum()
        (both + 2 * alone).backward()
        found.append([parameter.grad for parameter in parameters(stage).values()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_gradient_reaches_the_noisy_latents_through_a_frozen_unet(configure, build):
    stage, data = build(configure("camera_lora"))
    x_0, condition = stage.encode(data[0], generators())
    x_t = x_0.clone().requires_grad_(True)
    stage.denoise(x_t, T, condition).square().sum().backward()
    step = 1e-2 * torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ahead, behind = (stage.denoise(x_0 + sign * step, T, condition).square().sum() for sign in (1, -1))
    torch.testing.assert_close((x_t.grad * step).sum(), (ahead - behind) / 2, rtol=1e-2, atol=1e-2)


def kept_bytes(stage, batch):
    """Bytes kept for the backward pass, by the part of the model whose forward pass made them."""
    parameters = {parameter.data_ptr() for parameter in stage.parameters()}
    parts = {
        "text_encoder": stage.text_encoder,
        "vae": stage.vae.encoder,
        "image": stage.image_controlnet,
        "motion": stage.motion_controlnet,
        "mid": stage.unet.mid_block,
        **{f"down {i}": block for i, block in enumerate(stage.unet.down_blocks)},
        **{f"up {i}": block for i, block in enumerate(stage.unet.up_blocks)},
    }
    kept = dict.fromkeys(["outside", *(name.split()[0] for name in parts)], 0)
    inside = ["outside"]
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: inside.append(name.split()[0]))
        part.register_forward_hook(lambda *_: inside.pop() and None)

    def keep(tensor):
        if tensor.data_ptr() not in parameters:
            kept[inside[-1]] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x_0, condition = stage.encode(batch, generators())
        stage.denoise(x_0, T, condition)
    return kept


def test_what_learns_nothing_keeps_no_activation(configure, build):
    found = []
    for checkpointed in (False, True):
        stage, data = build(configure("motion_controlnet"))
        stage.unet.checkpoint_blocks = stage.motion_controlnet.checkpoint_blocks = checkpointed
        kept = kept_bytes(stage, data[0])
        assert [kept[name] for name in ("text_encoder", "vae", "image", "down", "mid")] == [0] * 5
        assert checkpointed or min(kept["up"], kept["motion"]) > 0
        found.append(kept["up"] + kept["motion"])
    assert found[1] < 0.25 * found[0]


def test_what_a_condition_holds(configure, build):
    dense, data = build(configure("motion_controlnet", trajectories="dense", text_dropout=1.0))
    sparse, _ = build(configure("motion_controlnet", max_tracks=1, text_dropout=0.0))
    batch = data[0]
    _, everything = dense.encode(batch, generators())
    _, few = sparse.encode(batch, generators())
    assert (everything.flow != 0).sum() > (few.flow != 0).sum() > 0
    embed = dense.text_encoder
    assert torch.equal(everything.text, embed(dense.networks.tokenize([""])).last_hidden_state)
    assert torch.equal(few.text, embed(dense.networks.tokenize(batch["caption"])).last_hidden_state)
    assert everything.keyframes[:, :, 0].any()
    assert not everything.keyframes[:, :, 1:].any()
    assert everything.mask.sum() == everything.mask[:, :, 0].numel()
