"""Model folders on the hub."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers.utils import hub_utils
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

from imageconductor.checkpoints.model_folder import locate_model
from imageconductor.commands import assemble
from imageconductor.sampling.pipeline import ImageConductorPipeline


def test_arguments_for_the_hub_reach_it(tiny_model, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda _, **how: asked.append(how) or str(tiny_model))
    how = {"revision": "v2", "token": "t", "cache_dir": "c", "local_files_only": True, "force_download": False}
    ImageConductorPipeline.from_pretrained("lab/conductor", **how)
    assert asked[0] == {"allow_patterns": ["*.json"], **how}
    assert all(how.items() <= given.items() for given in asked)


@pytest.fixture
def hub(tiny_model, tmp_path, monkeypatch):
    """Repositories "lab/conductor", with files beside those that are read, and "lab/foreign", one of Stable Diffusion.

    Gives their folder and that of what is downloaded.
    """
    root, local = tmp_path / "hub" / "lab", tmp_path / "cache"
    shutil.copytree(tiny_model, root / "conductor")
    for name in ("model.ckpt", "unet/diffusion_pytorch_model.bin", "unet/model.onnx"):
        (root / "conductor" / name).touch()
    (root / "foreign").mkdir()
    (root / "foreign" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (root / "foreign" / "v1-5-pruned.safetensors").touch()

    def download(name, **patterns):
        paths = [path.relative_to(root.parent / name) for path in (root.parent / name).rglob("*") if path.is_file()]
        for path in filter_repo_objects([path.as_posix() for path in paths], **patterns):
            (local / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root.parent / name / path, local / path)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return root, local


def test_a_foreign_repository_is_refused_before_its_weights_are_downloaded(hub):
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline without a motion ControlNet; `imageconductor asse"):
        locate_model("lab/foreign")
    assert [path.name for path in hub[1].iterdir()] == ["model_index.json"]


def test_of_a_model_on_the_hub_what_is_never_read_stays_there(hub, tiny_model):
    root, local = hub
    assert locate_model("lab/conductor") == local
    files = {path.relative_to(local) for path in local.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tiny_model) for path in tiny_model.rglob("*") if path.is_file()}

    (root / "conductor" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(local)
    assert locate_model("lab/conductor") == local  # pickled weights, where there are no others
    assert (local / "unet" / "diffusion_pytorch_model.bin").is_file()


def test_a_folder_goes_to_the_hub_and_comes_back(tiny_model, tmp_path, monkeypatch, capsys):
    """Offline: the two calls that reach the hub copy to and from a folder."""
    hub = tmp_path / "hub"

    def upload(repo_id, folder_path, **_):
        shutil.copytree(folder_path, hub / repo_id)
        return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *_, **__: ModelCard("---\n---\nempty"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(hub / name))
    interval = {"mean": 1.234, "low": 1.0, "high": 1.5, "n": 8}
    (tmp_path / "results.json").write_text(json.dumps({"cam_mc": 1.234, "intervals": {"cam_mc": interval}}))

    (tmp_path / "boxes.json").write_text('{"methods": {}}')
    other = ["--push-to-hub", "lab/conductor", "--model", str(tiny_model), "--results", str(tmp_path / "boxes.json")]
    assert assemble.main(other) == 2
    assert "is not of an evaluation of trajectories" in capsys.readouterr().err
    assert assemble.main(["--export", "published", "--model", "m", "--output", "o", "--private"]) == 2
    assert "--results FILE and --private go with --push-to-hub" in capsys.readouterr().err
    arguments = ["--push-to-hub", "lab/conductor", "--model", tiny_model, "--results", tmp_path / "results.json"]
    assert assemble.main([str(argument) for argument in arguments]) == 0
    assert "https://hub/lab/conductor" in capsys.readouterr().out
    card = (hub / "lab" / "conductor" / "README.md").read_text()
    assert 'from_pretrained("lab/conductor")' in card
    assert "| cam_mc | 1.23 | 1.00 .. 1.50 | 8 |" in card
    pipe, original = (
        ImageConductorPipeline.from_pretrained("lab/conductor"),
        ImageConductorPipeline.from_pretrained(tiny_model),
    )
    for name, network in original.components.items():
        if isinstance(network, torch.nn.Module):
            found = pipe.components[name].state_dict()
            assert all(torch.equal(found[key], value) for key, value in network.state_dict().items()), name
    assert json.loads(pipe.provenance["results.json"])["cam_mc"] == 1.234
