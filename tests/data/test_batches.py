"""The way of a batch from the loader to the device."""

import pytest
import torch

from imageconductor.data.batches import send, send_clips


def make_batches(asked_for):
    """Three batches of clips, each noted when it is asked for."""
    for number in range(3):
        asked_for.append(number)
        pixels = torch.full((1, 3, 16, 256, 384), number, dtype=torch.uint8)
        yield {"pixel_values": pixels, "points": torch.full((1, 2, 16, 2), float(number)), "key": [str(number)]}


def test_on_a_cpu_batches_stay_where_they_are_and_none_is_read_early():
    asked_for = []
    for number, batch in enumerate(send_clips(make_batches(asked_for), torch.device("cpu"))):
        assert asked_for == list(range(number + 1))
        assert batch["key"] == [str(number)]
        pixels = batch["pixel_values"]
        assert send(pixels, torch.device("cpu")) is pixels


@pytest.mark.gpu
def test_clips_that_a_busy_gpu_copies_arrive_whole():
    device, sums = torch.device("cuda"), []
    work = torch.randn(4096, 4096, device=device)
    for batch in send_clips(make_batches([]), device):
        assert batch["pixel_values"].is_cuda
        assert not batch["points"].is_cuda
        for _ in range(20):  # The next copy begins while these are waiting.
            work = torch.tanh(work @ work)
        sums.append((send(batch["points"], device).mean(), batch["pixel_values"].float().mean()))
    assert [(points.item(), pixels.item()) for points, pixels in sums] == [(0, 0), (1, 1), (2, 2)]
