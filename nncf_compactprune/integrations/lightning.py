"""Compression in Lightning's ``Trainer``: a callback, and its loss in ``training_step``.

.. code-block:: python

    module = Digits(net)  # a LightningModule whose training_step returns loss + compression.loss()
    module.compression = compression = CompressionCallback(net, "config.json", resume_from_checkpoint=last)
    trainer = lightning.pytorch.Trainer(callbacks=[compression], ...)
    trainer.fit(module, loader, ckpt_path=last)

When the model shrinks: with ``"one_shot"`` as the callback is made, before the optimizer exists. With a schedule on one
device, at the epoch that reaches the budget. Otherwise at the end of training; until then the
channels are masked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nncf_compactprune.config import CompressionConfig
from nncf_compactprune.controller import create_compressed_model, refuse_to_shrink_on_the_way
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.packages import require_package
from nncf_compactprune.plugins import Plugins

pl: Any = require_package("lightning.pytorch", "nncf-compactprune[lightning]")
STATE_KEY = "nncf_compactprune.CompressionCallback"


class CompressionCallback(pl.Callback):  # type: ignore[misc]
    """Steps a compression controller with a ``Trainer``, keeps its state in every checkpoint, and ends it.

    :param model: the ``LightningModule`` or a module in it, dense (also when resuming), on the device it trains on.
    :param config: a compression configuration, its path, or a dict.
    :param train_loader: batches for algorithms that need data and for BatchNorm adaptation, not the ``Trainer``'s own.
    :param resume_from_checkpoint: the file that ``Trainer.fit`` gets as ``ckpt_path``: the plan is replayed here, so
        that the checkpoint's weights and optimizer state fit. None: a new run.
    :param example_inputs: what to trace with; default: the configuration's ``input_info``.
    :raises CompactPruneError: as :func:`nncf_compactprune.create_compressed_model`; or the checkpoint has no state.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CompressionConfig | str | PathLike[str] | Mapping[str, Any],
        train_loader: Iterable[Any] | None = None,
        *,
        resume_from_checkpoint: str | PathLike[str] | None = None,
        example_inputs: Any = None,
        plugins: Plugins | None = None,
    ) -> None:
        self._resumed = None if resume_from_checkpoint is None else _read_state(resume_from_checkpoint)
        self.controller, self._model = create_compressed_model(
            model, config, train_loader, self._resumed, example_inputs=example_inputs, plugins=plugins
        )
        self._device = next(model.parameters()).device
        self._asked_for_loss = False

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressionCallback:
        """A copy of a LightningModule that has the callback for an attribute, such as an average, has the same one."""
        return self

    def loss(self) -> Tensor | float:
        """What ``training_step`` adds to the mean loss of its batch; a callback of Lightning's cannot do so itself."""
        self._asked_for_loss = True
        return self.controller.loss()

    @property
    def state_key(self) -> str:
        """Where a checkpoint has the compression's state."""
        return STATE_KEY

    def state_dict(self) -> dict[str, Any]:
        """The compression's state, for Lightning's checkpoint."""
        return self.controller.get_compression_state()

    # -- the Trainer's events --------------------------------------------------------------------------------------

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]) -> None:
        """Refuses to go on from another checkpoint than the one whose plan was replayed."""
        if trainer.state.fn == "fit" and checkpoint["callbacks"].get(STATE_KEY) != self._resumed:
            msg = (
                "CompressionCallback: the Trainer resumes from a checkpoint of another compression state. Give "
                "CompressionCallback(resume_from_checkpoint=...) and Trainer.fit(ckpt_path=...) the same file."
            )
            raise CompactPruneError(msg)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Checks what it was given, and lets the optimizers follow where one device trains."""
        if not any(module is self._model for module in pl_module.modules()):
            msg = "CompressionCallback: its model is no part of the LightningModule. Give it one that is."
            raise CompactPruneError(msg)
        if self.controller.adding_to_loss or not all(algorithm.settled for algorithm in self.controller.algorithms):
            self._refuse_unfit(trainer, pl_module)
        if trainer.world_size > 1:
            refuse_to_shrink_on_the_way(self.controller, "CompressionCallback: Lightning's strategy")
        one_device = trainer.world_size == 1 and trainer.optimizers
        self.controller.attach(
            optimizer=trainer.optimizers if one_device else None, ema=self._average(trainer, pl_module)
        )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins an epoch of the schedule; the model may shrink here."""
        self.controller.scheduler.epoch_step(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begins an optimizer step; accumulated batches after the first belong to the same one."""
        if trainer.current_epoch != self.controller.scheduler.current_epoch:
            # Resumed from a checkpoint of an epoch's last batch, Lightning leaves on_train_epoch_start out.
            self.controller.scheduler.epoch_step(trainer.current_epoch)
        if trainer.global_step != self.controller.scheduler.current_step:
            self.controller.scheduler.step(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Refuses to go on where an algorithm's loss would be left out in silence."""
        if not self._asked_for_loss and (names := self.controller.adding_to_loss):
            msg = (
                f"CompressionCallback: '{names[0]}' adds to the loss, but training_step did not ask for it. "
                "Return loss + callback.loss() from it."
            )
            raise CompactPruneError(msg)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Logs ``compression_rate``."""
        pl_module.log("compression_rate", float(self.controller.compression_rate))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Cuts what is still masked; afterwards the model is compact and free of hooks."""
        self.controller.strip()

    def _average(self, trainer: Any, pl_module: Any) -> nn.Module | None:
        """The model's copy in the average that Lightning's own callbacks keep of the whole module; None without one."""
        name = next(name for name, module in pl_module.named_modules() if module is self._model)
        for callback in trainer.callbacks:
            average = getattr(callback, "_average_model", None)
            if isinstance(average, AveragedModel):
                average = average.module
            if average is not None:
                copied: nn.Module = average.get_submodule(name)
                return copied
        return None

    def _refuse_unfit(self, trainer: Any, pl_module: Any) -> None:
        """Masks and teachers were made where the model was, and want whole parameters."""
        device = next(self._model.parameters()).device
        if device != self._device:
            msg = (
                f"CompressionCallback: made for a model on {self._device}, which trains on {device}. "
                f"Move the model before: model.to('{device}')."
            )
            raise CompactPruneError(msg)
        strategies = pl.strategies
        sharded = not isinstance(trainer.strategy, (strategies.SingleDeviceStrategy, strategies.DDPStrategy))
        if sharded or pl_module._compiler_ctx is not None:
            what = type(trainer.strategy).__name__ if sharded else "torch.compile"
            msg = (
                f"CompressionCallback: {what} does not go with masks, nor with a model that shrinks later. "
                'Use "schedule": "one_shot", which prunes as the callback is made.'
            )
            raise CompactPruneError(msg)


def _read_state(path: str | PathLike[str]) -> dict[str, Any]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)["callbacks"][STATE_KEY]
    except (OSError, UnpicklingError, RuntimeError, EOFError) as error:
        msg = f"{path}: cannot be read without running code from it ({error}). Take an earlier checkpoint."
        raise CompactPruneError(msg) from error
    except (KeyError, TypeError) as error:
        msg = f"{path}: has no compression state: it was saved without the callback, or with save_weights_only."
        raise CompactPruneError(msg) from error
    return state  # type: ignore[no-any-return]
