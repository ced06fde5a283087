"""Videos of several windows: what each window reads, how it goes on from the one before, and what is shared."""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from imageconductor.conditioning import Boxes, Trajectories, build_flow_map, encode_first_frame, to_pixels
from imageconductor.diffusion.clean_estimate import estimate_x_0
from imageconductor.models.adapters import active
from imageconductor.models.denoiser import Condition
from imageconductor.sampling.job import SampleJob, call_arguments, prepare
from imageconductor.sampling.pipeline import ImageConductorPipeline
from imageconductor.sampling.windows import Anchor, choose_window, split_frames

SIZE, STEPS, SCALE = (32, 32), 3, 4.0
LONG, WINDOW, OVERLAP = 6, 4, 2  # frames 0..3 and 2..5
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
LINE = Trajectories.from_tracks([[[4, 4], [10, 20], [28, 24]], [[16, 16]]], SIZE, LONG)


@pytest.fixture(scope="module")
def shared_pipe(tiny_model):
    pipe = ImageConductorPipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(shared_pipe):
    scheduler = shared_pipe.scheduler
    yield shared_pipe
    shared_pipe.scheduler = scheduler


def latents(pipe, num_frames=LONG, **arguments):
    """(B, C, T, 16, 16) of the line, from the picture."""
    given = {
        "image": PICTURE,
        "trajectories": LINE.at_frames(range(num_frames)),
        "prompt": "a red circle",
        "control": "object",
        "guidance_scale": SCALE,
        "num_inference_steps": STEPS,
        "window_frames": WINDOW,
        "window_overlap": OVERLAP,
        **arguments,
    }
    return pipe(num_frames=num_frames, output_type="latent", **given).frames


def noise(pipe, num_videos=1, num_frames=LONG):
    channels = pipe.unet.config.in_channels
    side = SIZE[0] // pipe.vae_scale_factor
    shape = num_videos, channels, num_frames, side, side
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("num_frames", "window", "overlap"), [(16, 16, 4), (17, 16, 4), (48, 16, 4), (49, 16, 15)])
def test_windows_cover_the_video_and_overlap_enough(num_frames, window, overlap):
    windows = split_frames(num_frames, window, overlap)
    assert sorted({frame for one in windows for frame in one}) == list(range(num_frames))
    assert {len(one) for one in windows} == {window}
    common = [len(set(a) & set(b)) for a, b in itertools.pairwise(windows)]
    assert all(count >= overlap for count in common)
    fewest = 1 + max(0, -(-(num_frames - window) // (window - overlap)))
    assert len(windows) == fewest
    assert max(common, default=0) - min(common, default=0) <= 1


def test_a_video_of_one_window_is_whole():
    assert split_frames(5, 16, 4) == (range(5),)
    assert choose_window(None, 16, 8) == 8  # the motion modules take no more


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_held_prediction_leads_to_the_anchored_frames(kind):
    generator = torch.Generator().manual_seed(0)
    x_t, prediction = (torch.randn(2, 3, 5, 4, 4, generator=generator) for _ in range(2))
    anchor = Anchor(torch.randn(2, 3, 2, 4, 4, generator=generator))
    held = anchor.hold(prediction, x_t, 0.3, kind)
    before, after = (estimate_x_0(one, x_t, 0.3, kind) for one in (prediction, held))
    torch.testing.assert_close(after[:, :, 0], anchor.latents[:, :, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[:, :, 1], (before[:, :, 1] + anchor.latents[:, :, 1]) / 2, atol=1e-5, rtol=1e-5)
    assert torch.equal(held[:, :, 2:], prediction[:, :, 2:])


def test_the_first_window_is_the_call_of_its_length(pipe):
    given = noise(pipe)
    long, short = latents(pipe, latents=given), latents(pipe, WINDOW, latents=given[:, :, :WINDOW])
    start = LONG - WINDOW
    assert torch.equal(long[:, :, : start + 1], short[:, :, : start + 1])
    assert not torch.allclose(long[:, :, start + 1], short[:, :, start + 1])  # joined with the second window


def test_a_further_window_equals_a_plain_loop_that_goes_on_from_the_one_before(pipe):
    given = noise(pipe, 2)
    long = latents(pipe, latents=given, num_videos_per_prompt=2)
    start = LONG - WINDOW
    first = latents(pipe, WINDOW, latents=given[:, :, :WINDOW], num_videos_per_prompt=2)[:, :, start:]
    expected = plain_window(pipe, given[:, :, start:], LINE.at_frames(range(start, LONG)), first)
    expected[:, :, 0] = first[:, :, 0]
    torch.testing.assert_close(long[:, :, start:], expected, atol=1e-4, rtol=1e-4)


def plain_window(pipe, x, line, made, **drawn):
    """Latents from noise, with whole evaluations of the model; `made` (B, C, K, h, w) are its first frames.

    The scheduler is a fresh one, whose steps take `drawn` too.
    """
    videos = len(x)
    keyframes, mask = torch.zeros_like(x), torch.zeros_like(x[:, :1])
    keyframes[:, :, 0], mask[:, :, 0] = made[:, :, 0], 1
    flow = build_flow_map(line, pipe.motion_controlnet.flow_convention).expand(videos, -1, -1, -1, -1)
    texts = [
        pipe.encode_prompt([text]).expand(videos, -1, -1)
        for text in (pipe.sampling_defaults["negative_prompt"], "a red circle")
    ]
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    x = x * scheduler.init_noise_sigma
    weights = (1.0, 0.5)
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, t)
        with torch.no_grad(), active(pipe.motion_controlnet, "object"):
            uncond, prompt = (pipe.denoiser(x_t, t, Condition(text, keyframes, mask, flow)) for text in texts)
        v = uncond + SCALE * (prompt - uncond)
        alpha = float(scheduler.alphas_cumprod[int(t)])
        x_0 = alpha**0.5 * x_t - (1 - alpha) ** 0.5 * v
        for frame, weight in enumerate(weights):
            x_0[:, :, frame] = (1 - weight) * x_0[:, :, frame] + weight * made[:, :, frame]
        v = (alpha**0.5 * x_t - x_0) / (1 - alpha) ** 0.5
        x = scheduler.step(v, t, x, return_dict=False, **drawn)[0]
    return x


def test_seeds_share_the_motion_controlnet_in_every_window(pipe):
    """The image ControlNet sees what each video has made of the window's first frame."""
    videos = {"image": [], "motion": []}

    def count(name):
        return lambda _module, arguments: videos[name].append(len(arguments[0]) // WINDOW)

    networks = {"image": pipe.image_controlnet, "motion": pipe.motion_controlnet}
    hooks = [net.mid_block.register_forward_pre_hook(count(name)) for name, net in networks.items()]
    latents(pipe, seed=[1, 2, 3], control="base")
    for hook in hooks:
        hook.remove()
    assert videos["image"] == [2] * STEPS + [6] * STEPS  # both texts of one picture, then of three
    assert videos["motion"] == [2] * 2 * STEPS


def test_each_video_is_what_it_is_alone(pipe):
    together = latents(pipe, seed=[1, 2])
    torch.testing.assert_close(together[1:], latents(pipe, seed=2), atol=1e-4, rtol=1e-4)


def test_pictures_of_later_frames_stand_in_their_window(pipe, monkeypatch):
    seen = []
    real = pipe.image_controlnet.forward
    monkeypatch.setattr(
        pipe.image_controlnet,
        "forward",
        lambda t, text, keyframes, mask: seen.append((keyframes, mask)) or real(t, text, keyframes, mask),
    )
    other = PICTURE.rotate(90)
    latents(pipe, image={0: PICTURE, -1: other}, num_inference_steps=1)
    (_, first), (pictures, second) = seen
    assert first[0, 0, :, 0, 0].tolist() == [1, 0, 0, 0]
    assert second[0, 0, :, 0, 0].tolist() == [1, 0, 0, 1]
    encoded = encode_first_frame(pipe.vae, to_pixels(other, SIZE))
    torch.testing.assert_close(pictures[0, :, 3], encoded[0], atol=1e-5, rtol=1e-5)


def test_gates_see_the_boxes_and_the_first_frame_of_their_window(gated_model):
    pipe = ImageConductorPipeline.from_pretrained(gated_model)
    pipe.set_progress_bar_config(disable=True)
    seen, told = [], []
    real, read = pipe.scene_gates.forward, pipe.object_gates.forward
    pipe.scene_gates.forward = lambda scene, input_frame, n: seen.append(scene) or real(scene, input_frame, n)
    pipe.object_gates.forward = lambda *given: told.append(given) or read(*given)
    boxes = Boxes.from_tracks(LINE, (10, 10), ["circle", "star"])
    made = latents(pipe, boxes=boxes, seed=[1, 2], num_inference_steps=1)
    assert seen[0].shape[0] == seen[1].shape[0] == 4  # two texts of two videos
    torch.testing.assert_close(seen[1][:2], made[:, :, LONG - WINDOW].to(seen[1]))
    for (xyxy, present, _), start in zip(told, (0, LONG - WINDOW), strict=True):
        expected = boxes.at_frames(range(start, start + WINDOW))
        for found in xyxy * torch.tensor(2 * SIZE):
            torch.testing.assert_close(found, expected.xyxy.transpose(0, 1), check_dtype=False)
        assert (present == expected.present.T).all()


def test_a_callback_counts_in_each_window_and_acts_in_it_alone(pipe):
    seen = []

    def on_step(pipe, step, _t, tensors):
        seen.append((pipe.window, step, pipe.guidance_scale))
        pipe._guidance_scale = 1.0
        return tensors

    latents(pipe, callback_on_step_end=on_step, num_inference_steps=2)
    assert seen == [(0, 0, SCALE), (0, 1, 1.0), (1, 0, SCALE), (1, 1, 1.0)]


def test_an_interrupt_ends_all_windows_and_keeps_what_is_made(pipe):
    seen = []

    def on_step(pipe, step, _t, tensors):
        seen.append(step)
        pipe._interrupt = step == STEPS - 1
        return tensors

    given = noise(pipe)
    made = latents(pipe, callback_on_step_end=on_step, latents=given)
    assert seen == list(range(STEPS))
    assert torch.equal(made[:, :, :WINDOW], latents(pipe, WINDOW, latents=given[:, :, :WINDOW]))


def test_text_to_video_goes_on_from_its_own_latents(pipe):
    given = noise(pipe)
    long = latents(pipe, image=None, trajectories=None, latents=given)
    short = latents(pipe, WINDOW, image=None, trajectories=None, latents=given[:, :, :WINDOW])
    start = LONG - WINDOW
    assert torch.equal(long[:, :, start], short[:, :, start])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"window_overlap": 4}, "window_overlap must be from 1 to 3 for windows of 4 frames, got 4"),
        ({"window_frames": 1}, "window_frames must be from 2 to"),
        ({"window_frames": 999}, "got 999"),
        ({"keep_latents": True}, "6 frames have 2; take at most 4 frames"),
        ({"resume_from": 1}, "6 frames have 2; take at most 4 frames"),
    ],
)
def test_what_windows_cannot_do_is_refused(pipe, arguments, words):
    with pytest.raises(ValueError, match=words):
        latents(pipe, **arguments)


def test_a_scheduler_that_tells_no_noise_level_is_refused(pipe):
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler cannot join"):
        latents(pipe)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"])
def test_other_schedulers_begin_each_window_anew(pipe, name):
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    given = noise(pipe)
    long = latents(pipe, latents=given, generator=torch.Generator().manual_seed(0))
    start, generator = LONG - WINDOW, torch.Generator().manual_seed(0)
    short = latents(pipe, WINDOW, latents=given[:, :, :WINDOW], generator=generator)
    assert torch.equal(long[:, :, : start + 1], short[:, :, : start + 1])
    line, made = LINE.at_frames(range(start, LONG)), short[:, :, start:]
    expected = plain_window(pipe, given[:, :, start:], line, made, generator=generator)
    expected[:, :, 0] = made[:, :, 0]
    torch.testing.assert_close(long[:, :, start:], expected, atol=1e-4, rtol=1e-4)


def test_a_job_of_any_length_is_prepared(tiny_model):
    job = SampleJob(prompt="a red circle", model=str(tiny_model), num_frames=70, preset="pan-left", dtype="float32")
    inputs = prepare(job)
    assert inputs.trajectories.num_frames == 70
    assert (
        inputs.job.window_frames == ImageConductorPipeline.from_pretrained(tiny_model).sampling_defaults["num_frames"]
    )
    assert call_arguments([inputs])["num_frames"] == 70
    with pytest.raises(ValueError, match="window_overlap must be from 1"):
        prepare(SampleJob(prompt="star", model=str(tiny_model), num_frames=4, window_overlap=99))
