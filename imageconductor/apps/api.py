"""The page's function over Gradio's HTTP API: /generate, as docs/page.md shows it."""

# Gradio reads the annotations of the endpoint as they stand, so they are not postponed here.
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from imageconductor.apps.engine import Stopped
from imageconductor.apps.form import AUTOMATIC, Form
from imageconductor.apps.limits import FieldError
from imageconductor.apps.results import Result
from imageconductor.apps.studio import Studio


def add_endpoint(studio: Studio) -> None:
    """Adds /generate to the Blocks that are being built."""

    def generate(
        request: gr.Request,
        image: dict | None = None,
        drawing: dict | None = None,
        prompt: str = "",
        negative_prompt: str | None = None,
        seed: int = 0,
        videos: int = 1,
        steps: int | None = None,
        frames: int | None = None,
        control: str = AUTOMATIC,
        guidance_scale: float | None = None,
        trajectory_guidance_scale: float | None = None,
        camera_free_scale: float | None = None,
        scene_guidance_scale: float | None = None,
        first_frame_by: str = AUTOMATIC,
        gated_fraction: float | None = None,
        looks: dict | None = None,
        motions: dict | None = None,
    ) -> dict:
        """Videos of a picture that move as a drawing says.

        Args:
            request: Of Gradio.
            image: A picture file; null = the prompt alone.
            drawing: Tracks in pixels of the picture, as a trajectory file holds them, and the objects of a boxes file;
                null = nothing is drawn.
            prompt: What the videos show.
            negative_prompt: What they do not show; null = the model's default, as below.
            seed: Of the first video; those of further ones count up from it.
            videos: How many.
            steps: Denoising steps.
            frames: Of each video.
            control: What the drawing moves: automatic, object, camera, mixed or base.
            guidance_scale: By the prompt.
            trajectory_guidance_scale: By the drawing.
            camera_free_scale: Above 1 holds the camera still; with control object.
            scene_guidance_scale: By the boxes.
            first_frame_by: What carries the picture: automatic, controlnet, gates or both.
            gated_fraction: Of the steps, in which boxes act.
            looks: Scales of style LoRAs by their names on the page.
            motions: Scales of learned motions by their names on the page.

        Returns:
            videos, overlays and gifs, each a list of files; trajectories, boxes, run and everything, files; seeds;
            background, the measured displacement of each video in words; cropped, a line for each track and box that
            is outside of the part of the picture that the videos show.
        """
        visit = studio.visits.find(request.session_hash)
        try:
            form = Form(
                picture=None if image is None else _uploaded(image),
                drawing=drawing,
                prompt=prompt,
                negative_prompt=negative_prompt,
                seed=seed,
                videos=videos,
                steps=steps,
                frames=frames,
                control=control,
                guidance_scale=guidance_scale,
                trajectory_guidance_scale=trajectory_guidance_scale,
                camera_free_scale=camera_free_scale,
                scene_guidance_scale=scene_guidance_scale,
                first_frame_by=first_frame_by,
                gated_fraction=gated_fraction,
                looks=looks or {},
                motions=motions or {},
            )
            for news in studio.make(visit, form):
                if isinstance(news, Stopped):
                    raise FieldError("generate", "the request was stopped")
                if isinstance(news, Result):
                    return describe(news)
        except FieldError as error:
            raise gr.Error(f"{error.field}: {error}", print_exception=False) from error
        raise AssertionError("a request ends with a result, or by being stopped")

    gr.api(generate, api_name="generate", concurrency_limit=None)


def describe(result: Result) -> dict[str, Any]:
    """A result as the API gives it."""
    kinds = {"videos": "video.mp4", "overlays": "overlay.mp4", "gifs": "video.gif"}
    names = {"trajectories": "trajectories.json", "boxes": "boxes.json", "run": "run.yaml", "everything": "all.zip"}
    files = {key: [_file(result.find(kind, seed)) for seed in result.seeds] for key, kind in kinds.items()}
    others = {key: _file(result.file(name)) for key, name in names.items()}
    return {**files, **others, "seeds": result.seeds, "background": result.displacement, "cropped": result.cropped}


def _file(path: Path | None) -> dict[str, Any] | None:
    return None if path is None else {"path": str(path), "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}


def _uploaded(image: object) -> str:
    """The path of an uploaded file, and of nothing else on this machine.

    Raises:
        FieldError: It was not uploaded to this page.
    """
    path = image.get("path") if isinstance(image, dict) else None
    if not isinstance(path, str) or not Path(path).is_file():
        raise FieldError("picture", "upload the picture first; gradio_client's handle_file(FILE) does it")
    if not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise FieldError("picture", "the picture must be a file that was uploaded to this page")
    return path
