"""The pipeline for diffusers: DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)."""

try:
    import imageconductor.sampling.diffusers_loader as loader
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "imageconductor":
        raise
    raise ImportError(
        "this model needs the Python package imageconductor, which is not installed or too old: run `pip install .` in "
        "an up-to-date copy of the Image Conductor repository (the folder with pyproject.toml and sample.py)"
    ) from None

ImageConductorPipeline = loader.LoadedByDiffusers
