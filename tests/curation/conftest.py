"""Modules that worker processes can import."""

import importlib

import pytest


@pytest.fixture(scope="module")
def importable(tmp_path_factory):
    """Makes a module from its name and text."""
    with pytest.MonkeyPatch.context() as patch:

        def make(name, text):
            folder = tmp_path_factory.mktemp(name)
            (folder / f"{name}.py").write_text(text)
            patch.syspath_prepend(str(folder))
            return importlib.import_module(name)

        yield make
