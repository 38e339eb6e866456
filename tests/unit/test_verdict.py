"""The one rule, by made-up cases: noise, too few seeds, figures that are all near, other settings, other data."""

import math

import pytest

from ddlib.report import verdict
from ddlib.report.verdict import Differences, Published, accuracy, data_of, factor

PAPER = {"iterations": 20000, "networks": 5, "experts": 100, "subset": 0, "lr_img": 1.0}
JPEG = "4e83476eaa8ece643f548c9f6632f844134392e9c843d9050291f62bd9ade102"
JPEG_SUBSET_1000 = "17d1a63a9b5c6ec3ae784d3669e0472240c4cf63f35378d127041f22e21379c5"
DM = Published(48.9, 0.6)  # CIFAR-10, IPC 10; random images there have 32.2


def around(mean: float, error: float, count: int = 5) -> list[float]:
    """`count` values of this mean whose standard error is this."""
    steps = [k - (count - 1) / 2 for k in range(count)]
    scale = error * math.sqrt(count * (count - 1) / sum(step**2 for step in steps))
    return [mean + scale * step for step in steps]


def test_the_helper_makes_what_it_says():
    assert verdict.standard_error([around(48.0, 0.25)]) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("scores", "printed", "lead", "word"),
    [
        ([around(48.5, 0.1)], DM, 16.7, "reproduced"),  # 0.4: always near
        ([around(48.3, 0.1)], DM, 16.7, "reproduced"),  # two errors of the difference: 0.63
        ([around(48.2, 0.1)], DM, 16.7, "contradicted"),
        ([around(49.7, 0.1)], DM, 16.7, "contradicted"),  # better is not the same
        ([around(48.3, 0.1)], Published(48.9), 16.7, "contradicted"),  # no spread counts as none
        # The noisier run is not easier to reproduce.
        ([around(47.4, 0.9)], DM, 16.7, "reproduced"),
        ([around(47.4, 1.1)], DM, 16.7, "inconclusive"),
        ([around(22.5, 3.0)], Published(26.0, 0.8), 9.5, "inconclusive"),
        ([around(24.5, 0.3)], Published(26.0, 0.8), 9.5, "contradicted"),
        # Near the ceiling, random images must not pass for a distilled set (MNIST, IPC 50: 97.9).
        ([around(97.9, 0.02)], Published(98.6, 0.1), 0.7, "contradicted"),
        ([around(98.2, 0.02)], Published(98.6, 0.1), 0.7, "inconclusive"),
        ([around(98.5, 0.02)], Published(98.6, 0.1), 0.7, "reproduced"),
        # Nor near the floor (ImageNet-1K, IPC 1).
        ([around(0.4, 0.02)], Published(1.3, 0.1), 0.8, "contradicted"),
        ([around(2.2, 0.02)], Published(1.3, 0.1), 0.8, "contradicted"),
        ([around(0.9, 0.02)], Published(1.3, 0.1), 0.8, "inconclusive"),
        ([around(48.9, 0.1)], DM, math.nan, "inconclusive"),  # no random images to stand beside
        ([around(48.8, 0.1)], DM, -2.0, "inconclusive"),  # the paper is below random images
        # One network tells no error; several seeds do, by their means alone.
        ([[48.9]], DM, 16.7, "inconclusive"),
        ([[48.8], [49.0]], DM, 16.7, "reproduced"),
        ([around(47.0, 0.1), around(51.0, 0.1)], DM, 16.7, "inconclusive"),  # seeds: error of 2
        ([around(48.9, 2.0), around(48.8, 2.0)], DM, 16.7, "reproduced"),
        # A coreset leads nobody: random images themselves.
        ([around(14.0, 0.2)], Published(14.4, 2.0), math.inf, "reproduced"),
        ([around(17.7, 0.2)], Published(16.5), math.inf, "contradicted"),
    ],
)
def test_at_the_papers_setting(scores, printed, lead, word):
    assert accuracy(scores, printed, Differences(), lead).word == word


SAME = "reproduced: +0.0 points, 0.6 are near"


@pytest.mark.parametrize(
    ("changes", "mean", "lead", "expected"),
    [
        ({}, 48.9, 16.7, SAME),
        (
            {"compile": True, "chunk": 7, "eval_precision": "bf16", "precision": "bf16"},
            48.9,
            16.7,
            SAME,
        ),
        ({"networks": 20}, 48.9, 16.7, SAME),  # more are only more certain
        ({"iterations": 800}, 48.5, 16.7, "matched on less: iterations 800 of 20000 (25x less)"),
        ({"iterations": 800}, 52.0, 16.7, "matched on less: iterations 800 of 20000 (25x less)"),
        ({"iterations": 800}, 46.8, 16.7, "reduced budget: iterations 800 of 20000 (25x less)"),
        ({"iterations": 800}, 48.5, 0.7, "reduced budget: iterations 800 of 20000 (25x less)"),
        ({"iterations": 15000}, 46.8, 16.7, "reduced budget: iterations 15000 of 20000"),
        ({"iterations": 0}, 46.8, 16.7, "reduced budget: iterations 0 of 20000"),
        ({"subset": 1000}, 48.9, 16.7, "matched on less: 1000 training images per class"),
        ({"iterations": 40000}, 48.9, 16.7, "changed method: iterations 40000 for 20000"),
        ({"lr_img": 0.5}, 48.9, 16.7, "changed method: lr_img 0.5 for 1"),
        (
            {"lr_img": 0.5, "experts": 2},
            20.0,
            16.7,
            "changed method: lr_img 0.5 for 1, experts 2 of 100 (50x less)",
        ),
        # A baseline has no merit in being better than the print.
        (
            {"networks": 3},
            50.1,
            math.inf,
            "inconclusive: a baseline +1.2 points above the print, networks 3 of 5",
        ),
        ({"networks": 3}, 49.3, math.inf, "matched on less: networks 3 of 5"),
    ],
)
def test_other_settings(changes, mean, lead, expected):
    paper = PAPER | {"compile": False, "chunk": 0, "eval_precision": "float32"}
    differs = verdict.differences(paper | changes, paper)
    assert str(accuracy([around(mean, 0.1)], DM, differs, lead)) == expected


def test_many_changes_are_named_and_counted():
    paper = {name: 1 for name in "abcd"}
    differs = verdict.differences({name: 2 for name in "abcd"}, paper)
    assert str(differs) == "4 settings (a, b, c, d)"
    assert verdict.differences(PAPER | {"iterations": 2000, "experts": 50}, PAPER).share == 0.05


def test_a_changed_method_is_never_counted_however_near():
    differs = verdict.differences(PAPER | {"lr_img": 0.5}, PAPER)
    assert accuracy([around(48.9, 0.01)], DM, differs, 16.7).word not in verdict.COUNTED


@pytest.mark.parametrize(
    ("dataset", "checksum", "subset", "expected"),
    [
        ("cifar10", None, 0, ("cifar10", "")),
        ("folder:cifar10", JPEG, 0, ("cifar10", "on the JPEG copy")),
        ("folder:/data/anything", JPEG, 0, ("cifar10", "on the JPEG copy")),
        ("folder:cifar10", JPEG_SUBSET_1000, 1000, ("cifar10", "on the JPEG copy")),
        ("folder:cifar10", JPEG_SUBSET_1000, 500, ("", "")),
        ("folder:cifar10", "0" * 64, 0, ("", "")),  # the name says nothing
        ("folder:cifar10", None, 0, ("", "")),
    ],
)
def test_data_is_known_by_its_checksum(dataset, checksum, subset, expected):
    assert data_of(dataset, checksum, subset) == expected


@pytest.mark.parametrize(
    ("ours", "printed", "sense", "word"),
    [
        (1.244, "1.02", "at most", "contradicted"),  # "only around 2 % more time"
        (3.0, "1.02", "at most", "contradicted"),
        (1.024, "1.02", "at most", "reproduced"),  # as it is printed
        (0.98, "1.02", "at most", "reproduced"),
        (11.1, "6", "at least", "reproduced"),
        (5.4, "6", "at least", "contradicted"),
        (0.9, "6", "at least", "contradicted"),  # the wrong direction
        (53.0, "15", "at least", "reproduced"),
        (0.49, "0.52", "at most", "reproduced"),  # an attack that fares worse is safer
        (0.97, "0.52", "at most", "contradicted"),
        (0.80, "0.87", "about", "reproduced"),
        (0.41, "0.87", "about", "contradicted"),
        (-0.20, "-0.20", "about", "reproduced"),
        (0.20, "-0.20", "about", "contradicted"),
        (1.004, "1.00", "about", "reproduced"),
        (0.04, "0.0", "about", "reproduced"),  # nothing is a tenth of nothing: as it is printed
    ],
)
def test_factors(ours, printed, sense, word):
    assert factor(ours, printed, sense).word == word


def test_a_factor_at_another_setting_judges_nothing():
    found = factor(11.1, "6", "at least", "dataset cifar10 for imagenet1k")
    assert found.word == "not attempted" and "cifar10 for imagenet1k" in str(found)


def test_marks_stand_in_the_verdict():
    marks = ("on the JPEG copy", verdict.UNKNOWN_CODE)
    found = accuracy([around(48.9, 0.1)], DM, Differences(), 16.7, marks)
    assert found.short == "reproduced, on the JPEG copy, code unknown"
    assert found.why == "+0.0 points, 0.6 are near"
