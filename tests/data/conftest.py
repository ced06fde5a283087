"""Clips of the sprite world."""

import pytest
from clip_files import record, write_folder


@pytest.fixture(scope="session")
def records():
    return {f"clip-{index}": record(index) for index in range(5)}


@pytest.fixture(scope="session")
def folder(records, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "plain", records)
