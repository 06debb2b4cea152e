"""``load_state`` of NNCF 2.x: weights into a model whose wrappers or masks are not those of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nncf.common.logging import nncf_logger
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from nncf_compactprune.algorithms import ChannelPruning
from nncf_compactprune.algorithms.quantization.algorithm import Quantization
from nncf_compactprune.algorithms.sparsity.base import MaskedWeights
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.tensors import NNCF_HOOKS
from nncf_compactprune.integrations.nncf2.checkpoints import Nncf2Masks, split
from nncf_compactprune.integrations.nncf2.controller import CompressionController, controller_of

#: what wrappers put before names: torch's for several devices, and NNCF 1.x's
_WRAPPERS = ("module.", "nncf_module.")


def load_state(
    model: nn.Module,
    state_dict_to_load: Mapping[str, Tensor],
    is_resume: bool = False,
    keys_to_ignore: Sequence[str] | None = None,
) -> int:
    """Loads weights by name, in place. Prefixes of wrappers (``module.``) do not matter, on either side.

    Masks in a checkpoint of the compressed model are set too, also those that NNCF 2.x wrote. Where nothing in the
    model takes a mask of NNCF 2.x, the weights that it masks become zero. What its quantizers kept is passed over,
    which is told; quantizers of the model measure their ranges on the new weights.

    :param model: any module, compressed, wrapped for several devices, or neither.
    :param state_dict_to_load: names to tensors.
    :param is_resume: whether everything must fit: True for a checkpoint of the same compressed model, False for weights
        of the dense one, where a misfit is logged and passed over.
    :param keys_to_ignore: names that are left as they are.
    :return: how many tensors were loaded.
    :raises CompactPruneError: with ``is_resume``, something is missing, unexpected or of another size. All of it is
        named, and the model is as it was, but for masks.
    """
    ignored = {_plain(key) for key in keys_to_ignore or ()}
    given, masks, foreign = split({_plain(key): value for key, value in state_dict_to_load.items()})
    for key in ignored & set(given):
        given.pop(key)
    inner = model.module if isinstance(model, (DataParallel, DistributedDataParallel)) else model
    controller = controller_of(inner)
    if controller is not None:
        _set_masks(controller, given, masks, is_resume=is_resume)
    if masks:
        given = masks.written(inner, given, () if controller is None else controller.started)
    own = {_plain(key): (key, value) for key, value in model.state_dict().items() if _plain(key) not in ignored}
    if masks or foreign:  # NNCF 2.x has no names in common with NNCF 3's hooks
        own = {key: value for key, value in own.items() if NNCF_HOOKS not in key}
    sized = [key for key in own if key in given and given[key].shape != own[key][1].shape]
    fitting = {own[key][0]: given[key] for key in own if key in given and key not in sized}
    problems = {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "of another size": [f"{k} (checkpoint {list(given[k].shape)}, model {list(own[k][1].shape)})" for k in sized],
    }
    _tell(problems, foreign, sorted(ignored), is_resume=is_resume, dense=not given.keys() - own.keys())
    model.load_state_dict(fitting, strict=False)
    if controller is not None and not any(NNCF_HOOKS in key for key in fitting):
        for algorithm in controller.started:
            if isinstance(algorithm, Quantization):
                algorithm.measure_again()
    nncf_logger.info("Loaded %d of the model's %d tensors", len(fitting), len(own) + len(ignored))
    return len(fitting)


def _plain(key: str) -> str:
    for wrapper in _WRAPPERS:
        while key.startswith(wrapper):
            key = key.removeprefix(wrapper)
    return key


def _set_masks(
    controller: CompressionController, weights: Mapping[str, Tensor], masks: Nncf2Masks, *, is_resume: bool
) -> None:
    """The masks of a checkpoint; one that is resumed has none where nothing was removed yet."""
    before = controller.from_nncf2
    for algorithm in controller.started:
        if isinstance(algorithm, MaskedWeights) and masks.weights:
            algorithm.adopt_masks(masks.weights, masks.learned, -1 if before is None else before.epoch)
        if not isinstance(algorithm, ChannelPruning):
            continue
        if masks.filters:
            complete = None if before is None else before.complete.get(algorithm.name)
            algorithm.adopt_channels(masks.kept(algorithm.present), complete=complete)
        elif is_resume or any(NNCF_HOOKS in key for key in weights):
            algorithm.adopt_masks(weights)


def _tell(
    problems: Mapping[str, Sequence[str]],
    foreign: Sequence[str],
    ignored: Sequence[str],
    *,
    is_resume: bool,
    dense: bool,
) -> None:
    if foreign:
        nncf_logger.warning(
            "load_state: %d tensors of NNCF 2.x's own quantizers are passed over, such as %s. The weights themselves "
            "are loaded.",
            len(foreign),
            foreign[0],
        )
    if ignored:
        nncf_logger.warning("load_state: left as they are: %s", ", ".join(ignored))
    # Weights of the dense model need not be all that a model with compression has.
    told = {what: keys for what, keys in problems.items() if keys and (what != "missing" or is_resume or not dense)}
    if not told:
        return
    lines = [
        f"  {len(keys)} {what}: {', '.join(keys[:5])}{' ...' if len(keys) > 5 else ''}" for what, keys in told.items()
    ]
    remedy = ""
    if problems["of another size"]:
        remedy = "\nA network that was cut fits only a model that was cut alike: pass its compression_state to "
        remedy += "create_compressed_model, or its dense checkpoint here."
    message = "load_state: the checkpoint does not fit the model:\n" + "\n".join(lines) + remedy
    if is_resume:
        raise CompactPruneError(message)
    nncf_logger.error(message)
