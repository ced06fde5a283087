"""Several processes, and runs that are killed: the entry points as a launcher starts them."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from imageconductor.files import lock
from imageconductor.training import checkpointing


def command(model, output, processes, script="train_motion_controlnet.py", **settings):
    fixed = {"model": model, "output": output, "world.size": "[32,32]", "world.num_frames": 4, "learning_rate": 1e-2}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [
        *(sys.executable, *launcher, script),
        *(f"{key}={value}" for key, value in {**fixed, **settings}.items()),
    ]


def start(arguments, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        arguments, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(arguments, **variables):
    process = start(arguments, **variables)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


def kill_all(mentioning):
    """Sends SIGKILL to the launcher and to its workers, which are sessions of their own."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mentioning.encode() in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)


def weights(output):
    return load_file(output / "motion_controlnet" / "diffusion_pytorch_model.safetensors")


def losses(output):
    return [json.loads(line)["denoising"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two(tiny_model, tmp_path_factory):
    """A run of two processes that nothing disturbed."""
    output = tmp_path_factory.mktemp("two") / "run"
    run(command(tiny_model, output, 2, batch_size=1, max_steps=STEPS, save_every=1, log_every=1))
    return output


STEPS = 8


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(two, tiny_model, tmp_path, run_forked):
    run_forked(command(tiny_model, tmp_path / "one", 1, batch_size=2, max_steps=STEPS, log_every=1))
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(tmp_path / "one")), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_stages_of_a_smoke_run_follow_each_other_in_two_processes(tiny_model, tmp_path):
    small = "[batch_size=1,gradient_accumulation_steps=1,num_workers=0,mixed_precision=no,num_frames=4,'size=[32,32]']"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = ["scripts/smoke_training.py", "--config", "configs/train/smoke.yaml", "max_steps=2", f"settings={small}"]
    run([*launcher, *script, f"model={tiny_model}", f"output={tmp_path}"])
    measured = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/measured.json")}
    assert len(measured) == 4
    assert measured["object_lora"]["clips_per_step"] == 2


_BARE_MACHINE = """
import runpy, sys
from importlib.machinery import PathFinder
absent = "cv2 decord imageio imageio_ffmpeg webdataset braceexpand tensorboard jinja2 av ray pyarrow scenedetect pebble"
find = PathFinder.find_spec
present = lambda cls, name, *more: None if name.split(".")[0] in absent.split() else find(name, *more)
PathFinder.find_spec = classmethod(present)
sys.path.insert(0, ".")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_model_is_built_in_parts_by_two_processes_on_a_machine_with_few_packages(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
        world: {size: [32, 32], num_frames: 4, grid: 4, min_sprites: 1, max_sprites: 1}
        model:
          {autoencoder_channels: [8, 8, 8], latent_channels: 4, block_out_channels: [16, 16], norm_num_groups: 4,
           num_attention_heads: 2, text_width: 16, text_layers: 1}
        autoencoder: {max_steps: 2000, batch_size: 4, crop: 32}
        decoder: {max_steps: 2000, batch_size: 4, crop: 32, decoder_only: true}
        foundation: [configs/train/sprites/foundation_dense.yaml]
        stages: [configs/train/sprites/camera_lora.yaml, configs/train/sprites/object_lora.yaml]
        """
    )
    (tmp_path / "bare.py").write_text(_BARE_MACHINE)
    output, runs = tmp_path / "model", tmp_path / "runs"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [str(tmp_path / "bare.py"), "scripts/train_sprites.py", "--config", str(recipe), "--device", "cpu"]
    arguments = [*launcher, *script, "--budget", "0.001", f"runs={runs}", f"output={output}"]
    run([*arguments, "--minutes", "0.000001"])
    assert list((runs / "autoencoder").glob("checkpoint-*"))
    assert not output.exists()
    run(arguments)
    assert (output / "object_lora" / "adapter_model.safetensors").is_file()
    start = json.loads((runs / "foundation_dense" / "environment.jsonl").read_text().splitlines()[-1])
    assert start["settings"]["batch_size"] == 8  # half of the recipe's
    assert start["clips_per_step"] == 16
    assert "\nbatch_size: 16\n" in (output / "training" / "foundation_dense.yaml").read_text()


_CHOOSING = """
import sys
from pathlib import Path
from accelerate import Accelerator
from imageconductor.training import checkpointing

checkpointing._PATIENCE_S = 0
accelerator = Accelerator(cpu=True)
folder = Path(sys.argv[1]) / str(accelerator.process_index)
try:
    with checkpointing.lock_folder(folder):
        found = checkpointing.latest_agreed(folder)
    said = f"goes on from {found and found.step}"
except ValueError as error:
    said = str(error)
(folder / "said").write_text(said)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (([1, 2], [1, 2]), ["goes on from 2", "goes on from 2"]),
        (([1], [1, 2]), ["goes on from 1", "goes on from 1"]),
        (
            ([1, 2], [1]),
            ["process 1: checkpoint .*2 cannot be read .* put output=.*1 on a disk that all"] * 2,
        ),
        (([], [1]), ["goes on from None", "goes on from None"]),
        (([-1], [1]), ["none of its 1 checkpoints can be read"] * 2),
        ((None, [1]), ["another process is writing into"] * 2),
    ],
    ids=["same", "newer", "missing", "none", "damaged", "locked"],
)
def test_all_processes_go_on_from_the_main_ones_checkpoint_or_none_does(steps, said, tmp_path, run_forked):
    for rank, found in enumerate(steps):
        (tmp_path / str(rank)).mkdir()
        for step in found or []:
            checkpointing.save(tmp_path / str(rank), abs(step), {"parameters": {"w": torch.ones(1)}}, {}, keep=5)
            if step < 0:
                (tmp_path / str(rank) / "checkpoint-00000001" / "state.json").write_text("{")
    (tmp_path / "choose.py").write_text(_CHOOSING)
    with lock(tmp_path / "0" / ".lock") if steps[0] is None else contextlib.nullcontext():
        run_forked(["--nproc_per_node=2", str(tmp_path / "choose.py"), str(tmp_path)])
    for rank in range(2):
        assert re.search(said[rank], (tmp_path / str(rank) / "said").read_text())


# What accelerate makes of configs/accelerate/fsdp.yaml and deepspeed.yaml.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
ENGINES = [pytest.param(FSDP, id="fsdp"), pytest.param(ZERO, id="deepspeed", marks=NEEDS_DEEPSPEED)]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sharded_first", [True, False])
def test_sharding_changes_nothing_and_a_run_may_begin_or_end_with_it(
    engine, sharded_first, two, tiny_model, tmp_path, run_forked
):
    for steps, sharded in ((STEPS // 2, sharded_first), (STEPS, not sharded_first)):
        arguments = command(tiny_model, tmp_path / "run", 2, batch_size=1, max_steps=steps, save_every=1, log_every=1)
        run_forked(arguments, **(engine if sharded else {}))
    expected, found = weights(two), weights(tmp_path / "run")
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in expected.items()}
    configs = [(folder / "motion_controlnet" / "config.json").read_text() for folder in (tmp_path / "run", two)]
    assert configs[0] == configs[1]
    # Rounding, which grows at this learning rate; a moment out of place would be a hundred times as much.
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "run")), torch.tensor(losses(two)), atol=5e-5, rtol=5e-5)


@pytest.mark.slow
def test_sharding_may_be_tried_in_one_process(tiny_model, tmp_path, run_forked):
    # Validation is by the average, which the next step must not find in place of the weights.
    settings = {"batch_size": 1, "max_steps": 4, "log_every": 1, "ema_decay": 0.9, "validation_every": 2}
    for name, variables in (("plain", {}), ("fsdp", FSDP)):
        run_forked(command(tiny_model, tmp_path / name, 1, **settings), **variables)
    plain, fsdp = (torch.tensor(losses(tmp_path / name)) for name in ("plain", "fsdp"))
    torch.testing.assert_close(fsdp, plain, atol=5e-5, rtol=5e-5)


@pytest.mark.slow
def test_the_orthogonal_loss_and_averages_are_sharded_too(tiny_model, tmp_path, run_forked):
    for name, variables in (("ddp", {}), ("fsdp", FSDP)):
        settings = {"batch_size": 1, "max_steps": 4, "log_every": 1, "lora_rank": 2, "ema_decay": 0.9}
        run_forked(command(tiny_model, tmp_path / name, 2, "train_object_lora.py", **settings), **variables)
    ddp, fsdp = ([json.loads(line) for line in (tmp_path / n / "metrics.jsonl").open()] for n in ("ddp", "fsdp"))
    for key in ("denoising", "orthogonal"):
        torch.testing.assert_close(
            torch.tensor([line[key] for line in fsdp]), torch.tensor([line[key] for line in ddp]), atol=1e-5, rtol=1e-5
        )
    adapters = [load_file(tmp_path / n / "object_lora" / "adapter_model.safetensors") for n in ("ddp", "fsdp")]
    # Rounding, which Adam makes as large as a step, 1e-2, where a gradient is nothing else: in few places.
    pairs = [(adapters[1][key], value) for key, value in adapters[0].items()]
    off = torch.cat([((found - value).abs() > 5e-4 + 1e-3 * value.abs()).flatten() for found, value in pairs])
    assert adapters[0].keys() == adapters[1].keys()
    assert off.float().mean() < 1e-3
    assert max((found - value).abs().max() for found, value in pairs) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        pytest.param(FSDP, "bf16", id="fsdp"),
        pytest.param({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "no", id="deepspeed", marks=NEEDS_DEEPSPEED),
    ],
)
def test_a_sharded_unet_with_accumulation_and_averages_can_be_resumed(
    engine, precision, tiny_model, tmp_path, run_forked
):
    settings = {"batch_size": 1, "gradient_accumulation_steps": 2, "mixed_precision": precision, "ema_decay": 0.9}
    settings |= {"lora_rank": 2, "log_every": 1, "save_every": 1, "validation_every": 4}
    for name, runs in (("whole", [(4, {})]), ("parts", [(2, {}), (3, engine), (4, engine)])):
        for steps, variables in runs:
            arguments = command(
                tiny_model, tmp_path / name, 2, "train.py", stage="style_lora", max_steps=steps, **settings
            )
            run_forked(arguments, **variables)
    whole, parts = (torch.tensor(losses(tmp_path / name)) for name in ("whole", "parts"))
    rounding = {"bf16": 2e-3, "no": 1e-5}[precision]
    torch.testing.assert_close(parts, whole, atol=rounding, rtol=rounding)
    ends = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("parts", "whole")]
    assert ends[0]["validation/loss"] == pytest.approx(ends[1]["validation/loss"], abs=rounding, rel=rounding)
    name = "style_lora/pytorch_lora_weights.safetensors"
    expected, found = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
    torch.testing.assert_close(found, expected, atol=2.5 * rounding, rtol=25 * rounding)


_SPOILED = """
import os, sys
from imageconductor.commands.train import main
from imageconductor.training import loop

build, calls = loop.build_engine, iter(range(100))

def build_spoiled(config):
    engine = build(config)
    backward = engine.backward
    engine.backward = lambda loss: backward(loss * (float("inf") if next(calls) == 1 else 1))
    return engine

loop.build_engine = build_spoiled
try:
    main(sys.argv[2:], "motion_controlnet")
except FloatingPointError as error:
    with open(f"{sys.argv[1]}/{os.environ['RANK']}", "w") as file:
        file.write(str(error))
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param({}, id="ddp"), *ENGINES])
@pytest.mark.parametrize(
    ("save_every", "said"),
    [(1, "weights or gradients are not finite after step 2,"), (3, "the gradients of step 1 are not finite,")],
    ids=["saved", "next"],
)
def test_gradients_that_are_not_finite_stop_all_processes(engine, save_every, said, tiny_model, tmp_path, run_forked):
    (tmp_path / "spoil.py").write_text(_SPOILED)
    arguments = command(tiny_model, tmp_path / "run", 2, batch_size=1, max_steps=3, save_every=save_every)
    place = arguments.index("train_motion_controlnet.py")
    run_forked([*arguments[:place], str(tmp_path / "spoil.py"), str(tmp_path), *arguments[place + 1 :]], **engine)
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text().startswith(said)
    assert checkpointing.latest_step(tmp_path / "run") == (1 if save_every == 1 else None)


@pytest.mark.parametrize("path", sorted(Path("configs/accelerate").iterdir()), ids=lambda path: path.stem)
def test_the_launchers_configurations_are_what_they_say(path):
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train_camera_lora.py"])
    arguments = _validate_launch_command(arguments)[0]
    arguments.deepspeed_fields_from_accelerate_config = ""  # The launcher sets it; it concerns accelerate's own plugin.
    variables = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    expected = {"fsdp": FSDP, "deepspeed": ZERO}.get(path.stem, {})
    assert {key: variables[key] for key in (*FSDP, *ZERO) if key in variables} == expected
    assert variables["ACCELERATE_MIXED_PRECISION"] == "no"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes to kill in /proc")
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_is_never_killed(processes, two, tiny_model, tmp_path, run_forked):
    arguments = {"batch_size": 1, "max_steps": STEPS, "save_every": 1, "log_every": 1}
    whole = two
    if processes == 1:
        whole = tmp_path / "whole"
        run_forked(command(tiny_model, whole, 1, **arguments))
    killed = tmp_path / "killed"
    process = start(command(tiny_model, killed, processes, **arguments))
    deadline = time.monotonic() + 200
    while not list(killed.glob("checkpoint-*[2-9]")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    kill_all(str(killed))
    process.communicate()
    assert list(killed.glob("checkpoint-*"))
    assert not (killed / "motion_controlnet").exists(), "it was over before it was killed"
    run_forked(command(tiny_model, killed, processes, **arguments))
    expected, found = weights(whole), weights(killed)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert losses(killed) == losses(whole)
    assert len(Path(killed / "environment.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_two_processes_that_are_asked_to_end_leave_a_checkpoint_and_go_on(two, tiny_model, tmp_path, run_forked):
    arguments = {"batch_size": 1, "max_steps": STEPS, "save_every": 100, "log_every": 1}
    ended = tmp_path / "ended"
    process = start(command(tiny_model, ended, 2, **arguments), ACCELERATE_USE_CPU="true")
    deadline = time.monotonic() + 200
    while not (ended / "metrics.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.terminate()  # torchrun hands it on
    said, _ = process.communicate(timeout=100)
    (checkpoint,) = ended.glob("checkpoint-*")
    step = int(checkpoint.name[-8:])
    assert 1 <= step < STEPS, said
    assert said.count(f"SIGTERM: the run ends after step {step}") in (1, 2)
    assert f"stopped at step {step} of {STEPS}; the same command goes on" in said
    assert (ended / "motion_controlnet").is_dir()
    run_forked(command(tiny_model, ended, 2, **arguments))
    expected, found = weights(two), weights(ended)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert losses(ended) == losses(two)
