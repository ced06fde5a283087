"""ControlNet outputs that are kept between calls: what is found again, what is not, and how memory is shared out."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from conftest import merge_in_place, tiny_pipeline
from PIL import Image

from imageconductor.conditioning import camera_preset
from imageconductor.models.controlnets import ImageControlNet, MotionControlNet, Residuals
from imageconductor.sampling.residual_cache import ResidualCache, weights_token

STEPS = 2
ENTRIES = 2 * STEPS  # an image and a motion evaluation a step


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def run(pipe, cache=None, **arguments):
    """(B, C, 2, 16, 16) after two steps."""
    given = {
        "image": picture(),
        "trajectories": camera_preset("pan-left", (32, 32), 2),
        "prompt": "a red circle",
        "control": "camera",
        "seed": 1,
        "num_inference_steps": STEPS,
        "num_frames": 2,
        **arguments,
    }
    return pipe(output_type="latent", residual_cache=cache, **given).frames


def counts(cache):
    """Hits and misses since the last look."""
    found = cache.hits, cache.misses
    cache.hits = cache.misses = 0
    return found


def test_kept_outputs_serve_what_they_depend_on(pipe, monkeypatch):
    calls = []
    for kind in (ImageControlNet, MotionControlNet):  # the classes, so that a merged copy is counted too
        monkeypatch.setattr(kind, "forward", lambda *args, f=kind.forward: calls.append(f) or f(*args))
    cache, half = ResidualCache(), ENTRIES // 2
    for changed, expected in (
        ({}, (0, ENTRIES)),
        ({}, (ENTRIES, 0)),
        ({"seed": [5, 7]}, (ENTRIES, 0)),
        ({"image": picture(1)}, (half, half)),
        ({"trajectories": camera_preset("zoom-in", (32, 32), 2)}, (half, half)),
        ({"control": "object"}, (half, half)),
        ({"prompt": "a blue star"}, (0, ENTRIES)),
        ({"negative_prompt": "a blue star"}, (0, ENTRIES)),
        ({"num_inference_steps": 3}, (2, 4)),  # the first timestep is the same
    ):
        calls.clear()
        found = run(pipe, cache, **changed)
        assert counts(cache) == expected, changed
        assert len(calls) == expected[1]
        assert torch.equal(found, run(pipe, **changed)), changed
    assert counts(cache) == (0, 0)
    cache.clear()
    assert cache.num_bytes == 0


@pytest.mark.parametrize("name", ["image_controlnet", "motion_controlnet"])
def test_changed_weights_are_another_network(name):
    """Also through `.data`, which PyTorch's count of writes does not see, and by a LoRA that is merged."""
    pipe, cache = tiny_pipeline(), ResidualCache()
    network, half = getattr(pipe, name), ENTRIES // 2
    run(pipe, cache)
    first = weights_token(network)
    with torch.no_grad():
        next(network.parameters()).add_(0.1)
    counts(cache)
    assert torch.equal(run(pipe, cache), run(pipe))
    assert counts(cache) == (half, half)
    next(network.parameters()).data.add_(0.1)
    assert torch.equal(run(pipe, cache), run(pipe))
    assert counts(cache) == (half, half)
    if name == "motion_controlnet":
        merged = copy.deepcopy(network)
        merge_in_place(merged, "object")
        assert len({first, weights_token(merged), weights_token(network)}) == 3
        token = weights_token(network)
        next(m for m in network.modules() if hasattr(m, "scaling")).scaling["camera"] *= 2
        assert weights_token(network) != token


def test_windows_of_one_video_do_not_push_each_other_out(pipe):
    track = camera_preset("pan-left", (32, 32), 4)

    def make(cache):
        run(pipe, cache, num_frames=4, trajectories=track, window_frames=2, window_overlap=1)
        return counts(cache)

    roomy = ResidualCache()
    hits, misses = make(roomy)
    assert make(roomy) == (hits + misses, 0)
    tight = ResidualCache(max_bytes=roomy.num_bytes // 2)
    make(tight)
    hits, _ = make(tight)
    assert hits >= misses // 3, "what the first windows have kept serves the next call"


def test_a_callbacks_text_is_not_served_what_was_kept_for_another(pipe):
    def replace_text(pipeline, step, t, tensors):
        tensors["prompt_embeds"] = -tensors["prompt_embeds"]
        return tensors

    cache = ResidualCache()
    run(pipe, cache)
    given = {"callback_on_step_end": replace_text, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert torch.equal(run(pipe, cache, **given), run(pipe, **given))


def test_half_precision_is_nearly_the_same_and_half_as_large(pipe):
    exact, half = ResidualCache(), ResidualCache(dtype=torch.float16)
    expected = run(pipe, exact)
    assert torch.equal(run(pipe, half), expected), "evaluated, and rounded only when kept"
    assert half.num_bytes * 2 == exact.num_bytes
    found = run(pipe, half)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_pictures_and_displacements_are_kept_too():
    cache = ResidualCache()
    cache.begin_call([1.0])
    evaluated = replace(entry(2.0), pictures=torch.full((3,), 5.0), displacements=torch.full((1,), 7.0))
    for _ in range(2):
        found = cache.residuals(("image",), 1.0, lambda: evaluated)
        assert found.pictures.tolist() == [5.0] * 3
        assert found.displacements.tolist() == [7.0]
        assert found.mid.tolist() == [2.0, 2.0]
        assert [x.tolist() for x in found.down] == [[2.0, 2.0]]
    assert cache.hits == 1


def entry(value=0.0):
    """16 bytes."""
    return Residuals((torch.full((2,), value),), torch.full((2,), value))


def sweep(cache, content, times):
    """Which timesteps of a call are served."""
    cache.begin_call(times)
    cache.expect(content)
    before = cache.hits
    served = []
    for time in times:
        found = cache.residuals(content, time, lambda time=time: entry(time))
        assert found.mid.tolist() == [time, time]
        served.append(cache.hits > before)
        before = cache.hits
    return served


def test_a_sweep_that_does_not_fit_keeps_what_fits():
    """With room for three of five timesteps, dropping the least recently used entry would never find one again."""
    cache, times = ResidualCache(max_bytes=48), [5.0, 4.0, 3.0, 2.0, 1.0]
    sweep(cache, ("a",), times)
    for _ in range(2):
        assert sweep(cache, ("a",), times) == [True, True, True, False, False]
    assert cache.num_bytes == 48


def test_old_contents_make_way_but_not_for_what_fits_beside_them():
    cache, times = ResidualCache(max_bytes=80), [3.0, 2.0, 1.0]
    sweep(cache, ("a",), times)
    sweep(cache, ("b",), times)
    assert sweep(cache, ("b",), times) == [True] * 3
    assert sweep(cache, ("a",), times) == [False, True, True], "one entry of five made way"
    sweep(cache, ("a",), [6.0, 5.0, 4.0, 3.5])
    assert sweep(cache, ("a",), [6.0, 5.0, 4.0, 3.5]) == [True] * 4, "timesteps of another number of steps make way"
    small = ResidualCache(max_bytes=15)
    assert sweep(small, ("a",), times) + sweep(small, ("a",), times) == [False] * 6
    with pytest.raises(ValueError, match="max_bytes must not be negative, got -1"):
        ResidualCache(max_bytes=-1)


def test_a_small_cache_changes_no_video(pipe):
    cache = ResidualCache()
    expected = run(pipe, cache)
    small = ResidualCache(max_bytes=cache.num_bytes // 2, device="cpu")
    for _ in range(2):
        assert torch.equal(run(pipe, small), expected)
    assert (small.hits, small.misses) == (STEPS, 3 * STEPS)


@torch.no_grad()
def test_offloaded_networks_are_the_same_networks():
    """Whole, as by `enable_model_cpu_offload`, and layer by layer, whose weights then lie in the hooks."""
    pipe, cache = tiny_pipeline(), ResidualCache()
    expected = run(pipe, cache)
    hooks = [cpu_offload_with_hook(n, execution_device="cpu")[1] for n in (pipe.image_controlnet, pipe.unet)]
    counts(cache)
    assert torch.equal(run(pipe, cache), expected)
    assert counts(cache) == (ENTRIES, 0)
    for hook in hooks:
        hook.remove()
    cpu_offload(pipe.motion_controlnet, execution_device="cpu")
    assert next(pipe.motion_controlnet.parameters()).is_meta
    token = weights_token(pipe.motion_controlnet)
    for _ in range(2):  # without a merged copy, so with other last bits
        torch.testing.assert_close(run(pipe, cache), expected, rtol=1e-4, atol=1e-4)
    assert counts(cache) == (3 * STEPS, STEPS)
    assert weights_token(pipe.motion_controlnet) == token


@torch.no_grad()
def test_a_merged_copy_is_made_only_where_something_is_evaluated(monkeypatch):
    """A copy and the network under its LoRA round differently and are not exchanged."""
    import imageconductor.sampling.branches as branches

    pipe, cache, copies = tiny_pipeline(), ResidualCache(), []
    merge_copy = branches.merge_copy
    monkeypatch.setattr(branches, "merge_copy", lambda *args: copies.append(args[1:]) or merge_copy(*args))
    expected = run(pipe, cache)
    assert copies == [("camera",)]
    assert torch.equal(run(pipe, cache), expected)
    assert copies == [("camera",)]
    assert torch.equal(run(pipe), expected)
    counts(cache)
    monkeypatch.setattr(branches, "_can_merge", lambda _: False)
    assert torch.equal(run(pipe, cache), run(pipe))
    assert counts(cache) == (STEPS, STEPS)


def test_compiled_networks_are_served_too(pipe):
    """A compiled network may write its next output where the last one lies, so what is kept is a copy."""
    cache, given = ResidualCache(), []
    network = pipe.motion_controlnet

    def call_in_place(*args):
        output = network.forward(*args)
        if not given:
            given.append(output)
        for place, x in zip((*given[0].down, given[0].mid), (*output.down, output.mid), strict=True):
            place.copy_(x)
        return given[0]

    network._compiled_call_impl = network.forward
    try:
        expected = run(pipe)
        network._compiled_call_impl = call_in_place
        for _ in range(2):
            assert torch.equal(run(pipe, cache), expected)
    finally:
        network._compiled_call_impl = None
    assert counts(cache) == (ENTRIES, ENTRIES)
