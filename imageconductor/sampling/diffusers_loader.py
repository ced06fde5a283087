"""The pipeline as diffusers' own loader makes it, by the `pipeline.py` of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from imageconductor.checkpoints.model_folder import load_companions, read_sampling_defaults
from imageconductor.models.networks import Networks, cast_network
from imageconductor.sampling.pipeline import ImageConductorPipeline


class LoadedByDiffusers(ImageConductorPipeline):
    """A pipeline that takes the LoRAs from its folder once diffusers says which, and is an ordinary one from then on.

    `DiffusionPipeline.from_pretrained` calls the class with the parts and tells the folder afterwards.
    """

    def register_to_config(self, **kwargs: Any) -> None:
        """As diffusers'.

        Raises:
            FileNotFoundError: A part of the folder is missing.
            ValueError: A part is damaged.
        """
        super().register_to_config(**kwargs)
        if "_name_or_path" not in kwargs:
            return
        folder = Path(kwargs["_name_or_path"])
        read_sampling_defaults(folder)
        Networks.check_folder(folder)
        if self.unet.dtype == torch.float32:  # diffusers' default; transformers' is the precision of the files
            cast_network(self.text_encoder, torch.float32)
        load_companions(self, folder)
        self.__class__ = ImageConductorPipeline  # type: ignore[assignment]
