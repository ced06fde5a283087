"""Gates for boxes and for the first frame: nothing when absent or closed, and then what they are meant to be."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import open_gates, tiny_gates, tiny_networks, tiny_pipeline

from imageconductor.checkpoints.model_folder import load_gates, save_gates
from imageconductor.models.denoiser import Condition, Denoiser
from imageconductor.models.gated_attention import ObjectGates, SceneGates, _place_boxes
from imageconductor.models.gating import Gating, gate_places, gate_scalars, gate_values
from imageconductor.models.motion_module import motion_modules_bypassed
from imageconductor.models.motion_unet import MotionUNet, UNetFeatures
from imageconductor.models.networks import GATES, Networks
from imageconductor.models.shared_start import rows_repeated
from imageconductor.sampling.branches import Control, GuidedDenoiser, plan

B, T, N = 2, 3, 2
T_STEP = torch.tensor(5)


@pytest.fixture(scope="module")
def unet():
    return tiny_networks().unet


def denoiser(unet, *gates):
    return Denoiser(unet, None, None, *gates)


def condition(seed=0, batch=B, frames=T):
    g = torch.Generator().manual_seed(seed)
    corners = torch.rand(batch, frames, N, 2, generator=g) * 0.5
    present = torch.ones(batch, frames, N)
    present[:, frames // 2, 0] = 0
    return Condition(
        torch.randn(batch, 5, 16, generator=g),
        boxes=torch.cat([corners, corners + 0.3], dim=-1),
        present=present,
        names=torch.randn(batch, N, 16, generator=g),
        scene=torch.randn(batch, 4, 8, 8, generator=g),
        input_frame=torch.randn(batch, 4, 8, 8, generator=g),
    )


def noisy(batch=B, frames=T):
    return torch.randn(batch, 4, frames, 8, 8, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
@pytest.mark.parametrize("is_parallel", [False, True])
def test_closed_gates_change_no_bit(unet, is_parallel):
    x, c = noisy(), condition()
    plain = unet(x, T_STEP, c.text).sample
    assert torch.equal(denoiser(unet)(x, T_STEP, Condition(c.text)), plain)
    closed = denoiser(unet, *tiny_gates(unet, is_open=False, is_parallel=is_parallel))
    assert torch.equal(closed(x, T_STEP, c), plain)
    opened = denoiser(unet, *tiny_gates(unet, is_parallel=is_parallel))
    assert not torch.equal(opened(x, T_STEP, c), plain)
    assert torch.equal(opened(x, T_STEP, Condition(c.text)), plain), "without boxes and scene, open gates are left out"


@torch.no_grad()
def test_every_condition_reaches_the_output(unet):
    x, c = noisy(), condition()
    networks = denoiser(unet, *tiny_gates(unet))
    whole = networks(x, T_STEP, c)
    others = condition(seed=1)
    for name in ("boxes", "present", "names", "scene", "input_frame"):
        value = torch.ones_like(c.present) if name == "present" else getattr(others, name)
        assert not torch.equal(networks(x, T_STEP, replace(c, **{name: value})), whole), name
    absent = replace(c, present=torch.zeros_like(c.present))
    no_boxes = replace(c, boxes=None, present=None, names=None)
    assert not torch.equal(networks(x, T_STEP, absent), networks(x, T_STEP, no_boxes)), "null tokens take part"
    moved = torch.where(c.present[..., None] > 0, c.boxes, others.boxes)
    assert torch.equal(networks(x, T_STEP, replace(c, boxes=moved)), whole), (
        "where an object is absent its box is not read"
    )


@torch.no_grad()
def test_clips_are_padded_to_one_number_of_objects(unet):
    gates, c = tiny_gates(unet)[0], condition()
    tokens = gates(c.boxes, c.present, c.names)
    assert tokens.shape == (B * T, 4, 16)

    def pad(x, dim):
        return torch.cat([x, torch.zeros_like(x)], dim)

    assert torch.equal(tokens, gates(pad(c.boxes, 2), pad(c.present, 2), pad(c.names, 1)))
    assert torch.equal(tokens[:, 2], tokens[:, 3]), "absent objects are alike"
    assert torch.equal(tokens[1, 0], tokens[0, 2]), "as an object is that is absent in a frame"
    torch.testing.assert_close(gates(c.boxes.flip(2), c.present.flip(2), c.names.flip(1))[:, :2], tokens[:, :2].flip(1))
    with pytest.raises(ValueError, match="6 objects, the model takes at most 4"):
        gates(torch.zeros(1, T, 6, 4), torch.zeros(1, T, 6), torch.zeros(1, 6, 16))
    with pytest.raises(ValueError, match="do not fit together"):
        gates(c.boxes, c.present[:, :, :1], c.names)


@torch.no_grad()
def test_a_parallel_scene_gate_reads_what_the_object_gate_reads(unet):
    objects, scene = tiny_gates(unet, is_parallel=True)
    c = condition()
    gating = denoiser(unet, objects, scene).gating(c, T)
    place = next(iter(gate_places(unet)))
    hidden = torch.randn(B * T, 9, gate_places(unet)[place].width)
    changes = [
        objects.gates[place](hidden, gating.object_tokens) - hidden,
        scene.gates[place](hidden, gating.scene_tokens) - hidden,
    ]
    torch.testing.assert_close(gating.act(place, hidden), hidden + changes[0] + changes[1])
    in_turn = replace(gating, is_parallel=False).act(place, hidden)
    first = objects.gates[place](hidden, gating.object_tokens)
    assert torch.equal(in_turn, scene.gates[place](first, gating.scene_tokens)), "boxes first, then the first frame"


@pytest.mark.parametrize("is_parallel", [False, True])
def test_only_the_scalars_learn_first(unet, is_parallel):
    unet.requires_grad_(False)
    gates = tiny_gates(unet, is_open=False, is_parallel=is_parallel)
    denoiser(unet, *gates)(noisy(), T_STEP, condition()).square().mean().backward()
    learns = {
        f"{k}.{name}"
        for k, g in enumerate(gates)
        for name, p in g.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    scalars = {f"{k}.{name}" for k, network in enumerate(gates) for name in gate_scalars(network)}
    assert learns == {*scalars, "1.input_branch.weight"}
    assert len(scalars) == 4 * len(gate_places(unet))


def test_how_far_gates_are_open_is_told(unet):
    gates = ObjectGates.from_unet(unet)
    assert set(gate_values(gates).values()) == {0.0}
    name = next(iter(gate_scalars(gates)))
    gate_scalars(gates)[name].data.fill_(0.5)
    assert gate_values(gates)[name] == pytest.approx(0.46211716)
    assert name == f"gates.{next(iter(gate_places(unet)))}.alpha_attn"


@pytest.mark.parametrize("frames", [T, 1])
def test_gates_learn_alike_with_layers_computed_again_and_motion_modules_bypassed(unet, frames):
    unet.requires_grad_(False)
    c = condition(frames=frames)
    gradients = []
    for again in (False, True):
        gates = tiny_gates(unet)
        unet.checkpoint_blocks = again
        with motion_modules_bypassed(unet, bypasses=frames == 1):
            denoiser(unet, *gates)(noisy(frames=frames), T_STEP, c).square().mean().backward()
        gradients.append({name: p.grad for g in gates for name, p in g.named_parameters() if p.grad is not None})
    unet.checkpoint_blocks = False
    assert gradients[0].keys() == gradients[1].keys()
    assert all(gradients[0][name].any() for name in gate_scalars(gates[0]))
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)


@torch.no_grad()
def test_half_the_videos_are_half_the_work(unet):
    networks, c, x = denoiser(unet, *tiny_gates(unet)), condition(), noisy()
    features = networks.encode(x, T_STEP, c)
    whole = networks.decode(features, None)
    torch.testing.assert_close(networks.decode(features.videos(1, 2), None), whole[1:], rtol=1e-4, atol=1e-5)
    twice = networks.encode(x.repeat_interleave(2, 0), T_STEP, c.for_encoder(2))
    torch.testing.assert_close(twice.videos(2, 3).mid, features.videos(1, 2).mid, rtol=1e-4, atol=1e-5)
    swapped = UNetFeatures.stack([features.videos(1, 2), features.videos(0, 1)])
    torch.testing.assert_close(networks.decode(swapped, None), whole.flip(0), rtol=1e-4, atol=1e-5)
    assert c.for_encoder().keyframes is None


@torch.no_grad()
def test_guidance_shares_the_encoder_among_branches_of_a_text(unet, monkeypatch):
    networks, c = denoiser(unet, *tiny_gates(unet)), condition(batch=1)
    conditions = {"prompt": c, "uncond": replace(c, text=torch.zeros_like(c.text))}
    branches = plan(Control.OBJECT, 4.0, has_trajectories=False)
    x = noisy(batch=3)
    alone = [
        sum(b.weight * networks(x[k : k + 1], T_STEP, conditions[b.text]) for b in branches) for k in range(len(x))
    ]
    passes, encode = [], unet.encode
    monkeypatch.setattr(unet, "encode", lambda *args: passes.append(len(args[0])) or encode(*args))
    together = GuidedDenoiser(networks, branches, conditions)(x, T_STEP)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert passes == [2 * len(x)]


@torch.no_grad()
def test_the_first_frame_is_told_from_others_at_the_start(unet):
    """Without norms a picture is lost behind a dozen convolutions of PyTorch's initialisation."""
    gates = SceneGates.from_unet(unet, channels=(16, 32, 64, 64))
    pictures = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens, _ = gates(pictures, None, 1)
    assert tokens.shape == (2, 16, 64)
    assert 0.2 < (tokens[0] - tokens[1]).std() < 2


@torch.no_grad()
def test_the_first_frame_may_enter_in_frame_0_alone(unet):
    c = condition()
    _, everywhere = tiny_gates(unet)[1](None, c.input_frame, T)
    _, first = tiny_gates(unet, frame_0_only=True)[1](None, c.input_frame, T)
    is_first = torch.arange(B * T) % T == 0
    assert torch.equal(first[is_first], everywhere[is_first])
    assert everywhere[~is_first].any()
    assert not first[~is_first].any()


@torch.no_grad()
def test_gates_at_some_places_alone(unet):
    names = list(gate_places(unet))
    assert names == sorted(names, key=lambda name: ("down", "mid_", "up_b").index(name[:4])), "as they are computed"
    gates = open_gates(ObjectGates.from_unet(unet, [names[-1]]))
    assert list(gates.gates) == [names[-1]]
    x, c = noisy(), replace(condition(), scene=None, input_frame=None)
    features, plain = denoiser(unet, gates).encode(x, T_STEP, c), unet.encode(x, T_STEP, c.text)
    assert torch.equal(features.mid, plain.mid)
    assert not torch.equal(unet.decode(features), unet.decode(plain))
    with pytest.raises(ValueError, match="no place nowhere for a gate; there are down_blocks"):
        ObjectGates.from_unet(unet, ["nowhere"])
    with pytest.raises(ValueError, match="max_objects must be at least 1"):
        ObjectGates.from_unet(unet, max_objects=0)


@torch.no_grad()
def test_gates_may_be_told_their_places_and_first_boxes(unet, tmp_path):
    plain = open_gates(ObjectGates.from_unet(unet, max_objects=4))
    told = open_gates(ObjectGates.from_unet(unet, max_objects=4, knows_places=True, knows_first_boxes=True))
    c = condition()
    alike = torch.ones(1, 5 * 7, 32)  # features of latents of 9x13 after a halving; each place has the same
    for gates, knows in ((plain, False), (told, True)):
        name = next(name for name, place in gate_places(unet).items() if place.width == 32)
        tokens = gates(c.boxes, c.present, c.names)[:1]
        changed = gates.gates[name](alike, tokens, size=(9, 13))[0]
        assert bool((changed - changed[0]).abs().max() > 1e-3) == knows
        boxes = c.boxes.clone()
        boxes[0, 0] = boxes[0, 0] * 0.5
        moved = gates(boxes, c.present, c.names) - gates(c.boxes, c.present, c.names)
        assert moved[0].any()
        assert bool(moved[1:T].any()) == knows, "the other frames of the clip"
        assert not moved[T:].any(), "the other clip"
    with pytest.raises(ValueError, match="no level of 34 places"):
        told.gates[name](alike[:, :34], tokens, size=(9, 13))

    x = noisy()
    told.save_pretrained(tmp_path / "object_gates")
    again = ObjectGates.from_pretrained(tmp_path / "object_gates")
    c = replace(c, scene=None, input_frame=None)
    assert torch.equal(denoiser(unet, again)(x, T_STEP, c), denoiser(unet, told)(x, T_STEP, c))


@torch.no_grad()
def test_the_motion_of_boxes_goes_with_its_frames(unet):
    """Sliced and stacked as other tensors are; of an object that is absent in a frame or in the first, none is told."""
    told = denoiser(unet, ObjectGates.from_unet(unet, max_objects=4, tells_motion=True))
    c = replace(condition(), scene=None, input_frame=None)
    c.present[1, 0, 1] = 0
    whole = told.gating(c, T)
    assert torch.equal(whole.box_motion[:, :, 8].view(B, T, N), c.present * c.present[:, :1])
    assert torch.equal(whole.box_motion[T + 2, 0, :8], torch.cat([c.boxes[1, 0, 0], c.boxes[1, 2, 0]]))
    parts = [whole.rows(slice(0, T)), whole.rows(slice(T, 2 * T))]
    assert torch.equal(Gating.stack(parts).box_motion, whole.box_motion)
    assert denoiser(unet, ObjectGates.from_unet(unet, max_objects=4)).gating(c, T).box_motion is None


def test_places_are_told_as_boxes_row_by_row():
    boxes = _place_boxes(35, (9, 13))[0]
    assert torch.allclose(boxes[0], torch.tensor([0, 0, 1 / 7, 1 / 5]))
    assert torch.allclose(boxes[8], torch.tensor([1 / 7, 1 / 5, 2 / 7, 2 / 5]))
    assert torch.allclose(boxes[-1, 2:], torch.ones(2))


def test_what_the_model_has_no_gates_for_is_told(unet):
    c = condition()
    with pytest.raises(ValueError, match="boxes are given, and the model has no object gates"):
        denoiser(unet)(noisy(), T_STEP, c)
    with pytest.raises(ValueError, match="a scene is given, and the model has no scene gates"):
        denoiser(unet, tiny_gates(unet)[0])(noisy(), T_STEP, c)
    with pytest.raises(ValueError, match="`present` and `names`"):
        denoiser(unet, *tiny_gates(unet))(noisy(), T_STEP, replace(c, names=None))


@torch.no_grad()
def test_gates_are_folders_of_their_own(unet, tmp_path):
    """The UNet's file is the base's, and what is loaded does what was saved."""
    gates = dict(zip(("object_gates", "scene_gates"), tiny_gates(unet, is_parallel=True), strict=True))
    assert not [key for key in unet.state_dict() if "gate" in key or "fuser" in key]
    unet.save_pretrained(tmp_path / "unet")
    save_gates(tmp_path, {**gates, "none": None})
    assert {path.name for path in tmp_path.iterdir()} == {"unet", "object_gates", "scene_gates"}
    loaded = load_gates(tmp_path)
    x, c = noisy(), condition()
    again = MotionUNet.from_pretrained(tmp_path / "unet")
    assert torch.equal(denoiser(again, *loaded.values())(x, T_STEP, c), denoiser(unet, *gates.values())(x, T_STEP, c))
    assert not any(p.requires_grad for network in loaded.values() for p in network.parameters())
    shutil.rmtree(tmp_path / "scene_gates")
    assert load_gates(tmp_path)["scene_gates"] is None


def test_a_model_folder_with_gates(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    assert not Networks.load(tmp_path).modules.keys() & GATES.keys()
    object_gates, scene_gates = tiny_gates(pipe.unet)
    save_gates(tmp_path, {"object_gates": object_gates, "scene_gates": scene_gates})
    networks = Networks.load(tmp_path)
    assert GATES.keys() <= networks.modules.keys() & networks.parts.keys()
    assert networks.denoiser.object_gates is networks.object_gates
    found = type(pipe).from_pretrained(tmp_path)
    value = next(iter(gate_values(found.scene_gates).values()))
    assert value == pytest.approx(0.46211716)
    found.save_pretrained(tmp_path / "again")
    again = load_gates(tmp_path / "again")
    assert all(gate_values(again[name]) == gate_values(getattr(found, name)) for name in GATES)
    (tmp_path / "object_gates" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"object_gates/config.json is damaged"):
        Networks.check_folder(tmp_path)


@torch.no_grad()
def test_class_names_are_told_by_the_token_that_ends_them():
    networks = tiny_networks()
    names = ["star", "a blue star"]
    features = networks.encode_names(names)
    states = networks.text_encoder(networks.tokenize(names)).last_hidden_state
    for row, name in enumerate(names):
        place = 1 + len(networks.tokenizer(name, add_special_tokens=False).input_ids)
        torch.testing.assert_close(features[row], states[row, place])
    assert networks.encode_names([]).shape == (0, 16)


@torch.no_grad()
def test_layers_before_the_text_run_once_under_gates_too(unet):
    networks, c, x = denoiser(unet, *tiny_gates(unet)), condition(), noisy()[:1].repeat(2, 1, 1, 1, 1)
    same = {name: value[:1].repeat(2, *[1] * (value.ndim - 1)) for name, value in vars(c).items() if value is not None}
    c = Condition(**{**same, "text": c.text})
    plain = networks.encode(x, T_STEP, c)
    with rows_repeated(unet, 2):
        shared = networks.encode(x, T_STEP, c)
    torch.testing.assert_close(networks.decode(shared, None), networks.decode(plain, None), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain.mid[:T], plain.mid[T:], atol=1e-3)
