"""The up path and the output of a small UNet read the first frame at places that they choose."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from imageconductor.conditioning.flow_map import flow_map
from imageconductor.models.controlnets import Residuals
from imageconductor.models.denoiser import Condition
from imageconductor.models.first_frame_warp import FirstFrameWarp, WarpedOutput, WarpedSkips
from imageconductor.models.gated_attention import ObjectGates
from imageconductor.models.gating import box_displacements
from imageconductor.models.motion_module import motion_modules_bypassed
from imageconductor.models.motion_unet import MotionUNet
from imageconductor.models.small_model import SmallModelConfig, build_small_model

SIZES = {"text_width": 8, "text_layers": 1, "text_length": 8}
READS = {"first_frame_warp": True, "first_frame_skips": True, "prediction_type": "sample"}
SMALL = SmallModelConfig((8, 8), 4, (8, 16), 1, 2, 4, 16, **SIZES, **READS)
PLAIN = replace(SMALL, first_frame_warp=False, first_frame_skips=False)


def reading_warp(*offsets):
    """A warp of two heads that adds the first frame's features at the offsets (x, y), in parts of the frame."""
    warp = FirstFrameWarp(8, 2, 2)
    with torch.no_grad():
        warp.offsets.bias.copy_(torch.tensor(offsets).flatten() * 16)
        for layer in (warp.values, warp.merge):
            nn.init.eye_(layer.weight.view(8, 8))
            layer.bias.zero_()
    return warp


def test_each_head_reads_the_first_frame_at_its_offset():
    warp = reading_warp((3 / 10, 0.0), (0.0, -2 / 6))
    x = torch.randn(8, 8, 6, 10)
    with torch.no_grad():
        read = warp(x, 4) - x
    first = x[[0, 0, 0, 0, 4, 4, 4, 4]]
    torch.testing.assert_close(read[:, :4, :, :7], first[:, :4, :, 3:])
    torch.testing.assert_close(read[:, 4:, 2:], first[:, 4:, :-2])
    torch.testing.assert_close(read[:, :4, :, 7:], first[:, :4, :, 9:].expand(-1, -1, -1, 3))  # Edges are repeated.


def test_an_untrained_warp_reads_each_place_itself_and_learns_its_offsets():
    warp = reading_warp((0.0, 0.0), (0.0, 0.0))
    x = torch.randn(4, 8, 5, 5)
    read = warp(x, 4) - x
    torch.testing.assert_close(read, x[[0, 0, 0, 0]])
    read.square().sum().backward()
    assert warp.offsets.weight.grad.abs().sum() > 0


def test_an_offset_is_a_part_of_the_frame_at_every_resolution():
    warp = reading_warp((0.25, 0.0), (0.25, 0.0))
    x = torch.randn(2, 8, 4, 4)
    fine = nn.functional.interpolate(x, scale_factor=4)
    with torch.no_grad():
        torch.testing.assert_close((warp(x, 2) - x)[..., 0], x[[0, 0], :, :, 1])
        read = (warp(fine, 2) - fine)[:, :, 1::4, 1]
    torch.testing.assert_close(read, fine[[0, 0], :, 1::4, 5])


def test_half_precision_keeps_places():
    warp = reading_warp((3 / 64, 0.0), (3 / 64, 0.0)).to(torch.bfloat16)
    x = torch.randn(1, 8, 4, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        read = (warp(x, 1) - x).float()
    assert (read[..., :60] - x[..., 3:63].float()).abs().max() < 0.1


def choosing(offset, logits, num_reads=2):
    """An output that reads the first frame at one offset (x, y), in parts of the frame, by fixed weights."""
    output = WarpedOutput(4, num_reads)
    with torch.no_grad():
        output.choose.weight.zero_()
        places = torch.tensor(offset).repeat(num_reads) * 16
        output.choose.bias.copy_(torch.cat([places, torch.tensor(logits)]))
    return output


def showing(pictures, displacements=None):
    """Residuals that hold nothing else."""
    return Residuals((), torch.zeros(()), pictures, displacements)


def test_an_output_is_painted_or_read_from_the_first_picture_by_weights_that_add_up_to_one():
    features, painted, pictures = torch.randn(6, 4, 5, 8), torch.randn(6, 3, 5, 8), torch.randn(6, 3, 5, 8)
    first = pictures[[0, 0, 0, 3, 3, 3]]
    pictures = showing(pictures)
    with torch.no_grad():
        copied = choosing((0.0, 0.0), [-50.0, 0.0, 0.0])(features, painted, pictures, 3)
        torch.testing.assert_close(copied, first)
        moved = choosing((-2 / 8, 0.0), [-50.0, 0.0, 0.0])(features, painted, pictures, 3)
        torch.testing.assert_close(moved[..., 2:], first[..., :-2])
        half = choosing((0.0, 0.0), [0.0, 0.0, -50.0])(features, painted, pictures, 3)
        torch.testing.assert_close(half, (painted + first) / 2)
        assert choosing((0.0, 0.0), [-50.0, 0.0, 0.0])(features, painted, None, 3) is painted


def test_the_first_read_begins_where_the_flow_map_says_that_a_place_has_come_from():
    features, painted, pictures = torch.randn(2, 4, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    displacements = torch.tensor([2 / 8, -1 / 5]).view(1, 2, 1, 1) * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    given = showing(pictures, displacements.expand(-1, -1, 5, 8))
    with torch.no_grad():
        came = choosing((0.0, 0.0), [-50.0, 0.0, -50.0])(features, painted, given, 2)
        torch.testing.assert_close(came[0], pictures[0])
        torch.testing.assert_close(came[1, :, :-1, 2:], pictures[0, :, 1:, :-2])
        further = choosing((-1 / 8, 0.0), [-50.0, 0.0, -50.0])(features, painted, given, 2)
        torch.testing.assert_close(further[1, :, :-1, 3:], pictures[0, :, 1:, :-3])
        other = choosing((0.0, 0.0), [-50.0, -50.0, 0.0])(features, painted, given, 2)
        torch.testing.assert_close(other, pictures[[0, 0]])


def test_reads_learn_to_differ():
    output = WarpedOutput(4)
    features, painted, pictures = torch.randn(2, 4, 6, 6), torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    output(features, painted, showing(pictures), 2).square().sum().backward()
    read = output.choose.weight.grad[:10].unflatten(0, (5, 2))
    assert all(not torch.allclose(read[0], other) for other in read[1:])


def comparing():
    """Two skip connections to which what would arrive and what was there are added."""
    skips = WarpedSkips(1, 2, 2)
    with torch.no_grad():
        skips.compare.weight.zero_()
        skips.compare.weight[[0, 1], [0, 1], 1, 1] = 1.0
        skips.compare.bias.fill_(20.0)  # where SiLU is the identity
        for layer in skips.add:
            layer.weight.copy_(torch.eye(2)[..., None, None])
            layer.bias.fill_(-20.0)
    return skips


def test_skip_connections_see_what_would_arrive_beside_what_was_there():
    pictures = torch.rand(4, 1, 5, 8)
    own, coarse = torch.zeros(4, 2, 5, 8), torch.zeros(4, 2, 2, 4)
    displacements = torch.tensor([2 / 8, -1 / 5]).view(1, 2, 1, 1).repeat(4, 1, 5, 8)
    with torch.no_grad():
        first, second, rest = comparing()((own, own, coarse), showing(pictures, displacements), 2)
        alone = comparing()((own, own, coarse), showing(pictures), 2)[0]
    there = pictures[[0, 0, 2, 2]]
    torch.testing.assert_close(first[:, :1, :-1, 2:], there[:, :, 1:, :-2], atol=1e-5, rtol=0)
    torch.testing.assert_close(first[:, 1:], there, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, there.expand(-1, 2, -1, -1), atol=1e-5, rtol=0)
    assert torch.equal(first, second)
    assert rest is coarse


def test_untrained_skip_connections_are_as_they_were(networks):
    unet, (x, pictures) = networks.unet, torch.randn(2, 2, 4, 3, 8, 8)
    assert len(unet.warped_skips.add) == 2  # conv_in and the one layer of the first level
    t, text, mask = torch.tensor(500), torch.zeros(2, 4, 8), torch.ones(2, 1, 3, 8, 8)
    with torch.no_grad():
        given = networks.image_controlnet(t, text, pictures, mask)
        features = unet.encode(x, t, text)
        before = unet.decode(features, given)
        unet.warped_skips.add[0].weight.normal_()
        assert not torch.allclose(unet.decode(features, given), before)
        blind = unet.decode(features, replace(given, pictures=None))
        del unet.warped_skips
        torch.testing.assert_close(unet.decode(features, given), before)
        torch.testing.assert_close(unet.decode(features, replace(given, pictures=None)), blind)


def test_pictures_reach_the_output_whatever_is_added_stacked_or_repeated(networks):
    unet, image, motion = networks.unet, networks.image_controlnet, networks.motion_controlnet
    with torch.no_grad():
        unet.warped_out.choose.weight.zero_()
        unet.warped_out.choose.bias.copy_(torch.tensor([0.0] * 10 + [-50.0] + [0.0] * 5))
        pictures, mask = torch.randn(2, 4, 3, 8, 8), torch.ones(2, 1, 3, 8, 8)
        t, text = torch.tensor(500), torch.zeros(2, 4, 8)
        given = image(t, text, pictures, mask) + motion(t, text, torch.zeros(1, 2, 3, 16, 16))
        features = unet.encode(torch.randn(2, 4, 3, 8, 8), t, text)
        copies = pictures[:, :, :1].expand_as(pictures)
        torch.testing.assert_close(unet.decode(features, given), copies)
        parts = [given.videos(i, i + 1, 3) for i in (1, 0)]
        torch.testing.assert_close(unet.decode(features, given.stack(parts)), copies.flip(0))
        torch.testing.assert_close(unet.decode(features, parts[1].repeat_videos(2, 3)), copies[[0, 0]])
        with pytest.raises(ValueError, match="pictures are given in some"):
            given.stack([given, replace(given, pictures=None)])


@pytest.mark.parametrize(
    ("convention", "told"),
    [
        ({"accumulate": True, "normalisation": "average", "scale": 0.125, "least_weight": 1e-6}, True),
        ({"accumulate": True, "normalisation": "peak"}, True),
        ({"normalisation": "peak"}, False),
        ({"accumulate": True, "normalisation": "sum"}, False),
    ],
)
def test_displacements_are_those_drawn_and_only_of_conventions_that_tell_them(convention, told):
    settings = {"sigma_px": 1.0, "kernel_size": 9, "still_drift_px": 0.0} | convention
    motion = build_small_model(replace(SMALL, flow_map=settings), ["a word"], seed=1).motion_controlnet
    points = torch.tensor([[5.0, 9.0], [6.0, 11.0], [9.0, 9.0]])[None, None]  # in a video of 16 x 16
    flow = flow_map(points, torch.ones(1, 1, 3, dtype=torch.bool), (16, 16), motion.flow_convention)
    with torch.no_grad():
        residuals = motion(torch.tensor(500), torch.zeros(2, 4, 8), flow)
    if not told:
        assert residuals.displacements is None
        return
    videos = residuals.displacements.unflatten(0, (2, 3))
    assert torch.equal(videos[0], videos[1])
    assert not videos[:, 0].any()
    if convention["normalisation"] == "average":  # a latent pixel of 2 x 2, in full within about 5 px
        torch.testing.assert_close(videos[0, 1, :, 4, 2], torch.tensor([1.0, 2.0]) / 16)
        torch.testing.assert_close(videos[0, 2, :, 5, 3], torch.tensor([4.0, 0.0]) / 16)


def test_rows_without_a_flow_map_are_told_nothing(networks):
    t, text, flow = torch.tensor(500), torch.zeros(2, 4, 8), torch.randn(2, 2, 3, 16, 16)
    condition = Condition(text, None, None, flow, has_flow=torch.tensor([1.0, 0.0]))
    with torch.no_grad():
        told = networks.denoiser.motion_residuals(t, condition)
    assert told.displacements[:3].any()
    assert not told.displacements[3:].any()
    stacked = Residuals.stack([told, replace(told, displacements=None)]).displacements
    assert torch.equal(stacked, torch.cat([told.displacements, torch.zeros_like(told.displacements)]))


def test_only_a_network_that_predicts_x_0_can_have_it():
    with pytest.raises(ValueError, match="prediction_type \"sample\", got 'epsilon'"):
        replace(SMALL, prediction_type="epsilon")


@pytest.fixture
def networks():
    return build_small_model(SMALL, ["a word"], seed=1)


def predict(unet, x, **kwargs):
    with torch.no_grad():
        return unet(x, torch.tensor(500), torch.zeros(len(x), 4, 8), **kwargs).sample


def test_only_a_videos_own_first_frame_is_read(networks):
    unet = networks.unet
    with torch.no_grad():
        for block in unet.up_blocks:
            for module in block.motion_modules:
                module.first_frame_warp.offsets.bias.fill_(2.0)
    x = torch.randn(2, 4, 3, 8, 8)
    before = predict(unet, x)
    other = x.clone()
    other[1] += torch.randn_like(other[1])
    torch.testing.assert_close(predict(unet, other)[0], before[0])


def test_where_motion_modules_are_bypassed_so_is_the_warp(networks):
    plain = build_small_model(PLAIN, ["a word"], seed=1).unet
    shared = plain.state_dict().keys()
    state = {key: value for key, value in networks.unet.state_dict().items() if key in shared}
    plain.load_state_dict(state)
    with torch.no_grad():
        networks.unet.linear_out.weight.zero_()
        networks.unet.linear_out.bias.zero_()
    x = torch.randn(2, 4, 1, 8, 8)
    with motion_modules_bypassed(plain), motion_modules_bypassed(networks.unet):
        assert torch.equal(predict(plain, x), predict(networks.unet, x))
    assert not torch.allclose(predict(plain, x), predict(networks.unet, x))


def test_a_saved_unet_keeps_it_and_others_have_none(networks, tmp_path):
    networks.unet.save_pretrained(tmp_path / "warp")
    loaded = MotionUNet.from_pretrained(tmp_path / "warp")
    x = torch.randn(1, 4, 3, 8, 8)
    torch.testing.assert_close(predict(loaded, x), predict(networks.unet, x))
    assert sum("first_frame_warp" in key for key in loaded.state_dict()) == 4 * 8
    plain = build_small_model(PLAIN, ["a word"], seed=1)
    assert not any(name in key for key in plain.unet.state_dict() for name in ("warp", "linear_out"))
    for controlnet in (networks.image_controlnet, networks.motion_controlnet):
        assert not any("first_frame_warp" in key for key in controlnet.state_dict())


MOVED, GROWN = [0.25, 0.25, 0.5, 0.5], [0.25, 0.5, 0.75, 1.0]


def test_what_is_in_a_box_has_come_with_it_and_grown_with_it():
    motion = torch.tensor([[[*MOVED, *GROWN, 1.0]]])
    told, covered = box_displacements(motion, (16, 16))
    torch.testing.assert_close(told[0, :, 9, 5], torch.tensor([11 / 32 - 19 / 64, 19 / 32 - 19 / 64]))
    torch.testing.assert_close(told[0, :, 15, 11], torch.tensor([23 / 32 - 31 / 64, 31 / 32 - 31 / 64]))
    assert covered[0, 0].nonzero().min(0).values.tolist() == [7, 3], "half a place more on each side"
    assert covered[0, 0].nonzero().max(0).values.tolist() == [15, 12]
    assert not told[~covered.expand_as(told)].any()


def test_the_smaller_of_two_boxes_counts_and_an_absent_one_does_not():
    still = [0.25, 0.5, 0.5, 0.75]
    both = torch.tensor([[[*MOVED, *GROWN, 1.0], [*still, *still, 1.0]]])
    told, _ = box_displacements(both, (16, 16))
    assert not told[0, :, 8:12, 4:8].any()
    assert told[0, :, 14, 10].all()
    both[0, 1, 8] = 0
    assert torch.equal(box_displacements(both, (16, 16))[0], box_displacements(both[:, :1], (16, 16))[0])


def test_an_object_that_leaves_the_frame_does_not_shrink():
    """Its box is cut at the edge; a box thinner than a place carries what is in it and no more."""
    first, leaving = [0.5, 0.25, 0.8, 0.5], [0.9, 0.25, 1.0, 0.5]
    told, _ = box_displacements(torch.tensor([[[*first, *leaving, 1.0]]]), (16, 32))
    torch.testing.assert_close(told[0, 0, 6, 29:], torch.full((3,), 0.4))
    assert not told[0, 1].abs().max() > 1e-6
    entering, came = [0.0, 0.25, 0.1, 0.5], [0.2, 0.2, 0.5, 0.7]
    told, _ = box_displacements(torch.tensor([[[*entering, *came, 1.0]]]), (16, 32))
    torch.testing.assert_close(told[0, 0, 6, 15], torch.tensor(15.5 / 32 - (0.1 - (0.5 - 15.5 / 32) / 2)))
    told, _ = box_displacements(torch.tensor([[[*MOVED, 0.6, 0.25, 0.6001, 0.5, 1.0]]]), (16, 16))
    assert told.abs().max() < 0.4


@torch.no_grad()
def test_boxes_move_the_first_frame_and_leave_the_rest_to_trajectories():
    networks = build_small_model(SMALL, ["a word"], seed=1)
    gates = ObjectGates.from_unet(networks.unet, max_objects=2, tells_motion=True)
    denoiser = replace(networks.denoiser, object_gates=gates)
    boxes = torch.tensor([[MOVED], [GROWN]])[None]
    condition = Condition(
        torch.randn(1, 3, 8),
        torch.randn(1, 4, 2, 8, 8),
        torch.ones(1, 1, 2, 8, 8),
        boxes=boxes,
        present=torch.ones(1, 2, 1),
        names=torch.randn(1, 1, 8),
    )
    gating = denoiser.gating(condition, 2)
    told = torch.full((2, 2, 8, 8), 0.5)
    residuals = replace(denoiser.residuals(torch.tensor(5), condition), displacements=told)
    covered = box_displacements(gating.box_motion, (8, 8))[1].expand_as(told)
    both = gating.tell(residuals).displacements
    assert (both[~covered] == 0.5).all()
    assert torch.equal(both[covered], box_displacements(gating.box_motion, (8, 8))[0][covered])
    x_t = torch.randn(1, 4, 2, 8, 8)
    by_boxes = denoiser(x_t, torch.tensor(5), condition)
    plain = denoiser(x_t, torch.tensor(5), replace(condition, boxes=None, present=None, names=None))
    assert not torch.equal(by_boxes, plain), "gates are closed, and the boxes act"
    gates.tells_motion = False
    assert torch.equal(denoiser(x_t, torch.tensor(5), condition), plain)
