"""SMCD's stored outputs, within 1e-4 of their largest value, and the facts recorded beside them."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import get_fourier_embeds_from_boundingbox
from parity import TOLERANCE
from parity_smcd import (
    CONFIG,
    KEYS,
    META,
    assert_close,
    backbone,
    ddim_scheduler,
    draw,
    expected,
    fill,
    first_conv,
    inputs,
    load_cell,
    weights,
)

from imageconductor.checkpoints.smcd import place_gates, split_gates
from imageconductor.diffusion.guidance import classifier_free_guidance
from imageconductor.models.gated_attention import ObjectGate, ObjectGates, SceneGate, SceneGates
from imageconductor.models.gating import Gating, gate_places, gate_scalars, open_gate_places_
from imageconductor.models.motion_module import motion_modules_bypassed

FRAMES = CONFIG["frames"]
VARIANTS = list(META["gate_scalars"])
SCALE = "out_scale"


@pytest.fixture(scope="module")
def reference():
    return expected()


@pytest.fixture(scope="module")
def x(reference):
    return {**inputs(), "boxes": reference["pos/boxes"], "masks": reference["pos/masks"]}


def test_the_seeded_fill_and_inputs_are_the_recorded_ones(x):
    found = {key: fill(key, KEYS[key.partition("/")[0]][key.partition("/")[2]]) for key in META["fill_check"]}
    found |= {key: x[key] for key in META["input_check"]}
    for key, record in {**META["fill_check"], **META["input_check"]}.items():
        values = found[key].numpy()
        assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest() == record["sha256"], key
        assert values.ravel()[:4].tolist() == pytest.approx(record["first4"])
        assert values.sum(dtype="f8") == pytest.approx(record["sum"])
    for variant, scalars in META["gate_scalars"].items():
        state = weights(f"gate_{variant}")
        assert {name: state[name].item() for name in scalars} == pytest.approx(scalars)


# -- the position network


@pytest.fixture(scope="module")
def object_gates():
    """The position network alone, which pads to as many objects as the stored inputs have."""
    net = ObjectGates({}, CONFIG["text_dim"], CONFIG["token_dim"], max_objects=CONFIG["boxes"])
    net.position_net.load_state_dict(weights("position_net"))
    return net.eval()


def tokens(net, x, masks):
    """The stored objects differ from frame to frame, names too: each frame is a clip of one."""
    return net(x["boxes"][:, None], masks[:, None], x["entity_embeddings"])


@torch.no_grad()
def test_position_network(object_gates, x, reference):
    frequencies = len(META["freq_bands"])
    assert_close(get_fourier_embeds_from_boundingbox(frequencies, x["boxes"]), reference, "pos/fourier")
    bands = 100 ** (torch.arange(frequencies) / frequencies)
    assert bands.tolist() == pytest.approx(META["freq_bands"])
    assert_close(tokens(object_gates, x, x["masks"]), reference, "pos/tokens")
    assert_close(tokens(object_gates, x, torch.zeros_like(x["masks"])), reference, "pos/tokens_all_null")
    half = x["masks"].clone()
    half[0, 1] = 0.5
    assert_close(tokens(object_gates, x, half)[0], reference, "pos/tokens_fractional_mask_frame0")


@torch.no_grad()
def test_position_network_facts(object_gates, x):
    assert not x["masks"][:, -1].any()
    assert not x["masks"][1, 0]
    net = ObjectGates({}, CONFIG["text_dim"], CONFIG["token_dim"], max_objects=CONFIG["boxes"])
    nulls = [p for name, p in net.named_parameters() if "null_" in name]
    assert max(p.abs().max().item() for p in nulls) == META["position_net_null_init_abs_max"]
    order = torch.arange(CONFIG["boxes"]).flip(0)
    flipped = {key: x[key][:, order] for key in ("boxes", "masks", "entity_embeddings")}
    difference = tokens(object_gates, flipped, flipped["masks"]) - tokens(object_gates, x, x["masks"])[:, order]
    assert difference.abs().max().item() <= META["position_net_permutes_with_objects_maxdiff"] + 1e-6
    record = META["grounding_input"]
    boxes, masks, names = (torch.zeros(record["null_shapes"][k]) for k in ("boxes", "masks", "positive_embeddings"))
    dropped = object_gates(boxes[:, None], masks[:, None], names)
    assert record["null_all_zero"]
    torch.testing.assert_close(dropped, tokens(object_gates, x, torch.zeros_like(x["masks"])))


# -- gated cells


def published_cell(variant, x, scale=1.0, box_tokens=None):
    """Output of a published cell by our gates; the published parallel one adds its input again for each beta."""
    state = weights(f"gate_{variant}")
    object_gate, scene_gate = load_cell(state, CONFIG["heads"], CONFIG["head_dim"])
    hidden, box_tokens = x["hidden"], x["box_tokens"] if box_tokens is None else box_tokens
    boxes = object_gate(hidden, box_tokens, scale)
    if scene_gate is None:
        return boxes
    if "beta_g" not in state:
        return scene_gate(boxes, x["image_tokens"], scale)
    scene = scene_gate(hidden, x["image_tokens"], scale)
    return hidden + state["beta_g"].tanh() * boxes + state["beta_v"].tanh() * scene


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_gated_cells(variant, x, reference):
    assert_close(published_cell(variant, x), reference, f"gate/{variant}/out")
    scaled = [key for key in reference if key.startswith(f"gate/{variant}/{SCALE}")]
    assert scaled
    for key in scaled:
        assert_close(published_cell(variant, x, float(key.rpartition(SCALE)[2])), reference, key)
    shorter = published_cell(variant, x, box_tokens=x["box_tokens"][:, :-1])
    assert_close(shorter, reference, f"gate/{variant}/out_without_last_token")
    # There is no mask to apply, so it can change nothing.
    assert META["sensitivity"]["mask_ignored_by_gate"][f"gate/{variant}/out_mask_zero_maxdiff"] == 0


@torch.no_grad()
def test_object_gate_of_a_cell_with_both(x, reference):
    for key in (key for key in reference if key.endswith("/mim_only")):
        gate, _ = load_cell(weights(f"gate_{key.split('/')[1]}"), CONFIG["heads"], CONFIG["head_dim"])
        assert_close(gate(x["hidden"], x["box_tokens"]), reference, key)


@pytest.mark.parametrize("variant", VARIANTS)
def test_which_parameters_learn_at_initialisation(variant, x):
    """The published parallel cell opens its betas first; ours has none, and opens what the others open."""
    state = {key: value * (value.ndim > 0) for key, value in weights(f"gate_{variant}").items()}
    object_gate, scene_gate = load_cell(state, CONFIG["heads"], CONFIG["head_dim"])
    place, width = "place", CONFIG["query_dim"]
    gating = Gating(
        {place: object_gate},
        x["box_tokens"],
        {} if scene_gate is None else {place: scene_gate},
        x["image_tokens"],
        is_parallel=variant == "parallel",
    )
    assert x["hidden"].shape[-1] == width
    output = gating.act(place, x["hidden"])
    assert (output - x["hidden"]).abs().max().item() == META["identity_at_init_maxdiff"][variant]
    (output * draw("gradient", *output.shape)).sum().backward()
    learns = {name for name, p in object_gate.named_parameters() if p.grad is not None and p.grad.any()}
    if scene_gate is not None:
        learns |= {f"cross_{name}" for name, p in scene_gate.named_parameters() if p.grad is not None and p.grad.any()}
    recorded = META["params_with_nonzero_grad_at_init"]
    if variant != "parallel":
        assert learns == set(recorded[variant])
        return
    assert learns == set(recorded["vanilla_cross_vision"])
    betas = {name: torch.zeros((), requires_grad=True) for name in recorded[variant]}
    gates = object_gate(x["hidden"], x["box_tokens"]), scene_gate(x["hidden"], x["image_tokens"])
    published = x["hidden"] + sum(b.tanh() * gate for b, gate in zip(betas.values(), gates, strict=True))
    (published * draw("gradient", *published.shape)).sum().backward()
    assert all(beta.grad.abs() > 0 for beta in betas.values())


@torch.no_grad()
def test_building_blocks(x, reference):
    gate, _ = load_cell(weights("gate_vanilla"), CONFIG["heads"], CONFIG["head_dim"])
    gate.attn.load_state_dict(weights("cross_attention"))
    gate.ff.load_state_dict(weights("feed_forward"))
    assert_close(gate.attn(x["hidden"]), reference, "cell/attention_self")
    assert_close(gate.ff(x["hidden"]), reference, "cell/feed_forward_geglu")


@torch.no_grad()
def test_spatial_transformer_block(x, reference):
    """Through diffusers' own call of the fuser, as in our UNet."""
    state = weights("block")
    object_gate, scene_gate = load_cell(
        {key.removeprefix("gate_attn."): value for key, value in state.items() if key.startswith("gate_attn.")},
        CONFIG["heads"],
        CONFIG["head_dim"],
    )
    block = BasicTransformerBlock(
        CONFIG["query_dim"], CONFIG["heads"], CONFIG["head_dim"], cross_attention_dim=x["text"].shape[-1]
    ).eval()
    block.load_state_dict({key: value for key, value in state.items() if not key.startswith("gate_attn.")})
    unet = torch.nn.Module()
    unet.down_blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"attentions": torch.nn.ModuleList([block])})])
    unet.mid_block, unet.up_blocks = torch.nn.Module(), torch.nn.ModuleList()
    open_gate_places_(unet)
    (place,) = gate_places(unet)
    gating = Gating({place: object_gate}, x["box_tokens_1024"], {place: scene_gate}, x["image_tokens_1024"])
    plain = block(x["hidden"], encoder_hidden_states=x["text"])
    gated = block(x["hidden"], encoder_hidden_states=x["text"], cross_attention_kwargs={"gligen": {"objs": gating}})
    assert_close(plain, reference, "block/out_without_grounding")
    assert_close(gated, reference, "block/out")
    recorded = META["sensitivity"]["grounding_vs_base_block"]
    assert (gated - plain).abs().max().item() == pytest.approx(recorded, rel=1e-4)


# -- the first frame


@torch.no_grad()
def test_first_frame_encoder(x, reference):
    state = weights("visual_encoder")
    latent_channels = state["conv_in.weight"].shape[1]
    net = SceneGates({}, latent_channels, CONFIG["enc_channels"], CONFIG["enc_rb"]).eval()
    net.image_encoder.load_state_dict(state)
    assert_close(net.image_encoder(x["first_frame_latent"]), reference, "enc/feature_map")
    rows, _ = net(x["first_frame_latent"], None, 2)
    assert torch.equal(rows[0], rows[1]), "the same tokens in every frame"
    assert_close(rows[:1], reference, "enc/tokens")
    for key in (key for key in reference if key.startswith("enc/feature_map_")):
        size = [int(side) for side in key.rpartition("_")[2].split("x")]
        latent = draw(f"first_frame_latent_{key.rpartition('_')[2]}", 1, latent_channels, *size)
        assert_close(net.image_encoder(latent), reference, key)


@torch.no_grad()
def test_input_branch_is_the_widened_convolution(reference):
    """A second convolution without bias beside the first, in place of one that reads both pictures."""
    record = META["zero_conv"]
    out, both = record["widened_shape"][:2]
    shape = (out, both // 2, *record["widened_shape"][2:])
    key = "zero_conv/out_channels_0_16_32"
    noisy, image = (
        draw(f"zero_conv/{n}", reference[key].shape[0], shape[1], *reference[key].shape[2:]) for n in ("noisy", "image")
    )
    weight, bias = fill("zero_conv/weight", shape), fill("zero_conv/bias", (out,))
    plain = F.conv2d(noisy, weight, bias, padding=1)
    net = SceneGates({}, shape[1], (8,), 1, input_channels=out)
    assert net.input_branch.weight.shape == shape
    assert net.input_branch.bias is None
    assert net.input_branch.weight.abs().max() == record["new_half_abs_max"]
    _, added = net(None, image, 1)
    assert (plain + added - plain).abs().max().item() == record["maxdiff_to_old_conv"]
    assert_close((plain + added)[:, ::16], reference, key)
    net.input_branch.weight.copy_(0.3 * fill("zero_conv/trained_half", shape))
    trained = plain + net(None, image, 1)[1]
    assert_close(trained[:, ::16], reference, "zero_conv/out_with_trained_half_channels_0_16_32")


# -- the whole network


@pytest.fixture(scope="module")
def unet():
    return backbone()


@pytest.fixture(scope="module")
def gates(unet):
    """Object gates and scene gates of the tiny network, as a released file brings them."""
    cells, _ = split_gates(weights("unet_smcd", "unet"), "the seeded UNet")
    objects, scene = place_gates(cells, unet, "the seeded UNet")
    found = {"objects": {}, "scene": {}}
    for name, place in gate_places(unet).items():
        width, token_dim = objects[name]["linear.weight"].shape
        found["objects"][name] = ObjectGate(width, token_dim, place.heads, place.head_dim).eval()
        found["objects"][name].load_state_dict(objects[name])
        token_dim = scene[name]["linear.weight"].shape[1]
        found["scene"][name] = SceneGate(width, token_dim, place.heads, place.head_dim).eval()
        found["scene"][name].load_state_dict(scene[name])
    return found


def evaluate(unet, gates, x, text="unet/text", at=None, *, image=True, boxes=True, scene=True, frame_0_only=False):
    """The tiny network, encoder and decoder, under what the stored outputs vary; `at` = (x_t, t)."""
    noisy, t = at or (x["unet/noisy"], CONFIG["timestep"])
    features = None
    if image:
        weight = first_conv()[1]
        net = SceneGates({}, weight.shape[1], (8,), 1, input_channels=len(weight), frame_0_only=frame_0_only)
        net.input_branch.weight.copy_(weight)
        _, features = net(None, x["unet/image_latent"], FRAMES)
    gating = Gating(
        gates["objects"],
        x["box_tokens_1024"] if boxes else None,
        gates["scene"],
        x["image_tokens_1024"] if scene else None,
        features,
    )
    return unet.decode(unet.encode(noisy, t, x[text], gating))


@torch.no_grad()
def test_whole_network(unet, gates, x, reference):
    assert_close(unet(x["unet/noisy"], CONFIG["timestep"], x["unet/text"]).sample, reference, "unet/base")
    settings = {
        "smcd": {},
        "smcd_null_text": {"text": "unet/null_text"},
        "smcd_zero_concat_image": {"image": False},
        "smcd_only_first_frame_concat": {"frame_0_only": True},
        "smcd_no_grounding": {"boxes": False, "scene": False},
    }
    found = {name: evaluate(unet, gates, x, **given) for name, given in settings.items()}
    for name, value in found.items():
        assert_close(value, reference, f"unet/{name}")
    for name, other in (
        ("smcd_vs_zero_image", "smcd_zero_concat_image"),
        ("smcd_vs_no_grounding", "smcd_no_grounding"),
    ):
        difference = (found["smcd"] - found[other]).abs().max().item()
        assert difference == pytest.approx(META["sensitivity"][name], rel=1e-4)
    with motion_modules_bypassed(unet):
        single = evaluate(unet, gates, x, image=False, scene=False)
    assert_close(single, reference, "unet/stage1_image_mode")


@torch.no_grad()
def test_closed_gates_leave_the_whole_network(unet, x):
    objects, scene = ObjectGates.from_unet(unet), SceneGates.from_unet(unet, channels=(8, 8), blocks_per_level=1)
    names = torch.zeros(1, CONFIG["boxes"], unet_width := unet.config["cross_attention_dim"])
    assert unet_width == x["unet/text"].shape[-1]
    tokens_, features = scene(x["unet/image_latent"], x["unet/image_latent"], FRAMES)
    gating = Gating(objects.gates, objects(x["boxes"][None], x["masks"][None], names), scene.gates, tokens_, features)
    plain = unet(x["unet/noisy"], CONFIG["timestep"], x["unet/text"]).sample
    closed = unet.decode(unet.encode(x["unet/noisy"], CONFIG["timestep"], x["unet/text"], gating))
    assert (closed - plain).abs().max().item() == META["smcd_unet_at_init_vs_base_maxdiff"]
    assert len(gate_scalars(objects)) == 2 * len(gate_places(unet))


@torch.no_grad()
def test_sampling_loop(unet, gates, x, reference):
    (key,) = (key for key in reference if key.startswith("loop/smcd_"))
    steps, scale = key.removeprefix("loop/smcd_").split("steps_s")
    scheduler = ddim_scheduler()
    scheduler.set_timesteps(int(steps))
    sample = draw("loop/start", *reference[key].shape)
    for t in scheduler.timesteps:
        outputs = (evaluate(unet, gates, x, name, (sample, t)) for name in ("unet/null_text", "unet/text"))
        guided = classifier_free_guidance(*outputs, float(scale))
        sample = scheduler.step(guided, t, sample).prev_sample
    assert_close(sample, reference, key, 5 * TOLERANCE)  # errors grow on the way
