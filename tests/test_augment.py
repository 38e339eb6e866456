"""DSA in one batch against a plain loop over classes, written from the formulas; ranges; gradients; errors."""

import math

import pytest
import torch

from ddlib.augment import OPS, augment, draw
from ddlib.core import DDError, generator

ALL = "_".join(OPS)


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
    a, b, c, d = (v[8], 0, 0, v[9]) if op == "scale" else (v[10].cos(), -v[10].sin(), v[10].sin(), v[10].cos())
    i = torch.arange(h, dtype=x.dtype)[:, None] - (h - 1) / 2
    j = torch.arange(w, dtype=x.dtype)[None] - (w - 1) / 2
    return bilinear(x, (c * j + d * i).expand(h, w) + (h - 1) / 2, (a * j + b * i).expand(h, w) + (w - 1) / 2)


def loop(x, params, each):
    """The official way: class after class, every image of a class under the class's transform."""
    out = []
    for k, images in enumerate(x.split(each)):
        for op in params.ops if params.mode == "M" else [OPS[params.op[k]]]:
            images = plain(images, op, params.values[:, k])
        out.append(images)
    return torch.cat(out)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("strategy", "mode"), [(op, "S") for op in OPS] + [(ALL, "S"), (ALL, "M")])
def test_batch_equals_loop_over_classes(strategy, mode, channels):
    rng = generator(0, "augment", strategy)
    params = draw(strategy, 12, (9, 9), rng, mode=mode)
    x = torch.randn(24, channels, 9, 9, generator=rng, dtype=torch.float64, requires_grad=True)
    ours, slow = augment(x, params.repeat(2)), loop(x, params, 2)
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
    assert not torch.allclose(ours, x)
    weight = torch.randn(ours.shape, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, slow)),
                               rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (7, 10), (1, 1)])
@pytest.mark.parametrize("strategy", ["crop", "cutout", "flip", "crop_cutout_flip"])
def test_moving_pixels_is_exact(strategy, size):
    params = draw(strategy, 20, size, generator(1, strategy))
    x = torch.randn(20, 2, *size, generator=generator(2))
    assert torch.equal(augment(x, params), loop(x, params, 1))


def test_scale_of_an_image_that_is_not_square():
    params = draw("scale", 4, (6, 11), generator(3))
    x = torch.randn(4, 1, 6, 11, generator=generator(4), dtype=torch.float64)
    torch.testing.assert_close(augment(x, params), loop(x, params, 1), rtol=0, atol=1e-12)


def test_real_and_synthetic_share_the_transform():
    params = draw(ALL, 10, (16, 16), generator(5))
    real = torch.randn(10, 7, 3, 16, 16, generator=generator(6))
    synthetic = real[:, 2:5]
    a = augment(real.flatten(0, 1), params.repeat(7)).view_as(real)
    b = augment(synthetic.flatten(0, 1), params.repeat(3)).view_as(synthetic)
    assert torch.equal(a[:, 2:5], b)
    some = torch.tensor([7, 1])
    assert torch.equal(augment(real[some].flatten(0, 1), params.select(some).repeat(7)), a[some].flatten(0, 1))
    assert len(params.select(slice(2, 5)).repeat(3)) == 9


@pytest.mark.parametrize("op", ["crop", "scale", "rotate"])
def test_finite_differences(op):
    params = draw(op, 3, (8, 8), generator(7))
    x = torch.randn(3, 1, 8, 8, generator=generator(8), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: augment(x, params), x)


def frequencies(values, expected):
    """The values seen are the expected ones, each within five standard errors of the uniform share."""
    seen, counts = torch.unique(values, return_counts=True)
    assert seen.tolist() == list(expected)
    p = 1 / len(seen)
    assert (counts / len(values) - p).abs().max() < 5 * math.sqrt(p * (1 - p) / len(values))


@pytest.mark.parametrize("strategy", [ALL, "color_crop_cutout_scale_rotate"])
def test_ops_are_uniform(strategy):
    frequencies(draw(strategy, 20000, (32, 32), generator(9)).op, sorted(map(OPS.index, strategy.split("_"))))


def test_parameters_cover_their_ranges():
    v = draw(ALL, 20000, (32, 28), generator(10)).values
    frequencies(v[3], range(-4, 5))
    frequencies(v[4], range(-4, 5))
    frequencies(v[5], range(33))
    frequencies(v[6], range(29))
    frequencies(v[7], (0, 1))
    assert set(draw("cutout", 999, (9, 9), generator(11)).values[5].tolist()) == set(range(9))  # odd hole: 0..8
    limits = {0: (-0.5, 0.5), 1: (0, 2), 2: (0.5, 1.5), 8: (1 / 1.2, 1.2), 9: (1 / 1.2, 1.2),
              10: (-math.pi / 12, math.pi / 12)}
    for row, (low, high) in limits.items():
        slack = (high - low) / 200
        assert low <= v[row].min() < low + slack and high - slack < v[row].max() <= high
        assert abs(v[row].mean() - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * 20000)


def test_draws_are_independent():
    params = draw(ALL, 20000, (32, 32), generator(19))
    table = torch.cat([params.op[None], params.values])
    assert (torch.corrcoef(table) - torch.eye(12)).abs().max() < 5 / math.sqrt(20000)


def test_one_op_a_mini_batch_with_parameters_an_image():
    params = draw(ALL, 25, (8, 8), generator(12), op_every=10)
    assert [len(set(part.tolist())) for part in params.op.split(10)] == [1, 1, 1]
    assert len(params.values[10].unique()) == 25
    assert len({int(draw(ALL, 5, (8, 8), generator(k), op_every=5).op[0]) for k in range(50)}) == 6


def test_draws_repeat_and_leave_the_global_state_alone():
    state = torch.get_rng_state()
    a, b = (draw(ALL, 6, (8, 8), generator(13)) for _ in range(2))
    augment(torch.zeros(6, 3, 8, 8), a)
    assert torch.equal(a.values, b.values) and torch.equal(a.op, b.op)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("strategy", ["", "none"])
def test_no_strategy_changes_nothing(strategy):
    x = torch.randn(4, 3, 8, 8, generator=generator(14))
    for mode in "SM":
        assert torch.equal(augment(x, draw(strategy, 2, (8, 8), generator(0), mode=mode).repeat(2)), x)


def test_no_images_and_half_precision():
    assert augment(torch.zeros(0, 3, 8, 8), draw(ALL, 0, (8, 8), generator(0))).shape == (0, 3, 8, 8)
    x = torch.randn(60, 3, 8, 8, generator=generator(15))
    params = draw("crop_scale_rotate", 60, (8, 8), generator(16))
    half = augment(x.bfloat16(), params)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), augment(x, params), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("kwargs", "names"), [
    ({"strategy": "color_crop_flop"}, "flop.*flip"), ({"strategy": "color__crop"}, "color, crop, cutout"),
    ({"mode": "X"}, "S, M"), ({"op_every": 0}, "at least 1")])
def test_bad_requests_are_named(kwargs, names):
    with pytest.raises(DDError, match=names):
        draw(**({"strategy": ALL, "n": 2, "size": (8, 8), "generator": generator(0)} | kwargs))


@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 3, 8, 9)])
def test_parameters_of_other_images_are_refused(shape):
    with pytest.raises(DDError, match="2 images of 8x8"):
        augment(torch.zeros(shape), draw(ALL, 2, (8, 8), generator(0)))


@pytest.mark.gpu
def test_gpu_equals_cpu_and_never_waits():
    params = draw(ALL, 40, (16, 16), generator(17)).repeat(2)
    x = torch.randn(80, 3, 16, 16, generator=generator(18))
    device = x.cuda()
    augment(device, params)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = augment(device, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), augment(x, params), rtol=0, atol=1e-4)
