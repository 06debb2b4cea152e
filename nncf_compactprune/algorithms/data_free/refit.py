"""Re-fitting a cut model to the dense one, for any pruning algorithm: keep the dense model, cut, re-fit."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import Field
from torch import nn

from nncf_compactprune.algorithms.base import Context
from nncf_compactprune.algorithms.data_free.inputs import GenerationConfig, check_generation, inputs_for
from nncf_compactprune.algorithms.data_free.reconstruction import Reconstruction, Refits, least_squares
from nncf_compactprune.algorithms.data_free.sources import REAL_SAMPLES, LayerInputs, is_small
from nncf_compactprune.config import Section
from nncf_compactprune.errors import DataError
from nncf_compactprune.host.calls import count_of, evaluating, shape_of_one
from nncf_compactprune.host.tensors import copy_in
from nncf_compactprune.host.torch_internals import tensors_of
from nncf_compactprune.plan import PruningPlan

RIDGE = 0.03
LARGE_SAMPLES = 1000  # of more than 64 x 64 pixels
IMAGE_MEMORY = 2**30  # bytes of all images
_Entry = TypeVar("_Entry", bound=Any)


class RefitConfig(Section):
    """``initializer.refit``: every layer around a cut is re-fitted to what the dense layer gave, before any training.

    :param num_samples: how many examples; null: 2,000 of up to 64 x 64 places (pixels, moments, words), 1,000 of larger
        ones, fewer where these take more than a gigabyte. Where activations are large, only as many run at once as a
        gigabyte holds.
    :param source: ``"dataset"`` takes examples of the training loader; ``"inversion"`` generates images from the
        network.
    :param ridge: how strongly weights are held to what the cut left, relative to the inputs' variance.
    """

    num_samples: int | None = Field(default=None, ge=1)
    source: Literal["dataset", "inversion"] = "dataset"
    ridge: float = Field(default=RIDGE, gt=0)

    def generation(self, context: Context) -> GenerationConfig:
        """As the generators read it."""
        if self.source == "inversion":
            return GenerationConfig(source="inversion", samples=self.num_samples)
        tensors, count = tensors_of(context.example_inputs), count_of(context.example_inputs)
        bytes_each = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / max(count, 1)
        fitting = REAL_SAMPLES if is_small(shape_of_one(context.example_inputs)) else LARGE_SAMPLES
        fitting = max(1, min(fitting, int(IMAGE_MEMORY / max(bytes_each, 1))))
        return GenerationConfig(source="dataset", samples=self.num_samples or fitting)


def refits_at_once(entry: _Entry, how: str) -> _Entry:
    """Refuses a re-fit behind a schedule.

    :param entry: has ``initializer`` and ``params``.
    :param how: the keys with which its cut happens at once.
    :return: the entry.
    :raises ValueError: it has a re-fit, and is not cut before training.
    """
    if entry.initializer.refit is not None and not entry.params.prunes_before_training:
        msg = (
            "initializer.refit goes back to what the dense layers gave, and a schedule leaves no dense layers: set "
            f"{how}, or leave out the re-fit."
        )
        raise ValueError(msg)
    return entry


def check_refit(context: Context, config: RefitConfig) -> None:
    """Refuses at once what would fail after the cut.

    :param context: the dense model and its training loader.
    :param config: the section.
    :raises DataError: examples of the training loader are wanted, and there is none.
    :raises DataFreeError: nothing can be generated from the network.
    """
    if config.source == "dataset" and context.train_loader is None:
        msg = (
            'initializer.refit: its source is "dataset", but no train_loader was given. Give one, or use "source": '
            '"inversion".'
        )
        raise DataError(msg)
    check_generation(context, config.generation(context))


@dataclass(frozen=True)
class DenseReference:
    """The dense model, kept from before the cut, with the inputs to compare on.

    :param context: its model is cut in between.
    :param dense: a copy of the model before the cut.
    :param inputs: what both run on.
    """

    context: Context
    dense: nn.Module
    inputs: LayerInputs

    @classmethod
    def keep(cls, context: Context, generation: GenerationConfig) -> DenseReference:
        """Copies the model of a context, which is dense now.

        :param context: the model, and the training loader where the images come from one.
        :param generation: where the images come from.
        """
        return cls(context, copy.deepcopy(context.model), inputs_for(context, generation))

    def refit(self, plan: PruningPlan, ridge: float) -> Refits:
        """Re-fits the context's model, which was cut meanwhile, in place; an EMA copy gets the same weights.

        :param plan: what was cut.
        :param ridge: see :class:`RefitConfig`.
        """
        context, model = self.context, self.context.model
        kept = {name: plan.selection(name) for name in plan.kept}
        with context.timed("reconstruction"), evaluating(model, changes=True), evaluating(self.dense):
            run = Reconstruction(self.dense, model, self.inputs, kept, least_squares(ridge))
            run.run(progress="Re-fitting layers")
        if context.ema is not None:
            copy_in(context.ema, model).load_state_dict(model.state_dict())
        return Refits(run.refits, run.left)
