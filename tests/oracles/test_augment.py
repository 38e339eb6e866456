"""Every op in one batch against a plain loop over classes, written from the formulas; ranges; gradients; errors."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import ndimage

from ddlib.augment import operations
from ddlib.augment.siamese import OPS, TABLES, augment, check_strategy, cutmix, draw
from ddlib.config import resolve
from ddlib.core import DDError, checksum, generator

ALL = "_".join(OPS)
FREPO = "frepo:flip_color_crop_rotate_translate_cutout"
IDC = ["color+crop+cutout", "color+crop", "color+flip+crop_scale_rotate"]


def bilinear(x, rows, columns):
    """x [N, C, H, W] read at the pixel positions rows, columns [H, W]; neighbours outside the image count as 0."""
    h, w = x.shape[2:]
    out = 0
    for di in (0, 1):
        for dj in (0, 1):
            i, j = rows.floor().long() + di, columns.floor().long() + dj
            weight = (1 - (rows - i).abs()) * (1 - (columns - j).abs())
            inside = ((i >= 0) & (i < h) & (j >= 0) & (j < w)).to(x.dtype)
            out = out + x[:, :, i.clamp(0, h - 1), j.clamp(0, w - 1)] * weight * inside
    return out


def plain(x, op, v):
    """One op with one parameter set `v` (the 11 numbers of an entry) on x [N, C, H, W], from the DSA formulas."""
    h, w = x.shape[2:]
    if op == "color":
        x = x + v[0]
        mean = x.mean(1, keepdim=True)
        x = (x - mean) * v[1] + mean
        mean = x.flatten(1).mean(1).view(-1, 1, 1, 1)
        return (x - mean) * v[2] + mean
    if op == "crop":
        out = torch.zeros_like(x)
        for i in range(h):
            for j in range(w):
                if 0 <= i + int(v[3]) < h and 0 <= j + int(v[4]) < w:
                    out[:, :, i, j] = x[:, :, i + int(v[3]), j + int(v[4])]
        return out
    if op == "cutout":
        keep = torch.ones(h, w, dtype=x.dtype)
        kh, kw = int(h * 0.5 + 0.5), int(w * 0.5 + 0.5)
        top, left = int(v[5]) - kh // 2, int(v[6]) - kw // 2
        keep[max(0, top) : max(0, top + kh), max(0, left) : max(0, left + kw)] = 0
        return x * keep
    if op == "flip":
        return x.flip(3) if v[7] else x
    a, b, c, d = (
        (v[8], 0, 0, v[9])
        if op == "scale"
        else (v[10].cos(), -v[10].sin(), v[10].sin(), v[10].cos())
    )
    i = torch.arange(h, dtype=x.dtype)[:, None] - (h - 1) / 2
    j = torch.arange(w, dtype=x.dtype)[None] - (w - 1) / 2
    return bilinear(
        x, (c * j + d * i).expand(h, w) + (h - 1) / 2, (a * j + b * i).expand(h, w) + (w - 1) / 2
    )


def plain_frepo(x, op, v):
    """The same for FRePo's ops (12 numbers), positions in pixels from the centre as in its code."""
    h, w = x.shape[2:]
    if op == "color":
        x = x + v[0]
        mean = x.flatten(1).mean(1).view(-1, 1, 1, 1)
        x = (x - mean) * v[1].exp() + mean
        mean = x.mean(1, keepdim=True)
        return (x - mean) * v[2].exp() + mean
    if op == "cutout":
        keep = torch.ones(h, w, dtype=x.dtype)
        keep[int(v[6]) : int(v[6]) + h // 4, int(v[7]) : int(v[7]) + w // 4] = 0
        return x * keep
    if op == "flip":
        return x.flip(3) if v[8] else x
    i = (torch.arange(h, dtype=x.dtype) - (h - 1) / 2)[:, None].expand(h, w)
    j = (torch.arange(w, dtype=x.dtype) - (w - 1) / 2)[None].expand(h, w)
    if op == "crop":
        zoom = v[3].exp()
        i, j = (i + v[4] * abs(zoom * h - h) / 2) / zoom, (j + v[5] * abs(zoom * w - w) / 2) / zoom
    elif op == "rotate":
        i, j = v[9].cos() * i + v[9].sin() * j, v[9].cos() * j - v[9].sin() * i
    else:
        i, j = i + v[10] * h, j + v[11] * w
    return bilinear(x, (i + (h - 1) / 2).clamp(0, h - 1), (j + (w - 1) / 2).clamp(0, w - 1))


def loop(x, params, each):
    """The official way: class after class, every image of a class under the class's transform."""
    out, reference = [], plain if params.table is TABLES["dsa"] else plain_frepo
    for k, images in enumerate(x.split(each)):
        for s in range(len(params.stages)):
            op = list(params.table.apply)[params.op[s, k]]
            images = reference(images, op, params.values[s, :, k])
        out.append(images)
    return torch.cat(out)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "strategy", [*OPS, ALL, *("frepo:" + op for op in TABLES["frepo"].apply), FREPO, *IDC]
)
def test_batch_equals_loop_over_classes(strategy, channels):
    rng = generator(0, "augment", strategy)
    params = draw(strategy, 12, (9, 9), rng)
    x = torch.randn(24, channels, 9, 9, generator=rng, dtype=torch.float64, requires_grad=True)
    ours, slow = augment(x, params.repeat(2)), loop(x, params, 2)
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
    assert not torch.allclose(ours, x)
    weight = torch.randn(ours.shape, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(
        *(torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, slow)), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (7, 10), (1, 1)])
@pytest.mark.parametrize("strategy", ["crop", "cutout", "flip", "crop_cutout_flip"])
def test_moving_pixels_is_exact(strategy, size):
    params = draw(strategy, 20, size, generator(1, strategy))
    x = torch.randn(20, 2, *size, generator=generator(2))
    assert torch.equal(augment(x, params), loop(x, params, 1))


@pytest.mark.parametrize(
    "strategy", ["scale", "frepo:crop", "frepo:rotate", "frepo:translate", "frepo:cutout"]
)
def test_an_image_that_is_not_square(strategy):
    params = draw(strategy, 8, (6, 11), generator(3))
    x = torch.randn(8, 1, 6, 11, generator=generator(4), dtype=torch.float64)
    torch.testing.assert_close(augment(x, params), loop(x, params, 1), rtol=0, atol=1e-12)


def test_draws_are_those_of_the_committed_records():
    """sha256 of what the version behind the first records drew (adding 0 makes -0 and 0 the same)."""
    drawn = [
        draw(strategy, n, size, generator(k, "golden"), op_every=every)
        for k, (strategy, n, size, every) in enumerate(
            [
                (ALL, 10, (32, 32), 1),
                (ALL, 25, (28, 28), 10),
                ("color_crop_cutout_scale_rotate", 7, (9, 5), 7),
            ]
        )
    ]
    assert (
        checksum(*(t for p in drawn for t in (p.op[0], p.values[0] + 0)))[:16] == "14e1e67e36cfa5ed"
    )


@pytest.mark.parametrize("strategy", [*IDC, "frepo:color+crop_rotate+flip"])
def test_stages_are_applied_one_after_the_other(strategy):
    params = draw(strategy, 30, (8, 8), generator(20), op_every=3)
    x = y = torch.randn(30, 3, 8, 8, generator=generator(21))
    assert "+".join(map("_".join, params.stages)) == strategy.removeprefix("frepo:")
    for s, ops in enumerate(params.stages):
        names = list(params.table.apply)
        assert {names[k] for k in params.op[s].tolist()} == set(ops)
        assert all(len(set(run.tolist())) == 1 for run in params.op[s].split(3))
        y = augment(
            y,
            replace(
                params, op=params.op[s : s + 1], values=params.values[s : s + 1], stages=(ops,)
            ),
        )
    assert torch.equal(augment(x, params), y)
    one = draw(strategy.split("+")[0], 30, (8, 8), generator(20), op_every=3)
    assert one.values.shape[0] == 1 and len(params.values[:, 0].unique()) == 30 * len(params.stages)


def test_order_of_stages():
    x = torch.randn(9, 3, 8, 8, generator=generator(22))
    assert (augment(x, draw("color+cutout", 9, (8, 8), generator(23))) == 0).flatten(1).any(1).all()
    assert not (augment(x, draw("cutout+color", 9, (8, 8), generator(23))) == 0).any()


@pytest.mark.parametrize("strategy", [ALL, FREPO, IDC[2]])
def test_real_and_synthetic_share_the_transform(strategy):
    params = draw(strategy, 10, (16, 16), generator(5))
    real = torch.randn(10, 7, 3, 16, 16, generator=generator(6))
    synthetic = real[:, 2:5]
    a = augment(real.flatten(0, 1), params.repeat(7)).view_as(real)
    b = augment(synthetic.flatten(0, 1), params.repeat(3)).view_as(synthetic)
    assert torch.equal(a[:, 2:5], b)
    some = torch.tensor([7, 1])
    assert torch.equal(
        augment(real[some].flatten(0, 1), params.select(some).repeat(7)), a[some].flatten(0, 1)
    )
    assert len(params.select(slice(2, 5)).repeat(3)) == 9


@pytest.mark.parametrize(
    "strategy", ["crop", "scale", "rotate", "color+cutout+flip", "frepo:color+crop+rotate"]
)
def test_finite_differences(strategy):
    params = draw(strategy, 2, (5, 5), generator(7))
    x = torch.randn(2, 2, 5, 5, generator=generator(8), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: augment(x, params), x)
    assert torch.autograd.gradgradcheck(lambda x: augment(x, params).square(), x)


def frequencies(values, expected):
    """The values seen are the expected ones, each within five standard errors of the uniform share."""
    seen, counts = torch.unique(values, return_counts=True)
    assert seen.tolist() == list(expected)
    p = 1 / len(seen)
    assert (counts / len(values) - p).abs().max() <= 5 * math.sqrt(p * (1 - p) / len(values))


@pytest.mark.parametrize("strategy", [ALL, "color_crop_cutout_scale_rotate", IDC[2], FREPO])
def test_ops_are_uniform(strategy):
    params = draw(strategy, 20000, (32, 32), generator(9))
    for op, ops in zip(params.op, params.stages, strict=True):
        frequencies(op, sorted(map(list(params.table.apply).index, ops)))


def ranges(v, limits):
    """Row r of v fills limits[r] = (low, high) evenly."""
    for row, (low, high) in limits.items():
        slack = (high - low) / 200
        assert low <= v[row].min() < low + slack and high - slack < v[row].max() <= high
        assert abs(v[row].mean() - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * v.shape[1])


def test_parameters_cover_their_ranges():
    v = draw(ALL, 20000, (32, 28), generator(10)).values[0]
    frequencies(v[3], range(-4, 5))
    frequencies(v[4], range(-4, 5))
    frequencies(v[5], range(33))
    frequencies(v[6], range(29))
    frequencies(v[7], (0, 1))
    assert set(draw("cutout", 999, (9, 9), generator(11)).values[0, 5].tolist()) == set(
        range(9)
    )  # odd hole: 0..8
    ranges(
        v,
        {
            0: (-0.5, 0.5),
            1: (0, 2),
            2: (0.5, 1.5),
            8: (1 / 1.2, 1.2),
            9: (1 / 1.2, 1.2),
            10: (-math.pi / 12, math.pi / 12),
        },
    )


def test_frepo_parameters_cover_their_ranges():
    v = draw(FREPO, 20000, (32, 28), generator(24)).values[0]
    frequencies(v[6], range(25))  # the last hole of 8 rows starts at 24
    frequencies(v[7], range(22))
    frequencies(v[8], (0, 1))
    ranges(
        v,
        {
            0: (-0.25, 0.25),
            1: (-0.25, 0.25),
            2: (-0.25, 0.25),
            3: (math.log(0.8), math.log(1.25)),
            4: (-1, 1),
            5: (-1, 1),
            9: (-math.pi / 12, math.pi / 12),
            10: (-0.125, 0.125),
            11: (-0.125, 0.125),
        },
    )


@pytest.mark.parametrize("strategy", [ALL, "color_crop+cutout_flip", FREPO])
def test_draws_are_independent(strategy):
    params = draw(strategy, 20000, (32, 32), generator(19))
    table = torch.cat([params.op, *params.values])
    assert (torch.corrcoef(table) - torch.eye(len(table))).abs().max() < 5 / math.sqrt(20000)


def test_one_op_a_mini_batch_with_parameters_an_image():
    params = draw(ALL, 25, (8, 8), generator(12), op_every=10)
    assert [len(set(part.tolist())) for part in params.op[0].split(10)] == [1, 1, 1]
    assert len(params.values[0, 10].unique()) == 25
    assert (
        len({int(draw(ALL, 5, (8, 8), generator(k), op_every=5).op[0, 0]) for k in range(50)}) == 6
    )


def test_draws_repeat_and_leave_the_global_state_alone():
    state = torch.get_rng_state()
    a, b = (draw(ALL, 6, (8, 8), generator(13)) for _ in range(2))
    augment(torch.zeros(6, 3, 8, 8), a)
    assert torch.equal(a.values, b.values) and torch.equal(a.op, b.op)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("strategy", ["", "none"])
def test_no_strategy_changes_nothing(strategy):
    x = torch.randn(4, 3, 8, 8, generator=generator(14))
    assert torch.equal(augment(x, draw(strategy, 2, (8, 8), generator(0)).repeat(2)), x)


@pytest.mark.parametrize(
    "strategy", ["crop_scale_rotate", "frepo:flip_crop_cutout_translate", "flip+crop_scale"]
)
def test_no_images_and_half_precision(strategy):
    assert augment(torch.zeros(0, 3, 8, 8), draw(strategy, 0, (8, 8), generator(0))).shape == (
        0,
        3,
        8,
        8,
    )
    x = torch.randn(60, 3, 8, 8, generator=generator(15))
    params = draw(strategy, 60, (8, 8), generator(16))
    half = augment(x.bfloat16(), params)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), augment(x, params), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({"strategy": "color_crop_flop"}, "flop.*flip"),
        ({"strategy": "color+flop"}, "flop.*flip"),
        ({"strategy": "frepo:flip_scale"}, "scale.*translate"),
        ({"strategy": "idc:color"}, "idc.*dsa, frepo"),
        ({"strategy": "color++crop"}, "color, crop, cutout"),
        ({"strategy": "color__crop"}, "color, crop, cutout"),
        ({"op_every": 0}, "at least 1"),
    ],
)
def test_bad_requests_are_named(kwargs, names):
    with pytest.raises(DDError, match=names):
        draw(**({"strategy": ALL, "n": 2, "size": (8, 8), "generator": generator(0)} | kwargs))
    if "strategy" in kwargs:
        with pytest.raises(DDError, match=names):
            check_strategy(kwargs["strategy"])
    for strategy in ("", "none", ALL, FREPO, *IDC):
        check_strategy(strategy)


@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 3, 8, 9)])
def test_parameters_of_other_images_are_refused(shape):
    with pytest.raises(DDError, match="2 images of 8x8"):
        augment(torch.zeros(shape), draw(ALL, 2, (8, 8), generator(0)))


def box_of(mask):
    """The numbers of rows and columns of a mask [H, W], which must be one rectangle."""
    rows, columns = (mask.any(dim).nonzero().flatten() for dim in (1, 0))
    assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert mask.sum() == len(rows) * len(columns)
    return len(rows), len(columns)


def test_cutmix_pastes_one_box_of_a_partner_and_weighs_the_labels_by_its_area():
    n, h, w, seen = 6, 8, 12, set()
    x = (
        (torch.arange(n) * 1.0).view(n, 1, 1, 1).expand(n, 2, h, w).clone()
    )  # the value tells the source
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    for k in range(300):
        mixed, soft = cutmix(x, y, generator(k, "cutmix"), 1.0, 5)
        assert torch.equal(mixed[:, 0], mixed[:, 1]) and soft.shape == (n, 5)
        for c in range(5):
            share = (y[mixed[:, 0].long()] == c).float().mean((1, 2))
            torch.testing.assert_close(soft[:, c], share, rtol=0, atol=1e-6)
        moved = (mixed[:, 0] != x[:, 0]).any(0)
        if moved.any():
            seen.add(box_of(moved))
            inside = mixed[:, 0, moved]
            assert (
                sorted(inside[:, 0].tolist()) == list(range(n)) and (inside == inside[:, :1]).all()
            )
    assert len(seen) > 20 and tuple(map(max, zip(*seen, strict=True))) == (
        h - 2,
        w - 2,
    )  # sides are even, sqrt < 1
    assert torch.equal(x[:, 0, 0, 0], torch.arange(6.0))  # the batch handed in is left alone


def test_cutmix_area_and_frequency():
    """lambda ~ U(0, 1): the half side k has P = ((2k+2)/s)^2 - (2k/s)^2, and the box is clipped at the border."""
    s, trials = 8, 4000
    x, y = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, s, s), torch.tensor([0, 1])
    rng = generator(25)
    shares = torch.tensor(
        [cutmix(x, y, rng, 1.0, 2)[1][0, 1].item() for _ in range(trials)]
    ).double()
    expected = 0.0
    for k in range(s // 2):
        length = sum(min(s, c + k) - max(0, c - k) for c in range(s)) / s**2
        expected += (((2 * k + 2) / s) ** 2 - (2 * k / s) ** 2) * length**2
    expected /= 2  # half of the permutations of two images are the identity
    assert abs(shares.mean() - expected) < 5 * shares.std() / math.sqrt(trials)
    images = torch.randn(5, 1, 32, 32, generator=rng)
    mixed = (
        sum(cutmix(images, torch.arange(5), rng, 0.3, 5)[0] is not images for _ in range(trials))
        / trials
    )
    assert abs(mixed - 0.3) < 5 * math.sqrt(0.3 * 0.7 / trials)
    assert cutmix(images, torch.arange(5), rng, 0.0, 5)[0] is images


def test_cutmix_of_soft_labels_repeats_and_is_differentiable():
    x = torch.randn(4, 3, 6, 6, generator=generator(26), requires_grad=True)
    y = torch.randn(4, 7, generator=generator(27), requires_grad=True)
    (a, soft), (b, again) = (cutmix(x, y, generator(29), 1.0) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(soft, again) and not torch.equal(soft, y)
    torch.testing.assert_close(soft.sum(0), y.sum(0))
    a.sum().backward()
    assert x.grad.sum() == x.numel()  # every pixel of the result is one pixel of x
    hard, one_hot = cutmix(x, torch.arange(4), generator(29), 0.0, 4)
    assert hard is x and torch.equal(one_hot, torch.eye(4))


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_cutmix_refuses_what_is_no_probability(p):
    with pytest.raises(DDError, match=r"\[0, 1\]"):
        cutmix(torch.zeros(1, 1, 2, 2), torch.tensor([0]), generator(0), p, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", [ALL, FREPO, IDC[2]])
def test_gpu_equals_cpu_and_never_waits(strategy):
    params = draw(strategy, 40, (16, 16), generator(17)).repeat(2)
    x = torch.randn(80, 3, 16, 16, generator=generator(18))
    device = x.cuda()
    labels = torch.arange(80, device="cuda") % 10
    augment(device, params), cutmix(device, labels, generator(29), 1.0, 10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = augment(device, params)
        mixed = cutmix(device, labels, generator(29), 1.0, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), augment(x, params), rtol=0, atol=1e-4)
    for ours, cpu in zip(mixed, cutmix(x, labels.cpu(), generator(29), 1.0, 10), strict=True):
        torch.testing.assert_close(ours.cpu(), cpu, rtol=0, atol=1e-6)


# DC's own, for evaluation


def test_dc_draws_an_operation_for_every_image():
    params = draw("dc:crop_scale_rotate", 900, (28, 28), generator(0), op_every=900)
    counts = torch.bincount(params.op[0])
    assert (counts > 250).all()
    shift, angle, scale = params.values[0].split([2, 1, 2])
    assert shift.unique().tolist() == list(range(-4, 4))
    degrees = (angle * 180 / math.pi).round(decimals=6)
    assert degrees.min() == -45 and degrees.max() == 44
    assert degrees.equal(degrees.round())
    assert 0.8 <= scale.min() < 0.81 and 1.19 < scale.max() <= 1.2


def test_dc_operations_against_scipy_and_interpolation():
    x = torch.rand(1, 1, 28, 28, generator=generator(1), dtype=torch.float64)
    apply, value = operations.DC.apply, lambda *v: torch.tensor(v, dtype=torch.float64)[:, None]
    cropped = apply["crop"](x, value(-4, 3))
    assert cropped[..., 4:, :25].equal(x[..., :24, 3:]) and not cropped[..., :4, :].any()
    turned = apply["rotate"](x, value(30 * math.pi / 180))
    reference = ndimage.rotate(x[0, 0].numpy(), 30, order=1, reshape=False)
    inner = slice(6, 22)  # the two treat the border differently
    difference = (turned[0, 0] - torch.from_numpy(reference))[inner, inner].abs().max()
    other = (turned[0, 0] - torch.from_numpy(reference).flip(0))[inner, inner].abs().max()
    assert difference < 1e-9 < other
    smaller = apply["scale"](x, value(0.87, 1.0))
    source = (torch.arange(28) - 13.5) / 0.87 + 13.5
    inside = (source > -0.5) & (source < 27.5)
    assert 0 < (~inside).sum() < 6
    assert smaller[..., inside].equal(x[..., source[inside].round().long()])
    assert not smaller[..., ~inside].any()


def test_dc_evaluates_mnist_with_augmentation_and_all_else_without():
    for method, changes in (
        ("dc", {}),
        ("random", {"protocol": "dc"}),
        ("herding", {"protocol": "dc"}),
    ):
        mnist = resolve(method, "mnist", 10, "paper", **changes)
        assert (mnist.recipe.augment, mnist.recipe.epochs) == ("dc:crop_scale_rotate", 1001)
        cifar = resolve(method, "cifar10", 10, "paper", **changes)
        assert (cifar.recipe.augment, cifar.recipe.epochs) == ("none", 301)
    dsa = resolve("dsa", "mnist", 10, "paper").recipe
    assert (dsa.augment, dsa.epochs) == ("color_crop_cutout_scale_rotate", 1001)
