"""What NNCF 2.x's scripts register in an ``NNCFConfig``: loaders, criterion, evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from nncf_compactprune.errors import DataError

if TYPE_CHECKING:
    from nncf_compactprune.integrations.nncf2.config import NNCFConfig

Forward = tuple[tuple[Any, ...], dict[str, Any]]


class PTInitializingDataLoader:
    """Says what of a loader's batch goes into the model and what is the target; for batches that are no pair of both.

    Subclass it and implement :meth:`get_inputs`, and :meth:`get_target` where an algorithm needs labels.

    :param data_loader: the loader that it wraps.
    """

    def __init__(self, data_loader: Iterable[Any]) -> None:
        self._data_loader: Any = data_loader

    @property
    def batch_size(self) -> int:
        """Of the wrapped loader."""
        return int(self._data_loader.batch_size)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._data_loader)

    def __len__(self) -> int:
        return len(self._data_loader)

    def get_inputs(self, dataloader_output: Any) -> Forward:
        """Positional and keyword arguments of the model's call.

        :param dataloader_output: one batch.
        """
        raise NotImplementedError

    def get_target(self, dataloader_output: Any) -> Any:
        """What the loss compares with.

        :param dataloader_output: one batch.
        """
        raise NotImplementedError


class DefaultInitializingDataLoader(PTInitializingDataLoader):
    """For batches of ``(inputs, target)``, and for dictionaries of keyword arguments with a label key."""

    def get_inputs(self, dataloader_output: Any) -> Forward:
        if isinstance(dataloader_output, Mapping):
            return (), {key: value for key, value in dataloader_output.items() if key not in _TARGETS}
        if isinstance(dataloader_output, (tuple, list)) and len(dataloader_output) == 2:
            return (dataloader_output[0],), {}
        got = type(dataloader_output).__name__
        size = f" of {len(dataloader_output)}" if isinstance(dataloader_output, (tuple, list)) else ""
        msg = (
            f"train_loader: expected batches of (inputs, target) or dictionaries, got a {got}{size}. Wrap the loader "
            "in a PTInitializingDataLoader whose get_inputs gives the arguments of your model."
        )
        raise DataError(msg)

    def get_target(self, dataloader_output: Any) -> Any:
        if isinstance(dataloader_output, Mapping):
            return next((dataloader_output[key] for key in _TARGETS if key in dataloader_output), None)
        return dataloader_output[1]


_TARGETS = ("labels", "label", "target", "targets")


def wrap_dataloader_for_init(data_loader: Any) -> PTInitializingDataLoader:
    """Wraps a loader, unless it is wrapped.

    :param data_loader: of ``(inputs, target)``, or a :class:`PTInitializingDataLoader`.
    """
    if isinstance(data_loader, PTInitializingDataLoader):
        return data_loader
    return DefaultInitializingDataLoader(data_loader)


class NNCFExtraConfigStruct:
    """Base of what :meth:`NNCFConfig.register_extra_structs` takes."""

    ID: ClassVar[str] = ""

    @classmethod
    def get_id(cls) -> str:
        """What tells one kind from another."""
        return cls.ID


class _LoaderArgs(NNCFExtraConfigStruct):
    def __init__(self, data_loader: Any, device: str | None = None) -> None:
        self.data_loader = data_loader
        self.device = device


class QuantizationRangeInitArgs(_LoaderArgs):
    """The loader for the ranges of quantizers."""

    ID = "quantization_range_init_args"


class BNAdaptationInitArgs(_LoaderArgs):
    """The loader for the adaptation of BatchNorm statistics, and for algorithms that look at data."""

    ID = "bn_adaptation_init_args"


class ModelEvaluationArgs(NNCFExtraConfigStruct):
    """How a model is evaluated.

    :param eval_fn: takes the model, returns the metric.
    """

    ID = "model_evaluation_args"

    def __init__(self, eval_fn: Callable[..., Any]) -> None:
        self.eval_fn = eval_fn


def register_default_init_args(
    nncf_config: NNCFConfig,
    train_loader: Any,
    criterion: Any = None,
    criterion_fn: Callable[[Any, Any, Any], Any] | None = None,
    train_steps_fn: Callable[..., Any] | None = None,
    validate_fn: Callable[..., Any] | None = None,
    val_loader: Any = None,
    autoq_eval_fn: Callable[..., Any] | None = None,
    model_eval_fn: Callable[..., Any] | None = None,
    distributed_callbacks: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    execution_parameters: Any = None,
    legr_train_optimizer: Any = None,
    device: str | None = None,
) -> NNCFConfig:
    """Attaches to a configuration what algorithms start with; same arguments as in NNCF 2.x.

    :param nncf_config: is added to.
    :param train_loader: for BatchNorm adaptation, quantizer ranges, and algorithms that look at data.
    :param criterion: belonged to mixed precision, which NNCF 3 does not have; not read.
    :param criterion_fn: as ``criterion``.
    :param train_steps_fn: trains the candidates of a learned ranking: takes loader, model, optimizer, controller and a
        number of steps. Without it, ``validate_fn`` and ``val_loader``, they are trained and judged as classifiers on
        ``train_loader``.
    :param validate_fn: judges them: takes model and loader, returns accuracy and loss.
    :param val_loader: is passed to ``validate_fn``.
    :param autoq_eval_fn: as ``criterion``.
    :param model_eval_fn: takes the model, returns its metric; accuracy-aware training uses it where it is not given
        the uncompressed accuracy.
    :param distributed_callbacks: not read: nothing here wraps models for distributed training.
    :param execution_parameters: as ``distributed_callbacks``.
    :param legr_train_optimizer: takes the parameters of a candidate, returns its optimizer.
    :param device: where to initialise; the model's own device is used.
    :return: the configuration.
    :raises CompactPruneError: it was called for this configuration before.
    """
    loader = wrap_dataloader_for_init(train_loader)
    nncf_config.register_extra_structs(
        [QuantizationRangeInitArgs(loader, device), BNAdaptationInitArgs(loader, device)]
    )
    if train_steps_fn is not None and validate_fn is not None and val_loader is not None:
        ranking = LeGRInitArgs(train_loader, train_steps_fn, val_loader, validate_fn, legr_train_optimizer, nncf_config)
        nncf_config.register_extra_structs([ranking])
    if model_eval_fn is not None:
        nncf_config.register_extra_structs([ModelEvaluationArgs(model_eval_fn)])
    return nncf_config


class LeGRInitArgs(NNCFExtraConfigStruct):
    """How the candidates of a learned ranking are trained and judged.

    :param train_loader: is passed to ``train_fn``.
    :param train_fn: takes loader, model, optimizer, controller and a number of steps.
    :param val_loader: is passed to ``val_fn``.
    :param val_fn: takes model and loader, returns accuracy and loss.
    :param train_optimizer: takes parameters, returns an optimizer; NNCF 2.x's default, where None.
    :param nncf_config: not read.
    """

    ID = "legr_init_args"

    def __init__(
        self,
        train_loader: Any,
        train_fn: Callable[..., Any],
        val_loader: Any,
        val_fn: Callable[..., Any],
        train_optimizer: Callable[..., Any] | None,
        nncf_config: NNCFConfig,
    ) -> None:
        self.train_loader, self.train_steps_fn = train_loader, train_fn
        self.val_loader, self.val_fn = val_loader, val_fn
        self.train_optimizer, self.config = train_optimizer, nncf_config


class TrainingBatches:
    """The batches of a registered loader as ``(inputs, target)``, inputs as :func:`create_compressed_model` takes them.

    :param loader: says what is what.
    :param model: whose ``forward`` names the arguments.
    """

    def __init__(self, loader: PTInitializingDataLoader, model: nn.Module) -> None:
        self._loader, self._model = loader, model

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in self._loader:
            args, kwargs = self._loader.get_inputs(batch)
            yield as_inputs(self._model, args, kwargs), self._target(batch)

    def __len__(self) -> int:
        return len(self._loader)

    def _target(self, batch: Any) -> Any:
        try:
            return self._loader.get_target(batch)
        except NotImplementedError:  # a loader for algorithms that need no labels
            return None


def as_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The arguments of a call as one value: a single tensor, a tuple of positional or a dict of keyword inputs.

    :param model: whose ``forward`` names positional arguments where there are both kinds.
    :param args: positional arguments.
    :param kwargs: keyword arguments.
    """
    if not kwargs:
        return args[0] if len(args) == 1 else tuple(args)
    if not args:
        return dict(kwargs)
    signature = inspect.signature(model.forward)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named
