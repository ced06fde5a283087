"""Variants of the stages, side by side."""

from dataclasses import replace
from pathlib import Path

import pytest

from imageconductor import config as config_file
from scripts.ablations import AblationConfig, Variant, main, measured, stage_configs

RECIPES = Path("configs/ablations")


def plans(recipe, seed=0):
    config = config_file.load(AblationConfig, RECIPES / recipe)
    return {name: stage_configs(config, variant, seed) for name, variant in config.variants.items()}


def outputs(plan):
    return {name: settings.output for name, settings in plan.items()}


def test_variants_share_the_stages_in_which_they_do_not_differ():
    found = plans("loras_sprites.yaml")
    reference, off, linear = (found[name] for name in ("orthogonal_identity", "orthogonal_off", "linear_only"))
    shared = {name for name in reference if outputs(reference)[name] == outputs(off)[name]}
    assert shared == {"camera_lora"}
    assert outputs(linear)["camera_lora"] != outputs(reference)["camera_lora"]
    other = plans("loras_sprites.yaml", seed=1)["orthogonal_identity"]
    assert set(outputs(other).values()).isdisjoint(outputs(reference).values())
    assert (reference["object_lora"].orthogonal_weight, off["object_lora"].orthogonal_weight) == (0.1, 0)
    dense_first, sparse = plans("dense_first_sprites.yaml").values()
    assert set(outputs(sparse).values()).isdisjoint(outputs(dense_first).values())


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.iterdir()))
def test_variants_have_equal_budgets_and_arms_that_exist(recipe):
    steps = {sum(settings.max_steps for settings in plan.values()) for plan in plans(recipe).values()}
    assert len(steps) == 1
    config = config_file.load(AblationConfig, RECIPES / recipe)
    assert list(measured(config).arms) == config.arms
    with pytest.raises(ValueError, match="has no arm objects; it has camera, "):
        measured(replace(config, arms=["objects"]))


def test_two_variants_are_trained_and_measured(tiny_model, tmp_path, capsys):
    world = "{size: [32, 32], num_frames: 4}"
    recipe = tmp_path / "recipe.yaml"
    stages = ("motion_controlnet_sparse", "camera_lora", "object_lora")
    settings = [f"{s}.{k}" for s in stages for k in ("max_steps=2", "batch_size=1", f"world={world}", "lora_rank=2")]
    settings += [f"{s}.mixed_precision=no" for s in stages]
    recipe.write_text(
        f"model: {tiny_model}\noutput: {tmp_path / 'out'}\nfresh_motion_controlnet: true\nseeds: [0]\n"
        "stages:\n" + "".join(f"  {s}: configs/train/sprites/{s}.yaml\n" for s in stages) + f"settings: {settings}\n"
        "variants:\n  reference: {}\n  without: {settings: [object_lora.orthogonal_weight=0]}\n"
        "arms: [camera, object]\nevaluation_settings: [num_scenes=1, num_inference_steps=1, device=cpu]\n"
    )
    assert main(["--config", str(recipe)]) == 0
    table = (tmp_path / "out" / "ablations.md").read_text()
    assert "| variant | camera: error | camera: coverage | object: error | object: leak | object: coverage |" in table
    assert "| reference | " in table
    assert "| without | " in table
    assert len(list((tmp_path / "out" / "stages").iterdir())) == 4, "two stages are shared"
    capsys.readouterr()
    assert main(["--config", str(recipe)]) == 0
    assert "stages" not in capsys.readouterr().out, "nothing was trained again"


def test_a_stage_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="there is no stage 'camera'; there are camera_lora"):
        AblationConfig({"a": Variant(["camera.seed=1"])}, {"camera_lora": "x.yaml"})
    with pytest.raises(ValueError, match="'foundation' begins with none of"):
        AblationConfig({"a": Variant()}, {"foundation": "x.yaml"})
