"""Variants of the stages, side by side."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from imageconductor import config as config_file
from scripts.ablations import AblationConfig, Variant, build_stage_configs, load_evaluation, main, train_model

RECIPES = Path("configs/ablations")


@cache
def load_recipe(name):
    return config_file.load(AblationConfig, RECIPES / name)


@cache
def build_plans(recipe):
    config = load_recipe(recipe)
    return {name: build_stage_configs(config, variant, seed=0) for name, variant in config.variants.items()}


def outputs(plan):
    return {name: settings.output for name, settings in plan.items()}


def test_variants_share_the_stages_in_which_they_do_not_differ():
    found = build_plans("loras_sprites.yaml")
    reference, off, linear = (found[name] for name in ("orthogonal_identity", "orthogonal_off", "linear_only"))
    shared = {name for name in reference if outputs(reference)[name] == outputs(off)[name]}
    assert shared == {"camera_lora"}
    assert outputs(linear)["camera_lora"] != outputs(reference)["camera_lora"]
    config = load_recipe("loras_sprites.yaml")
    other = build_stage_configs(config, config.variants["orthogonal_identity"], seed=1)
    assert set(outputs(other).values()).isdisjoint(outputs(reference).values())
    assert (reference["object_lora"].orthogonal_weight, off["object_lora"].orthogonal_weight) == (0.1, 0)
    dense_first, sparse = build_plans("dense_first_sprites.yaml").values()
    assert set(outputs(sparse).values()).isdisjoint(outputs(dense_first).values())


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.iterdir()))
def test_variants_have_equal_budgets_and_tasks_that_exist(recipe):
    steps = {sum(settings.max_steps for settings in plan.values()) for plan in build_plans(recipe).values()}
    assert len(steps) == 1
    config = load_recipe(recipe)
    assert list(load_evaluation(config).tasks) == config.tasks
    with pytest.raises(ValueError, match="has no task objects; it has camera, "):
        load_evaluation(replace(config, tasks=["objects"]))


@pytest.mark.slow
def test_two_variants_are_trained_and_measured(tiny_model, tmp_path, capsys):
    stages = {}
    for stage in ("motion_controlnet", "camera_lora", "object_lora"):
        stages[f"{stage}_short"] = str(tmp_path / f"{stage}.yaml")
        (tmp_path / f"{stage}.yaml").write_text(
            f"stage: {stage}\nmax_steps: 1\nbatch_size: 1\nworld: {{size: [32, 32], num_frames: 4}}\n"
        )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\noutput: {tmp_path / 'out'}\nfresh_motion_controlnet: true\nseeds: [0]\n"
        f"stages: {stages}\nsettings: [camera_lora_short.lora_rank=2, object_lora_short.lora_rank=2]\n"
        "variants:\n  reference: {}\n  without: {settings: [object_lora_short.orthogonal_weight=0]}\n"
        "tasks: [camera, object]\nevaluation_settings: [num_scenes=1, num_inference_steps=1, device=cpu]\n"
    )
    assert main(["--config", str(recipe)]) == 0
    table = (tmp_path / "out" / "ablations.md").read_text()
    heading = "| variant | camera: error | camera: tracked fraction | object: error | object: background displacement |"
    assert f"{heading} object: tracked fraction |" in table
    assert "| reference | " in table
    assert "| without | " in table
    assert len(list((tmp_path / "out" / "stages").iterdir())) == 4, "two stages are shared"
    capsys.readouterr()
    assert main(["--config", str(recipe)]) == 0
    assert "stages" not in capsys.readouterr().out, "nothing was trained again"


def test_a_model_of_other_stages_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    trained = []

    def run_stage(settings):
        Path(settings.output).mkdir(parents=True)
        trained.append(settings.stage)
        return SimpleNamespace(step=settings.max_steps)

    monkeypatch.setattr("imageconductor.training.run.run_stage", run_stage)
    monkeypatch.setattr("imageconductor.checkpoints.assembly.assemble", lambda config: config)
    monkeypatch.setattr(
        "imageconductor.commands.assemble.write_model_folder", lambda _, folder: folder.mkdir(parents=True)
    )
    config = replace(load_recipe("loras_sprites.yaml"), output=str(tmp_path))
    plan = build_stage_configs(config, Variant(), 0)
    for _ in range(2):
        assert train_model(config, "a-0", plan, None) == tmp_path / "models" / "a-0"
    assert trained == [settings.stage for settings in plan.values()]
    other = build_stage_configs(config, Variant(["object_lora.max_steps=7"]), 0)
    with pytest.raises(ValueError, match=r"stages was .*name another output"):
        train_model(config, "a-0", other, None)
    assert len(trained) == len(plan)


def test_a_stage_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="there is no stage 'camera'; there are camera_lora"):
        AblationConfig({"a": Variant(["camera.seed=1"])}, {"camera_lora": "x.yaml"})
    config = AblationConfig({"a": Variant()}, {"first": "configs/train/sprites/foundation_whole.yaml"})
    with pytest.raises(
        ValueError, match=r"foundation_whole\.yaml is for foundation, not for one of motion_controlnet, "
    ):
        build_stage_configs(config, Variant(), 0)
