"""NNCF 2.19's own ``NNCFConfig`` and ``create_compressed_model`` take the algorithms of this package.

.. code-block:: python

    import nncf_compactprune.integrations.nncf219  # import nncf_compactprune does it too
    from nncf import NNCFConfig
    from nncf.torch import create_compressed_model

    config = NNCFConfig.from_dict({
        "input_info": {"sample_size": [1, 3, 32, 32]},
        "compression": [{"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}}, {"algorithm": "quantization"}],
    })
    ctrl, model = create_compressed_model(model, config)

Needs ``NNCF_TORCH_LEGACY_TRACING=1`` in the environment before NNCF is imported: NNCF 2.19's own algorithms do. All
entries of this package in one config work as one list, in its order, beside NNCF's. Names that NNCF has itself
(``filter_pruning``, ``quantization``) stay NNCF's. Channels are masked while the schedule ramps up and cut at
``ctrl.strip()``; with ``ctrl.attach(optimizer=...)`` on the entry's controller they are cut while the model trains.
Quantizers' scales of a channel go with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.algorithms import ChannelPruning
from nncf_compactprune.controller import CompressionController, create_compressed_model
from nncf_compactprune.cut.surgery import plan_of
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host import nncf2
from nncf_compactprune.host.optimizers import Optimizers
from nncf_compactprune.plugins import default_plugins

__all__ = ["CompactPruneController", "install"]

STATE = "compactprune"  # where this package's state is, in the controller's state
SHARED_KEYS = ("input_info", "target_device", "ignored_scopes", "target_scopes", "compression_lr_multiplier")
# They hook operations, or run a copy of the network part by part; in an NNCFNetwork, NNCF 2's tracing takes both over.
NOT_HERE = ("data_free_quantization", "data_free_layerwise", "data_free_sparsity")
_names: set[str] = set()


class Engine:
    """This package's controller of all its entries in one NNCF config. The first entry that NNCF builds makes it.

    :param model: the ``NNCFNetwork``.
    :param config: the whole NNCF config.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model = model
        self._config = config
        entries = config["compression"]
        self._listed = entries if isinstance(entries, list) else [entries]
        self.entries = [dict(entry) for entry in self._listed if entry["algorithm"] in _names]
        self._plan = plan_of(model)
        self._controller: CompressionController | None = None

    @classmethod
    def of(cls, model: Any, config: Any) -> Engine:
        """The model's engine.

        :param model: an ``NNCFNetwork``.
        :param config: NNCF's, with all entries.
        """
        if getattr(model.nncf, STATE, None) is None:
            setattr(model.nncf, STATE, cls(model, config))
        engine: Engine = getattr(model.nncf, STATE)
        return engine

    def __deepcopy__(self, memo: Any) -> Engine:
        return self  # a copied network is no longer compressed

    @property
    def controller(self) -> CompressionController:
        """The controller; the algorithms begin at its first use."""
        if self._controller is None:
            self.start()
        assert self._controller is not None
        return self._controller

    def start(self, state: Mapping[str, Any] | None = None) -> None:
        """Builds the algorithms: afresh, or as an earlier run had left them."""
        left_out = [e["algorithm"] for e in self.entries if e["algorithm"] in NOT_HERE]
        if left_out:
            msg = (
                f"{left_out[0]} does not go with NNCF 2's create_compressed_model: it runs parts of the network by "
                "themselves, and NNCF 2 has wrapped them by then. Call nncf_compactprune.create_compressed_model with "
                "this entry first, strip, and give NNCF the result with the other entries."
            )
            raise CompactPruneError(msg)
        known, names = default_plugins().algorithms, [entry["algorithm"] for entry in self.entries]
        cutting = [name for name in names if issubclass(known[name], ChannelPruning)]
        if cutting and any(entry["algorithm"] == "filter_pruning" for entry in self._listed):
            msg = (
                f"{cutting[0]} does not go beside NNCF 2's filter_pruning, whose masks keep the widths from before the "
                "cut. Leave one of them out, or strip with the first entry and compress the result with the other."
            )
            raise CompactPruneError(msg)
        document = {key: self._config[key] for key in SHARED_KEYS if key in self._config}
        self._controller, _ = create_compressed_model(
            self.model,
            {**document, "compression": self.entries},
            train_loader=nncf2.InitialData.of(self._config),
            compression_state=state,
            example_inputs=None if "input_info" in document else nncf2.example_inputs(self.model),
        )
        self.follow()

    def follow(self) -> None:
        """Lets NNCF's graph follow a cut."""
        if plan_of(self.model) is not self._plan:
            self._plan = plan_of(self.model)
            nncf2.renew_graph(self.model)


class CompactPruneBuilder(nncf2.PTCompressionAlgorithmBuilder):  # type: ignore[misc]
    """Builds one entry. It inserts nothing into NNCF's graph: the engine works on the network itself."""

    def _get_algo_specific_config_section(self) -> dict[str, Any]:
        return {}  # scopes are resolved by this package, which also knows module names

    def get_transformation_layout(self, model: Any) -> Any:
        return nncf2.PTTransformationLayout()

    def initialize(self, model: Any) -> None:
        _ = Engine.of(model, self.config).controller

    def _build_controller(self, model: Any) -> CompactPruneController:
        engine = Engine.of(model, self.config)
        return CompactPruneController(model, engine, first=engine.entries[0]["algorithm"] == self.name)


class CompactPruneController(nncf2.PTCompressionAlgorithmController):  # type: ignore[misc]
    """NNCF's controller of one entry. That of the first entry drives the engine, the others only tell of theirs.

    :param model: the ``NNCFNetwork``.
    :param engine: what all entries share.
    :param first: whether this is the first entry's.
    """

    def __init__(self, model: Any, engine: Engine, *, first: bool) -> None:
        super().__init__(model)
        self._engine = engine
        self._first = first
        self._loss = _Loss(engine if first else None)
        self._scheduler = _Scheduler(engine if first else None)

    @property
    def loss(self) -> _Loss:
        return self._loss

    @property
    def scheduler(self) -> _Scheduler:
        return self._scheduler

    def attach(self, *, optimizer: Optimizers | None = None, ema: object | None = None) -> None:
        """Lets the network shrink while it trains; see :meth:`CompressionController.attach`.

        :param optimizer: holds the model's parameters.
        :param ema: a shadow copy.
        """
        self._engine.controller.attach(optimizer=optimizer, ema=ema)
        self._engine.follow()

    def compression_stage(self) -> Any:
        return nncf2.CompressionStage(int(self._engine.controller.compression_stage()))

    def statistics(self, quickly_collected_only: bool = False) -> Any:
        collected = nncf2.NNCFStatistics()
        figures = self._engine.controller.statistics()
        collected.register(self.name, figures.only(self.name))
        return collected

    @property
    def compression_rate(self) -> float:
        return self._engine.controller.compression_rate

    @compression_rate.setter
    def compression_rate(self, value: float) -> None:
        self._engine.controller.compression_rate = value

    @property
    def maximal_compression_rate(self) -> float:
        return self._engine.controller.maximal_compression_rate

    def disable_scheduler(self) -> None:
        if self._first:
            self._engine.controller.disable_scheduler()

    def prepare_for_export(self) -> None:
        """Ends the compression: the network itself is cut, and holds no hook of this package any more."""
        self._engine.controller.strip()
        self._engine.follow()

    def strip(self, do_copy: bool = True, strip_format: Any = nncf2.StripFormat.NATIVE) -> Any:
        """Ends the compression of the network itself.

        :param do_copy: return a copy of it.
        :param strip_format: of NNCF's quantizers.
        """
        self.prepare_for_export()
        return self.strip_model(self.model, do_copy, strip_format)

    def get_state(self) -> dict[str, Any]:
        state: dict[str, Any] = super().get_state()
        if self._first:
            state[STATE] = self._engine.controller.get_compression_state()
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        if self._first:
            if STATE not in state:
                msg = f"compression_state: holds nothing of {self._engine.entries[0]['algorithm']}. Resume with the "
                msg += "config of the run that made it."
                raise CompactPruneError(msg)
            self._engine.start(state[STATE])
        super().load_state(state)


class _Loss(nncf2.PTCompressionLoss):  # type: ignore[misc]
    def __init__(self, engine: Engine | None) -> None:
        super().__init__()
        self._of = (engine,)

    def calculate(self) -> Tensor:
        engine = self._of[0]
        value = 0.0 if engine is None else engine.controller.loss()
        return value if isinstance(value, Tensor) else torch.tensor(float(value))


class _Scheduler(nncf2.BaseCompressionScheduler):  # type: ignore[misc]
    def __init__(self, engine: Engine | None) -> None:
        super().__init__()
        self._engine = engine

    def step(self, next_step: int | None = None) -> None:
        super().step(next_step)
        if self._engine is not None:
            self._engine.controller.scheduler.step(self.current_step)

    def epoch_step(self, next_epoch: int | None = None) -> None:
        super().epoch_step(next_epoch)
        if self._engine is not None:
            self._engine.controller.scheduler.epoch_step(self.current_epoch)
            self._engine.follow()


def install() -> None:
    """Makes the installed algorithms known to NNCF 2, once. Importing this module does it.

    Where NNCF 2 does not trace as its algorithms need it, its own ``create_compressed_model`` names the variable.
    """
    if _names:
        return
    for name in default_plugins().algorithms:
        if nncf2.register(name, type(f"CompactPruneBuilder_{name}", (CompactPruneBuilder,), {})):
            _names.add(name)
    nncf2.list_statistics()
    nncf2.let_function_modes_through()
    together = nncf2.CompositeController.strip

    def strip(self: Any, do_copy: bool = True, strip_format: Any = nncf2.StripFormat.NATIVE) -> Any:
        for child in self.child_ctrls:  # before NNCF takes its copy
            if isinstance(child, CompactPruneController):
                child.prepare_for_export()
        for module in self.model.modules():  # the last loss of knowledge distillation is no leaf, which has no copies
            if hasattr(module, "zero_kd_loss"):
                module.zero_kd_loss()
        return together(self, do_copy, strip_format)

    nncf2.CompositeController.strip = strip


install()
