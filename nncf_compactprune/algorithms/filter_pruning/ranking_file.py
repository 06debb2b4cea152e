"""A learned ranking as a file: ``{"layer": [factor, summand], ...}``, as NNCF 2.x wrote it."""

from __future__ import annotations

import json
from pathlib import Path

from nncf_compactprune.algorithms.base import Context
from nncf_compactprune.algorithms.filter_pruning.importance import Ranking, ranked_weights
from nncf_compactprune.channels import ChannelGraph
from nncf_compactprune.decide.nncf2_names import OldNames
from nncf_compactprune.decide.scopes import names_of
from nncf_compactprune.errors import DataError
from nncf_compactprune.storage.writing import write_whole


def save_ranking(ranking: Ranking, path: str) -> None:
    """Writes a ranking.

    :param ranking: factor and summand of each producing weight.
    :param path: the file.
    :raises StorageError: it cannot be written.
    """
    layers = {name.removesuffix(".weight"): list(pair) for name, pair in ranking.items()}
    write_whole(Path(path), json.dumps(layers, indent=4).encode())


def load_ranking(path: str, context: Context, graph: ChannelGraph) -> Ranking:
    """Reads a ranking.

    :param path: the file; its layers have today's names or those of NNCF 2.x.
    :param context: the model and its example input.
    :param graph: the model's channels.
    :raises DataError: there is no such file, it holds something else, or a layer is missing in it.
    """
    try:
        pairs = {name: (float(a), float(b)) for name, (a, b) in json.loads(Path(path).read_bytes()).items()}
    except OSError as error:
        msg = f"load_ranking_coeffs_path: {path} cannot be read: {error.strerror}."
        raise DataError(msg) from error
    except (ValueError, TypeError, AttributeError) as error:
        msg = f'load_ranking_coeffs_path: {path}: expected a JSON object such as {{"conv1": [1.0, 0.0]}}.'
        raise DataError(msg) from error
    names = names_of(context.model, context.example_inputs)
    old = OldNames(context.model, {name: found.module for name, found in names.items()})
    found: dict[str, tuple[float, float]] = {}
    for name, pair in pairs.items():
        for today in {name} & set(names) or old.named(name):
            found.update(dict.fromkeys(names[today].tensors, pair))
    wanted = ranked_weights(graph)
    missing = [weight for weight in wanted if weight not in found]
    if missing:
        layer = missing[0].removesuffix(".weight")
        msg = (
            f"load_ranking_coeffs_path: {path} has nothing for {len(missing)} of {len(wanted)} layers, first '{layer}'."
        )
        raise DataError(msg)
    return {weight: found[weight] for weight in wanted}
