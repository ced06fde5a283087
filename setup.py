"""Builds the package with what it needs outside a checkout; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithShippedFiles(build_py):
    """Puts configs, the bundled model and its example into the package, where `imageconductor.files` finds them."""

    def run(self) -> None:
        """Copies them unless the installation is editable, which reads the checkout."""
        super().run()
        if not self.editable_mode:
            for folder in ("configs", "assets", "models/sprites"):
                target = Path(self.build_lib, "imageconductor", "shipped", folder)
                shutil.copytree(folder, target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithShippedFiles})
