"""Which settings the result of a curation depends on."""

from dataclasses import fields, replace

import pytest

from imageconductor.curation.curate_config import CurateConfig, check_unused, select_result_settings

PLAIN = CurateConfig("", "")
NETWORKS = replace(PLAIN, flow="raft", raft_weights="a/raft.pth", tracker="cotracker", captioner="blip2")
FREE = {
    "input": "moved",
    "output": "moved",
    "videos": "moved",
    "device": "cuda:1",
    "workers": 1,
    "gpu_workers": 4,
    "gpus_per_worker": 0.25,
    "executor": "ray",
    "ray_address": "head:6379",
    "batch_size": 1,
    "raft_batch": 2,
    "time_limit_s": 60.0,
}
UNUSED = {
    "raft_weights": "raft.pth",
    "cotracker": "tracker",
    "cotracker_model": "cotracker2",
    "blip2": "captioner",
    "caption_frames": 5,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"min_side_px": 0}, "min_side_px must be at least 1, got 0"),
        ({"max_side_px": 63}, "max_side_px must be at least min_side_px=64, got 63"),
        ({"cut_threshold": 0.0}, "cut_threshold must be positive, got 0.0"),
    ],
)
def test_what_would_reject_everything_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **changes)


@pytest.mark.parametrize(("name", "value"), {**FREE, **UNUSED}.items())
def test_settings_that_change_nothing_are_free(name, value):
    assert select_result_settings(replace(PLAIN, **{name: value})) == select_result_settings(PLAIN)


@pytest.mark.parametrize(("name", "value"), {**UNUSED, "raft_batch": 2, "ray_address": "head:6379"}.items())
def test_settings_of_what_is_not_chosen_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value} does nothing with \w+=\w+; set \w+=\w+, or leave"):
        check_unused(replace(PLAIN, **{name: value}))
    check_unused(replace(NETWORKS, executor="ray", **{name: value}))


def test_footage_beside_a_folder_of_videos_is_refused():
    with pytest.raises(ValueError, match=r"videos=there is for source=csv and source=realestate10k; .* input=here"):
        check_unused(replace(PLAIN, input="here", videos="there"))
    check_unused(replace(PLAIN, input="here", videos="there", source="csv"))


@pytest.mark.parametrize("name", [field.name for field in fields(CurateConfig) if field.name not in FREE])
def test_all_others_are_not(name):
    assert name in select_result_settings(NETWORKS)


@pytest.mark.parametrize(("name", "value"), UNUSED.items())
def test_settings_of_networks_in_use_are_not_free(name, value):
    changed = replace(NETWORKS, **{name: value if name != "raft_weights" else "a/other.pth"})
    assert select_result_settings(changed) != select_result_settings(NETWORKS)


def test_files_of_networks_may_move():
    moved = replace(NETWORKS, raft_weights="/b/raft.pth", cotracker="/c/co-tracker", blip2="/d/blip2-opt-2.7b")
    assert select_result_settings(moved) == select_result_settings(NETWORKS)
