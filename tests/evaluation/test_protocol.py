"""The sprite protocol on videos whose score is known."""

import numpy as np
import pytest

from imageconductor.data.sprites import SpriteSet
from imageconductor.evaluation.protocol import EvaluateConfig, arms, evaluate, measure, requests
from imageconductor.evaluation.trackers import LucasKanadeTracker
from scripts.evaluate import Kept, compared

SIZE, FRAMES = (64, 64), 16


@pytest.fixture(scope="module")
def perfect():
    config = EvaluateConfig(num_scenes=8, camera_free_scales=[1.5])
    return evaluate(config, lambda batch, *_: np.stack([r.truth for r in batch]), SIZE, FRAMES)


def test_videos_that_follow_exactly_score_below_a_pixel(perfect):
    record, videos = perfect
    assert record["cam_mc"] < 1
    assert record["obj_mc"] < 1
    assert record["leak_object"] < 0.1
    assert record["leak_object_free_1.5"] < 0.1
    assert record["coverage"] > 0.9
    assert record["first_frame_psnr"] == float("inf") or record["intervals"]["first_frame_psnr"]["n"] == 0
    assert record["cam_mc_still"] > 3
    assert record["obj_mc_still"] > 3
    assert {arm.name for arm in arms(EvaluateConfig(camera_free_scales=[1.5]))} == set(videos)


def test_motionless_videos_score_what_still_says():
    config = EvaluateConfig(num_scenes=3)
    for kind in (SpriteSet.CAMERA, SpriteSet.OBJECT):
        for request in requests(config, kind, SIZE, FRAMES):
            still = np.repeat(request.truth[:1], FRAMES, axis=0)
            row = measure(request, still, LucasKanadeTracker())
            assert row["error_all_points"] == pytest.approx(row["still"], abs=0.05)
            assert row["background"] == pytest.approx(0, abs=0.05)


def test_requests_are_held_out_and_repeat():
    config = EvaluateConfig(num_scenes=2)
    first, second = (requests(config, SpriteSet.OBJECT, SIZE, FRAMES) for _ in range(2))
    assert [r.key for r in first] == [r.key for r in second]
    assert all(np.array_equal(a.truth, b.truth) for a, b in zip(first, second, strict=True))
    assert "moves" not in first[0].scene.caption


def test_a_comparison_shows_one_request_under_every_arm_of_its_set(perfect):
    _, videos = perfect
    names = [name.partition(": ")[2] for name, _ in compared(SpriteSet.OBJECT, videos)]
    wanted = ["object", "object_as_camera", "object_as_base", "object_uncontrolled", "object_free_1.5"]
    assert names[1:6] == names[7:] == wanted
    keys = {name.partition(": ")[0] for name, _ in compared(SpriteSet.CAMERA, videos)}
    assert keys == {request.key for request, _ in videos["camera"][:2]}


def test_videos_that_were_made_are_not_made_again(tmp_path):
    made = []

    def generate(batch, arm, seeds):
        made.append((arm.name, seeds[0]))
        return np.stack([request.truth for request in batch])

    config = EvaluateConfig(num_scenes=2, batch_size=1, model=str(tmp_path / "model"))
    (tmp_path / "model").mkdir()
    first, _ = evaluate(config, Kept(generate, tmp_path / "kept", config), SIZE, FRAMES)
    assert len(set(made)) == len(made) == 2 * len(arms(config))
    again, _ = evaluate(config, Kept(generate, tmp_path / "kept", config), SIZE, FRAMES)
    assert len(made) == 2 * len(arms(config))
    assert again["clips"] == first["clips"]
    (tmp_path / "model" / "changed.safetensors").write_bytes(b"")
    Kept(generate, tmp_path / "kept", config)(
        requests(config, SpriteSet.CAMERA, SIZE, FRAMES)[:1], arms(config)[0], [0]
    )
    assert len(made) == 2 * len(arms(config)) + 1


def test_a_video_of_another_length_is_an_error():
    request = requests(EvaluateConfig(num_scenes=1), SpriteSet.CAMERA, SIZE, FRAMES)[0]
    with pytest.raises(ValueError, match="expected a video of shape"):
        measure(request, request.truth[:-1], LucasKanadeTracker())


def test_tracker_follows_a_shift_and_loses_what_vanishes():
    rng = np.random.default_rng(0)
    canvas = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    frames = np.stack([canvas[20:84, 20 + t : 84 + t] for t in range(6)])
    tracks, followed = LucasKanadeTracker().track(frames, np.array([[40.0, 30.0], [2.0, 30.0]]))
    np.testing.assert_allclose(tracks[0], [[40 - t, 30] for t in range(6)], atol=0.15)
    assert followed[0].all()
    assert not followed[1, -1], "it left the frame"
