"""Point trackers: the curation annotates clips with them, and the evaluation measures motion with them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray


class Tracker(Protocol):
    """Tracks points of frame 0 through a video."""

    name: str
    version: str

    def track(
        self, frames: NDArray[np.uint8], points: NDArray[np.floating]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Positions of the points in every frame, and whether they could be tracked there.

        Args:
            frames: (T, H, W, 3).
            points: (N, 2) xy pixels of frame 0, (0, 0) = centre of the top-left pixel.

        Returns:
            (N, T, 2) pixels, (N, T) bool.
        """
        ...


class LucasKanadeTracker:
    """Pyramidal Lucas-Kanade from frame to frame, with a forward-backward check; needs no weights.

    A lost point stays lost.

    Args:
        min_side_px: Videos whose shorter side is smaller are enlarged to at least this, so that windows hold enough
            pixels.
        window_px: Side of the window after enlargement. In rendered clips of the sprite world, 45 px track 98 % of the
            points and 31 px about 92 %, at the same error; smaller windows lose the interiors of plain objects.
        max_round_trip_px: Largest distance, in pixels of the video, between a point and its position after a step
            forward and back; beyond it the point counts as lost.
    """

    name = "opencv-lucas-kanade"

    def __init__(self, min_side_px: int = 256, window_px: int = 45, max_round_trip_px: float = 0.5):
        self.version = f"{cv2.__version__}, window {window_px} px, round trip {max_round_trip_px} px"
        self.min_side_px = min_side_px
        self.window_px = window_px
        self.max_round_trip_px = max_round_trip_px

    def track(
        self, frames: NDArray[np.uint8], points: NDArray[np.floating]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """As `Tracker.track`."""
        num_frames, height, width = frames.shape[:3]
        factor = max(1, -(-self.min_side_px // min(height, width)))
        size = (width * factor, height * factor)
        large = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
        large = [cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC) for frame in large]

        tracks = np.empty((len(points), num_frames, 2))
        followed = np.ones((len(points), num_frames), bool)
        tracks[:, 0] = points
        here = ((np.asarray(points) + 0.5) * factor - 0.5).astype(np.float32).reshape(-1, 1, 2)
        # OpenCV's default threshold on the window's texture would reject the soft textures of enlarged videos.
        options: dict[str, Any] = {
            "winSize": (self.window_px, self.window_px),
            "maxLevel": 3,
            "minEigThreshold": 1e-6,
        }
        for t in range(1, num_frames if len(points) else 0):
            there, found, _ = cv2.calcOpticalFlowPyrLK(large[t - 1], large[t], here, None, **options)  # type: ignore
            back, found_back, _ = cv2.calcOpticalFlowPyrLK(large[t], large[t - 1], there, None, **options)  # type: ignore
            round_trip = np.linalg.norm(back - here, axis=-1).ravel() / factor
            inside = ((there >= -0.5) & (there < np.array(size) - 0.5)).all(axis=-1).ravel()
            step = (found.ravel() == 1) & (found_back.ravel() == 1) & inside & (round_trip <= self.max_round_trip_px)
            followed[:, t] = followed[:, t - 1] & step
            tracks[:, t] = (there.reshape(-1, 2) + 0.5) / factor - 0.5
            here = there
        return tracks, followed


class CoTracker:
    """CoTracker, loaded through torch.hub by the user. Its weights are CC-BY-NC.

    A hidden point may become visible again. `version` names the repository, and the weights by the beginning of their
    SHA-256.

    Args:
        repository: A local clone, or `owner/name` on GitHub.
        model: Entry point of the repository.
        device: None = cuda if available.

    Raises:
        ValueError: The repository cannot be loaded, or the device cannot be used.

    Source: Karaev et al., 2023, the tracker of section 2.2.
    """

    def __init__(self, repository: str, model: str = "cotracker3_offline", device: str | None = None):
        import torch

        from imageconductor.devices import choose_device

        self.device = choose_device(device)
        self.name = model
        is_local = Path(repository).is_dir()
        try:
            network: Any = torch.hub.load(repository, model, source="local" if is_local else "github", trust_repo=True)  # type: ignore[arg-type]
        except Exception as error:  # A download and foreign code can raise anything.
            raise ValueError(f"CoTracker cannot be loaded from {repository}: {error}") from error
        digest = hashlib.sha256()
        for value in network.state_dict().values():
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        self.version = f"{Path(repository).resolve().name if is_local else repository} {digest.hexdigest()[:12]}"
        self.network = network.to(self.device, torch.float32).eval()  # the precision of the videos

    def track(
        self, frames: NDArray[np.uint8], points: NDArray[np.floating]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """As `Tracker.track`. One video at a time: the published networks fail with more in one call."""
        import torch

        video = torch.from_numpy(frames).to(self.device)[None].permute(0, 1, 4, 2, 3).float()
        start = torch.as_tensor(np.asarray(points), dtype=torch.float32, device=self.device)
        queries = torch.cat([torch.zeros_like(start[:, :1]), start], dim=1)  # (N, 3): frame, x, y
        with torch.inference_mode():
            tracks, visible = self.network(video, queries=queries[None])
        followed = visible.reshape(len(frames), len(points)).bool().T.cpu().numpy()
        return tracks[0].transpose(0, 1).cpu().double().numpy(), followed
