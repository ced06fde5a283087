"""Sizes and frames of reference clips against those of the published MotionDirector and its AnimateDiff port."""

import json
from pathlib import Path
from random import Random

import pytest

from imageconductor.data.reference_windows import (
    ANIMATEDIFF_PORT,
    MOTION_DIRECTOR,
    choose_bucket,
    chunk_frames,
    fit_bucket,
    frame_stride,
    listed_frames,
    spaced_frames,
    window_frames,
)

CASES = json.loads((Path(__file__).parent / "parity_md" / "data_cases.json").read_text())


@pytest.mark.parametrize(
    ("table", "rule"), [("bucket_md", MOTION_DIRECTOR), ("bucket_animatediff_port", ANIMATEDIFF_PORT)]
)
def test_buckets_are_the_published_ones(table, rule):
    for case in CASES[table]:
        native, target = ((case[f"{name}_w"], case[f"{name}_h"]) for name in ("input", "target"))
        assert choose_bucket(native, target, rule) == (case["out_w"], case["out_h"]), case


@pytest.mark.parametrize("native", [(64, 48), (90, 100), (100, 90), (64, 64)])
@pytest.mark.parametrize("target", [(64, 64), (64, 128), (128, 64), (192, 192)])
def test_clips_of_small_models_are_not_larger_than_their_target(native, target):
    assert fit_bucket(native, target) == target


def test_the_size_is_the_one_that_keeps_more_of_the_frame():
    assert fit_bucket((400, 390), (384, 384)) == (384, 384)  # where the releases squeeze it to 384x320
    assert fit_bucket((1280, 720), (576, 320)) == (576, 320)  # and this to 576x192
    assert fit_bucket((1280, 720), (384, 384)) == (384, 256)
    assert fit_bucket((720, 1280), (384, 384)) == (256, 384)
    with pytest.raises(ValueError, match=r"at least 1 px, got \(0, 9\)"):
        fit_bucket((0, 9), (64, 64))


def test_windows_in_folders_are_the_published_ones():
    for case in CASES["folder_sampling"]:
        frames = spaced_frames(case["clip_frames"], frame_stride(case["native_fps"], case["fps"]))
        drawn = window_frames(frames, case["n_sample_frames"], Random(case["python_random_seed"]))
        assert drawn == case["indices"], case


def test_chunks_of_a_single_video_are_the_published_ones():
    for case in CASES["single_video_chunks"]:
        shape = case["clip_frames"], case["frame_step"], case["n_sample_frames"]
        assert [list(chunk) for chunk in chunk_frames(*shape, keeps_short=True)] == case["md_chunks"]
        assert [list(chunk) for chunk in chunk_frames(*shape)] == case["animatediff_port_chunks_max_chunks0"]


def test_frames_of_json_entries_are_the_published_ones():
    for case in CASES["json_clip_frames"]:
        shape = case["clip_frames"], case["start"], case["frame_step"], case["n_sample_frames"]
        assert list(listed_frames(*shape)) == case["md_indices"]
