"""``data_free_layerwise``: Layer-Wise Data-Free CNN Compression (Horton et al. 2020, arXiv 2011.09058), channels.

The paper compresses a trained network without data, layer by layer, on generated layer inputs. Only its abstract was at
hand, so the parts are ours; each says so where it is:

1. *Inputs*: images inverted from BatchNorm statistics, drawn BatchNorm outputs, or both (``sources.py``).
2. *Which channels*: optimal brain surgery on whole channels, on the second moments of what their consumers see
   (``importance.py``). *How many*: ``balanced``, on the shares of a group's whole loss. The losses are shares of output
   variance, and ``least_loss`` compares them all over the network; it empties narrow first layers of some.
3. *The cut* is exact with respect to the masks, as for every pruning algorithm here.
4. *Making up for it*: each layer is re-fitted by ridge least squares to what the dense layer gives, in network order,
   on what the compressed prefix delivers; BatchNorm statistics follow (``reconstruction.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from nncf_compactprune.algorithms.channel_pruning import ChannelPruning, ChannelPruningConfig, ChannelPruningParams
from nncf_compactprune.algorithms.data_free.importance import consumer_names, importance
from nncf_compactprune.algorithms.data_free.inputs import FOLLOWS, GenerationConfig, check_generation, inputs_for
from nncf_compactprune.algorithms.data_free.operations import refittable
from nncf_compactprune.algorithms.data_free.reconstruction import dense_moments
from nncf_compactprune.algorithms.data_free.refit import RIDGE, DenseReference
from nncf_compactprune.channels import ChannelGraph
from nncf_compactprune.config import AlgorithmConfig
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.plugins.hookspecs import Algorithm, hookimpl

SCORE_RIDGE = 1e-3  # only keeps the inverse finite: channels that repeat each other are to be found out


class DataFreeParams(ChannelPruningParams):
    """Parameters of ``data_free_layerwise``: everything happens at once, before any training.

    :param schedule: nothing else is offered.
    :param ridge: how strongly re-fitted weights are held to what the cut left, relative to the inputs' variance.
    """

    unread: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("num_init_steps", "pruning_init", "pruning_steps", "shrink_every"), "everything happens at once."
    )
    schedule: Literal["one_shot"] = "one_shot"
    ridge: float = Field(default=RIDGE, gt=0)


class DataFreeConfig(ChannelPruningConfig):
    """A ``data_free_layerwise`` entry."""

    unread: ClassVar[Mapping[str, str]] = {"initializer": FOLLOWS}
    params: DataFreeParams = DataFreeParams()
    generation: GenerationConfig = GenerationConfig()


class DataFreeLayerwise(ChannelPruning):
    """Structured pruning without data, with re-fitted layers."""

    name = "data_free_layerwise"
    summary = "Structured pruning with no data: layers re-fitted on generated inputs (arXiv 2011.09058)"
    Config: ClassVar[type[AlgorithmConfig]] = DataFreeConfig
    config: DataFreeConfig

    def prepare(self, state: Mapping[str, Any] | None = None) -> None:
        if state is None:
            check_generation(self.context, self.config.generation)
        super().prepare(state)

    def scores(self, graph: ChannelGraph) -> Sequence[Tensor]:
        """The loss that re-fitted consumers would have without each channel."""
        model = self.context.model
        inputs = inputs_for(self.context, self.config.generation)
        with evaluating(model):
            names = consumer_names(graph) & set(refittable(model, inputs.rows(0, 1)).found)
            found = dense_moments(model, inputs, names)
        return importance(model, graph, found, SCORE_RIDGE, torch.get_num_threads())

    def before_cut(self) -> Callable[[PruningPlan], None]:
        reference = DenseReference.keep(self.context, self.config.generation)

        def refit(plan: PruningPlan) -> None:
            self.refits = reference.refit(plan, self.config.params.ridge)

        return refit

    def statistics(self) -> Mapping[str, Any]:
        seconds = {f"seconds of {what}": f"{s:.1f}" for what, s in self.context.seconds.items()}
        return {**super().statistics(), **seconds}


@hookimpl
def compactprune_algorithms() -> Iterable[type[Algorithm]]:
    """Offers :class:`DataFreeLayerwise`."""
    return [DataFreeLayerwise]
