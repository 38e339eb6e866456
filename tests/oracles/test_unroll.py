"""The gradient engines in float64 against an unroll written out here, against differences of L, and their memory."""

import weakref
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

from ddlib.augment.siamese import augment, draw
from ddlib.core import DDError, generator
from ddlib.engine.meter import SavedTensors
from ddlib.match.inner import CompiledStep
from ddlib.match.trajectory import FlatNet, Segment, match, stored_weights
from ddlib.methods.trajectory import soft_cross_entropy
from ddlib.nets.build import build

SHAPE, CLASSES = (3, 8, 8), 4
RELU, SMOOTH = "convnet:width=4,depth=2", "convnet:width=4,depth=2,act=swish"


@dataclass
class Problem:
    net: FlatNet
    segment: Segment
    images: torch.Tensor
    labels: torch.Tensor
    rates: torch.Tensor
    criterion: object = F.cross_entropy

    def match(self, engine="adjoint", **options):
        return match(
            self.net,
            self.segment,
            self.images,
            self.labels,
            self.rates,
            engine,
            criterion=self.criterion,
            **options,
        )

    def loss(self, images=None, labels=None, rates=None, *, momentum=0.0, stop=False, last=None):
        """L by a plain unroll; `stop` holds every theta_i fixed inside g_i, `last` detaches all steps but so many."""
        images, labels, rates = (
            mine if given is None else given
            for given, mine in ((images, self.images), (labels, self.labels), (rates, self.rates))
        )
        theta, steps = self.segment.start.clone().requires_grad_(), len(self.rates)
        velocity = torch.zeros_like(theta)
        for i, (index, params) in enumerate(
            zip(self.segment.batches, self.segment.params, strict=True)
        ):
            x = images[index] if params is None else augment(images[index], params)
            at = theta.detach().requires_grad_() if stop else theta
            (g,) = grad(self.criterion(self.net(at, x), labels[index]), at, create_graph=True)
            velocity = momentum * velocity + g
            theta = theta - rates[i] * velocity
            if last is not None and i < steps - last:
                theta, velocity = theta.detach().requires_grad_(), velocity.detach()
        return (theta - self.segment.target).square().sum() / (
            self.segment.start - self.segment.target
        ).square().sum()

    def oracle(self, **options):
        """(L, dL/dX, dL/drates, dL/dY or None) by autograd through `loss`."""
        soft = self.labels.is_floating_point()
        leaves = [
            t.clone().requires_grad_()
            for t in (self.images, self.rates, self.labels)[: 3 if soft else 2]
        ]
        loss = self.loss(leaves[0], leaves[2] if soft else None, leaves[1], **options)
        return loss.detach(), *grad(loss, leaves), *([] if soft else [None])


def problem(spec=RELU, *, batches="full", labels="hard", dsa=False, steps=4, seed=0) -> Problem:
    rng, n = generator(seed, "unroll"), 8
    net = FlatNet(build(spec, SHAPE, CLASSES, rng).double().requires_grad_(False))
    index = {
        "full": [torch.arange(n)] * steps,
        "disjoint": list(torch.randperm(n, generator=rng).split(max(1, n // steps)))[:steps],
        "overlapping": [torch.randperm(n, generator=rng)[:5] for _ in range(steps)],
    }[batches]
    params = [
        draw("color_crop_cutout_flip_scale_rotate", len(b), SHAPE[1:], rng) if dsa else None
        for b in index
    ]
    start = net.vector()
    y = torch.arange(n) % CLASSES
    if labels != "hard":
        y = torch.randn(n, CLASSES, generator=rng, dtype=torch.float64)
        y = y.softmax(1) if labels == "soft" else y
    return Problem(
        net,
        Segment(start, start + 0.05 * torch.randn(net.size, generator=rng).double(), index, params),
        torch.randn(n, *SHAPE, generator=rng).double(),
        y,
        0.1 + 0.2 * torch.rand(steps, generator=rng).double(),
        soft_cross_entropy if labels == "logits" else F.cross_entropy,
    )


def gap(found, wanted) -> float:
    return float((found - wanted).norm() / wanted.norm())


def assert_equal(found, wanted, tolerance=1e-10):
    loss, images, rates, labels = wanted
    assert gap(found.loss, loss) < tolerance
    assert gap(found.images, images) < tolerance
    assert gap(found.rates, rates) < tolerance
    assert (found.labels is None) == (labels is None)
    assert labels is None or gap(found.labels, labels) < tolerance


CASES = [
    ("full", "hard", False),
    ("disjoint", "soft", True),
    ("overlapping", "hard", True),
    ("overlapping", "logits", False),
    ("full", "logits", True),
]


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize(("batches", "labels", "dsa"), CASES)
def test_exact_engines_equal_the_unroll(batches, labels, dsa, momentum):
    p = problem(batches=batches, labels=labels, dsa=dsa)
    wanted = p.oracle(momentum=momentum)
    for engine in ("adjoint", "unroll", "checkpoint", "window=4", "window=9"):
        assert_equal(p.match(engine, momentum=momentum), wanted)
    assert_equal(p.match(micro=3, momentum=momentum), wanted)


def test_rate_gradients_sum_to_that_of_one_shared_rate():
    p = problem(batches="overlapping", dsa=True)
    p.rates = p.rates[:1].expand(4)
    beta = p.rates[0].clone().requires_grad_()
    (wanted,) = grad(p.loss(rates=beta.expand(4)), beta)
    assert gap(p.match().rates.sum(), wanted) < 1e-10
    assert p.match().rates.unique().numel() == 4


def test_inputs_are_left_alone():
    p = problem(labels="soft")
    p.images.requires_grad_()
    before = [t.detach().clone() for t in (p.images, p.labels, p.rates, p.segment.start)]
    for engine in ("adjoint", "tesla", "unroll", "checkpoint"):
        result = p.match(engine)
        assert not any(
            t.requires_grad
            for t in (result.loss, result.images, result.labels, result.rates, result.final)
        )
    after = (p.images, p.labels, p.rates, p.segment.start)
    assert (
        all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and p.images.grad is None
    )
    assert p.images.requires_grad and not p.labels.requires_grad and not p.rates.requires_grad


@pytest.mark.parametrize(("labels", "momentum"), [("logits", 0.7), ("hard", 0.0)])
def test_compiled_steps_give_the_same_numbers(labels, momentum, monkeypatch):
    """Of the graphs that are compiled, run as they are: a compiler takes half a minute for each, and tracing them a
    second, or half of one for a network of one block."""
    monkeypatch.setattr("ddlib.match.inner.compiled", lambda graph: graph)
    p = problem("convnet:width=4,depth=1", batches="overlapping", labels=labels, dsa=True)
    inner = CompiledStep(p.net, p.criterion)
    ways = [("adjoint", {"keep": 3}), ("window=2", {"micro": 3})]
    ways += [] if momentum else [("tesla", {"keep": 2})]
    for engine, options in ways:
        wanted = p.match(engine, momentum=momentum, **options)
        found = p.match(engine, momentum=momentum, inner=inner, **options)
        for name, value in vars(wanted).items():
            mine = getattr(found, name)
            assert (mine is None) == (value is None)
            assert value is None or gap(mine, value) < 1e-12, (engine, options, name)
            assert value is None or not mine.requires_grad


def test_a_compiled_step_lays_images_and_kernels_channels_last_on_a_cpu():
    p, seen = problem("convnet:width=4,depth=2"), []

    def look(conv, given, found):
        tensors = (given[0], conv.weight)
        seen.append([t.is_contiguous(memory_format=torch.channels_last) for t in tensors])

    for conv in (part for part in p.net.net.modules() if isinstance(part, torch.nn.Conv2d)):
        conv.register_forward_hook(look)
    CompiledStep(p.net, p.criterion)._loss(p.segment.start, p.images, p.labels)
    assert seen == [[True, True]] * 2


@pytest.mark.parametrize("engine", ["adjoint", "tesla", "window=2"])
def test_kept_graphs_give_the_same_numbers(engine):
    """To rounding: a gradient that can be differentiated again takes other kernels."""
    p = problem(batches="overlapping", labels="logits", dsa=True)
    plain = p.match(engine)
    for keep in (2, 4, 9):  # of four steps
        for name, value in vars(p.match(engine, keep=keep)).items():
            assert gap(value, getattr(plain, name)) < 1e-12, (keep, name)


def test_kept_graphs_grow_the_memory_by_one_step_each():
    one, two, three = (saved("adjoint", 4, keep=keep)[0] for keep in (1, 2, 3))
    assert two - one == pytest.approx(three - two, rel=0.1) and two > one
    assert saved("window=2", 4, keep=9) == saved("window=2", 4, keep=2)  # none before the window


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_window_drops_what_the_earlier_steps_contribute(last, momentum):
    p = problem(batches="overlapping", labels="soft", dsa=True)
    wanted = p.oracle(momentum=momentum, last=last)
    assert_equal(p.match(f"window={last}", momentum=momentum), wanted)
    assert gap(p.match(momentum=momentum).images, wanted[1]) > 1e-3
    assert not p.match(f"window={last}", momentum=momentum).rates[: 4 - last].any()


@pytest.mark.parametrize(("batches", "labels", "dsa"), CASES)
def test_tesla_is_the_unroll_with_theta_held_fixed(batches, labels, dsa):
    p = problem(batches=batches, labels=labels, dsa=dsa)
    assert_equal(p.match("tesla"), p.oracle(stop=True), 1e-12)
    assert_equal(p.match("tesla", micro=3), p.oracle(stop=True), 1e-12)
    exact = p.match()
    assert gap(p.match("tesla").loss, exact.loss) < 1e-12
    assert (
        gap(p.match("tesla").images, exact.images) > 1e-3
        and gap(p.match("tesla").rates, exact.rates) > 1e-3
    )


def test_tesla_is_exact_for_the_last_step_only():
    p = problem(batches="disjoint")
    exact, tesla = p.match("unroll"), p.match("tesla")
    *earlier, last = p.segment.batches
    assert (
        gap(tesla.images[last], exact.images[last]) < 1e-12
        and gap(tesla.rates[-1], exact.rates[-1]) < 1e-12
    )
    assert all(gap(tesla.images[b], exact.images[b]) > 1e-3 for b in earlier)
    one = problem(steps=1, dsa=True, labels="soft")
    assert_equal(one.match("tesla"), one.oracle(), 1e-12)


def test_tesla_repo_halves_the_images_alone():
    p = problem(labels="soft")
    tesla, released = p.match("tesla"), p.match("tesla_repo")
    assert torch.equal(released.images, tesla.images / 2)
    assert torch.equal(released.rates, tesla.rates) and torch.equal(released.labels, tesla.labels)


@pytest.mark.parametrize("what", ["images", "labels", "rates"])
def test_differences_of_the_loss(what):
    """On a smooth net: across the kinks of ReLU a difference of second order means nothing."""
    p = problem(SMOOTH, batches="overlapping", labels="logits", dsa=True)
    at = getattr(p, what)
    direction, step = torch.randn(at.shape, generator=generator(1)).double(), 1e-4
    ends = [p.loss(**{what: at + sign * step * direction}) for sign in (1, -1)]
    slope = float((ends[0] - ends[1]).detach() / (2 * step))
    assert float((getattr(p.match(), what) * direction).sum()) == pytest.approx(slope, rel=1e-6)
    assert float((getattr(p.match("tesla"), what) * direction).sum()) != pytest.approx(
        slope, rel=1e-3
    )


def test_refusals():
    p = problem()
    still = replace(p.segment, target=p.segment.start.clone())
    with pytest.raises(DDError, match="stands still"):
        match(p.net, still, p.images, p.labels, p.rates)
    with pytest.raises(DDError, match="4 steps need as many rates"):
        match(p.net, p.segment, p.images, p.labels, p.rates[:3])
    with pytest.raises(DDError, match="BatchNorm"):
        FlatNet(build("convnet:width=4,norm=bn", SHAPE, CLASSES))
    with pytest.raises(DDError, match="did you mean 'adjoint'"):
        p.match("adjiont")
    for engine in ("window=0", "window=", "window=-1", "window=2.5"):
        with pytest.raises(DDError, match="whole number of at least 1"):
            p.match(engine)
    with pytest.raises(DDError, match="without momentum"):
        p.match("tesla", momentum=0.5)


def test_saved_tensors_counts_graphs_by_hand():
    x = torch.randn(100, dtype=torch.float64, requires_grad=True)
    with SavedTensors() as saved:
        y = x.exp()  # saves its result, 800 bytes
        assert saved.live == 800
        z = y * y  # saves y twice, which is held already
        assert saved.live == 800
        s = z.sin().sum()  # saves z
        assert saved.live == 1600
        (first,) = grad(s, x, create_graph=True)
        assert saved.live > 1600  # the graph of the gradient
        peak = saved.peak
        del y, z, s, first
        assert saved.live == 0 and saved.peak == peak


def saved(
    engine: str, steps: int, device="cpu", *, width=8, n=4, shape=SHAPE, **options
) -> tuple[int, int]:
    """(peak bytes of graphs, bytes of one parameter vector). `meta` computes nothing, so any size is free."""
    net = FlatNet(build(f"convnet:width={width}", shape, 10).to(device))
    start, index = net.vector(), torch.arange(n, device=device)
    segment = Segment(start, start + 1, [index] * steps, [None] * steps)
    images, rates = torch.rand(n, *shape, device=device), torch.full((steps,), 0.01, device=device)
    with SavedTensors() as meter:
        match(net, segment, images, index % 10, rates, engine, **options)
    assert meter.live == 0
    return meter.peak, net.size * 4


def test_graphs_are_flat_in_the_number_of_steps():
    for engine in ("adjoint", "tesla"):
        (few, vector), (many, _) = saved(engine, 10), saved(engine, 80)
        assert many == few > vector, engine
    few, many = saved("unroll", 10)[0], saved("unroll", 80)[0]
    assert 7.8 < many / few < 8.1


class Watched(FlatNet):
    """Counts the weight vectors it was called with that are still alive: `most` at once."""

    def __init__(self, net):
        super().__init__(net)
        self.alive, self.most = weakref.WeakValueDictionary(), 0

    def __call__(self, theta, x):
        self.alive[id(theta)] = theta
        self.most = max(self.most, len(self.alive))
        return super().__call__(theta, x)


@pytest.mark.parametrize(("engine", "growth"), [("tesla", 0), ("window=2", 0), ("adjoint", 12)])
def test_weights_that_wait_for_the_way_back(engine, growth):
    """How many are alive at once grows as `stored_weights` says."""

    def most(steps: int) -> int:
        p = problem(steps=steps)
        p.net = Watched(p.net.net)
        p.match(engine)
        return p.net.most

    assert most(16) - most(4) == growth
    assert stored_weights(engine, 16) - stored_weights(engine, 4) == growth


def test_micro_batches_divide_the_graph():
    whole, vector = saved("adjoint", 2, n=32)
    for engine in ("adjoint", "tesla"):
        assert saved(engine, 2, n=32, micro=4)[0] - vector < 1.1 * (whole - vector) / 8


def test_at_the_papers_size_the_unroll_needs_ten_times_the_memory():
    """N = 50, IPC 10, width 128: counted on `meta` at N = 2 and 4, beyond which an unroll grows by the same step."""
    assert saved("unroll", 2, "meta") == saved("unroll", 2) and saved(
        "adjoint", 2, "meta"
    ) == saved("adjoint", 2)
    size = {"width": 128, "n": 100, "shape": (3, 32, 32)}
    two, three, four = (saved("unroll", steps, "meta", **size)[0] for steps in (2, 3, 4))
    assert four - three == three - two
    unroll = two + 48 * (three - two)
    graph, vector = saved("adjoint", 2, "meta", **size)
    assert 14e9 < unroll < 16e9
    assert unroll > 10 * (graph + 51 * vector)
