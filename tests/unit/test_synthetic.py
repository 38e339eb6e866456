"""The multi-formation decoder: shapes, order, padding, and the real-image start that fits it (IDC)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ddlib.core import DDError, generator
from ddlib.data.dataset import load
from ddlib.distilled import Synthetic, check_factor, decode, encode
from ddlib.recipe import Recipe


def by_loops(images: torch.Tensor, factor: int, fill: float) -> torch.Tensor:
    """Pad, cut row by row, enlarge: one image and tile at a time."""
    side = images.shape[-1]
    extra = factor - side % factor if side % factor else 0
    tile = (side + extra) // factor
    out = []
    for r in range(factor):
        for c in range(factor):
            for image in images:
                image = F.pad(image, (0, extra, 0, extra), value=fill)
                cut = image[:, r * tile : (r + 1) * tile, c * tile : (c + 1) * tile]
                out.append(
                    F.interpolate(
                        cut[None], size=(side, side), mode="bilinear", align_corners=False
                    )[0]
                )
    return torch.stack(out)


@pytest.mark.parametrize(("side", "factor"), [(32, 1), (32, 2), (32, 3), (28, 2), (28, 3)])
def test_decode_is_the_loop_over_images_and_tiles(side, factor):
    images = torch.rand(3, 2, side, side, generator=generator(0))
    assert torch.equal(
        decode(images, factor, 0.5), by_loops(images, factor, 0.5) if factor > 1 else images
    )


def test_decode_pads_each_channel_with_its_own_grey_and_lets_gradients_through():
    images = torch.zeros(1, 2, 32, 32, requires_grad=True)
    out = decode(images, 3, torch.tensor([1.0, -1.0])[:, None, None])
    assert out[8, 0, -1, -1] == 1 and out[8, 1, -1, -1] == -1  # the last tile's corner is padding
    assert out[0].abs().max() == 0
    out.sum().backward()
    assert (images.grad > 0).all()


@pytest.mark.parametrize(
    ("side", "factor", "cuts"),
    [(32, 2, [16, 16]), (32, 3, [11, 11, 10]), (28, 2, [14, 14]), (28, 3, [10, 9, 9])],
)
def test_encode_puts_source_k_x_ipc_plus_i_into_tile_k_of_image_i(side, factor, cuts):
    ipc, classes = 2, 3
    value = torch.arange(classes * ipc * factor**2, dtype=torch.float32).view(classes, -1)
    sources = value[..., None, None, None].expand(-1, -1, 1, side, side)
    images = encode(sources, factor)
    assert images.shape == (classes * ipc, 1, side, side)
    for c in range(classes):
        for i in range(ipc):
            image, top = images[c * ipc + i, 0], 0
            for r, high in enumerate(cuts):
                left = 0
                for k, wide in enumerate(cuts):
                    tile = image[top : top + high, left : left + wide]
                    assert (tile == value[c, (r * factor + k) * ipc + i]).all()
                    left += wide
                top += high


def test_encode_shrinks_by_nearest_neighbour():
    sources = torch.arange(16.0).view(1, 1, 1, 4, 4).expand(1, 4, 1, 4, 4)
    assert encode(sources, 2)[0, 0, :2, :2].tolist() == [[0, 2], [8, 10]]


def test_a_factor_that_does_not_fit():
    assert check_factor(4, (1, 8, 8)) == 4
    for factor in (0, 5):
        with pytest.raises(
            DDError, match=f"factor {factor} does not fit images of 8x8 px; allowed: 1 to 4"
        ):
            check_factor(factor, (1, 8, 8))


def test_a_decoded_set_trains_on_all_tiles_and_survives_the_disk(tmp_path):
    data = load("digits", device="cpu")
    soft = torch.rand(20, 10, generator=generator(1))
    syn = Synthetic.of(
        data, data.batch("train", range(20)), soft, Recipe(epochs=1), "convnet", factor=2
    )
    images, labels = syn.training_set()
    assert images.shape == (80, 1, 8, 8) and torch.equal(labels, soft.repeat(4, 1)) and syn.ipc == 2
    again = Synthetic.load(syn.save(tmp_path / "set.safetensors"))
    assert again.factor == 2 and torch.equal(again.training_set()[0], images)
    assert syn.hardened().labels.tolist() == [c for c in range(10) for _ in range(2)]
    assert torch.equal(replace(syn, factor=1).training_set()[0], syn.images)


def test_labels_of_the_wrong_width_are_refused():
    data = load("digits", device="cpu")
    images = data.batch("train", range(10))
    for labels in (torch.zeros(10, 9), torch.zeros(9), torch.zeros(10, 10, 1)):
        with pytest.raises(DDError, match="labels must be finite"):
            Synthetic.of(data, images, labels, Recipe(epochs=1), "convnet").check(data)
    Synthetic.of(data, images, torch.zeros(10, 10), Recipe(epochs=1), "convnet").check(data)
