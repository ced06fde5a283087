import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from imageconductor.conditioning import FlowMapConvention, Trajectories, build_flow_map
from imageconductor.conditioning.flow_map import flow_map

DATA = Path(__file__).parents[1] / "data/flow"
GOLDEN = json.loads((DATA / "flow_cases.json").read_text())
RELEASE = FlowMapConvention()
SMALL = FlowMapConvention(kernel_size=13, sigma_px=2.0, normalisation="peak")


def slow_flow_map(points, visible, size, convention):
    """One clip the long way: scatter each step in drawing order, then OpenCV's two-dimensional filter."""
    width, height = size
    num_frames = points.shape[1]
    out = np.zeros((2, num_frames, height, width))
    kernel = cv2.getGaussianKernel(convention.kernel_size, convention.sigma_px)
    kernel = kernel @ kernel.T
    if convention.normalisation != "sum":
        kernel /= kernel.max()
    for i in range(num_frames - 1):
        written = np.zeros((height, width))
        for track, seen in zip(points.tolist(), visible.tolist(), strict=True):
            (x, y), (to_x, to_y) = track[i], track[i + 1]
            at_x, at_y = (to_x, to_y) if convention.at_end else (x, y)
            if not (seen[i] and seen[i + 1] and 0 <= at_x < width and 0 <= at_y < height):
                continue
            from_x, from_y = track[0] if convention.accumulate else track[i]
            out[:, i + 1, int(at_y), int(at_x)] = [to_x - from_x, to_y - from_y]
            written[int(at_y), int(at_x)] = 1
        least = convention.least_weight
        weights = np.maximum(cv2.filter2D(written, -1, kernel), least) if convention.normalisation == "average" else 1
        for channel in range(2):
            out[channel, i + 1] = cv2.filter2D(out[channel, i + 1], -1, kernel) / weights
    return torch.from_numpy(out * convention.scale).float()


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_published_flow_maps(case):
    stride, size = GOLDEN["stride"], (GOLDEN["W"], GOLDEN["H"])
    drawn = Trajectories.from_tracks(GOLDEN["cases"][case]["tracks"], size, GOLDEN["L"])
    expected = load_file(DATA / "flow_expected.safetensors")[case]
    ours = build_flow_map(drawn, RELEASE)[0, :, :, ::stride, ::stride]
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    kernel_size=st.sampled_from([1, 3, 9, 21]),
    normalisation=st.sampled_from(["sum", "peak", "average"]),
    accumulate=st.booleans(),
    least_weight=st.sampled_from([0.1, 1.0]),
    at_end=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_separable_filter_equals_the_slow_one(
    size, kernel_size, normalisation, accumulate, least_weight, at_end, seed
):
    convention = FlowMapConvention(
        kernel_size, 2.5, normalisation, accumulate, scale=0.5, least_weight=least_weight, at_end=at_end
    )
    generator = torch.Generator().manual_seed(seed)
    # Wider than the frame, so that some steps start outside, and crowded, so that some share a pixel.
    points = (torch.rand(2, 8, 4, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2) * torch.tensor(size)
    visible = torch.rand(2, 8, 4, generator=generator) > 0.2
    ours = flow_map(points, visible, size, convention)
    for b in range(2):
        slow = slow_flow_map(points[b], visible[b], size, convention)
        torch.testing.assert_close(ours[b], slow, rtol=1e-5, atol=1e-5)


def test_no_track_gives_zeros():
    assert build_flow_map(Trajectories.empty((20, 10), 4), RELEASE).equal(torch.zeros(1, 2, 4, 10, 20))


def test_on_average_many_tracks_of_one_motion_say_the_same_as_one():
    convention = FlowMapConvention(kernel_size=13, sigma_px=2.0, normalisation="average")
    steps = torch.tensor([[0.0, 0.0], [3.0, -2.0]])
    starts = torch.cartesian_prod(torch.arange(10.0, 22), torch.arange(10.0, 22))
    crowd = starts[:, None] + steps
    alone, together = (
        flow_map(points[None], torch.ones(1, len(points), 2, dtype=torch.bool), (32, 32), convention)
        for points in (crowd[66:67], crowd)
    )
    x, y = starts[66].long()
    torch.testing.assert_close(alone[0, :, 1, y, x], steps[1])
    torch.testing.assert_close(together[0, :, 1, 10:22, 10:22], steps[1].view(2, 1, 1).expand(2, 12, 12))
    still = torch.tensor([[[16.0, 16.0], [16.0, 16.0]]])
    held = flow_map(torch.cat([crowd[66:67], still])[None], torch.ones(1, 2, 2, dtype=torch.bool), (32, 32), convention)
    assert held[0, :, 1, y, x].abs().sum() < alone[0, :, 1, y, x].abs().sum(), "a still track beside it holds it back"


def test_a_small_least_weight_writes_a_displacement_in_full_around_its_track():
    convention = FlowMapConvention(49, 8.0, "average", least_weight=0.1)
    drawn = build_flow_map(Trajectories.from_tracks([[[40, 40], [45, 38]]], (80, 80), 2), convention)[0, :, 1, 40]
    torch.testing.assert_close(drawn[:, 23:58], torch.tensor([[5.0], [-2.0]]).expand(2, 35))  # 17 px to each side
    assert 0 < drawn[0, 62] < 2.6, "where the kernel is below a tenth, values fall"
    assert drawn[0, 65] == 0


def test_shift_the_track_and_the_field_shifts():
    track = torch.tensor([[20.0, 25.0], [23.0, 24.0], [24.0, 28.0]])
    points = torch.stack([track, track + torch.tensor([5.0, 3.0])])[:, None]
    a, b = flow_map(points, torch.ones(2, 1, 3, dtype=torch.bool), (60, 50), SMALL)
    torch.testing.assert_close(a.roll((3, 5), (-2, -1)), b)
    assert a[0, 1, 25, 20] == 3  # channel 0 is x, at row y and column x, in the frame the step ends in
    assert a[1, 1, 25, 20] == -1
    assert not a[:, 0].any()


def test_resize_then_draw_equals_draw_then_rescale():
    points = torch.tensor([[[9.0, 8.0], [13.0, 20.0], [29.0, 12.0], [30.0, 21.0]]])
    tracks = Trajectories(points, torch.ones(1, 4, dtype=torch.bool), (40, 30))
    threefold = FlowMapConvention(kernel_size=39, sigma_px=6.0, normalisation="peak")
    small, large = build_flow_map(tracks, SMALL), build_flow_map(tracks.resize((120, 90)), threefold)
    # Pixel j of the small map and pixel 3 j + 1 of the large one have the same centre.
    torch.testing.assert_close(large[..., 1::3, 1::3], 3 * small)


def test_flip_then_draw_equals_draw_then_flip():
    points = torch.tensor([[[9.0, 8.0], [13.0, 20.0], [29.0, 12.0]]])
    tracks = Trajectories(points, torch.ones(1, 3, dtype=torch.bool), (40, 30))
    flipped = build_flow_map(tracks, SMALL).flip(-1) * torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1, 1)
    torch.testing.assert_close(build_flow_map(tracks.flip_horizontal(), SMALL), flipped)


def test_the_later_track_wins_on_a_shared_pixel_unless_it_is_not_written():
    first, second = [[5.2, 5], [9, 5]], [[5.9, 5], [5.9, 9]]
    both, only_first, only_second = (
        Trajectories.from_tracks(tracks, (16, 16), 2) for tracks in ([first, second], [first], [second])
    )
    assert torch.equal(build_flow_map(both, SMALL), build_flow_map(only_second, SMALL))
    hidden = Trajectories(both.points, torch.tensor([[True, True], [True, False]]), both.size)
    assert torch.equal(build_flow_map(hidden, SMALL), build_flow_map(only_first, SMALL))


def test_still_points_drift_as_released_or_not_at_all():
    border = Trajectories.from_tracks([[[15.9, 15.9]]], (16, 16), 5)
    drawn = build_flow_map(border, SMALL)[0, :, :, 15, 15]
    torch.testing.assert_close(drawn, torch.tensor([0.0, 0.25, 0.25, 0.25, 0.25]).expand(2, 5))
    assert not build_flow_map(border, FlowMapConvention(still_drift_px=0)).any()


def test_hidden_points_may_be_nan():
    points = torch.tensor([[[[8.0, 8.0], [9.0, 8.0], [float("nan"), float("nan")]]]])
    drawn = flow_map(points, torch.tensor([[[True, True, False]]]), (16, 16), SMALL)
    assert drawn[0, 0, 1, 8, 8] == 1
    assert not drawn[:, :, 2].any()


def test_accumulated_values_count_from_the_first_frame():
    drawn = Trajectories.from_tracks([[[2, 3], [12, 3]]], (16, 16), 6)
    values = build_flow_map(drawn, FlowMapConvention(normalisation="peak", kernel_size=1, accumulate=True))
    assert [values[0, 0, i + 1, 3, 2 + 2 * i].item() for i in range(5)] == [2, 4, 6, 8, 10]


def test_a_hidden_start_counts_where_it_is_known():
    nan = float("nan")
    paths = [[[nan, nan], [8, 8], [11, 8]], [[-4, 2], [3, 2], [5, 2]], [[nan, 5], [3, 5], [5, 5]]]
    visible = torch.tensor([[[False, True, True]]]).expand(1, 3, 3)
    values = flow_map(
        torch.tensor(paths)[None].double(),
        visible,
        (16, 16),
        FlowMapConvention(1, normalisation="average", accumulate=True),
    )
    expected = torch.zeros(1, 2, 3, 16, 16)
    expected[0, 0, 2, 2, 3] = 9  # from outside of the frame
    assert torch.equal(values, expected)
    steps = flow_map(torch.tensor(paths)[None].double(), visible, (16, 16), FlowMapConvention(1, normalisation="peak"))
    assert [steps[0, 0, 2, y, x].item() for y, x in ((8, 8), (2, 3), (5, 3))] == [3, 2, 2]


def test_values_at_the_end_of_a_step_lie_where_the_point_is_in_their_frame():
    points = torch.tensor([[[2.0, 3.0], [5.0, 3.0], [11.0, 3.0]], [[9.0, 8.0], [14.0, 8.0], [17.0, 8.0]]])[None]
    convention = FlowMapConvention(1, normalisation="peak", accumulate=True, at_end=True)
    values = flow_map(points, torch.ones(1, 2, 3, dtype=torch.bool), (16, 16), convention)[0, 0]
    written = [[frame, y, x, values[frame, y, x].item()] for frame, y, x in values.nonzero().tolist()]
    assert written == [[1, 3, 5, 3], [1, 8, 14, 5], [2, 3, 11, 9]]  # The second track has left in the last frame.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_map_is_full_precision_whatever_the_points_dtype_or_autocast(dtype):
    points = torch.tensor([[[[4.0, 6.0], [9.0, 6.0], [10.0, 10.0]]]])
    visible = torch.ones(1, 1, 3, dtype=torch.bool)
    expected = flow_map(points.double(), visible, (32, 32), RELEASE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow_map(points.to(dtype), visible, (32, 32), RELEASE), expected)


@pytest.mark.parametrize(
    "field",
    [
        {"kernel_size": 98},
        {"kernel_size": -1},
        {"sigma_px": 0.0},
        {"normalisation": "max"},
        {"still_drift_px": -1.0},
        {"scale": float("nan")},
    ],
)
def test_conventions_are_checked(field):
    ((name, value),) = field.items()
    with pytest.raises(ValueError, match=rf"{name} must .* got '?{value}"):
        FlowMapConvention(**field)


def test_shapes_are_checked():
    points, visible = torch.zeros(1, 2, 3, 2), torch.ones(1, 2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"points must be float \(B, N, T, 2\)"):
        flow_map(points[0], visible, (8, 8), RELEASE)
    with pytest.raises(ValueError, match=r"visible must be bool \(1, 2, 3\)"):
        flow_map(points, visible[:, :, :2], (8, 8), RELEASE)
    with pytest.raises(ValueError, match=r"still must be bool \(1, 2\)"):
        flow_map(points, visible, (8, 8), RELEASE, still=visible)


@pytest.mark.gpu
def test_cuda_draws_the_same_map():
    drawn = Trajectories.from_tracks(GOLDEN["cases"]["multi_mixed"]["tracks"], (384, 256), 16)
    torch.testing.assert_close(build_flow_map(drawn, RELEASE, "cuda").cpu(), build_flow_map(drawn, RELEASE))
