"""The nodes of ComfyUI, and stand-ins for its modules."""

import comfyui_host
import pytest
from conftest import tiny_pipeline


@pytest.fixture(scope="session")
def package():
    return comfyui_host.load_nodes()


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture
def host(monkeypatch, tmp_path):
    return comfyui_host.Host(monkeypatch, tmp_path)
