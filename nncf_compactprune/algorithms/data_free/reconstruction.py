"""Re-fits a compressed network layer by layer, in network order, so that each layer gives what the dense one gave.

For each convolution or linear layer, with X' what the compressed prefix delivers and Y what the dense layer computes:

    minimise_W  || W X' - Y ||^2 + lambda || W - W_0 ||^2

about the means, W_0 being the weights that the cut left. Closed form from Gram matrices (``gram.py``). What a bias or
the next BatchNorm can carry is taken out: means go there.

A BatchNorm's statistics then follow *relatively*: sigma' = sigma std(Y') / std(Y), and mu' such that
(mean(Y') - mu') / sigma' = (mean(Y) - mu) / sigma, with Y and Y' what the dense and the compressed layer in front of it
give on the same inputs. Were the inputs real, this would be BatchNorm re-estimation; with generated ones it keeps what
the dense network knows of real statistics.

Source: "Layer-Wise Data-Free CNN Compression" (arXiv 2011.09058) reconstructs layers on generated inputs; the closed
form, the prior and the relative statistics are ours (only the abstract was at hand).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import nncf
import torch
from nncf.common.logging import nncf_logger
from torch import Tensor, nn

from nncf_compactprune.algorithms.data_free.gram import CHUNK_ELEMENTS, Moments, Sums, damped
from nncf_compactprune.algorithms.data_free.network import batch_norms, statistics
from nncf_compactprune.algorithms.data_free.operations import Call, Calls, refittable
from nncf_compactprune.algorithms.data_free.pacing import Met, Paced, Part, Place, parts_of, places, room_for, twin
from nncf_compactprune.algorithms.data_free.resampling import resampling
from nncf_compactprune.algorithms.data_free.sources import LayerInputs
from nncf_compactprune.cut.transaction import Transaction, transaction
from nncf_compactprune.host.calls import call_model, unmarked
from nncf_compactprune.host.nncf_hooks import remove_hooks
from nncf_compactprune.host.nncf_progress import track
from nncf_compactprune.host.tensors import carries_hooks, model_tensors, named_modules, own_tensors
from nncf_compactprune.host.torch_internals import BatchNorm

MUCH_DOUBT = 0.5  # from here on more of a layer's correlations is chance than not
MIN_VARIANCE = 0.01  # a channel that varies less, beside what its BatchNorm remembers, says little of its spread
MIN_STD_RATIO = 0.05  # a channel whose output all but vanished keeps a scale that does not blow up


@dataclass(frozen=True)
class Refit:
    """How one layer came out.

    :param name: the layer.
    :param before: squared error of its outputs with the weights that the cut left, over their variance.
    :param after: the same after least squares.
    :param doubt: see :attr:`~nncf_compactprune.algorithms.data_free.gram.Moments.doubt`.
    """

    name: str
    before: float
    after: float
    doubt: float = 0.0


@dataclass(frozen=True)
class Refits:
    """What a re-fit did.

    :param layers: one entry a layer, in network order.
    :param left: layers that it did not touch, each with the reason.
    """

    layers: Sequence[Refit] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    def statistics(self) -> dict[str, str]:
        """Figures to report, by name."""
        figures = {"layers re-fitted": str(len(self.layers))}
        if self.left:
            figures["layers left"] = ", ".join(self.left)
        if self.layers:
            before, after = (
                sum(getattr(layer, when) for layer in self.layers) / len(self.layers) for when in ("before", "after")
            )
            figures["mean layer error"] = f"{before:.3f} -> {after:.3f}"
        doubtful = [f"{layer.name} ({layer.doubt:.0%})" for layer in self.layers if layer.doubt > MUCH_DOUBT]
        if doubtful:
            figures["layers that the images tell little of (doubt)"] = ", ".join(doubtful)
        return figures


def solve(weight: Tensor, found: Moments, ridge: float) -> Tensor:
    """Ridge least squares around given weights. What the images leave in doubt holds them back, too: the second moments
    are the trusted ones, and of what the output lacks, the share that is chance is not learned.

    :param weight: where the ridge pulls to, ``[groups, out/groups, d]``.
    :param found: moments of what enters the layer, and of what it should give.
    :param ridge: strength relative to the inputs' mean variance.
    :return: the weights, same shape.
    """
    right = found.cross - found.inputs @ weight.transpose(1, 2)
    right = (1 - found.chance) * right
    moved: Tensor = torch.linalg.solve(damped(found.trusted, ridge), right).transpose(1, 2)
    return weight + moved


def relative_error(weight: Tensor, found: Moments) -> float:
    """Squared error of ``W X - Y`` about the means, over the variance of Y.

    :param weight: W, ``[groups, out/groups, d]``.
    :param found: moments of X and Y.
    :return: at least 0; 1 is as good as a constant.
    """
    rows = weight.transpose(1, 2)
    fit = (rows * (found.inputs @ rows)).sum(1) - 2 * (rows * found.cross).sum(1) + found.energy
    return float(fit.sum() / found.energy.sum().clamp_min(1e-30))


LayerStep = Callable[[str, Tensor, Moments], Tensor]
"""Name, weight as matrices ``[groups, out/groups, d]``, and moments to the layer's new weight, same shape."""


def least_squares(ridge: float) -> LayerStep:
    """The step that re-fits each layer around the weights that it has."""
    return lambda name, rows, found: solve(rows, found, ridge)


def as_they_are(name: str, rows: Tensor, found: Moments) -> Tensor:
    """The step that leaves weights alone: biases and BatchNorm statistics are corrected, nothing else.

    :param name: the layer's.
    :param rows: its weight, ``[groups, out/groups, d]``.
    :param found: its moments.
    :return: ``rows``.
    """
    return rows


@dataclass
class Reconstruction:
    """One pass over a compressed model that re-fits every layer it comes to.

    :param dense: the reference, in eval mode.
    :param compressed: changed in place, in eval mode; the same modules under the same names, channels cut or not; some
        may be gone.
    :param inputs: what both run on; in parts, where memory asks for it and the compressed model carries no hooks.
    :param kept: parameter name to dimension to kept positions, of what was cut; empty where nothing was.
    :param step: how a layer's weights are chosen.
    :param used: layer and its weight to what its operation uses, where a hook works on that.
    :param left: the layers that were not re-fitted, with the reason; filled by :meth:`run`.
    """

    dense: nn.Module
    compressed: nn.Module
    inputs: LayerInputs
    kept: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    step: LayerStep = as_they_are
    used: Callable[[str, Tensor], Tensor] = lambda name, weight: weight
    refits: list[Refit] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    @torch.no_grad()
    def run(self, *, progress: str = "") -> list[Refit]:
        """Goes through the model once. Layers that cannot be re-fitted keep their weights, with a warning.

        :param progress: description of a progress bar; none where empty.
        :return: one entry a layer, in network order.
        """
        modules = dict(named_modules(self.compressed))
        first = self.inputs.rows(0, 1)
        layers = refittable(self.dense, first).among(modules)
        self.left = layers.left
        warn_of_left(self.left)
        once = called_once(self.dense, first)
        norms = [name for name in batch_norms(self.compressed) if name in once]
        watched = places(self.dense, self._call(first), _weights(self.dense, layers.found), norms)
        found = set(layers.found)
        bar = iter(track(range(len(found)), description=progress)) if progress else iter(())
        with ExitStack() as stack:
            # all copies come first: a run puts hooks on its models
            models = {part: self._models(part) for part in self._parts(watched)}
            running: dict[Part, tuple[ExitStack, Paced, Paced]] = {}
            for at, place in enumerate(watched):
                for part in [part for part in running if part.last < at]:
                    running.pop(part)[0].close()
                for part, pair in models.items():
                    if part.first == at:
                        ends = stack.enter_context(ExitStack())
                        running[part] = (ends, *self._started(part, *pair, norms, layers.found, ends))
                        for passed in watched[:at]:
                            for run in running[part][1:]:
                                run.meet(passed.name)
                met = [(there.meet(place.name), here.meet(place.name)) for _, there, here in running.values()]
                if place.name in found:
                    self._layer(modules[place.name], met)
                    next(bar, None)
                else:
                    self._norm(modules[place.name], met)  # type: ignore[arg-type]
                del met
            for _, _, compressed in running.values():
                compressed.step()  # to its end: quantizers that come later find their ranges, too
        if not watched:
            self._call(self.inputs.batch)(self.compressed)
        next(bar, None)
        return self.refits

    def _parts(self, watched: Sequence[Place]) -> list[Part]:
        """The images, split. All stay together where some rows are drawn, as these stand at the end, and where NNCF's
        hooks are on: two models with hooks cannot run in turns."""
        count = len(self.inputs)
        if self.inputs.resampled or carries_hooks(self.compressed):
            return [Part(0, count, 0, len(watched) - 1)]
        parts = parts_of(count, [2 * place.bytes for place in watched])
        used = sum(part.end - part.begin for part in parts)
        if used < count:
            nncf_logger.info("Re-fit: %d of %d images are used, as many as memory has room for.", used, count)
        return parts

    def _call(self, inputs: Any) -> Callable[[nn.Module], None]:
        return partial(run_on, inputs, contents=False)

    def _models(self, part: Part) -> tuple[nn.Module, nn.Module]:
        """Both models for a part's images: the first part has the models, the others have twins."""
        if part.begin == 0:
            return self.dense, self.compressed
        return twin(self.dense), twin(self.compressed)

    def _started(
        self,
        part: Part,
        dense: nn.Module,
        compressed: nn.Module,
        norms: Collection[str],
        layers: Collection[str],
        stack: ExitStack,
    ) -> tuple[Paced, Paced]:
        """Runs of both models, at their start, until the stack is closed."""
        modules = dict(named_modules(compressed))

        def compute(name: str, call: Call) -> Tensor:
            return call.run(self.used(name, modules[name].get_parameter("weight")), _bias(modules[name]))

        stack.enter_context(resampling(dense, self.inputs.resampled, {}))
        stack.enter_context(resampling(compressed, self.inputs.resampled, self.kept))
        call = self._call(self.inputs.rows(part.begin, part.end))
        return (
            stack.enter_context(Paced(dense, call, _weights(dense, layers), norms)),
            stack.enter_context(Paced(compressed, call, _weights(compressed, layers), norms, compute)),
        )

    def _layer(self, module: nn.Module, met: Sequence[tuple[Met, Met]]) -> None:
        name, operation = met[0][1].name, met[0][1].operation
        if operation is None:
            msg = f"'{name}' is no layer"
            raise nncf.InternalError(msg)
        weight, bias = module.get_parameter("weight"), _bias(module)
        old = operation.rows(weight)
        sums = Sums(operation, sum(len(here.input) for _, here in met))
        for there, here in met:
            sums.add(here.input, self._wanted(there, operation.channel_dim))
        found = sums.moments(old)
        try:
            new = self.step(name, old, found)
        except RuntimeError:  # inputs that are all zero, say: nothing to learn from
            new = old
        if bool(torch.isfinite(new).all()):
            weight.copy_(operation.weight(new))
        rows = operation.rows(weight)
        if bias is not None:
            offset = found.mean_out - (rows @ found.mean_in.unsqueeze(2)).squeeze(2)
            bias.copy_(offset.reshape(-1))
        self.refits.append(Refit(name, relative_error(old, found), relative_error(rows, found), found.doubt))

    def _wanted(self, met: Met, channel_dim: int) -> Tensor:
        """What the dense layer gives, the channels that are left."""
        if met.output is None or met.operation is None:
            msg = f"'{met.name}' is no layer"
            raise nncf.InternalError(msg)
        positions = met.operation.outputs_kept(self.kept.get(f"{met.name}.weight", {}))
        if positions is None:
            return met.output
        return met.output.index_select(channel_dim, positions.to(met.output.device))

    def _norm(self, module: BatchNorm, met: Sequence[tuple[Met, Met]]) -> None:
        name = met[0][0].name
        positions = self.kept.get(f"{name}.running_mean", {}).get(0)
        mean, var = self._mean_and_variance([here.input for _, here in met])
        dense_mean, dense_var = self._mean_and_variance([there.input for there, _ in met])
        if positions is not None:
            positions = positions.to(dense_mean.device)
            dense_mean, dense_var = dense_mean[positions], dense_var[positions]
        stored_mean, stored_var = statistics(module)
        expected = MIN_VARIANCE * stored_var.to(dense_var)
        floor = torch.where(dense_var < expected, expected, 0.0)  # nearly constant on these inputs: they say little
        ratio = ((var + floor) / (dense_var + floor).clamp_min(1e-12)).clamp_min(MIN_STD_RATIO**2)
        stored_mean.copy_(mean - (dense_mean - stored_mean) * ratio.sqrt())
        stored_var.mul_(ratio)

    def _mean_and_variance(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Of all channels ``[c]`` over images and places; drawn rows count only where there are no others."""
        found, weights = [], []
        for part in parts:
            rows = len(part) - self.inputs.resampled or len(part)
            images = max(1, CHUNK_ELEMENTS * len(part) // part.numel())
            for x in part[:rows].split(images):  # type: ignore[no-untyped-call]
                found.append(torch.var_mean(x.double(), [0, *range(2, x.dim())], unbiased=False))
                weights.append(len(x))
        share = torch.tensor(weights, dtype=torch.float64, device=parts[0].device).unsqueeze(1) / sum(weights)
        variances, means = (torch.stack(values) for values in zip(*found, strict=True))
        mean = (share * means).sum(0)
        return mean, (share * (variances + (means - mean).square())).sum(0)


def run_on(inputs: Any, model: nn.Module, *, contents: bool = True) -> None:
    """Runs a model, and takes back what that leaves in it. For a run in a thread of its own, as what is written into
    tensors is seen in the thread that writes it.

    :param inputs: as it is called.
    :param model: the network, or a compressed copy.
    :param contents: see :func:`~nncf_compactprune.host.calls.unmarked`.
    """
    with unmarked(model, contents=contents):
        call_model(model, inputs)


def warn_of_left(left: Mapping[str, str]) -> None:
    """Names the layers that are not re-fitted.

    :param left: the reason of each, by name.
    """
    if left:
        lines = "".join(f"\n  '{name}': {reason}" for name, reason in left.items())
        nncf_logger.warning("%d layers are not re-fitted and keep their weights:%s", len(left), lines)


def _bias(module: nn.Module) -> Tensor | None:
    return own_tensors(module).get("bias")


def _weights(model: nn.Module, layers: Iterable[str]) -> dict[int, str]:
    return {id(model.get_parameter(f"{name}.weight")): name for name in layers}


@contextmanager
def whole_or_nothing(model: nn.Module) -> Iterator[Transaction]:
    """An exception inside puts every tensor back and takes NNCF's hooks off; the model came without any."""
    with transaction() as log:
        for _, tensor in model_tensors(model).named():
            log.set_data(tensor, tensor.data.clone())
        try:
            yield log
        except BaseException:
            remove_hooks(model)
            raise


@torch.no_grad()
def called_once(model: nn.Module, inputs: Any) -> set[str]:
    """Names of the modules that one forward pass calls exactly once.

    :param model: it is only run.
    :param inputs: as it is called; one example is enough.
    """
    counts: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(partial(lambda *_, name: counts.update([name]), name=name))
        for name, module in named_modules(model)
    ]
    try:
        with unmarked(model):
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, count in counts.items() if count == 1}


@torch.no_grad()
def dense_moments(model: nn.Module, inputs: LayerInputs, names: Collection[str]) -> dict[str, Moments]:
    """Moments of layers on a model's own inputs and outputs, in one pass.

    :param model: in eval mode.
    :param inputs: what it runs on.
    :param names: of layers that :func:`refittable` found.
    """
    found: dict[str, Sums] = {}
    count = len(inputs)
    if not inputs.resampled:
        on_one = partial(run_on, inputs.rows(0, 1))
        count = min([count, *(room_for(place.bytes) for place in places(model, on_one, _weights(model, names), ()))])

    def collect(name: str, call: Call) -> Tensor:
        output = call.run(call.weight, call.bias)
        sums = found.setdefault(name, Sums(call.operation, len(inputs)))
        sums.add(call.input, output)
        return output

    with resampling(model, inputs.resampled, {}), Calls(_weights(model, names), collect), unmarked(model):
        for part in inputs.split(count):
            call_model(model, part)
    return {name: found.pop(name).moments() for name in list(found)}  # sums take as much memory again
