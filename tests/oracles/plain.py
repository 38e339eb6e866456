"""The papers' steps as their released codes write them, class by class: what the library's steps are compared with.

The benchmarks time the same loops against the library's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from itertools import count, islice

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, vmap
from torch.func import grad as func_grad

from ddlib.augment.siamese import augment, cutmix, draw
from ddlib.core import generator
from ddlib.distilled import decode
from ddlib.methods.gradient import Config, Gradient
from ddlib.nets.build import Backbone, build, initialise


def dm_gradient(
    data, images: Tensor, ipc: int, batch: int, step: int, backbone: str = "convnet"
) -> Tensor:
    """The gradient of DM's loss for all images, with DM's own draws."""
    net = build(backbone, data.shape, data.num_classes).to(images).requires_grad_(False).train()
    initialise(net, generator(0, "dm", "network", step))
    real = data.sample(batch, generator(0, "dm", "real", step))
    params = draw(
        "color_crop_cutout_flip_scale_rotate",
        data.num_classes,
        data.shape[1:],
        generator(0, "dm", "augment", step),
    )
    images = images.detach().requires_grad_()
    loss = 0.0
    for c in range(data.num_classes):
        mine = params.select(torch.tensor([c]))
        x = augment(data.batch("train", real[c]).to(images), mine.repeat(batch))
        s = augment(images[c * ipc : (c + 1) * ipc], mine.repeat(ipc))
        loss = loss + (net.features(x).detach().mean(0) - net.features(s).mean(0)).square().sum()
    return torch.autograd.grad(loss, images)[0]


def gradients_by_vmap(
    net: Backbone, x: Tensor, y: Tensor, weights: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of every class's mean cross-entropy [C, *weight.shape] and mean features [C, d], by vmap over classes.

    x: images [C, B, ch, H, W]; y: labels [C, B]. Of the weights of layer norm, vmap's derivative misses a part (torch
    2.15).
    """
    names = {id(weight): name for name, weight in net.named_parameters()}
    chosen = {names[id(weight)]: weight.detach() for weight in weights}

    def loss(values: dict[str, Tensor], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional_call(net, values, (images,))
        return F.cross_entropy(logits, labels), net.features(images).mean(0)

    per_class = vmap(func_grad(loss, has_aux=True), in_dims=(None, 0, 0))
    gradients, means = per_class(chosen, x, y)
    return [*gradients.values(), means]


def idc_images(method: Gradient, steps: int, outer: int = 0) -> Tensor:
    """IDC's pixels X after `steps` image steps, from the method's network, images and draws.

    Each class's rows are those once the momentum of its last step has moved them as often as its earlier ones did.
    Squared distance over convolutions, real training data, image steps once per class: IDC's settings.
    """
    c, data, ipc, net = (
        method.config,
        method.data,
        method.ipc,
        copy.deepcopy(method.net).requires_grad_(True),
    )
    images = method.raw.clone().requires_grad_()
    sgd = torch.optim.SGD([images], lr=c.lr_img * ipc / 10, momentum=c.momentum)
    trainer = torch.optim.SGD(
        net.parameters(), lr=c.net_lr, momentum=c.net_momentum, weight_decay=c.net_decay
    )
    rng = partial(generator, method.seed, "gradient")
    order = (
        torch.randperm(len(data.labels["train"]), generator=rng("order", outer, epoch))
        for epoch in count()
    )
    stream = enumerate(rows for epoch in order for rows in epoch.split(c.net_batch))
    for inner in range(steps):
        real = data.sample(method.batch, rng("real", outer, inner))
        params = draw(
            c.augment_match, data.num_classes, data.shape[1:], rng("augment", outer, inner)
        )
        for k in range(data.num_classes):
            loss = _class_loss(
                net,
                data,
                real[k],
                images[k * ipc : (k + 1) * ipc],
                params.select(torch.tensor([k])),
                c,
                k,
            )
            sgd.zero_grad()
            loss.backward()
            loss.item()
            sgd.step()
        for k, rows in islice(
            stream, math.ceil(c.net_images / c.net_batch) if inner + 1 < steps else 0
        ):
            draws = rng("train", outer, "real", k)
            x = data.batch("train", rows)
            x = augment(x, draw(c.augment_net, len(x), data.shape[1:], draws, op_every=len(x)))
            x, y = cutmix(x, data.labels["train"][rows], draws, c.cutmix, data.num_classes)
            trainer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            trainer.step()
    settled = []
    for k in range(data.num_classes):
        settled.append(images[k * ipc : (k + 1) * ipc].detach().clone())
        images.grad = torch.zeros_like(images)
        sgd.step()
    return torch.cat(settled)


def _class_loss(net, data, rows: Tensor, images: Tensor, params, c: Config, k: int) -> Tensor:
    x = augment(data.batch("train", rows), params.repeat(len(rows)))
    s = (decode(images, c.factor) - data.mean.to(images)) / data.std.to(images)
    s = augment(s, params.repeat(len(s)))

    def gradients(images: Tensor, graph: bool) -> tuple[Tensor, ...]:
        labels = torch.full((len(images),), k, device=images.device)
        loss = F.cross_entropy(net(images), labels)
        return torch.autograd.grad(loss, list(net.parameters()), create_graph=graph)

    pairs = zip(gradients(x, False), gradients(s, True), strict=True)
    return sum((a - b).square().sum() for a, b in pairs if a.ndim == 4)
