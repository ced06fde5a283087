"""What the page shows while a video is made, as HTML: a bar, the time left, and pictures that move."""

from __future__ import annotations

import base64
import html
import io
import re
from dataclasses import replace

from PIL import Image

from imageconductor.apps.progress import Step, Waiting
from imageconductor.sampling.video import Frames

LABELS = {
    "guidance_scale": "Guidance by the prompt",
    "trajectory_guidance_scale": "Guidance by the drawing",
    "camera_free_scale": "Hold the camera still",
    "scene_guidance_scale": "Guidance by the boxes",
    "first_frame_by": "The picture acts through",
    "gated_fraction": "Part of the steps with boxes",
}
"""What the page calls settings of `SampleJob`."""

_FRAME_MS = 320
_BRANCH_NAMES = {
    "undrawn": "without the drawing",
    "camera": "camera",
    "object": "objects",
    "mixed": "camera and objects",
}


def show_waiting(waiting: Waiting) -> str:
    """The place in the queue."""
    if waiting.ahead == 0:
        return _bar("Starting", "", 0.0)
    others = "1 request" if waiting.ahead == 1 else f"{waiting.ahead} requests"
    return _bar("Waiting", f"{others} before yours", 0.0)


def show_step(step: Step, last: str = "") -> str:
    """The bar after a step, the current estimate of each video, and what each branch wants.

    Args:
        step: The step.
        last: Pictures of an earlier step, from `show_pictures`, for a step that has none.
    """
    pictures = show_pictures(step) or last
    if step.done == step.total:
        return _bar("Writing the video", f"after {step.total} steps", 1.0) + pictures
    left = "" if step.seconds_left is None else f"{format_seconds(step.seconds_left)} left"
    return _bar(f"Step {step.done} of {step.total}", left, step.done / step.total) + pictures


def show_pictures(step: Step) -> str:
    """Estimates and branches of a step; empty if it has none."""
    parts = []
    if step.estimates:
        many = len(step.estimates) > 1
        figures = [
            _figure(frames, f"seed {seed}" if many else "current estimate", large=not many)
            for seed, frames in step.estimates.items()
        ]
        parts.append(f'<div class="ic-strip">{"".join(figures)}</div>')
    if step.branches:
        figures = [_figure(frames, _BRANCH_NAMES[name]) for name, frames in step.branches.items()]
        parts.append(
            f'<div class="ic-strip-title">What each branch wants after step {step.done}</div>'
            f'<div class="ic-strip ic-branches">{"".join(figures)}</div>'
        )
    return "".join(parts)


def show_done(title: str, seconds: float, last: Step | None = None) -> str:
    """The bar of a finished request, and what each branch wanted at the last step that showed it."""
    branches = "" if last is None else show_pictures(replace(last, estimates={}))
    return _bar("Done", f"{title} in {format_seconds(seconds)}", 1.0) + branches


def show_stopped() -> str:
    """The bar of a request that was stopped."""
    return _bar("Stopped", "nothing was kept", 0.0)


def show_error(message: str) -> str:
    """A refusal, for the place beside its field."""
    return f'<div class="ic-error" role="alert">{html.escape(message)}</div>'


def translate(message: str) -> str:
    """A message in the page's words: tracks and points count from 1, and settings are called as their labels are."""
    counted = re.sub(r"\b(track|point) (\d+)\b", lambda found: f"{found[1]} {int(found[2]) + 1}", message)
    return re.sub(rf"\b({'|'.join(LABELS)})\b", lambda found: f"“{LABELS[found[1]]}”", counted)


def format_seconds(seconds: float) -> str:
    """A duration in words: 8 s, 2 min 5 s, 1 h 10 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s" if seconds >= 1 else "less than a second"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def to_data_url(frames: Frames) -> str:
    """Frames (K, H, W, 3) as an endless WebP animation, or a still picture of one."""
    pictures = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=_FRAME_MS, loop=0, quality=80, method=0
    )
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(frames: Frames, caption: str, large: bool = False) -> str:
    kind = "ic-figure ic-large" if large else "ic-figure"
    text = html.escape(caption)
    return (
        f'<figure class="{kind}"><img src="{to_data_url(frames)}" alt="{text}"><figcaption>{text}</figcaption></figure>'
    )


def _bar(what: str, more: str, part: float) -> str:
    percent = f"{100 * min(max(part, 0.0), 1.0):.0f}"
    return (
        '<div class="ic-progress" role="progressbar" aria-label="Progress of the video" '
        f'aria-valuenow="{percent}" aria-valuemin="0" aria-valuemax="100">'
        f'<div class="ic-progress-words"><b>{html.escape(what)}</b><span>{html.escape(more)}</span></div>'
        f'<div class="ic-track"><div class="ic-fill" style="width: {percent}%"></div></div></div>'
    )
