"""Fréchet distances against their formula."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from imageconductor.evaluation.drawn_motion.config import EvaluateConfig
from imageconductor.evaluation.drawn_motion.reference_videos import forget_reference_files, list_reference_files
from imageconductor.evaluation.metrics.frechet import (
    I3D,
    FrechetDistance,
    SmallExtractor,
    Statistics,
    _build_metric,
    collect_statistics,
    frechet_distance,
)
from imageconductor.evaluation.metrics.frechet_names import check_fvd_frames
from imageconductor.evaluation.metrics.inception import Inception
from tests.evaluation.metrics.i3d import write_i3d

pytest.importorskip("torchmetrics")


def formula(a, b):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), by scipy."""
    (m1, c1), (m2, c2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(c1 @ c2).real
    return ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * root)


def formula_of_few(a, b):
    """The same for fewer samples than dimensions: tr (C1 C2)^(1/2) is the nuclear norm of C1^(1/2) C2^(1/2)."""
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    cross = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((x**2).sum() for x in centred) - 2 * cross


class Features(nn.Module):
    num_features = 6

    def forward(self, x):
        return x


def distance(name, generated, reference, weights=None, num_frames=16) -> FrechetDistance:
    """The distance between two sets of videos."""
    sets = (collect_statistics(name, videos, weights, num_frames, "cpu") for videos in (generated, reference))
    return frechet_distance(name, *sets, weights, num_frames)


def statistics_of(features) -> Statistics:
    metric = _build_metric(Features())
    metric.update(torch.as_tensor(features), real=True)
    return Statistics(len(features), metric.real_features_sum, metric.real_features_cov_sum)


def test_it_is_the_formula():
    random = np.random.default_rng(0)
    a = random.normal(0, 1, (400, 6)) @ random.normal(0, 1, (6, 6))
    b = random.normal(0.5, 1.3, (300, 6)) @ random.normal(0, 1, (6, 6))
    found = frechet_distance("frechet_small", statistics_of(a), statistics_of(b))
    assert found.value == pytest.approx(formula(a, b), rel=1e-6)
    assert (found.num_generated, found.num_reference) == (400, 300)


def test_shifted_gaussians_are_their_shift_apart():
    a = torch.randn(500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = frechet_distance("frechet_small", statistics_of(a + 0.5), statistics_of(a))
    assert found.value == pytest.approx(6 * 0.25, rel=1e-6)


def test_statistics_come_back_from_their_file(tmp_path):
    statistics = collect_statistics("frechet_small", videos(0), num_frames=8)
    statistics.save(tmp_path / "reference.safetensors")
    loaded = Statistics.load(tmp_path / "reference.safetensors")
    assert loaded.count == 12
    assert loaded.products.dtype == torch.float64
    assert torch.equal(loaded.total, statistics.total)
    assert torch.equal(loaded.products, statistics.products)


def videos(seed, count=12, shift=0):
    random = np.random.default_rng(seed)
    clips = random.integers(0, 200, (count, 8, 24, 32, 3), dtype=np.uint8)
    return [video + np.uint8(shift) for video in clips]


def test_equal_sets_are_nothing_apart_and_others_are():
    equal = distance("frechet_small", videos(0), videos(0), num_frames=8)
    assert equal.value == pytest.approx(0, abs=1e-6)
    assert (equal.num_generated, equal.num_reference, equal.weights) == (12, 12, "")
    near = distance("frechet_small", videos(0, shift=10), videos(0), num_frames=8).value
    far = distance("frechet_small", videos(0, shift=50), videos(0), num_frames=8).value
    assert 1e-6 < near < far


def test_the_small_extractor_sees_time():
    clip = torch.rand(1, 3, 8, 24, 32, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    assert (SmallExtractor()(clip) - SmallExtractor()(clip[:, :, order])).abs().max() > 1e-3
    assert torch.equal(SmallExtractor()(clip), SmallExtractor()(clip))


def test_reference_files_are_drawn_from_the_whole_folder_by_their_names_in_it(tmp_path):
    for root in ("a", "z"):
        for number in range(200):
            path = tmp_path / root / f"part{number // 100}" / f"{number:03}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    config = EvaluateConfig(model="m", reference=str(tmp_path / "a"), num_reference=40)
    numbers = [int(path.stem) for path in list_reference_files(config)]
    assert len(set(numbers)) == 40
    assert numbers == sorted(numbers)
    assert 10 < sum(number < 100 for number in numbers) < 30
    (tmp_path / "a" / "part0" / f"{numbers[0]:03}.mp4").rename(tmp_path / "a" / "damaged")
    assert [int(path.stem) for path in list_reference_files(config)] == numbers, "an evaluation looks once"
    forget_reference_files()
    assert len({int(path.stem) for path in list_reference_files(config)} - set(numbers)) == 1, "one takes its place"
    (tmp_path / "a" / "damaged").rename(tmp_path / "a" / "part0" / f"{numbers[0]:03}.mp4")
    moved = replace(config, reference=str(tmp_path / "z"))
    assert [int(path.stem) for path in list_reference_files(moved)] == numbers
    for count in (200, 201):
        whole = list_reference_files(replace(config, num_reference=count))
        assert [int(path.stem) for path in whole] == list(range(200))


class Port(nn.Module):
    """Logits that depend on the flags that the common port takes."""

    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False):
        assert x.shape[-1] == 224
        assert x.shape[-2] == 224
        mean = x.mean(dim=[2, 3, 4])
        if rescale or resize or not return_features:
            mean = mean * 0
        return mean.repeat(1, 134)[:, :400]


class Plain(nn.Module):
    def forward(self, x: torch.Tensor):
        return x.mean(dim=[2, 3, 4]).repeat(1, 134)[:, :400]


@pytest.mark.parametrize("port", [Port, Plain])
def test_both_ports_of_i3d_are_called_as_they_want(port, tmp_path):
    torch.jit.script(port()).save(str(tmp_path / "i3d.pt"))
    clips = torch.rand(2, 3, 4, 20, 30, generator=torch.Generator().manual_seed(0))
    features = I3D(tmp_path / "i3d.pt")(clips)
    assert features.shape == (2, 400)
    assert features[:, :3] == pytest.approx(clips.mean(dim=(2, 3, 4)) * 2 - 1, abs=1e-2)
    found = distance("fvd", videos(0), videos(0), tmp_path / "i3d.pt", num_frames=4)
    assert found.value == pytest.approx(0, abs=1e-6)
    assert (found.num_frames, found.resize) == (4, "bilinear to 224 x 224")


@pytest.mark.parametrize(
    ("divisor", "num_parameters"), [(16, None), pytest.param(1, 12_697_264, marks=pytest.mark.slow)]
)
def test_fvd_of_i3d_is_the_formula_over_its_logits(tmp_path, divisor, num_parameters):
    """The real architecture, at a sixteenth of its width and at its full size."""
    written = write_i3d(tmp_path / "i3d.pt", divisor)
    assert num_parameters in (None, sum(p.numel() for p in written.parameters()))
    random = np.random.default_rng(0)
    sets = [random.integers(low, high, (2, 16, 24, 32, 3), dtype=np.uint8) for low, high in ((0, 200), (40, 240))]
    found = distance("fvd", *sets, tmp_path / "i3d.pt", num_frames=14)
    assert (found.num_generated, found.num_reference) == (2, 2)
    with torch.no_grad():
        clips = [torch.from_numpy(videos[:, :14]).permute(0, 4, 1, 2, 3).float() for videos in sets]
        resized = [nn.functional.interpolate(clip, (14, 224, 224), mode="trilinear") for clip in clips]
        features = [written(clip, resize=False, return_features=True).double().numpy() for clip in resized]
    assert features[0].shape == (2, 400)
    expected = formula_of_few(*features)
    assert expected > 1e-3
    if divisor > 1:
        check_fvd_frames(["fvd"], 9)
        written(clips[0][:, :, :9], return_features=True)
        with pytest.raises(RuntimeError, match="smaller than kernel size"):
            written(clips[0][:, :, :8], return_features=True)
        with pytest.raises(ValueError, match=r"fvd needs at least 9 frames of a video, .* and there are 8"):
            check_fvd_frames(["fvd"], 8)
    assert found.value == pytest.approx(expected, rel=1e-2)


@pytest.mark.slow
def test_fid_of_the_full_network_is_the_formula_over_its_features(tmp_path):
    """Inception-v3 of the published size in float32, with random weights that keep the scale of what passes through."""
    torch.manual_seed(0)
    network = Inception().eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    sets = (videos(0, count=2), videos(1, count=2, shift=40))
    found = distance("fid", *sets, tmp_path / "inception.pth", num_frames=2)
    assert (found.num_generated, found.num_reference) == (4, 4)
    with torch.no_grad():
        frames = [torch.from_numpy(np.concatenate([v[:2] for v in clips])).permute(0, 3, 1, 2) for clips in sets]
        expected = formula_of_few(*(network(batch.float() / 255).double().numpy() for batch in frames))
    assert expected > 0.01
    assert found.value == pytest.approx(expected, rel=1e-2)
    equal = distance("fid", sets[0], sets[0], tmp_path / "inception.pth", num_frames=2)
    assert equal.value == pytest.approx(0, abs=1e-3 * found.value)


def test_inception_has_the_published_size_and_loads_its_own_weights(tmp_path):
    """Beside torchvision's it has the resizing of pytorch-fid, and other pools in the blocks."""
    torch.manual_seed(0)
    network = Inception()
    # torchvision's Inception-v3 without its auxiliary head has 23,834,568 parameters; eight classes more here.
    assert sum(p.numel() for p in network.parameters()) == 23_834_568 + 8 * 2049
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    loaded = Inception.load(tmp_path / "inception.pth")
    images, read = torch.rand(2, 3, 40, 60), {}
    blocks = {name: block for name, block in loaded.named_children() if hasattr(block, "branch_pool")}
    pools = {f"{name} pool": block.branch_pool for name, block in blocks.items()}
    for name, layer in {"first": loaded.Conv2d_1a_3x3, **blocks, **pools}.items():
        layer.register_forward_pre_hook(lambda _, given, name=name: read.update({name: given[0]}))
    with torch.no_grad():
        features = loaded(images)
        assert features.shape == (2, 2048)
        assert torch.equal(features, network.eval()(images))
    resized = nn.functional.interpolate(images, (299, 299), mode="bilinear", align_corners=False, antialias=False)
    torch.testing.assert_close(read["first"], resized * 2 - 1)
    assert len(blocks) == 9
    for name in blocks:
        x = read[name]
        sums, counts = (nn.functional.avg_pool2d(y, 3, 1, 1, divisor_override=1) for y in (x, torch.ones_like(x)))
        average, largest = sums / counts, nn.functional.max_pool2d(x, 3, 1, 1)
        torch.testing.assert_close(read[f"{name} pool"], largest if name == "Mixed_7c" else average, atol=0, rtol=1e-4)
        assert not torch.allclose(average, largest, atol=0, rtol=1e-2), name
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold pytorch-fid's Inception weights"):
        Inception.load(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("name", "arguments", "error", "said"),
    [
        ("fid", {}, FileNotFoundError, "fid needs the weights"),
        ("fid", {"weights": "nowhere.pth"}, FileNotFoundError, "get them from https"),
        ("fvd", {"weights": "nowhere.pt"}, FileNotFoundError, "no I3D at nowhere.pt; get it from"),
        ("frechet_small", {"num_frames": 9}, ValueError, r"has not the 9 frames"),
        ("fvd_small", {}, ValueError, "name must be fid, fvd or frechet_small"),
    ],
)
def test_bad_input_says_what_to_do(name, arguments, error, said):
    with pytest.raises(error, match=said):
        distance(name, videos(0), videos(1), **{"num_frames": 8, **arguments})


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used"):
        collect_statistics("frechet_small", videos(0), num_frames=8, device="cuda:99")


def test_a_single_video_has_no_distribution():
    with pytest.raises(ValueError, match="the generated one has 1"):
        distance("frechet_small", videos(0)[:1], videos(1), num_frames=8)
