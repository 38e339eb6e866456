"""The whole trunk on the embedded digits at the smoke profile: distilling must be worth it.

The runs are the notebooks': within `make test`, which empties the results first, whoever is first makes them.
"""

from statistics import fmean

import pytest

import ddlib as dd

SEEDS = (0, 1, 2)


@pytest.mark.slow
def test_dm_beats_random_images_by_ten_points_at_ipc_1():
    data = dd.load("digits", device="cpu")
    means = {
        method: fmean(
            dd.run(
                method, "digits", ipc=1, seed=seed, device="cpu", data=data, progress=False
            ).accuracy
            for seed in SEEDS
        )
        for method in ("random", "dm")
    }
    assert means["dm"] >= means["random"] + 10, means
    assert means["random"] > 20  # chance is 10: the protocol itself works


@pytest.mark.slow
def test_gradient_matching_beats_random_images_by_ten_points_at_ipc_1():
    data = dd.load("digits", device="cpu")
    scores = {
        method: dd.run(method, "digits", ipc=1, device="cpu", data=data, progress=False).accuracy
        for method in ("random", "dsa", "idc", "dream", "dream_plus")
    }
    assert min(scores.values()) == scores["random"] <= sorted(scores.values())[1] - 10, scores
