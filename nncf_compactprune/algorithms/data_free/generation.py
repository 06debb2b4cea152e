"""Images that a network's own BatchNorm statistics call for.

After Yin et al. 2020, "Dreaming to Distill" (DeepInversion): images are optimised until the statistics in front of
every BatchNorm are the stored ones and a classifier is sure of a class. Ours: the loss is free of scale (see
:func:`statistics_loss`), and the start is not noise but "dead leaves" pictures (overlapping discs; Lee, Mumford and
Huang 2001). Their edges and smooth areas are so much nearer to what trained filters expect that some dozens of steps
do; more steps bring the statistics nearer and make the images less useful, as they grow alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nncf_compactprune.algorithms.data_free.network import SingleInput, batch_norms, statistics
from nncf_compactprune.decide.labelled import class_scores
from nncf_compactprune.host.calls import call_model, evaluating
from nncf_compactprune.host.torch_internals import BatchNorm

LEAVES = 60  # discs a picture: enough to cover it


@dataclass(frozen=True)
class Inversion:
    """How images are optimised.

    :param steps: Adam steps a batch.
    :param lr: their size, falling to zero as a cosine.
    :param class_weight: of the cross-entropy against a class per image, all classes in turn.
    :param smooth_weight: of the mean squared difference of neighbouring pixels.
    """

    steps: int = 20
    lr: float = 0.1
    class_weight: float = 0.1
    smooth_weight: float = 0.01


def statistics_loss(x: Tensor, norm: BatchNorm) -> Tensor:
    """How far a batch is from what a BatchNorm remembers, per channel and free of scale.

    ``mean_c ((m_c - mu_c) / sigma_c)^2 + (s_c / sigma_c - 1)^2`` with m, s the batch's mean and standard deviation,
    mu, sigma the stored ones. Ours: DeepInversion compares raw means and variances, which lets the widest layer rule.

    :param x: the norm's input, ``[n, c, ...]``.
    :param norm: the BatchNorm, with running statistics.
    :return: the loss, a scalar of at least 0.
    """
    x = at_least_float32(x)
    dims = [0, *range(2, x.dim())]
    mean, var = x.mean(dims), x.var(dims, unbiased=False)
    stored_mean, stored_var = statistics(norm)
    sigma = (stored_var + norm.eps).sqrt()
    shift = (mean - stored_mean) / sigma
    return shift.square().mean() + ((var + norm.eps).sqrt() / sigma - 1).square().mean()


def dead_leaves(count: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Pictures of overlapping discs of random place, size (heavy-tailed, as in natural images) and colour. Of sounds
    they are intervals, of films balls.

    :param count: number of pictures.
    :param shape: ``(c, *places)`` with up to three dimensions of places, or ``(places,)``.
    :param generator: of the CPU.
    :return: ``[count, *shape]`` on the CPU, mean 0 and variance 1 over all.
    """
    channels, *places = shape if len(shape) > 1 else (1, *shape)
    axes = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in places), indexing="ij")[::-1]
    ones = (1,) * len(places)

    def normal(*rest: int) -> Tensor:
        return torch.randn(count, *rest, generator=generator)

    base = normal(channels, *ones) * 0.8
    picture = base.expand(count, channels, *places).clone()
    for _ in range(LEAVES):
        centre = torch.rand(count, len(places), *ones, generator=generator) * 2.4 - 1.2
        radius = 0.08 / torch.rand(count, *ones, generator=generator).clamp_min(0.08)
        stretch = torch.exp(normal(*ones) * 0.5)
        apart = [axis - centre[:, at] for at, axis in enumerate(axes)]
        if len(places) > 1:
            apart[:2] = apart[0] * stretch, apart[1] / stretch
        inside = sum((distance.square() for distance in apart), torch.zeros(())) < radius.square()
        colour = base * 0.5 + normal(1, *ones) * 0.8 + normal(channels, *ones) * 0.4
        shade = 1 + 0.2 * axes[0] * normal(*ones)
        picture = torch.where(inside.unsqueeze(1), colour * shade.unsqueeze(1), picture)
    picture = picture + 0.05 * normal(channels, *places)
    return ((picture - picture.mean()) / picture.std()).view(count, *shape)


def labels_in_turn(count: int, classes: int, generator: torch.Generator) -> Tensor:
    """Classes for images, in random order, each once before any comes a second time: neighbours in the order of
    ImageNet's classes are alike, and few images shall tell of all of them.

    :param count: number of images.
    :param classes: number of classes.
    :param generator: of the CPU.
    :return: ``[count]``.
    """
    rounds = [torch.randperm(classes, generator=generator) for _ in range(-(-count // classes))]
    return torch.cat(rounds)[:count]


def invert(
    model: nn.Module,
    network: SingleInput,
    start: Tensor,
    settings: Inversion,
    *,
    labels: Tensor | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Optimises one batch of images; the model is only run.

    A classifier without BatchNorm is inverted from its classes alone.

    :param model: in any mode; its weights and statistics stay.
    :param network: how to run it.
    :param start: ``[n, *shape]``: some dozens at least, as their joint statistics are matched.
    :param settings: steps, their size, and weights of the losses.
    :param labels: which class each image shall show, ``[n]``; None: no class is asked for.
    :param on_step: called after every step, for a progress bar.
    :return: images, same shape.
    """
    layout = torch.channels_last if start.dim() == 4 else torch.preserve_format  # a fifth faster on a CPU
    images = start.clone(memory_format=layout).requires_grad_(True)
    optimizer = torch.optim.Adam([images], settings.lr, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    terms: list[Tensor] = []
    with evaluating(model), _before(batch_norms(model), lambda m, x: terms.append(statistics_loss(x, m))):
        for _ in range(settings.steps):
            terms.clear()
            with torch.enable_grad():
                scores = class_scores(call_model(model, network.wrap(images)))
                loss = sum(terms, images.new_zeros(())) + settings.smooth_weight * _roughness(images)
                if labels is not None:
                    loss = loss + settings.class_weight * functional.cross_entropy(at_least_float32(scores), labels)
                # only the images' gradient: none is left behind in the model
                (images.grad,) = torch.autograd.grad(loss, [images])
            optimizer.step()
            schedule.step()
            on_step()
    return images.detach().contiguous()


def at_least_float32(values: Tensor) -> Tensor:
    """Sums over many values of a bfloat16 or float16 network lose or overflow what they are about."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _roughness(images: Tensor) -> Tensor:
    """Mean squared difference of neighbours, summed over the dimensions of places."""
    places = range(2 if images.dim() > 2 else 1, images.dim())
    return sum((images.diff(dim=dim).square().mean() for dim in places), images.new_zeros(()))


@contextmanager
def _before(modules: Mapping[str, BatchNorm], hook: Callable[[BatchNorm, Tensor], object]) -> Iterator[None]:
    """Calls ``hook(module, input)`` before each run of the modules."""

    def pre_hook(module: BatchNorm, args: Any) -> None:
        hook(module, args[0])

    handles = [module.register_forward_pre_hook(pre_hook) for module in modules.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
