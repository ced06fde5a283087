"""Finished videos on the page: the tab of one, the history, and two side by side."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import gradio as gr
import imageio.v3 as iio
import numpy as np

from imageconductor.apps.limits import FieldError
from imageconductor.apps.live import translate
from imageconductor.apps.page_base import PageEvents, Updates
from imageconductor.apps.results import Result
from imageconductor.apps.visits import Visit
from imageconductor.sampling.video import write_mp4


class ResultEvents(PageEvents):
    """Functions that show what has been made."""

    def show_result(self, result: Result, seed: Any = None, overlay: bool = False) -> Updates:
        """A result in its tab."""
        view, chosen = self.parts.result, choose_seed(result, seed)
        files = {
            view.mp4: result.find("video.mp4", chosen),
            view.gif: result.find("video.gif", chosen),
            view.trajectories: result.file("trajectories.json"),
            view.boxes: result.file("boxes.json"),
            view.run: result.file("run.yaml"),
            view.everything: result.file("all.zip"),
        }
        index = result.seeds.index(chosen)
        notes = result.displacement[index : index + 1]
        notes = [*notes, *map(translate, result.cropped)]
        if result.note:
            notes = [*notes, f"run.yaml does not repeat this video: {result.note}"]
        first = result.file("first_frame.png")
        video = (result.find("overlay.mp4", chosen) if overlay else None) or result.find("video.mp4", chosen)
        steps = int(result.job.steps or 1)
        return {
            self.parts.number: result.number,
            view.video: str(video),
            view.first_frame: None if first is None else str(first),
            view.chosen: gr.update(
                choices=[str(one) for one in result.seeds], value=str(chosen), visible=len(result.seeds) > 1
            ),
            view.overlay: gr.update(value=overlay),
            view.words: show_words(notes),
            **{
                button: gr.update(value=None if path is None else str(path), visible=path is not None)
                for button, path in files.items()
            },
            self.parts.resuming.step: gr.update(
                maximum=max(2, steps - 1), value=max(1, steps // 2), interactive=steps > 1
            ),
        }

    def switch(self, number: int, seed: Any, overlay: bool, request: gr.Request) -> Updates:
        """Another seed of the shown result, or the drawing on it."""
        visit = self.visit(request)
        try:
            return {**self.errors(), **self.show_result(visit.result(number), seed, overlay)}
        except FieldError as error:
            return self.errors(error)

    def recall(self, overlay: bool, request: gr.Request, event: gr.SelectData) -> Updates:
        """A result of the history."""
        visit = self.visit(request)
        try:
            results = visit.results
            number = results[int(event.index)].number if int(event.index) < len(results) else 0
            return {**self.errors(), **self.show_result(visit.result(number), None, overlay)}
        except FieldError as error:
            return self.errors(error)

    def list_results(self, visit: Visit) -> Updates:
        """The history, and what can be compared: the two latest."""
        history, results = self.parts.history, visit.results
        titles = [(result.title, result.number) for result in results]
        numbers = [number for _, number in titles] or [None]
        return {
            history.gallery: gr.update(value=list_thumbnails(results), selected_index=None),
            history.left: gr.update(choices=titles, value=numbers[1] if len(numbers) > 1 else numbers[0]),
            history.right: gr.update(choices=titles, value=numbers[0]),
        }

    def compare(self, left: int | None, right: int | None, request: gr.Request) -> Updates:
        """The first videos of two results in one, which keeps them in step."""
        visit = self.visit(request)
        try:
            chosen = [visit.result(number) for number in (left, right)]
            files = [result.find("video.mp4", result.seeds[0]) for result in chosen]
            path = visit.folder / f"compare-{left}-{right}.mp4"
            _join_videos([file for file in files if file is not None], path, int(chosen[0].job.fps or 8))
            return {**self.errors(), self.parts.history.both: str(path)}
        except FieldError as error:
            return self.errors(error)


def choose_seed(result: Result, seed: Any) -> int:
    """A seed of the result: the one that the radio button names, or the first."""
    return next((one for one in result.seeds if str(one) == str(seed)), result.seeds[0])


def list_thumbnails(results: list[Result], all_seeds: bool = False) -> list[tuple[str, str]]:
    """Moving thumbnails with captions: of each result the first video, or all."""
    pairs = [(result, seed) for result in results for seed in (result.seeds if all_seeds else result.seeds[:1])]
    return [
        (str(path), f"seed {seed}" if all_seeds else result.title)
        for result, seed in pairs
        if (path := result.find("video.gif", seed)) is not None
    ]


def show_words(lines: list[str]) -> str:
    """Lines of text as HTML."""
    return "".join(f'<div class="ic-words">{html.escape(line)}</div>' for line in lines)


def _join_videos(files: list[Path], path: Path, fps: int) -> None:
    """Videos beside each other, on the black of the largest; a shorter one stands on its last frame."""
    videos = [iio.imread(file, plugin="FFMPEG") for file in files]
    length, height = max(len(video) for video in videos), max(video.shape[1] for video in videos)
    padded = [
        np.pad(
            video[np.minimum(np.arange(length), len(video) - 1)], ((0, 0), (0, height - video.shape[1]), (0, 0), (0, 0))
        )
        for video in videos
    ]
    write_mp4(path, np.concatenate(padded, axis=2), fps)
