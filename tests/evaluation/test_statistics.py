"""Intervals against what is known of their coverage, means by hand."""

import numpy as np
import pytest

from imageconductor.evaluation.statistics import MIN_SOURCES, summarise, summarise_differences

NAN = float("nan")


def test_what_is_not_finite_does_not_count_and_the_number_says_so():
    figure = summarise([*range(1, 8), NAN], list("abcdefgh"))
    assert (figure.mean, figure.n, figure.num_sources) == (4.0, 7, 7)
    assert 1 <= figure.low < 4 < figure.high <= 7
    lone = summarise([NAN, 5.0, NAN], ["a", "b", "c"])
    assert (lone.mean, lone.n, lone.num_sources) == (5.0, 1, 1)
    assert summarise([NAN, NAN], ["a", "b"]).n == 0


@pytest.mark.parametrize("num_images", [1, 2, MIN_SOURCES - 1, MIN_SOURCES])
def test_videos_of_few_images_have_a_mean_but_no_interval(num_images):
    """Between two images the percentiles are the two means themselves, which hold the truth half of the time."""
    values = np.arange(10.0 * num_images)
    figure = summarise(values, np.repeat(np.arange(num_images).astype(str), 10))
    assert (figure.mean, figure.num_sources) == (values.mean(), num_images)
    assert np.isnan([figure.low, figure.high]).all() == (num_images < MIN_SOURCES)
    lost = [NAN] * 10 + list(values[10:])
    assert np.isnan(summarise(lost, np.repeat(np.arange(num_images).astype(str), 10)).low)


def test_copies_of_a_video_are_no_evidence():
    random = np.random.default_rng(0)
    single = random.normal(0, 1, 40)
    images = [str(i) for i in range(40)]
    once = summarise(single, images)
    tenfold = summarise(np.repeat(single, 10), np.repeat(images, 10))
    assert (tenfold.n, tenfold.num_sources) == (400, 40)
    assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high))


def test_an_interval_covers_the_mean_as_often_as_it_says():
    """30 images of 6 videos, which share most of their error: drawing videos would cover 55 % here."""
    random = np.random.default_rng(1)
    sources = np.repeat(np.arange(30).astype(str), 6)
    covered, rounds = 0, 300
    for seed in range(rounds):
        values = np.repeat(random.normal(0, 1, 30), 6) + random.normal(0, 0.3, 180)
        figure = summarise(values, sources, seed, resamples=400)
        covered += figure.low < 0 < figure.high
    assert 0.90 <= covered / rounds <= 0.98


def test_differences_are_paired():
    """A constant gain on requests of very different difficulty is certain, though both methods' intervals overlap."""
    base = np.random.default_rng(2).normal(10, 5, 20)
    sources = [str(i) for i in range(20)]
    better = base - 0.5
    gain = summarise_differences(better, base, sources)
    assert (gain.mean, gain.low, gain.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert summarise(base, sources).low < summarise(better, sources).high
    better[3] = NAN
    assert summarise_differences(better, base, sources).n == 19
