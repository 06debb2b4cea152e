"""``load_state`` of NNCF 2.x: weights into a model whose wrappers or masks are not those of the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from nncf.common.logging import nncf_logger
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from nncf_compactprune.algorithms import ChannelPruning
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.tensors import NNCF_HOOKS
from nncf_compactprune.integrations.nncf2.controller import controller_of

#: what wrappers put before names: torch's for several devices, and NNCF 1.x's
_WRAPPERS = ("module.", "nncf_module.")
#: what NNCF 2.x's own hooks keep beside the weights
_OF_NNCF2 = re.compile(r"(^|\.)(_nncf|external_quantizers|external_op|pre_ops|post_ops)\.")


def load_state(
    model: nn.Module,
    state_dict_to_load: Mapping[str, Tensor],
    is_resume: bool = False,
    keys_to_ignore: Sequence[str] | None = None,
) -> int:
    """Loads weights by name, in place. Prefixes of wrappers (``module.``) do not matter, on either side.

    Masks in a checkpoint of the compressed model are set too. What NNCF 2.x's own masks and quantizers kept there is
    passed over, which is told.

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
    given = {_plain(key): value for key, value in state_dict_to_load.items()}
    foreign = [key for key in given if _OF_NNCF2.search(key)]
    for key in (*foreign, *(ignored & set(given))):
        given.pop(key, None)
    _set_masks(model, given, is_resume=is_resume)
    own = {_plain(key): (key, value) for key, value in model.state_dict().items() if _plain(key) not in ignored}
    sized = [key for key in own if key in given and given[key].shape != own[key][1].shape]
    fitting = {own[key][0]: given[key] for key in own if key in given and key not in sized}
    problems = {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "of another size": [f"{k} (checkpoint {list(given[k].shape)}, model {list(own[k][1].shape)})" for k in sized],
    }
    _tell(problems, foreign, sorted(ignored), is_resume=is_resume, dense=not given.keys() - own.keys())
    model.load_state_dict(fitting, strict=False)
    nncf_logger.info("Loaded %d of the model's %d tensors", len(fitting), len(own) + len(ignored))
    return len(fitting)


def _plain(key: str) -> str:
    for wrapper in _WRAPPERS:
        while key.startswith(wrapper):
            key = key.removeprefix(wrapper)
    return key


def _set_masks(model: nn.Module, weights: Mapping[str, Tensor], *, is_resume: bool) -> None:
    """The masks of a checkpoint; one that is resumed has none where nothing was removed yet."""
    inner = model.module if isinstance(model, (DataParallel, DistributedDataParallel)) else model
    controller = controller_of(inner)
    if controller is None or not (is_resume or any(NNCF_HOOKS in key for key in weights)):
        return
    for algorithm in controller.algorithms:
        if isinstance(algorithm, ChannelPruning):
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
            "load_state: %d tensors of NNCF 2.x's own masks and quantizers are passed over, such as %s. The weights "
            "themselves are loaded, unmasked.",
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
