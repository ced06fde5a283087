"""The pipeline as a diffusers user meets it."""

import json
import shutil
import weakref
from dataclasses import fields

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from PIL import Image

from imageconductor.conditioning import Trajectories, camera_preset, object_preset
from imageconductor.models.adapters import attached_adapters
from imageconductor.models.networks import Networks
from imageconductor.sampling import branches
from imageconductor.sampling.pipeline import ImageConductorPipeline

SIZE, FRAMES = (32, 32), 4
STEPS = 3


@pytest.fixture(scope="module")
def pipe(tiny_model):
    pipe = ImageConductorPipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8))


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(generators) > 1 else generators[0]


def run(pipe, image, trajectories=None, seeds=(1,), **arguments):
    arguments = {"prompt": "a red circle", "output_type": "np", "num_inference_steps": STEPS, **arguments}
    return pipe(image, trajectories, generator=seeded(*seeds), **arguments).frames


def test_a_saved_model_gives_the_same_video(pipe, image, tmp_path):
    track = camera_preset("pan-left", SIZE, FRAMES)
    pipe.save_pretrained(tmp_path / "copy")
    again = ImageConductorPipeline.from_pretrained(tmp_path / "copy")
    again.set_progress_bar_config(disable=True)
    assert attached_adapters(again.motion_controlnet) == ("camera", "object")
    for control in ("camera", "object", "mixed", "base"):
        arguments = {"control": control, "num_inference_steps": 1}
        assert np.array_equal(run(pipe, image, track, **arguments), run(again, image, track, **arguments))


def test_any_picture_is_shown_as_a_viewer_shows_it(pipe, image):
    plain = run(pipe, image.convert("L"), num_inference_steps=1)
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
    assert np.array_equal(run(pipe, Image.fromarray(deep), num_inference_steps=1), plain)
    with pytest.raises(ValueError, match="image: its pixels are floating-point numbers"):
        run(pipe, Image.fromarray(deep.astype(np.float32)))
    with pytest.raises(ValueError, match="image: expected a PIL image, got ndarray"):
        run(pipe, deep)


def test_trajectory_guidance_is_off_unless_the_model_says_otherwise(tiny_model, pipe, image, tmp_path):
    track = camera_preset("pan-left", SIZE, FRAMES)
    plain = run(pipe, image, track, control="camera")
    assert np.array_equal(run(pipe, image, track, control="camera", trajectory_guidance_scale=1.0), plain)
    guided = run(pipe, image, track, control="camera", trajectory_guidance_scale=2.0)
    assert np.abs(guided - plain).max() > 1e-3

    shutil.copytree(tiny_model, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    values = json.loads(index.read_text())
    values["sampling_defaults"]["trajectory_guidance_scale"] = 2.0
    index.write_text(json.dumps(values))
    other = ImageConductorPipeline.from_pretrained(tmp_path / "model")
    other.set_progress_bar_config(disable=True)
    assert np.array_equal(run(other, image, track, control="camera"), guided)
    run(other, image, num_inference_steps=1)  # The model's own is no reason to refuse a video without trajectories,
    run(other, image, num_inference_steps=1, trajectory_guidance_scale=1.0)  # and off is off.


@pytest.mark.slow
def test_compiled_networks_make_the_same_video(tiny_model, image):
    """The halves of the UNet too: with them left out, Dynamo would see two graphs of four."""
    compiled, graphs = ImageConductorPipeline.from_pretrained(tiny_model), []
    compiled.set_progress_bar_config(disable=True)
    track = camera_preset("pan-left", SIZE, FRAMES)
    expected = run(compiled, image, track, control="camera", num_inference_steps=2)
    torch._dynamo.reset()
    compiled.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    found = run(compiled, image, track, control="camera", num_inference_steps=2)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(graphs) >= 4


def test_tiled_and_chunked_decoding_give_whole_frames(tiny_model, image):
    pipe = ImageConductorPipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    expected = run(pipe, image)
    assert np.allclose(run(pipe, image, decode_chunk_size=1), expected, atol=1e-5)
    pipe.vae.tile_sample_min_size = 16
    pipe.vae.tile_latent_min_size = 8
    pipe.vae.enable_tiling()
    tiled = run(pipe, image)
    assert tiled.shape == expected.shape
    assert np.abs(tiled - expected).max() > 0, "tiles see less around them"


def test_offloading_sees_the_halves_of_the_unet(pipe, image):
    track = camera_preset("pan-left", SIZE, FRAMES)
    expected = run(pipe, image, track, control="camera")
    _, hook = cpu_offload_with_hook(pipe.unet, execution_device="cpu")
    arrived = []
    before = pipe.unet._hf_hook.pre_forward
    pipe.unet._hf_hook.pre_forward = lambda module, *args: arrived.append(module) or before(module, *args)
    try:
        assert np.array_equal(run(pipe, image, track, control="camera"), expected)
    finally:
        hook.remove()
    assert len(arrived) == STEPS


def test_offloaded_networks_have_left_before_decoding(pipe, image, monkeypatch):
    """The UNet comes last in the chain, so that nothing but the end of it would send it away."""
    order = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: order.append("free"))
    decode = pipe.decode_latents
    monkeypatch.setattr(pipe, "decode_latents", lambda *args: order.append("decode") or decode(*args))
    run(pipe, image, num_inference_steps=1)
    assert order == ["free", "decode", "free"]


def test_nothing_stays_beside_the_autoencoder(pipe, image, monkeypatch):
    """The merged copy of the motion ControlNet is gone before decoding, and frames leave chunk by chunk."""
    copies, given, decode, merge = [], [], pipe.decode_latents, branches.merge_copy

    def merge_and_watch(*args):
        copy = merge(*args)
        copies.append(weakref.ref(copy))
        return copy

    def decode_alone(latents, chunk_size, device):
        assert [copy() for copy in copies] == [None] * (len(given) + 1)
        given.append((chunk_size, device))
        return decode(latents, chunk_size, device)

    monkeypatch.setattr(branches, "merge_copy", merge_and_watch)

    monkeypatch.setattr(pipe, "decode_latents", decode_alone)
    track = camera_preset("pan-left", SIZE, FRAMES)
    for kind in ("np", "pt"):
        run(pipe, image, track, control="camera", num_inference_steps=1, output_type=kind, decode_chunk_size=2)
    assert given == [(2, "cpu"), (2, None)]


def test_controls_differ_and_absent_control_is_a_no_op(pipe, image):
    track = object_preset("line-right", SIZE, FRAMES, start=(10.0, 16.0))
    once = {"num_inference_steps": 1}
    controls = ("camera", "object", "mixed", "base")
    videos = {control: run(pipe, image, track, control=control, **once) for control in controls}
    videos["free"] = run(pipe, image, track, control="object", camera_free_scale=1.5, **once)
    videos["none"] = run(pipe, image, **once)
    names = list(videos)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert np.abs(videos[one] - videos[other]).max() > 1e-3, (one, other)
    assert np.array_equal(run(pipe, image, track.state("camera"), **once), videos["camera"]), "as the tracks say"
    assert np.array_equal(run(pipe, image, track, **once), videos["object"]), "the model's default"
    assert np.array_equal(videos["none"], run(pipe, image, None, control="camera", **once)), (
        "no motion network, no adapter"
    )


def test_a_video_does_not_depend_on_its_batch(pipe, image):
    track = camera_preset("zoom-in", SIZE, FRAMES)
    three = run(pipe, image, track, seeds=(1, 2, 3), num_videos_per_prompt=3, control="camera")
    for row, seed in enumerate((1, 2, 3)):
        np.testing.assert_allclose(run(pipe, image, track, seeds=(seed,), control="camera")[0], three[row], atol=1e-4)
    assert np.abs(three[0] - three[1]).max() > 1e-2


def test_prompts_images_and_trajectories_pair_up(pipe, image):
    other = image.rotate(90)
    tracks = [camera_preset("pan-left", SIZE, FRAMES), camera_preset("pan-right", SIZE, FRAMES)]
    both = run(pipe, [image, other], tracks, seeds=(5, 6), prompt=["a red circle", "a blue star"], control="camera")
    second = run(pipe, other, tracks[1], seeds=(6,), prompt="a blue star", control="camera")
    np.testing.assert_allclose(both[1], second[0], atol=1e-4)


def test_output_types_and_callback(pipe, image):
    steps = []

    def stop_moving(_, step, timestep, tensors):
        steps.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    zeros = run(pipe, image, output_type="latent", callback_on_step_end=stop_moving, num_inference_steps=2)
    assert [step for step, _ in steps] == [0, 1]
    assert not zeros.any()
    array = run(pipe, image)
    tensor = run(pipe, image, output_type="pt")
    pictures = run(pipe, image, output_type="pil")
    assert array.shape == (1, FRAMES, 32, 32, 3)
    assert array.min() >= 0
    assert array.max() <= 1
    assert np.array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), array)
    assert np.array_equal(np.array(pictures[0][2]), np.round(array[0, 2] * 255).astype(np.uint8))


def test_trajectories_of_another_size_are_fitted(pipe, image):
    small = Trajectories.from_tracks([[[4, 8], [12, 8]]], (16, 16), FRAMES)
    np.testing.assert_array_equal(
        run(pipe, image, small, control="object"), run(pipe, image, small.resize(SIZE), control="object")
    )


def test_tracks_that_the_crop_leaves_out_are_told(pipe, image, caplog):
    lost, kept = [[2, 8], [6, 9]], [[30, 8], [34, 9]]
    drawn = Trajectories.from_tracks([kept, lost], (64, 32), FRAMES)
    run(pipe, image, drawn, num_inference_steps=1, num_frames=FRAMES, width=32, height=32)
    assert "trajectories: track 1 is outside of the cropped picture in all frames" in caplog.text
    with pytest.raises(ValueError, match=r"trajectories: every track is outside of the cropped picture, .* of 64x32"):
        run(pipe, image, Trajectories.from_tracks([lost], (64, 32), FRAMES), num_frames=FRAMES, width=32, height=32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"width": 33}, "multiples of 2"),
        ({"num_frames": -1}, "num_frames must be at least 1, got -1"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"width": 0}, "got 0"),
        ({"eta": 1.5}, r"eta must lie in \[0, 1\], got 1.5"),
        ({"decode_chunk_size": 0}, "decode_chunk_size must be at least 1, got 0"),
        ({"mix": {"camera": 1.0}}, "mix={'camera': 1.0} weighs what trajectories do, and there are none"),
        ({"camera_free_scale": 1.5}, "camera_free_scale=1.5 weighs what trajectories do"),
        ({"trajectory_guidance_scale": 2.0}, "trajectory_guidance_scale=2.0 weighs what trajectories do"),
        ({"trajectories": camera_preset("pan-up", SIZE, 4), "mix": {}}, "mix is empty"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number, got 2.5"),
        ({"num_frames": 4.0}, "num_frames must be a whole number, got 4.0"),
        ({"decode_chunk_size": 1.5}, "decode_chunk_size must be a whole number, got 1.5"),
        ({"control": "zoom"}, "camera, object, mixed, base"),
        ({"output_type": "gif"}, "gif"),
        ({"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"]}, "prompt: expected 1 or 3"),
        ({"num_videos_per_prompt": 3, "seeds": (1, 2)}, "3 videos"),
        ({"control": "camera", "camera_free_scale": 1.0}, "camera_free_scale"),
        ({"trajectories": camera_preset("pan-up", SIZE, 7)}, "4 frames, its trajectories 7"),
        ({"latents": torch.zeros(1, 4, 4, 3, 3)}, "latents must be"),
    ],
)
def test_bad_arguments_are_told(pipe, image, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, image, **arguments)


def test_words_that_the_text_encoder_does_not_read_are_named_once(pipe, image, caplog):
    """In the prompt and in the negative one; training names one caption a run."""
    long = "a red circle " * 60
    for _ in range(2):
        run(pipe, image, prompt=long + "above a star", negative_prompt=long + "below", num_inference_steps=1)
    negative, prompt = (r.getMessage() for r in caplog.records if r.name.startswith("imageconductor"))
    assert negative.endswith("below'")
    assert prompt.endswith("above a star'")
    caplog.clear()
    networks = Networks(**{field.name: getattr(pipe, field.name) for field in fields(Networks)})
    tokens = networks.tokenize(["a star", long, long + "again"])
    networks.tokenize([long])
    (message,) = caplog.messages
    assert repr(long) in message
    kept = pipe.tokenizer.decode(tokens[1], skip_special_tokens=True).split()
    left_out = message.rpartition("leaves out ")[2].strip("'").split()
    assert kept + left_out == long.split()


def test_pictures_may_stand_at_any_frames_and_none_is_text_to_video(pipe, image):
    alone = run(pipe, image)
    other = image.transpose(Image.Transpose.ROTATE_180)
    assert np.array_equal(run(pipe, {0: image}), alone)
    both = run(pipe, {-1: other, 0: image})
    assert np.array_equal(both, run(pipe, {0: image, FRAMES - 1: other}))
    assert not np.array_equal(both, alone)
    together = run(pipe, [image, {0: image, 3: other}], seeds=(1, 1))
    np.testing.assert_allclose(together, np.concatenate([alone, both]), atol=1e-5)

    track = camera_preset("pan-left", SIZE, FRAMES)
    without, drawn = run(pipe, None), run(pipe, None, track)
    assert not np.array_equal(without, alone)
    assert not np.array_equal(without, drawn)
    for wrong, message in (
        ({4: image}, "4 must be the number of one of the video's 4 frames"),
        ({0: image, -4: image}, "each once; got 0, -4"),
        ({}, "empty; leave the image out for text-to-video"),
        ({1: "picture.png"}, "image 1: expected a PIL image, got str"),
    ):
        with pytest.raises(ValueError, match=message):
            run(pipe, wrong)


def test_without_a_condition_its_controlnet_is_not_evaluated(pipe, image, monkeypatch):
    def refuse(*_):
        raise AssertionError("evaluated")

    with monkeypatch.context() as patched:
        patched.setattr(type(pipe.image_controlnet), "forward", refuse)
        run(pipe, None, camera_preset("pan-left", SIZE, FRAMES))
    monkeypatch.setattr(type(pipe.motion_controlnet), "forward", refuse)
    run(pipe, None)


def test_embeddings_stand_for_prompts(pipe, image):
    texts = ["a red circle", "a blue star"]
    embeds, negative = pipe.encode_prompt(texts), pipe.encode_prompt(["blurred"])
    expected = run(pipe, image, seeds=(1, 2), prompt=texts, negative_prompt="blurred", guidance_scale=3.0)
    given = {"prompt": "", "prompt_embeds": embeds, "negative_prompt_embeds": negative, "guidance_scale": 3.0}
    assert np.array_equal(run(pipe, image, seeds=(1, 2), **given), expected)
    with pytest.raises(ValueError, match="prompt and prompt_embeds exclude each other"):
        run(pipe, image, prompt_embeds=embeds)
    with pytest.raises(ValueError, match=r"prompt_embeds must be \(P, L, D\)"):
        run(pipe, image, prompt="", prompt_embeds=embeds[0])
    with pytest.raises(ValueError, match="must have one shape"):
        run(pipe, image, prompt="", prompt_embeds=embeds[:, :4])


def test_seeds_are_videos_of_each_condition(pipe, image):
    arguments = {"prompt": ["a red circle", "a blue star"], "output_type": "np", "num_inference_steps": 1}
    expected = pipe(image, generator=seeded(5, 7, 5, 7), num_videos_per_prompt=2, **arguments).frames
    assert np.array_equal(pipe(image, seed=[5, 7], **arguments).frames, expected)
    arguments["prompt"] = "a red circle"
    assert np.array_equal(pipe(image, seed=5, **arguments).frames, pipe(image, generator=seeded(5), **arguments).frames)
    alone = pipe(image, seed=5, **arguments).frames
    assert np.array_equal(pipe(image, seed=np.int64(5), **arguments).frames, alone)
    with pytest.raises(ValueError, match="seed is an empty list"):
        pipe(image, seed=[])
    for wrong in (2**64, 1.5, [3, 2.5]):
        with pytest.raises(ValueError, match=r"seed must be whole numbers from -2\^63 to 2\^64 - 1, .*, got "):
            pipe(image, seed=wrong)
    with pytest.raises(ValueError, match="image: expected 1 or"):
        pipe([], prompt=["a", "b"])
    with pytest.raises(ValueError, match="seed=5 stands in place of generator"):
        pipe(image, seed=5, generator=seeded(5))
