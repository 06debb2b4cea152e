"""The basis of a stream: the directions in which it moves most, measured on batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.algorithms.rotation.streams import Stream
from nncf_compactprune.algorithms.rotation.tape import Site, SiteCounter
from nncf_compactprune.errors import DataError
from nncf_compactprune.host.calls import call_model, evaluating
from nncf_compactprune.host.distributed import summed
from nncf_compactprune.host.tensors import device_of
from nncf_compactprune.host.torch_internals import TorchDispatchMode


@dataclass(frozen=True)
class Basis:
    """A rotation of a stream, ``x' = x @ matrix``.

    :param stream: which.
    :param matrix: orthogonal, ``[width, width]``, float64.
    :param energy: for every norm, how much of its result each direction holds, the sum of all being 1, ``[width]``, in
        the order of the channels: the last ones hold least of all norms together. Where a norm takes the mean away,
        channel j + 1 brings in direction j, and channel 0 none.
    """

    stream: Stream
    matrix: Tensor
    energy: Mapping[Site, Tensor]

    @property
    def scores(self) -> Tensor:
        """Root of the mean energy over all norms, ``[width]``, larger kept. They fall, so that the last channels go."""
        scores = torch.stack(list(self.energy.values())).mean(0).sqrt()
        if self.stream.has_means:
            scores[0] = scores.max()
        step = 1e-9 * torch.arange(len(scores), 0, -1, dtype=scores.dtype, device=scores.device)  # empty ones fall, too
        return scores.cummin(0).values + step

    def factor(self, site: Site, kept: int) -> float:
        """What layers behind a norm have to multiply its result by where the first channels stay.

        A norm over fewer channels makes the mean square of those that stay 1, and it was another: where the last
        directions were empty, all the others were larger by the root of ``width / kept``.

        :param site: the norm.
        :param kept: how many channels stay.
        """
        share = float(self.energy[site][:kept].sum())
        return math.sqrt(share * self.stream.width / kept)


def helmert(width: int) -> Tensor:
    """Orthonormal rows, each of which sums to zero, ``[width - 1, width]``, float64.

    Row j is zero behind position j + 1. So where the last positions go, rows that lay in them leave the same number in
    all positions that stay, which a LayerNorm's mean takes away: the other rows are as before.

    :param width: number of positions.
    """
    rows = torch.ones(width - 1, width, dtype=torch.float64).tril()
    at = torch.arange(1, width, dtype=torch.float64)
    rows[torch.arange(width - 1), torch.arange(1, width)] = -at
    return rows / (at * (at + 1)).sqrt()[:, None]


def measured(model: nn.Module, streams: Sequence[Stream], batches: Sequence[Any]) -> list[Basis]:
    """The basis of every stream: principal directions of what the norms over it give, all norms alike, without their
    weights (Ashkboos et al. 2024, SliceGPT, section 3.3, which has a basis for every block).

    :param model: is only run, in eval mode.
    :param streams: of the model.
    :param batches: model inputs.
    :raises DataError: no batch; or the network takes other norms on one of them than it took on the example input.
    """
    moments = {
        id(stream): torch.zeros(stream.width, stream.width, dtype=torch.float64, device=device_of(model))
        for stream in streams
    }

    def add(stream: Stream, site: Site, normed: Tensor) -> None:
        moments[id(stream)] += (normed.T @ normed).double()

    _watch(model, streams, batches, add)
    totals = summed([moments[id(stream)] for stream in streams])
    matrices = {id(stream): _directions(stream, total) for stream, total in zip(streams, totals, strict=True)}
    energies = {
        (id(stream), site): torch.zeros(stream.width, dtype=torch.float64, device=device_of(model))
        for stream in streams
        for site in stream.sites
    }

    def measure(stream: Stream, site: Site, normed: Tensor) -> None:
        rotated = normed.double() @ matrices[id(stream)]
        if stream.has_means:
            rows = helmert(stream.width).to(rotated.device)
            rotated = nn.functional.pad(rotated @ rows.T, (1, 0))
        energies[id(stream), site] += rotated.square().sum(0)

    _watch(model, streams, batches, measure)
    found = []
    for stream in streams:
        sums = summed([energies[id(stream), site] for site in stream.sites])
        shares = {site: one / one.sum().clamp_min(1e-30) for site, one in zip(stream.sites, sums, strict=True)}
        found.append(Basis(stream, matrices[id(stream)], shares))
    return found


def _directions(stream: Stream, moments: Tensor) -> Tensor:
    """Columns by descending variance. Where norms take the mean away, the mean over channels stays what it is, and the
    directions beside it are brought into Helmert's."""
    if not stream.has_means:
        return _principal(moments)
    rows = helmert(stream.width).to(moments.device)
    return rows.T @ _principal(rows @ moments @ rows.T) @ rows + 1 / stream.width


def _principal(moments: Tensor) -> Tensor:
    """Eigenvectors as columns, the largest eigenvalue first."""
    vectors: Tensor = torch.linalg.eigh(moments).eigenvectors
    return vectors.flip(1)


def _watch(
    model: nn.Module,
    streams: Sequence[Stream],
    batches: Iterable[Any],
    see: Callable[[Stream, Site, Tensor], None],
) -> None:
    """Shows what every norm over the streams gives before its weight, ``[positions, width]``, float32 or float64."""
    seen = 0
    for batch in batches:
        seen += 1
        watching = _Norms(streams, see)
        with evaluating(model, batch), watching:
            call_model(model, batch)
        if watching.missed:
            msg = (
                f"rotate: {type(model).__name__} takes other norms on batch {seen} than on the example input. Give "
                "batches and an example input that take the same way through the network."
            )
            raise DataError(msg)
    if not seen:
        msg = "rotate: expected at least one batch to measure the network on, got none. Give a train_loader."
        raise DataError(msg)


class _Norms(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Recognises norms by their place in the run."""

    def __init__(self, streams: Sequence[Stream], see: Callable[[Stream, Site, Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see
        self._counter = SiteCounter()
        self._wanted = {(site.kind, site.number): (stream, site) for stream in streams for site in stream.sites}

    @property
    def missed(self) -> bool:
        """Whether norms did not come."""
        return bool(self._wanted)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = self._wanted.get(self._counter.number(func, args))
        if found is not None:
            stream, site = found
            x = args[0]
            if x.shape[site.dim] == stream.width:
                del self._wanted[site.kind, site.number]
                x = x.movedim(site.dim, -1).reshape(-1, stream.width)
                x = x if x.dtype == torch.float64 else x.float()
                if site.kind == "layer_norm":
                    x = x - x.mean(-1, keepdim=True)
                self._see(stream, site, x * (x.square().mean(-1, keepdim=True) + 1e-12).rsqrt())
        return func(*args, **(kwargs or {}))
