"""What the three kinds of sparsity share: masks on NNCF's hooks, a schedule, and zeros in the weights at the end."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from nncf.common.logging import nncf_logger
from torch import Tensor

from nncf_compactprune.algorithms.base import MASKED_WEIGHTS, Begins, CompressionAlgorithm, CompressionStage, Context
from nncf_compactprune.algorithms.batch_norm import adapt_batch_norm
from nncf_compactprune.algorithms.sparsity.config import SparsityEntry
from nncf_compactprune.algorithms.sparsity.schedules import level
from nncf_compactprune.config import Nncf2Entry
from nncf_compactprune.decide.scopes import ScopeRules, operations_out_of_scope
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.host.nncf_sparsity import Sparsity
from nncf_compactprune.host.tensors import copy_in


class MaskedWeights(CompressionAlgorithm):
    """Single weights are zero through masks until :meth:`strip` writes the zeros.

    :param config: the validated entry of ``"compression"``.
    :param context: the model and what else the algorithm works with.
    """

    begins: ClassVar[Begins] = Begins.AFTER_CUTS
    #: the masks are parameters
    learned: ClassVar[bool] = False
    config: Nncf2Entry

    def __init__(self, config: Nncf2Entry, context: Context) -> None:
        super().__init__(config, context)
        self._sparsity: Sparsity | None = None
        self._zeros = 0.0
        self._stripped = False

    @property
    def sparsity(self) -> float:
        """Share of zeros in the weights in scope."""
        return self._zeros if self._sparsity is None else self._sparsity.level

    def prepare(self, state: Mapping[str, Any] | None = None) -> None:
        if state is not None and state["stripped"]:
            self._zeros, self._stripped = float(state["zeros"]), True
            return
        self._sparsity = self._masked()
        self.context.shared[MASKED_WEIGHTS] = True

    def _masked(self) -> Sparsity:
        """Puts masks that keep everything on what the scopes leave."""
        model, example, config = self.context.model, self.context.example_inputs, self.config
        rules = ScopeRules(nncf2=True, validate=config.validate_scopes)
        left_out = operations_out_of_scope(model, example, config.ignored_scopes, config.target_scopes, rules)
        with evaluating(model, changes=True):
            return Sparsity(model, example, left_out, learned=self.learned)

    @property
    def masked_weights(self) -> Collection[str]:
        """The parameters that carry a mask now."""
        return () if self._sparsity is None else self._sparsity.masks().keys()

    def adopt_masks(self, masks: Mapping[str, Tensor], learned: Mapping[str, Tensor], epoch: int) -> None:
        """Takes over the masks of another run, before its weights are loaded.

        :param masks: by parameter, which weights stay: booleans of its shape.
        :param learned: by parameter, the logits behind masks that are learned.
        :param epoch: the last that the run had begun; -1 where none is known.
        """
        if self._sparsity is not None:
            self._sparsity.take_masks(masks, learned)

    def strip(self) -> None:
        if self._sparsity is not None:
            self._zeros = self._sparsity.level
            ema = self.context.ema
            self._sparsity.write([] if ema is None else [copy_in(ema, self.context.model)])
            self._sparsity = None
        self._stripped = True

    def stage(self) -> CompressionStage:
        return CompressionStage.FULLY_COMPRESSED

    def statistics(self) -> Mapping[str, Any]:
        return {"stage": self.stage().name.lower(), "zeros": f"{self.sparsity:.1%} of the weights in scope"}

    def get_state(self) -> dict[str, Any]:
        return {"zeros": self.sparsity, "stripped": self._stripped}


class ScheduledSparsity(MaskedWeights):
    """Sparsity whose level rises with the epochs.

    :param config: the validated entry of ``"compression"``.
    :param context: the model and what else the algorithm works with.
    """

    config: SparsityEntry

    def __init__(self, config: SparsityEntry, context: Context) -> None:
        super().__init__(config, context)
        self._level = config.sparsity_init
        self._frozen = False
        self._scheduled = True
        self._epoch = -1
        self._steps = 0
        self._steps_per_epoch = config.params.steps_per_epoch

    # -- for subclasses ------------------------------------------------------------------------------------------

    def set_level(self, value: float) -> None:
        """Asks for a level now.

        :param value: share of zeros, in [0, 1).
        """
        self._level = value

    def freeze(self) -> None:
        """The masks stay as they are from here on."""
        self._frozen = True

    def level_at(self, epoch: float) -> float:
        """The level that the schedule asks for.

        :param epoch: from 0; within an epoch, a fraction more.
        """
        return level(self.config.params, self.config.sparsity_init, epoch)

    # -- life ----------------------------------------------------------------------------------------------------

    def prepare(self, state: Mapping[str, Any] | None = None) -> None:
        super().prepare(state)
        if self._sparsity is None:
            return
        if state is None:
            self.set_level(self.config.sparsity_init)
            if "initializer" in self.config.model_fields_set:
                samples = self.config.initializer.batchnorm_adaptation.num_bn_adaptation_samples
                adapt_batch_norm(self.context, samples, asked_for=True)
        else:
            self.load_state(state)

    def adopt_masks(self, masks: Mapping[str, Tensor], learned: Mapping[str, Tensor], epoch: int) -> None:
        if self._sparsity is None:
            return
        if epoch >= 0:
            self._epoch = epoch
            self.set_level(self.level_at(epoch))
            if epoch >= self.config.params.sparsity_freeze_epoch:
                self.freeze()
        super().adopt_masks(masks, learned, epoch)

    def epoch_step(self, epoch: int) -> None:
        if self._steps_per_epoch is None and self._steps:
            self._steps_per_epoch = self._steps
        self._epoch, self._steps = epoch, 0
        if self._sparsity is None or self._frozen or not self._scheduled:
            return
        if epoch >= self.config.params.sparsity_freeze_epoch:
            self.set_level(self.level_at(epoch))
            self.freeze()
        else:
            self.set_level(self.level_at(epoch))

    def step(self, step: int) -> None:
        self._steps += 1
        params = self.config.params
        by_step = params.update_per_optimizer_step and params.schedule == "polynomial"
        if not by_step or self._steps_per_epoch is None or self._sparsity is None:
            return
        if not self._frozen and self._scheduled:
            share = min((self._steps - 1) / self._steps_per_epoch, 1.0)
            self.set_level(self.level_at(max(self._epoch, 0) + share))

    def disable_scheduler(self) -> None:
        self._scheduled = False

    def stage(self) -> CompressionStage:
        if not self._scheduled or self._stripped or self._level >= self.config.params.target:
            return CompressionStage.FULLY_COMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED if self._level > 0 else CompressionStage.UNCOMPRESSED

    def statistics(self) -> Mapping[str, Any]:
        return {**super().statistics(), "level asked for": f"{self._level:.3f} of {self.config.params.target:.3f}"}

    def get_state(self) -> dict[str, Any]:
        return {
            **super().get_state(),
            "level": self._level,
            "frozen": self._frozen,
            "scheduled": self._scheduled,
            "steps_per_epoch": self._steps_per_epoch,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._scheduled = self._scheduled and bool(state["scheduled"])  # a schedule that ended stays so
        self._steps_per_epoch = state["steps_per_epoch"]
        self.set_level(float(state["level"]))
        if state["frozen"] and not self._frozen:
            self.freeze()


def warn_unread(config: SparsityEntry, name: str) -> None:
    """Names keys of one schedule that another one does not read.

    :param config: the entry.
    :param name: of the algorithm, for the message.
    """
    params = config.params
    readers = {
        "multistep_steps": "multistep",
        "multistep_sparsity_levels": "multistep",
        "update_per_optimizer_step": "polynomial",
        "steps_per_epoch": "polynomial",
        "power": "polynomial",
        "concave": "polynomial",
        "patience": "adaptive",
    }
    given = [key for key, schedule in readers.items() if key in params.model_fields_set and params.schedule != schedule]
    if given:
        nncf_logger.warning(f'{name}: the schedule "{params.schedule}" does not read {", ".join(given)}.')
