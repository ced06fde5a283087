"""The recipe of the bundled model, without running it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from imageconductor.config import load
from imageconductor.data.sprite_world import SpriteWorldConfig
from imageconductor.models.networks import Networks
from imageconductor.models.small_model import SmallModelConfig, build_small_model
from imageconductor.training.autoencoder import AutoencoderConfig
from scripts import train_sprites
from scripts.train_sprites import Clock, OutOfTimeError, SpriteRecipe, check_budget, stage_config, starting_networks

SMALL = SmallModelConfig(autoencoder_channels=(8, 16), block_out_channels=(16, 32), text_width=16, text_layers=1)


@pytest.fixture(scope="module")
def recipe():
    return load(SpriteRecipe, Path("configs/train/sprites.yaml"))


def test_every_phase_takes_the_recipes_world_and_a_share_of_its_steps(recipe, tmp_path):
    for path in [*recipe.foundation, *recipe.stages]:
        config, tried = (stage_config(path, recipe, budget, tmp_path, tmp_path / "model") for budget in (1, 0.01))
        assert config.world.size == (128, 128)
        assert config.world.patterns == recipe.world.patterns
        assert config.output == str(tmp_path / Path(path).stem)
        assert tried.max_steps == max(2, round(config.max_steps / 100))
    spacings = [stage_config(path, recipe, 1, tmp_path, tmp_path).max_frame_spacing for path in recipe.foundation]
    assert spacings == [5, 5, None, None]  # far and near, then whole clips


def test_a_trial_neither_replaces_a_model_nor_leaves_parts_to_the_real_run(tmp_path, monkeypatch, capsys):
    output, runs = tmp_path / "model", tmp_path / "runs"
    output.mkdir()
    command = ["train_sprites.py", "--config", "configs/train/sprites.yaml", "--device", "cpu", "--budget", "0.001"]
    monkeypatch.setattr("sys.argv", [*command, f"output={output}", f"runs={runs}"])
    with pytest.raises(SystemExit) as end:
        train_sprites.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: --budget 0.001 would replace {output} by a model of fewer steps; name other folders"
    )
    assert not runs.exists()

    check_budget(SpriteRecipe(output=str(output), runs=str(runs)), 1.0)
    tried = SpriteRecipe(output=str(tmp_path / "try"), runs=str(runs), autoencoder=AutoencoderConfig(max_steps=2000))
    tried = replace(tried, model=SMALL, world=SpriteWorldConfig(size=(32, 32), num_frames=4))
    with pytest.raises(OutOfTimeError):
        train_sprites.build(tried, 0.001, Clock(1e-6))
    check_budget(tried, 0.001)
    with pytest.raises(ValueError, match=r"holds results of other settings: budget was 0\.001 and now 1\.0"):
        check_budget(SpriteRecipe(output=str(output), runs=str(runs)), 1.0)


def test_a_gpu_takes_more_clips_and_processes_share_them(recipe, tmp_path, monkeypatch):
    path = recipe.foundation[0]
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    alone = stage_config(path, recipe, 1, tmp_path, tmp_path)
    for device, processes, clips, workers in (("cpu", 2, 8, 0), ("cuda", 1, 64, 12), ("cuda", 4, 16, 12)):
        state = SimpleNamespace(num_processes=processes, device=torch.device(device))
        monkeypatch.setattr("scripts.train_sprites.PartialState", lambda state=state: state)
        config = stage_config(path, recipe, 1, tmp_path, tmp_path)
        assert (config.batch_size, config.num_workers) == (clips, workers)
        assert config.max_steps == alone.max_steps
    state.num_processes = 3
    with pytest.raises(SystemExit, match="3 processes cannot share 64 clips"):
        stage_config(path, recipe, 1, tmp_path, tmp_path)


def test_the_weights_leave_room_for_the_adapters_within_50_mb(recipe):
    networks = build_small_model(recipe.model, ["a"])
    size = sum(2 * p.numel() for network in networks.modules.values() for p in network.parameters())
    assert 40e6 < size < 46.5e6
    assert networks.vae_scale_factor == 8


def test_the_text_to_video_recipe_goes_on_from_the_bundled_model_and_shows_no_picture(tmp_path):
    recipe = load(SpriteRecipe, Path("configs/train/sprites_text.yaml"))
    networks, bundled = starting_networks(recipe), Networks.load(recipe.start)
    assert networks.scheduler.config["prediction_type"] == "v_prediction"
    given, kept = (one.motion_controlnet.state_dict() for one in (bundled, networks))
    assert all(torch.equal(value, kept[key]) for key, value in given.items())
    for path in recipe.foundation:
        config = stage_config(path, recipe, 1, tmp_path, tmp_path / "model")
        assert (config.image_dropout, config.world.size) == (1.0, (64, 64))


def test_a_start_goes_on_with_what_it_predicts_or_as_one_of_v(monkeypatch):
    def start(given, wanted):
        monkeypatch.setattr(Networks, "load", lambda _: build_small_model(replace(SMALL, prediction_type=given), ["a"]))
        recipe = SpriteRecipe(start="FOLDER", model=replace(SMALL, prediction_type=wanted))
        return starting_networks(recipe).scheduler.config["prediction_type"]

    assert start("sample", "sample") == "sample"
    assert start("sample", "v_prediction") == "v_prediction"
    for given, wanted in (("sample", "epsilon"), ("v_prediction", "sample")):
        with pytest.raises(ValueError, match=f"start=FOLDER predicts '{given}'; it cannot go on as one of '{wanted}'"):
            start(given, wanted)
