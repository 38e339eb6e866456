"""Batched K-means against scikit-learn, a plain loop and itself: classes, ragged sizes, empty clusters, ties."""

import pytest
import torch
from sklearn.cluster import KMeans

from ddlib.core import DDError, generator
from ddlib.match.kmeans import _lloyd, kmeans, nearest


def clouds(
    classes: int, rows: int, columns: int, blobs: int = 12, spread: float = 1.0, seed: int = 0
) -> torch.Tensor:
    """[C, N, D] of Gaussian clouds, overlapping at spread 1; each class has its own."""
    rng = generator(seed, "clouds")
    centres = torch.randn(classes, blobs, columns, generator=rng)
    which = torch.randint(blobs, (classes, rows), generator=rng)
    return centres[torch.arange(classes)[:, None], which] + spread * torch.randn(
        classes, rows, columns, generator=rng
    )


def inertia_of(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x.double(), centres.double()).min(2).values.square().sum(1)


def plain(
    x: torch.Tensor, centres: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm by loops over clusters."""
    centres = centres.clone()
    for _ in range(iterations):
        assignment = torch.cdist(x, centres).argmin(1)
        for k in range(len(centres)):
            if (assignment == k).any():
                centres[k] = x[assignment == k].mean(0)
    return centres, assignment


@pytest.mark.parametrize(
    "columns", [24, 1100]
)  # in the whole space; by way of the sketch, 1,100 being no multiple
def test_inertia_is_scikit_learns(columns):
    # Both end in local minima, which differ by the seeds: means over classes, and over oracle's three seeds.
    x = clouds(4, 900, columns)
    centres, _, inertia = kmeans(x, 40, generator(0, "k"))
    torch.testing.assert_close(inertia, inertia_of(x, centres), rtol=5e-3, atol=0)
    oracle = [
        KMeans(40, init="random", n_init=1, random_state=seed)
        .fit(rows.numpy())
        .inertia_  # to convergence
        for rows in x
        for seed in range(3)
    ]
    assert float(inertia.mean()) < 1.01 * sum(oracle) / len(oracle)


def test_it_is_the_plain_loop_in_float64():
    x = clouds(3, 200, 7).double()
    start = x[:, :9]
    centres, assignment, inertia = _lloyd(x, start, 6, torch.zeros(3, 200, dtype=torch.bool))
    for c in range(3):
        expected, where = plain(x[c], start[c], 6)
        torch.testing.assert_close(centres[c], expected, rtol=0, atol=1e-12)
        assert torch.equal(assignment[c], where)
        torch.testing.assert_close(
            inertia[c], (x[c] - expected[where]).square().sum(), rtol=1e-12, atol=0
        )


def test_ragged_classes_are_clustered_as_if_alone():
    x, sizes = clouds(3, 60, 5).double(), [60, 17, 33]
    padded = x.clone()
    for c, size in enumerate(sizes):
        padded[c, size:] = 1e3  # must not matter
    padding = torch.arange(60) >= torch.tensor(sizes)[:, None]
    centres, assignment, inertia = _lloyd(padded, x[:, :8], 5, padding)
    for c, size in enumerate(sizes):
        alone = _lloyd(x[c : c + 1, :size], x[c : c + 1, :8], 5, padding[c : c + 1, :size])
        torch.testing.assert_close(centres[c], alone[0][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(inertia[c], alone[2][0], rtol=1e-10, atol=0)
        assert torch.equal(assignment[c, :size], alone[1][0]) and (assignment[c, size:] == 8).all()
    centres, assignment, _ = kmeans(padded, 8, generator(0, "k"), sizes)
    assert centres.abs().max() < 100 and torch.equal(assignment == 8, padding)
    rows = nearest(padded, centres, 2, sizes)
    assert all(
        row.max() < size and len(row.unique()) == 16 for row, size in zip(rows, sizes, strict=True)
    )


def test_seeds_are_different_rows_and_an_empty_cluster_keeps_its_centre():
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])[None]
    centres, assignment, _ = _lloyd(
        x, torch.tensor([[[0.0], [10.0], [-90.0]]]), 3, torch.zeros(1, 4, dtype=torch.bool)
    )
    assert centres.flatten().tolist() == [0.5, 10.5, -90.0] and assignment.tolist() == [
        [0, 0, 1, 1]
    ]
    for seed in range(20):  # as many clusters as rows: every row is its own seed
        assert float(kmeans(x, 4, generator(seed, "k"))[2]) == pytest.approx(0, abs=1e-3)


def test_picks_are_different_even_where_rows_are_not():
    x = torch.zeros(2, 30, 3)
    x[1] = clouds(1, 30, 3)[0]
    rows = nearest(x, kmeans(x, 10, generator(0, "k"))[0], 3)
    assert rows.shape == (2, 30) and all(sorted(row.tolist()) == list(range(30)) for row in rows)


def test_a_pick_is_the_nearest_row_that_is_left():
    x, centres = torch.tensor([[[0.0], [2.0], [3.0], [9.0]]]), torch.tensor([[[1.9], [2.1], [8.0]]])
    assert nearest(x, centres).tolist() == [[1, 2, 3]]
    assert nearest(x, centres[:, 1:], 2).tolist() == [[1, 2, 3, 0]]


@pytest.mark.parametrize("sketch", [False, True])
def test_groups_of_classes_leave_the_result_alone(monkeypatch, sketch):
    x = clouds(4, 80, 1024 if sketch else 16)
    whole = kmeans(x, 10, generator(0, "k"))
    monkeypatch.setattr("ddlib.match.kmeans.LIMIT", 1)
    parts = kmeans(x, 10, generator(0, "k"))
    torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=1e-4)
    assert torch.equal(parts[1], whole[1])
    assert torch.equal(nearest(x, whole[0]), nearest(x, parts[0]))


def test_the_generator_alone_decides():
    x = clouds(2, 120, 6)
    one, two, other = (kmeans(x, 9, generator(seed, "k"))[0] for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    x = clouds(4, 500, 1024, spread=0.5)
    cpu, cuda = (kmeans(x.to(device), 20, generator(0, "k")) for device in ("cpu", "cuda"))
    assert (cpu[1] == cuda[1].cpu()).float().mean() > 0.99  # up to ties
    torch.testing.assert_close(cuda[2].cpu(), cpu[2], rtol=1e-3, atol=0)
    again = kmeans(x.cuda(), 20, generator(0, "k"))
    assert all(torch.equal(a, b) for a, b in zip(cuda, again, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: kmeans(x, 8, generator(0, "k"), [9, 7]),
            "cannot make 8 clusters of the 7 samples of class 1.*1 to 7",
        ),
        (lambda x: kmeans(x, 0, generator(0, "k")), "cannot make 0 clusters"),
        (lambda x: nearest(x, x[:, :5], 2), "cannot pick 10 samples of the 9"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(DDError, match=message):
        call(clouds(2, 9, 3))
