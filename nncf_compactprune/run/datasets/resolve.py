"""From a dataset's name to the dataset."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from nncf_compactprune.errors import ResolveError
from nncf_compactprune.host.packages import load_function, pick
from nncf_compactprune.plugins import Plugins, default_plugins
from nncf_compactprune.plugins.hookspecs import hookimpl
from nncf_compactprune.run.datasets.base import ResolvedDataset
from nncf_compactprune.run.datasets.cifar10 import cifar10
from nncf_compactprune.run.datasets.digits import digits
from nncf_compactprune.run.datasets.image_folder import imagefolder
from nncf_compactprune.run.datasets.pictures import pictures


def resolve_dataset(
    name: str, options: Mapping[str, Any] | None = None, plugins: Plugins | None = None
) -> ResolvedDataset:
    """Returns the dataset that a name stands for.

    :param name: ``scheme`` or ``scheme:rest``, such as ``digits`` or ``cifar10:data/cifar10``.
    :param options: the scheme's own keyword options.
    :param plugins: where schemes come from; the installed plugins by default.
    :raises ResolveError: if the scheme, the files or an option is wrong.
    """
    scheme, _, rest = name.partition(":")
    resolver = pick("dataset", scheme, (plugins or default_plugins()).datasets)
    try:
        inspect.signature(resolver).bind(rest, **(options or {}))
    except TypeError as error:
        msg = f"Dataset '{name}': {error}."
        raise ResolveError(msg) from error
    dataset = resolver(rest, **(options or {}))
    if not isinstance(dataset, ResolvedDataset):
        msg = f"Dataset '{name}': expected a ResolvedDataset, got {type(dataset).__name__}."
        raise ResolveError(msg)
    return dataset


def python_dataset(rest: str, **options: Any) -> ResolvedDataset:
    """Calls a user's own function, which returns a :class:`ResolvedDataset`.

    :param rest: ``module:function`` or ``file.py:function``.
    :param options: the function's keyword arguments.
    :raises ResolveError: there is no such function, or it does not take the options.
    """
    try:
        dataset = load_function(rest)(**options)
    except TypeError as error:
        msg = f"python:{rest} does not take these options: {error}"
        raise ResolveError(msg) from error
    return dataset  # type: ignore[no-any-return]  # resolve_dataset checks the type


@hookimpl
def compactprune_datasets() -> Mapping[str, Callable[..., ResolvedDataset]]:
    """The dataset schemes that come with the package."""
    return {
        "cifar10": cifar10,
        "digits": digits,
        "imagefolder": imagefolder,
        "pictures": pictures,
        "python": python_dataset,
    }
