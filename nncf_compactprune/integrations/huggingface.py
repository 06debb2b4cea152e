"""Compression in Hugging Face's ``Trainer``, without a subclass: a callback and a loss function.

.. code-block:: python

    last = last_checkpoint(args.output_dir)
    compression = CompressionCallback(model, "config.json", resume_from_checkpoint=last)
    trainer = Trainer(model, args, callbacks=[compression], compute_loss_func=compression.compute_loss, ...)
    trainer.train(resume_from_checkpoint=last)

When the model shrinks: with ``"one_shot"`` as the callback is made, before the optimizer exists. With a schedule on one
process, at the epoch that reaches the budget, optimizer state along with it; with ``shrink_every``, on the way, too.
With a schedule on several processes, at the end of training, as the ``Trainer`` wraps the model itself; until then the
channels are masked.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.algorithms import CompressionStage
from nncf_compactprune.config import CompressionConfig, load_config
from nncf_compactprune.controller import create_compressed_model, refuse_to_shrink_on_the_way
from nncf_compactprune.cut.surgery import plan_of
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.huggingface import restore_forward
from nncf_compactprune.host.packages import require_package
from nncf_compactprune.integrations.pretrained import describe, fill, write_plan_beside
from nncf_compactprune.plugins import Plugins, default_plugins
from nncf_compactprune.storage.digests import file_digest
from nncf_compactprune.storage.writing import write_whole

logger = logging.getLogger("nncf")

STATE_FILE = "compression_state.json"
PREFIX = "checkpoint-"
_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # transformers 5.23's name, and the older one
IGNORED = -100  # labels that transformers does not count
# What a resumed Trainer reads; other ranks' random states may still be on their way.
RESUMED_FILES = ("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")

_transformers = require_package("transformers", "nncf-compactprune[transformers]")
TrainerCallback: Any = _transformers.TrainerCallback


class CompressionCallback(TrainerCallback):  # type: ignore[misc]
    """Steps a compression controller with a ``Trainer``, saves its state in every checkpoint, and ends it.

    :param model: the ``PreTrainedModel`` that the ``Trainer`` is given, dense (also when resuming).
    :param config: a compression configuration, its path, or a dict. Without ``input_info`` the model's own config says
        what its input looks like.
    :param train_loader: batches for algorithms that need data and for BatchNorm adaptation, not the ``Trainer``'s own.
    :param resume_from_checkpoint: the folder that ``Trainer.train`` gets too: the plan is replayed here, so that the
        checkpoint's weights and optimizer state fit.
    :param task_loss: ``(outputs, labels) -> mean loss``; default: the model's own loss for its ``problem_type``.
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
        task_loss: Callable[[Any, Tensor], Tensor] | None = None,
        plugins: Plugins | None = None,
    ) -> None:
        plugins = plugins or default_plugins()
        if not isinstance(config, CompressionConfig):
            config = load_config(config, plugins)
        if example_inputs is None and not config.input_info:
            example_inputs = image_inputs(model)
        self._resumed = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        self._task_loss = task_loss
        self._asked_for_loss = False
        self._losses: list[Tensor] = []
        self.controller, self._model = create_compressed_model(
            model,
            config,
            train_loader,
            None if self._resumed is None else _read_state(self._resumed)["compression"],
            example_inputs=example_inputs,
            plugins=plugins,
        )
        self._resumes = self._resumed is not None
        self._full = self._is_full()
        self._describe()

    # -- the loss --------------------------------------------------------------------------------------------------

    def compute_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The ``Trainer``'s ``compute_loss_func``: task loss, plus the compression's while training.

        Both are means over a batch. Under gradient accumulation each batch counts by its share of the examples of the
        whole step (``num_items_in_batch``), so that the step's gradient is that of one large batch.

        :param outputs: what the model returns.
        :param labels: of the batch; -100 is not counted.
        :param num_items_in_batch: labels in the whole step, or None for the batch alone.
        :return: a scalar.
        """
        loss = self._task(outputs, labels)
        if not self._model.training:
            return loss
        self._asked_for_loss = True
        extra = self.controller.loss()
        if isinstance(extra, Tensor):
            self._losses.append(extra.detach())
        share = 1.0 if num_items_in_batch is None else (labels != IGNORED).sum() / num_items_in_batch
        return (loss + extra) * share

    def _task(self, outputs: Any, labels: Tensor) -> Tensor:
        if self._task_loss is not None:
            return self._task_loss(outputs, labels)
        model: Any = self._model
        logits = outputs["logits"]
        given = {"labels": labels, "logits": logits, "pooled_logits": logits, "config": model.config}
        if getattr(model.config, "vocab_size", None) is not None:
            given["vocab_size"] = model.config.vocab_size
        asked = inspect.signature(model.loss_function).parameters
        missing = [
            name
            for name, parameter in asked.items()
            if name not in given and parameter.default is parameter.empty and parameter.kind not in _ANY_NUMBER
        ]
        if missing:
            msg = (
                f"CompressionCallback: the loss of {type(model).__name__} is not one of its logits and labels (it asks "
                f"for '{missing[0]}'). Give task_loss, a function of outputs and labels."
            )
            raise CompactPruneError(msg)
        loss: Tensor = model.loss_function(**{name: value for name, value in given.items() if name in asked})
        return loss

    # -- the Trainer's events --------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks what it was given, and lets the optimizer follow where one process trains."""
        if kwargs["model"] is not self._model:
            msg = "CompressionCallback: made for another model than the Trainer's. Give both the same object."
            raise CompactPruneError(msg)
        if state.global_step > 0 and self._resumed is None and self.controller.scheduler.current_step < 0:
            msg = (
                f"CompressionCallback: the Trainer resumes at step {state.global_step}, but the callback was made "
                "without resume_from_checkpoint. Give it the same folder: the plan is replayed before the weights."
            )
            raise CompactPruneError(msg)
        changes = not all(algorithm.settled for algorithm in self.controller.algorithms)
        if changes and args.torch_compile:
            msg = (
                "CompressionCallback: torch_compile does not see masks, nor a model that shrinks later. "
                'Use "schedule": "one_shot", which prunes before the Trainer compiles.'
            )
            raise CompactPruneError(msg)
        if changes and any(getattr(args, name, None) for name in CHECKPOINTING):
            msg = (
                "CompressionCallback: gradient checkpointing runs layers again without their masks, so gradients would "
                'be wrong. Use "schedule": "one_shot", or train without it.'
            )
            raise CompactPruneError(msg)
        if args.world_size > 1 or args.n_gpu > 1:
            refuse_to_shrink_on_the_way(self.controller, "CompressionCallback: the Trainer's wrapper")
        if self._resumed is not None:
            fill(self._model, self._resumed)
        if args.world_size == 1 and args.n_gpu <= 1:
            optimizer = kwargs["optimizer"]
            self.controller.attach(optimizer=getattr(optimizer, "optimizer", optimizer))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins an epoch of the schedule; the model may shrink here."""
        before = plan_of(self._model)
        self.controller.scheduler.epoch_step(self._next_epoch(state, kwargs.get("train_dataloader")))
        if plan_of(self._model) is not before or (not self._full and self._is_full()):
            self._full = self._is_full()
            # What was measured on a larger model is no candidate for the best one, and its weights would not fit.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
            self._describe()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins an optimizer step."""
        self.controller.scheduler.step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses to go on where an algorithm's loss would be left out in silence."""
        with_loss = self.controller.adding_to_loss
        if with_loss and not self._asked_for_loss:
            msg = (
                f"CompressionCallback: '{with_loss[0]}' adds to the loss, but the Trainer does not ask for it. "
                "Pass Trainer(compute_loss_func=callback.compute_loss)."
            )
            raise CompactPruneError(msg)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Adds ``compression_rate`` and the mean ``compression_loss`` since the last log."""
        if logs is None or "loss" not in logs:
            return
        figures: dict[str, float] = {"compression_rate": round(float(self.controller.compression_rate), 4)}
        if self._losses:
            figures["compression_loss"] = float(torch.stack(self._losses).mean())
            self._losses.clear()
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Completes a checkpoint: plan, compression state and digests. It counts as whole once these are there."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"{PREFIX}{state.global_step}"
        write_plan_beside(self._model, folder)
        files = {name: file_digest(folder / name) for name in RESUMED_FILES if (folder / name).is_file()}
        document = {"compression": self.controller.get_compression_state(), "sha256": files}
        write_whole(folder / STATE_FILE, json.dumps(document).encode())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cuts what is still masked; afterwards model and config are compact and free of hooks and AMP wrappers."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            fill(self._model, state.best_model_checkpoint)
        self.controller.strip()
        restore_forward(self._model)
        self._describe()
        if state.is_world_process_zero:
            write_plan_beside(self._model, args.output_dir)  # for trainer.save_model()

    def _next_epoch(self, state: Any, loader: Any) -> int:
        """A loader of no length has epochs, too, but the Trainer's count of them stands still."""
        resumes, self._resumes = self._resumes, False
        if loader is not None and not _transformers.trainer_utils.has_length(loader):
            at = self.controller.scheduler.current_epoch
            return max(at, 0) if resumes else at + 1
        return int(state.epoch or 0)

    def _is_full(self) -> bool:
        return self.controller.compression_stage() is CompressionStage.FULLY_COMPRESSED

    def _describe(self) -> None:
        if plan_of(self._model) is not None:
            describe(self._model)


def image_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Noise of the size that a vision model's config states, ``{"pixel_values": [2, channels, height, width]}``."""
    config: Any = getattr(model, "config", None)
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", None) or 3
    noise = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    reference = next(model.parameters())
    return {getattr(model, "main_input_name", "pixel_values"): noise.to(reference.device, reference.dtype)}


def last_checkpoint(output_dir: str | PathLike[str]) -> str | None:
    """The newest checkpoint of a run that is whole, or None. Damaged ones are reported and passed over.

    :param output_dir: the ``Trainer``'s.
    """
    folders = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True):
        try:
            expected = _read_state(folder)["sha256"]
            wrong = [name for name, digest in expected.items() if file_digest(folder / name) != digest]
        except (CompactPruneError, OSError) as error:
            logger.warning("%s is passed over: %s", folder, error)
            continue
        if not wrong:
            return str(folder)
        logger.warning("%s is passed over: %s changed since it was saved.", folder, ", ".join(wrong))
    return None


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    try:
        document = json.loads(path.read_bytes())
        if isinstance(document["compression"], dict) and isinstance(document["sha256"], dict):
            return document  # type: ignore[no-any-return]
        msg = f"{path}: expected what CompressionCallback wrote."
    except FileNotFoundError:
        msg = f"{path}: no such file: saving the checkpoint did not come to its end, or went without the callback."
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{path}: damaged ({error})."
    msg = f"{msg} Take an earlier checkpoint, see last_checkpoint."
    raise CompactPruneError(msg)
