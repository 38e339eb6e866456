"""DM against the plain loop over classes, in float64; its chunks, its initialisation and its seeds."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from ddlib.core import DDError, generator
from ddlib.data.dataset import Dataset, from_arrays
from ddlib.methods.dm import DM, Config
from tests.oracles.plain import dm_gradient

CLASSES, IPC, BATCH = 3, 2, 5


class Double(Dataset):
    """The same dataset in float64, which makes everything DM computes float64."""

    def batch(self, split, index):
        return super().batch(split, index).double()


def arrays(sizes=(9, 9, 9), device="cpu") -> Dataset:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    images = (
        60 * labels[:, None, None, None] + rng.integers(0, 90, (len(labels), 3, 8, 8))
    ).astype(np.uint8)
    return from_arrays(images, labels, images, labels, device=device)


def double(data: Dataset) -> Double:
    return Double(**{field.name: getattr(data, field.name) for field in fields(data)})


def dm(data: Dataset, norm: str = "in", ipc: int = IPC, seed: int = 0, **config) -> DM:
    method = DM(
        Config(**{"batch_real": BATCH} | config), data, ipc, f"convnet:width=8,norm={norm}", seed
    )
    if isinstance(data, Double):
        method.net.double()
    return method


def after(method: DM, steps: int) -> torch.Tensor:
    for _ in range(steps):
        method.step()
    return method.images


def plain(method: DM, data: Dataset, steps: int, norm: str, batch: int = BATCH) -> torch.Tensor:
    """The images after `steps` steps of the loop over classes and PyTorch's own SGD."""
    images = method.images.clone().requires_grad_()
    sgd = torch.optim.SGD([images], lr=method.config.lr_img, momentum=method.config.momentum)
    for step in range(steps):
        images.grad = dm_gradient(data, images, IPC, batch, step, f"convnet:width=8,norm={norm}")
        sgd.step()
    return images.detach()


@pytest.mark.parametrize("norm", ["in", "ln", "gn", "none"])
def test_all_classes_at_once_are_the_loop_over_classes(norm):
    data = double(arrays())
    method = dm(data, norm, lr_img=0.7)
    first = dm_gradient(data, method.images, IPC, BATCH, 0, f"convnet:width=8,norm={norm}")
    expected = plain(method, data, 3, norm)
    method.step()
    assert first.dtype == torch.float64 and first.abs().max() > 1e-4
    torch.testing.assert_close(method.velocity, first, rtol=0, atol=1e-12)
    torch.testing.assert_close(after(method, 2), expected, rtol=0, atol=1e-12)


def test_batchnorm_takes_the_joint_branch():
    # Statistics over all classes together, as in the released code: not the loop, and never in chunks.
    data = double(arrays())
    method = dm(data, "bn")
    loop = dm_gradient(data, method.images, IPC, BATCH, 0, "convnet:width=8,norm=bn")
    method.step()
    assert (method.velocity - loop).norm() > 0.05 * loop.norm()
    assert torch.equal(after(dm(data, "bn", chunk=1), 2), after(dm(data, "bn", chunk=1000), 2))


@pytest.mark.parametrize("chunk", [1, 10, 11])
def test_chunks_of_classes_leave_the_result_alone(chunk):
    data = double(arrays())
    whole, parts = dm(data, chunk=1000), dm(data, chunk=chunk)
    assert len(whole.chunks(BATCH)) == 1 and len(parts.chunks(BATCH)) > 1
    torch.testing.assert_close(after(parts, 3), after(whole, 3), rtol=0, atol=1e-12)


def test_pieces_of_the_real_images_leave_the_result_alone():
    data = double(arrays())
    whole, parts = dm(data), dm(data)
    assert whole.piece == 2**15 // 64 and dm(data, "bn").piece == 0  # BatchNorm sees all at once
    parts.piece = 4
    torch.testing.assert_close(after(parts, 3), after(whole, 3), rtol=0, atol=1e-12)


def test_a_class_smaller_than_the_real_batch():
    data = double(arrays((4, 9, 9)))
    method = dm(data, batch_real=256)
    expected = plain(method, data, 2, "in", batch=4)
    torch.testing.assert_close(after(method, 2), expected, rtol=0, atol=1e-12)


def test_real_images_start_the_set_class_by_class():
    data = arrays()
    method = dm(data)
    assert method.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for image, label in zip(method.images, method.labels, strict=True):
        same = (data.batch("train", slice(None)) == image).all((1, 2, 3))
        assert data.labels["train"][same].tolist() == [label]
    assert len(method.images.unique(dim=0)) == CLASSES * IPC


def test_noise_starts_the_set():
    images = dm(arrays(), ipc=9, init="noise").images
    assert images.shape == (27, 3, 8, 8) and images.dtype == torch.float32
    assert abs(float(images.mean())) < 0.05 and abs(float(images.std()) - 1) < 0.05
    assert not torch.equal(images, dm(arrays(), ipc=9, init="noise", seed=1).images)


def test_steps_differ_and_a_restored_method_goes_on_with_the_next_one():
    data = arrays()
    half, other = dm(data), dm(data, seed=0)
    after(half, 2)
    other.load_state_dict({key: value.clone() for key, value in half.state_dict().items()})
    assert torch.equal(after(other, 2), after(dm(data), 4))
    frozen = dm(data, lr_img=0.0)
    assert (
        frozen.step()["loss"] != frozen.step()["loss"]
    )  # another network, batch and augmentation on the same images


def test_the_average_is_the_result_and_leaves_the_path_alone():
    data = double(arrays())
    method, without = dm(data, ema=0.75, lr_img=0.7), dm(data, lr_img=0.7)
    expected = without.images
    for _ in range(3):
        method.step(), without.step()
        expected = 0.75 * expected + 0.25 * without.images
        torch.testing.assert_close(method.images, expected, rtol=0, atol=1e-12)
    assert torch.equal(method.trained, without.images) and not torch.equal(
        method.images, method.trained
    )
    other = dm(data, ema=0.75, lr_img=0.7)
    other.load_state_dict({key: value.clone() for key, value in method.state_dict().items()})
    assert torch.equal(after(other, 2), after(method, 2))


def test_the_loss_falls():
    method = dm(arrays(), init="noise", lr_img=1.0, augment="none")
    losses = [float(method.step()["loss"]) for _ in range(30)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_reported_loss_is_the_sum_over_classes_divided_by_their_number():
    data = double(arrays())
    method = dm(data, augment="none", batch_real=9)
    start = method.images.clone()
    reported = method.step()["loss"]
    psi = method.net.features  # of step 0 still: one step draws one network
    means = [
        (psi(x).unflatten(0, (CLASSES, -1)).mean(1))
        for x in (data.batch("train", slice(None)), start)
    ]
    torch.testing.assert_close(
        reported, (means[0] - means[1]).square().sum() / CLASSES, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("init", ["real", "noise"])
def test_more_images_than_a_class_has(init):
    with pytest.raises(DDError, match="cannot sample 5 images.*0 to 4"):
        dm(arrays((9, 4, 9)), ipc=5, init=init)
    with pytest.raises(DDError, match="cannot sample 1000.* images of each class: 0 to 4"):
        arrays((9, 4, 9)).sample(10**18, generator(0))


def test_bf16_is_another_way_to_nearly_the_same_gradient():
    data = arrays()
    plain, low = dm(data), dm(data, precision="bf16")
    plain.step(), low.step()
    assert low.images.dtype == torch.float32
    cosine = torch.cosine_similarity(low.velocity.flatten(), plain.velocity.flatten(), 0)
    assert 0.99 < cosine < 1 - 1e-6
    with pytest.raises(DDError, match="precision 'bf16' is for features alone; allowed with match"):
        dm(data, precision="bf16", match="both")


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    # Loosely: convolutions may run in TF32, and an image that moves feeds the next step.
    cpu, cuda = (after(dm(arrays(device=device)), 3).cpu() for device in ("cpu", "cuda"))
    torch.testing.assert_close(cuda, cpu, rtol=0, atol=1e-2)


def test_the_network_of_a_step_comes_from_the_seed_and_the_step_alone():
    method = dm(arrays())
    method.step()
    weight = next(method.net.parameters())
    bound = weight[0].numel() ** -0.5
    expected = torch.empty_like(weight).uniform_(
        -bound, bound, generator=generator(0, "dm", "network", 0)
    )
    assert torch.equal(weight, expected)
