"""The papers' parameter counts, seeds, spec grammar, other image sizes, and which norms couple the batch."""

import pytest
import torch
import torch.nn.functional as F

from ddlib.core import DDError, generator
from ddlib.nets.build import ACTIVATIONS, DEFAULTS, build, count_flops, default_depth, initialise

CIFAR, MNIST, TINY, DIGITS = (3, 32, 32), (1, 28, 28), (3, 64, 64), (1, 8, 8)
FREPO = "convnet:norm=none,grow=2,init=lecun"  # where there is no norm, its order says nothing
POOL = "convnet:norm=bn,grow=2,order=pre,init=lecun"


def parameters(net):
    return sum(p.numel() for p in net.parameters())


# Released code of DC/DSA/DM, counted: (spec, shape, classes, parameters, features).
COUNTS = [
    ("convnet", CIFAR, 10, 320_010, 2048),
    ("convnet", MNIST, 10, 317_706, 2048),
    ("convnet", CIFAR, 100, 504_420, 2048),
    ("convnet", TINY, 200, 857_160, 2048),
    ("convnet:depth=3", TINY, 200, 1_938_120, 8192),
    ("convnet:width=32", CIFAR, 10, 24_714, 512),
    ("convnet:width=64", CIFAR, 10, 86_282, 1024),
    ("convnet:width=256", CIFAR, 10, 1_229_834, 4096),
    ("convnet:depth=1", CIFAR, 10, 331_530, 32768),
    ("convnet:depth=2", CIFAR, 10, 233_610, 8192),
    ("convnet:depth=4", CIFAR, 10, 452_490, 512),
    ("convnet:norm=none", CIFAR, 10, 319_242, 2048),
    ("convnet:norm=bn", CIFAR, 10, 320_010, 2048),
    ("convnet:norm=ln", CIFAR, 10, 663_306, 2048),
    ("convnet:norm=gn", CIFAR, 10, 320_010, 2048),
    ("convnet:pool=none", CIFAR, 10, 1_610_250, 131072),
    ("convnet:pool=max", CIFAR, 10, 320_010, 2048),
    ("mlp", CIFAR, 10, 411_146, 128),
    ("mlp", MNIST, 10, 118_282, 128),
    ("lenet", CIFAR, 10, 62_006, 84),
    ("lenet", MNIST, 10, 61_706, 84),
    ("alexnet", CIFAR, 10, 1_872_202, 3072),
    ("alexnet", MNIST, 10, 1_865_802, 3072),
    ("alexnet:norm=bn", CIFAR, 10, 1_874_122, 3072),
    ("alexnet:norm=bn", MNIST, 10, 1_867_722, 3072),
    ("vgg11", CIFAR, 10, 9_231_114, 512),
    ("vgg11:norm=bn", CIFAR, 10, 9_231_114, 512),
    ("vgg11", MNIST, 10, 9_229_962, 512),
    ("resnet18", CIFAR, 10, 11_173_962, 512),
    ("resnet18:norm=bn", CIFAR, 10, 11_173_962, 512),
    ("resnet18", MNIST, 10, 11_172_810, 512),
    ("resnet18_ap", CIFAR, 10, 11_250_762, 8192),
    ("resnet18_ap:norm=bn", CIFAR, 10, 11_250_762, 8192),
    ("resnet18_ap", MNIST, 10, 11_213_770, 4608),
]


@pytest.mark.parametrize(("spec", "shape", "classes", "count", "dim"), COUNTS)
def test_published_parameter_counts(spec, shape, classes, count, dim):
    net = build(spec, shape, classes)
    assert (parameters(net), net.feature_dim, net.classifier.in_features) == (count, dim, dim)
    with torch.no_grad():
        assert net.features(torch.zeros(2, *shape)).shape == (2, dim)


# FRePo's ConvNet of width w: (3x3 convolutions of w, 2w, 4w, ..., linear), BatchNorm before all but the first.
FREPO_COUNTS = [
    (MNIST, 10, 8192, 1_558_538, 768),
    (CIFAR, 10, 8192, 1_560_842, 768),
    (CIFAR, 100, 8192, 2_298_212, 768),
    (CIFAR, 200, 8192, 3_117_512, 768),
    (TINY, 200, 16384, 9_475_528, 1792),
    (TINY, 1000, 16384, 22_583_528, 1792),
    ((3, 128, 128), 10, 32768, 25_402_634, 3840),
]


@pytest.mark.parametrize(("shape", "classes", "dim", "count", "norms"), FREPO_COUNTS)
def test_frepos_parameter_counts(shape, classes, dim, count, norms):
    net = build(POOL, shape, classes)
    affine = sum(parameters(m) for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert (net.feature_dim, parameters(net), affine) == (
        dim,
        count + norms,
        norms,
    ) and net.spec == POOL


def test_frepos_evaluation_network_has_no_norm():
    net = build(FREPO, CIFAR, 10)
    assert parameters(net) == 1_560_842 and not net.couples_samples and net.spec == FREPO


def test_frepos_block_is_norm_convolution_relu_pool():
    net = build("convnet:width=4,depth=2,norm=bn,grow=3,order=pre", DIGITS, 3)
    kinds = [type(layer).__name__ for layer in net.body]
    assert kinds == ["Conv2d", "ReLU", "AvgPool2d", "BatchNorm2d", "Conv2d", "ReLU", "AvgPool2d"]
    assert [layer.out_channels for layer in net.body[::4]] == [4, 12]
    assert (
        net.body[3].momentum == 0.9 and build("convnet:norm=bn", DIGITS, 3).body[1].momentum == 0.1
    )


def test_lecun_initialisation():
    net = build(POOL, CIFAR, 10, generator(3))
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            std = layer.weight[0].numel() ** -0.5
            assert abs(layer.weight.std() / std - 1) < 0.02 and not layer.bias.any()
            assert 1.9 * std / 0.8796 < layer.weight.abs().max() <= 2.0001 * std / 0.8796


def test_mnist_ends_in_a_4x4_map():
    assert build("convnet", MNIST, 10).body(torch.zeros(1, *MNIST)).shape == (1, 128, 4, 4)
    assert build("convnet", (3, 28, 28), 10).body(torch.zeros(1, 3, 28, 28)).shape == (1, 128, 3, 3)


@pytest.mark.parametrize(
    "spec", [*DEFAULTS, "convnet:norm=bn", "resnet18:norm=ln,width=16", "alexnet:norm=in"]
)
@pytest.mark.parametrize("shape", [DIGITS, (3, 9, 14), (1, 33, 16), TINY])
def test_other_image_sizes_give_features_that_differ(spec, shape):
    net = build(spec, shape, 7)
    with torch.no_grad():
        x = torch.randn(3, *shape, generator=generator(0))
        features, logits = net.features(x), net(x)
    assert features.shape == (3, net.feature_dim) and logits.shape == (3, 7)
    assert torch.isfinite(logits).all() and (features[0] - features[1]).abs().max() > 1e-4


def test_default_depth_follows_the_image():
    sides = {4: 2, 8: 2, 16: 2, 28: 3, 32: 3, 64: 4, 128: 5}
    assert {side: default_depth((3, side, side)) for side in sides} == sides


def test_instance_norm_is_per_sample_and_batch_norm_couples():
    x = torch.randn(6, *DIGITS, generator=generator(1), dtype=torch.float64)
    for norm in ("in", "ln", "gn", "none", "bn"):
        net = build(f"convnet:width=8,norm={norm}", DIGITS, 3).double()
        alone = torch.cat([net.features(part) for part in x.split(2)])
        gap = (net.features(x) - alone).abs().max()
        assert net.couples_samples == (norm == "bn")
        assert gap > 0.1 if norm == "bn" else gap < 1e-12


def test_instance_norm_takes_each_channel_to_zero_mean_and_unit_variance():
    net = build("convnet:depth=2", DIGITS, 3)
    maps = net.body[:2](torch.randn(4, *DIGITS, generator=generator(2)) * 3 + 1)
    assert maps.mean((2, 3)).abs().max() < 1e-5
    assert (maps.var((2, 3), unbiased=False) - 1).abs().max() < 1e-2


@pytest.mark.parametrize("pooled", [False, True])
def test_resnet_block_by_hand(pooled):
    """stride 2, or stride 1 and average pooling after the first activation and in the shortcut before its norm."""
    net = build("resnet18_ap:width=4" if pooled else "resnet18:width=4", (3, 16, 16), 3)
    first, halving = net.body[3], net.body[5]
    x = torch.randn(2, 4, 16, 16, generator=generator(6))

    def conv(weight, x, halve=False):
        return F.conv2d(
            x, weight, stride=2 if halve and not pooled else 1, padding=weight.shape[-1] // 2
        )

    def pool(x):
        return F.avg_pool2d(x, 2) if pooled else x

    a, b = (m.weight for m in first.residual if isinstance(m, torch.nn.Conv2d))
    expected = (F.instance_norm(conv(b, F.instance_norm(conv(a, x)).relu())) + x).relu()
    torch.testing.assert_close(first(x), expected)
    a, b = (m.weight for m in halving.residual if isinstance(m, torch.nn.Conv2d))
    main = F.instance_norm(conv(b, pool(F.instance_norm(conv(a, x, True)).relu())))
    shortcut = F.instance_norm(pool(conv(halving.shortcut[0].weight, x, True)))
    torch.testing.assert_close(halving(x), (main + shortcut).relu())


@pytest.mark.parametrize(
    ("act", "value"),
    [("sigmoid", 0.11920292), ("relu", 0.0), ("leakyrelu", -0.02), ("swish", -0.23840584)],
)
def test_activations(act, value):
    layer = build(f"mlp:act={act}", DIGITS, 3).body[2]
    torch.testing.assert_close(layer(torch.tensor(-2.0)), torch.tensor(value))
    assert len(ACTIVATIONS) == 4


def test_initialise_bounds_and_spread():
    net = build("convnet", CIFAR, 10, generator(3))
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    for conv, bound in zip(convs, (0.19245, 0.029463, 0.029463), strict=True):
        assert bound * 0.99 < conv.weight.abs().max() <= bound * 1.00002
        assert abs(conv.weight.std() / (bound / 3**0.5) - 1) < 0.02
        assert bound * 0.9 < conv.bias.abs().max() <= bound * 1.00002
    assert 2048**-0.5 * 0.99 < net.classifier.weight.abs().max() <= 2048**-0.5


def test_initialise_works_in_place_and_repeats():
    net = build("convnet:norm=bn", DIGITS, 10, generator(4))
    first = {k: v.clone() for k, v in net.state_dict().items()}
    pointers = [v.data_ptr() for v in net.state_dict().values()]
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    net(torch.randn(4, *DIGITS, generator=generator(5)))
    assert initialise(net, generator(5)) is net
    assert not torch.equal(net.state_dict()["body.0.weight"], first["body.0.weight"])
    initialise(net, generator(4))
    assert all(torch.equal(v, first[k]) for k, v in net.state_dict().items())
    assert [v.data_ptr() for v in net.state_dict().values()] == pointers
    twice = initialise(build("convnet:norm=bn", DIGITS, 10).double(), generator(4))
    assert all(torch.equal(v.to(first[k].dtype), first[k]) for k, v in twice.state_dict().items())


def test_the_global_random_state_is_neither_read_nor_changed():
    state = torch.get_rng_state()
    first = [build(name, DIGITS, 3) for name in DEFAULTS]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    for net in first:
        again = build(net.spec, DIGITS, 3)
        assert all(
            torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True)
        )
    torch.set_rng_state(state)


def test_initialise_refuses_a_layer_it_does_not_know():
    with pytest.raises(DDError, match="PReLU"):
        initialise(torch.nn.PReLU(), generator(0))


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("convnet", "convnet"),
        ("convnet:", "convnet"),
        ("convnet:norm=in,depth=3", "convnet"),
        ("convnet:act=swish,width=32", "convnet:width=32,act=swish"),
        ("alexnet:norm=in", "alexnet:norm=in"),
        ("convnet:depth=4", "convnet:depth=4"),
    ],
)
def test_canonical_spec(spec, canonical):
    net = build(spec, CIFAR, 10)
    assert net.spec == canonical == build(net.spec, CIFAR, 10).spec


def test_flops_of_the_papers_convnet():
    assert count_flops(build("convnet", CIFAR, 10), CIFAR) == 2 * (
        1024 * 27 * 128 + (256 + 64) * 1152 * 128 + 20480
    )  # 101.5 M
    net = build("convnet:norm=bn", DIGITS, 10).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert count_flops(net, DIGITS) > 0 and net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("spec", "shape", "names"),
    [
        ("convnett", CIFAR, "convnet.*mlp, lenet, alexnet, vgg11, resnet18"),
        ("mlp:norm=in", CIFAR, "width, depth, act"),
        ("convnet:colour=red", CIFAR, "depth, norm, act, pool, grow, order, init"),
        ("convnet:norm=batch", CIFAR, "in, bn, ln, gn, none"),
        ("vgg11:pool=none", CIFAR, "avg, max"),
        ("convnet:act=gelu", CIFAR, "sigmoid, relu, leakyrelu, swish"),
        ("convnet:order=mid", CIFAR, "post, pre"),
        ("convnet:init=he", CIFAR, "torch, lecun"),
        ("convnet:grow=0", CIFAR, "above 0"),
        ("mlp:grow=2", CIFAR, "width, dep"),
        ("convnet:width=0", CIFAR, "above 0"),
        ("convnet:depth=two", CIFAR, "above 0"),
        ("convnet:width", CIFAR, "key=value"),
        ("convnet:width=8,width=9", CIFAR, "each key once"),
        ("convnet:width=6,norm=gn", CIFAR, "multiples of 4"),
        ("convnet:depth=4", DIGITS, "largest depth that fits is 3"),
        ("convnet", (3, 3, 9), "largest depth that fits is 1"),
        ("convnet", (3, 1, 1), "at least 2"),
        ("resnet18", (3, 7, 8), "at least 8"),
        ("alexnet", (3, 4, 4), "at least 8"),
        ("convnet", (32, 32), "channels, height, width"),
        ("convnet", (0, 8, 8), "all positive"),
    ],
)
def test_bad_requests_are_named(spec, shape, names):
    with pytest.raises(DDError, match=names):
        build(spec, shape, 10)


def test_no_classes():
    with pytest.raises(DDError, match="at least 1 class"):
        build("convnet", CIFAR, 0)
