"""A motion learned by `train.py` and played by `sample.py`, as README says; on the tiny model."""

import shutil
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import tiny_networks
from diffusers import DDIMScheduler, EulerDiscreteScheduler, TextToVideoSDPipeline, UNet3DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from imageconductor.checkpoints.reference_run import find_reference_lora
from imageconductor.commands import sample, train
from imageconductor.models.adapters import lora_targets, plain_layers
from imageconductor.sampling.denoising import mix_noise_priors
from imageconductor.sampling.job import SampleJob, prepare
from imageconductor.sampling.job_files import load_job
from imageconductor.sampling.pipeline import ImageConductorPipeline

PROMPT = "A red circle, moving."


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """`motion`: of one clip, with a noise prior; `look`: of two images."""
    folder = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(0)
    clip = random.integers(0, 255, (5, 32, 32, 3), np.uint8)
    iio.imwrite(folder / "clip.mp4", clip, plugin="FFMPEG", fps=8, codec="libx264", macro_block_size=2)
    (folder / "images").mkdir()
    for name in ("a", "b"):
        Image.fromarray(random.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / "images" / f"{name}.png")
    common = ["stage=motion_director", f"model={tiny_model}", "size=[32,32]", "max_steps=3", "lora_rank=2"]
    common += ["learning_rate=0.1", "num_frames=4", "prompt=a red circle"]
    prior = ["noise_prior=0.5", "inversion_steps=3"]
    assert train.main([*common, *prior, f"data=[{folder}/clip.mp4]", f"output={folder}/motion"]) == 0
    look = ["learns_motion=false", "appearance=per_clip", f"data=[{folder}/images]", f"output={folder}/look"]
    assert train.main([*common, *look]) == 0
    return folder


@pytest.fixture(scope="module")
def modelscope(tmp_path_factory):
    """Folder of a tiny text-to-video model, as diffusers writes it."""
    networks, folder = tiny_networks(), tmp_path_factory.mktemp("modelscope") / "tiny"
    unet = UNet3DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    TextToVideoSDPipeline(
        networks.vae, networks.text_encoder, networks.tokenizer, unet, DDIMScheduler(clip_sample=False)
    ).save_pretrained(folder)
    return folder


def test_a_text_to_video_model_keeps_its_scheduler(modelscope, tmp_path):
    folder = shutil.copytree(modelscope, tmp_path / "model")
    pipe = ImageConductorPipeline.from_pretrained(folder)
    assert type(pipe.scheduler) is DDIMScheduler
    EulerDiscreteScheduler.from_config(pipe.scheduler.config).save_pretrained(folder / "scheduler")
    assert type(ImageConductorPipeline.from_pretrained(folder).scheduler) is EulerDiscreteScheduler
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("EulerDiscreteScheduler", "UNet2DModel"))
    with pytest.raises(ValueError, match="diffusers has no scheduler 'UNet2DModel'"):
        ImageConductorPipeline.from_pretrained(folder)


def make(tiny_model, output, *options):
    common = ["--model", str(tiny_model), "--steps", "2", "--output", str(output)]
    return sample.main([*common, *map(str, options)])


def video(folder):
    (path,) = folder.glob("*-0.mp4")
    return path.read_bytes()


def test_a_prompt_alone_gives_videos_named_by_prompt_and_seed(tiny_model, runs, tmp_path):
    assert make(tiny_model, tmp_path / "out", "--prompt", PROMPT, "--seed", 3, 4) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a-red-circle-moving-3.mp4", "a-red-circle-moving-4.mp4", "run.yaml"}


@pytest.mark.slow
def test_motion_appearance_and_noise_prior_each_change_the_video_and_repeat(tiny_model, runs, tmp_path):
    options = {
        "base": [],
        "motion": ["--motion-lora", runs / "motion"],
        "weak": ["--motion-lora", f"{runs}/motion:0.5"],
        "look": ["--appearance-lora", runs / "look" / "appearance_lora" / "a"],
        "prior": ["--noise-prior", f"{runs}/motion:0.5"],
        # The look of an image, two motions at once, and the run's own fraction of its noise.
        "all": ["--motion-lora", runs / "motion", "--motion-lora", f"{runs}/motion:0.3", "--appearance-lora",
                f"{runs}/look/appearance_lora/a:0.7", "--noise-prior", runs / "motion"],
    }  # fmt: skip
    for name, some in options.items():
        assert make(tiny_model, tmp_path / name, "--prompt", PROMPT, *some) == 0
    assert len({video(tmp_path / name) for name in options}) == len(options)
    assert sample.main(["--config", str(tmp_path / "all" / "run.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert video(tmp_path / "again") == video(tmp_path / "all")
    assert load_job(tmp_path / "all" / "run.yaml").noise_prior == f"{runs}/motion:0.5"


def test_a_motion_plays_in_one_window_of_as_many_frames_as_it_was_learned_from(tiny_model, runs, tmp_path):
    long = shutil.copytree(runs / "motion", tmp_path / "long")
    settings = (long / "config.yaml").read_text()
    (long / "config.yaml").write_text(settings.replace("num_frames: 4", "num_frames: 6"))
    shutil.copytree(long / "motion_lora", long / "checkpoint-00000002" / "motion_lora")
    job = SampleJob(model=str(tiny_model), prompt=PROMPT, num_frames=6)
    for path in (long, long / "motion_lora", long / "checkpoint-00000002"):
        assert prepare(replace(job, motion_lora=[f"{path}:0.5"])).job.window_frames == 6
    assert prepare(replace(job, motion_lora=[f"{path}:0.5"], window_frames=3)).job.window_frames == 3
    assert prepare(replace(job, motion_lora=[str(runs / "motion")])).job.window_frames == 4


def test_a_folder_of_pickled_weights_is_a_lora(tmp_path):
    (tmp_path / "adapter_model.bin").touch()
    assert find_reference_lora(tmp_path, "motion") == tmp_path


def test_videos_are_named_by_prompts_in_any_script(tiny_model, tmp_path):
    assert make(tiny_model, tmp_path / "out", "--prompt", "Ein Käfer, 走る犬!", "--seed", 3) == 0
    assert make(tiny_model, tmp_path / "long", "--prompt", "走" * 90, "--seed", 3) == 0
    assert (tmp_path / "out" / "ein-käfer-走る犬-3.mp4").is_file()
    assert (tmp_path / "long" / f"{'走' * 53}-3.mp4").is_file()


def test_a_learned_motion_on_a_first_frame_along_a_drawn_path(tiny_model, runs, tmp_path):
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "first.png")
    options = ["--image", tmp_path / "first.png", "--preset", "line-right", "--motion-lora", runs / "motion"]
    assert make(tiny_model, tmp_path / "out", *options) == 0
    assert make(tiny_model, tmp_path / "without", *options[:4]) == 0
    first, second = (iio.imread(tmp_path / name / "video-0.mp4") for name in ("out", "without"))
    assert not np.array_equal(first, second)


def test_a_text_to_video_model_of_diffusers_learns_and_plays_a_motion(modelscope, runs, tmp_path):
    settings = ["stage=motion_director", f"model={modelscope}", "size=[32,32]", "max_steps=3", "lora_rank=2"]
    settings += ["learning_rate=0.1", "num_frames=4", "prompt=a red circle", "noise_prior=0.5", "inversion_steps=2"]
    settings += ["gradient_checkpointing=true", f"data=[{runs}/clip.mp4]", f"output={tmp_path}/run"]
    assert train.main(settings) == 0
    common = ["--prompt", PROMPT, "--num-frames", 4, "--guidance-scale", 2]
    for name, some in {
        "base": [],
        "motion": ["--motion-lora", tmp_path / "run"],
        "all": ["--motion-lora", tmp_path / "run", "--appearance-lora", tmp_path / "run", "--noise-prior",
                tmp_path / "run"],
    }.items():  # fmt: skip
        assert make(modelscope, tmp_path / name, *common, *some) == 0
    assert len({video(tmp_path / name) for name in ("base", "motion", "all")}) == 3
    assert iio.imread(next((tmp_path / "all").glob("*.mp4"))).shape[0] == 4


def test_published_lists_play_on_a_text_to_video_model(modelscope, tmp_path):
    pipe = ImageConductorPipeline.from_pretrained(modelscope)
    layers, generator = plain_layers(pipe.unet), torch.Generator().manual_seed(0)
    for target_set in ("motion", "appearance"):
        tensors = []
        for name in lora_targets(pipe.unet, target_set):
            out, into = layers[name].weight.shape
            shapes = ((out, 2), (2, into))
            tensors += [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        torch.save(tensors, tmp_path / f"{target_set}.pt")
    common = ["--prompt", PROMPT, "--num-frames", 4]
    options = {"base": [], "motion": ["--motion-lora", tmp_path / "motion.pt"]}
    options["both"] = [*options["motion"], "--appearance-lora", tmp_path / "appearance.pt"]
    for name, some in options.items():
        assert make(modelscope, tmp_path / name, *common, *some) == 0
    assert len({video(tmp_path / name) for name in options}) == 3


def test_an_untouched_text_to_video_model_samples_as_diffusers_does(modelscope):
    arguments = {"num_frames": 4, "height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 3.0}
    ours = ImageConductorPipeline.from_pretrained(modelscope)
    theirs = TextToVideoSDPipeline.from_pretrained(modelscope)
    latents = torch.randn(1, 4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = theirs("a red circle", latents=latents.clone(), output_type="latent", **arguments).frames
    found = ours(prompt="a red circle", latents=latents, output_type="latent", **arguments).frames
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_text_to_video_model_takes_no_image(modelscope, tmp_path, capsys, monkeypatch):
    Image.new("RGB", (32, 32)).save(tmp_path / "first.png")
    monkeypatch.setattr(sample, "load_pipeline", lambda _: pytest.fail("weights were loaded"))
    for options in (["--image", tmp_path / "first.png"], ["--prompt", "a", "--preset", "line-right"]):
        assert make(modelscope, tmp_path / "out", *options) == 2
        assert "ControlNets" in capsys.readouterr().err
    assert train.main(["stage=style_lora", f"model={modelscope}", f"output={tmp_path}/run"]) == 2
    assert "ControlNets" in capsys.readouterr().err


def test_a_text_to_video_pipeline_is_saved_and_read_again(modelscope, tmp_path):
    ImageConductorPipeline.from_pretrained(modelscope).save_pretrained(tmp_path / "saved")
    arguments = {"prompt": "a", "num_frames": 2, "num_inference_steps": 1, "seed": 0, "output_type": "latent"}
    first, second = (ImageConductorPipeline.from_pretrained(f)(**arguments) for f in (modelscope, tmp_path / "saved"))
    assert torch.equal(first.frames, second.frames)


def test_a_text_to_video_folder_takes_parts_and_defaults_and_no_other_argument(modelscope, tmp_path):
    scheduler = EulerDiscreteScheduler()
    own = {"num_frames": 6, "guidance_scale": 2.0}
    pipe = ImageConductorPipeline.from_pretrained(modelscope, scheduler=scheduler, sampling_defaults=own)
    assert pipe.scheduler is scheduler
    pipe.provenance["training/style_lora.yaml"] = "max_steps: 3\n"
    pipe.save_pretrained(tmp_path / "saved")
    again = ImageConductorPipeline.from_pretrained(tmp_path / "saved")
    assert again.sampling_defaults == pipe.sampling_defaults
    assert again.sampling_defaults.items() >= {**own, "width": 32, "control": "base"}.items()
    assert again.provenance == {"training/style_lora.yaml": "max_steps: 3\n"}
    with pytest.raises(ValueError, match=r"is a text-to-video model, which takes .*, and not shceduler; leave it out"):
        ImageConductorPipeline.from_pretrained(modelscope, shceduler=scheduler)


def test_priors_of_clips_of_other_sizes_are_resized():
    noise = torch.zeros(2, 4, 3, 8, 8)
    inverted = [torch.full((4, 3, 6, 8), 1.0), torch.full((4, 3, 8, 4), 2.0)]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    mixed = mix_noise_priors(noise, inverted, 1.0, generators)
    assert mixed.shape == noise.shape
    assert set(mixed.unique().tolist()) <= {1.0, 2.0}


def test_repeat_gives_way_to_no_seed_of_a_yaml():
    assert sample.build_job(sample.DEFAULT_CONFIG, {"repeat": 2}).repeat == 2


def test_repeat_draws_fresh_seeds_and_records_them(tiny_model, runs, tmp_path):
    assert make(tiny_model, tmp_path / "out", "--prompt", PROMPT, "--repeat", 2) == 0
    seeds = load_job(tmp_path / "out" / "run.yaml").seed
    assert len(set(seeds)) == 2
    assert {f"a-red-circle-moving-{seed}.mp4" for seed in seeds} <= {p.name for p in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--motion-lora", "{runs}/motion"], ["--prompt"]),
        (["--motion-lora", "{runs}/look", "--prompt", "a"], ["look", "no motion LoRA"]),
        (["--appearance-lora", "{runs}/look", "--prompt", "a"], ["for each clip", "appearance_lora/a"]),
        (["--noise-prior", "{runs}/look", "--prompt", "a"], ["no noise prior", "noise_prior=0.3"]),
        (["--noise-prior", "{runs}/motion:1.5", "--prompt", "a"], ["[0, 1]", "1.5"]),
        (["--noise-prior", "{runs}/motion", "--num-frames", "3", "--prompt", "a"], ["4 frames", "3"]),
        (["--noise-prior", "{runs}/torn", "--prompt", "a"], ["torn", "truncated or damaged"]),
        (["--motion-lora", "{runs}/killed", "--prompt", "a"], ["no motion LoRA", "{runs}/killed/checkpoint-00000002"]),
        (["--motion-lora", "{runs}/wide", "--prompt", "a"], ["another base", "24"]),
        (["--motion-lora", "{runs}/nowhere", "--prompt", "a"], ["nowhere"]),
        (["--repeat", "2", "--seed", "1", "--prompt", "a"], ["repeat", "seed"]),
    ],
)
def test_bad_input_is_one_line_before_weights_are_loaded(
    tiny_model, runs, tmp_path, capsys, monkeypatch, options, words
):
    wide = runs / "wide" / "pytorch_lora_weights.safetensors"
    if not wide.exists():
        wide.parent.mkdir()
        state = load_file(runs / "motion" / "motion_lora" / wide.name)
        save_file({key: torch.zeros([24 if n > 2 else n for n in value.shape]) for key, value in state.items()}, wide)
        shutil.copytree(runs / "motion", runs / "torn")
        (runs / "torn" / "noise_prior.safetensors").write_bytes(b"torn")
        shutil.copytree(runs / "motion" / "motion_lora", runs / "killed" / "checkpoint-00000002" / "motion_lora")
        shutil.copy(runs / "motion" / "config.yaml", runs / "killed")
    monkeypatch.setattr(sample, "load_pipeline", lambda _: pytest.fail("weights were loaded"))
    assert make(tiny_model, tmp_path / "out", *(text.format(runs=runs) for text in options)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert all(word.format(runs=runs) in line for word in words), line
    assert not (tmp_path / "out").exists()
