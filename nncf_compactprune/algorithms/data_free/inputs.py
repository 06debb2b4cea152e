"""The ``generation`` section that all data-free algorithms share, and the inputs that they share at work."""

from __future__ import annotations

from pydantic import Field, model_validator

from nncf_compactprune.algorithms.base import Context
from nncf_compactprune.algorithms.data_free import Generation, Inversion, LayerInputs, layer_inputs
from nncf_compactprune.algorithms.data_free.sources import Source, check
from nncf_compactprune.config import Section
from nncf_compactprune.host.calls import evaluating

SHARED_KEY = "datafree.inputs"
FOLLOWS = (
    "BatchNorm statistics follow the re-fitted layers. Give BatchNorm adaptation to an entry that prunes with data."
)


class GenerationConfig(Section):
    """Where layer inputs come from.

    :param source: ``"inversion"`` optimises images until the network's BatchNorm statistics match; ``"bn_sampling"``
        draws BatchNorm outputs; ``"inversion+bn_sampling"`` is both; ``"dataset"`` takes examples of the training
        loader, of any kind.
    :param samples: how many; null: 512 of 32 x 32 pixels, fewer of larger images, at least 64; of the training loader
        2,000 of up to 64 x 64 places (pixels, moments, words), 300 of larger ones.
    :param steps: optimisation steps of an inverted image.
    :param seed: of all draws.
    :param cache: a safetensors file to keep inverted images in; a run that was killed goes on from it.
    """

    source: Source = "inversion"
    samples: int | None = Field(default=None, ge=1)
    steps: int = Field(default=20, ge=1)
    seed: int = Field(default=0, ge=0)
    cache: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _of_one_source(self) -> GenerationConfig:
        for key in ("steps", "cache"):
            if key in self.model_fields_set and "inversion" not in self.source and getattr(self, key) is not None:
                msg = f"'{key}' belongs to inverted images, but the source is \"{self.source}\". Leave one of them out."
                raise ValueError(msg)
        return self

    def settings(self) -> Generation:
        """As the generators read it."""
        return Generation(self.source, self.samples, Inversion(self.steps), self.seed, self.cache)


def check_generation(context: Context, config: GenerationConfig) -> None:
    """Refuses at once what generation would refuse after an hour.

    :param context: its model is only looked at.
    :param config: the entry's ``generation`` section.
    :raises DataFreeError: see :func:`nncf_compactprune.algorithms.data_free.sources.check`.
    """
    check(context.model, context.example_inputs, config.settings(), has_data=context.train_loader is not None)


def inputs_for(context: Context, config: GenerationConfig) -> LayerInputs:
    """Inputs for the model as it is now. What an earlier algorithm of the list made with equal settings serves again:
    pruning keeps what a network's inputs look like.

    :param context: its model is only run; the inputs are kept in its ``shared``.
    :param config: the entry's ``generation`` section.
    :raises DataFreeError: they cannot be made; the model is untouched.
    """
    key = (SHARED_KEY, config.settings())
    if key not in context.shared:
        with context.timed("generation"), evaluating(context.model):
            batches = context.batches() if context.train_loader is not None else None
            context.shared[key] = layer_inputs(context.model, context.example_inputs, config.settings(), batches)
    found: LayerInputs = context.shared[key]
    return found
