"""What the processes of a distributed run must agree on; in a single process nothing here does anything.

Every rank decides for itself, on scores averaged over the ranks, and the decisions are compared before anything is
masked or cut. Ranks that disagreed would train networks of different shapes and stop inside a collective operation.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from nncf_compactprune.errors import CompactPruneError


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this is the process that writes files: rank 0, or the only one."""
    return process_count() == 1 or dist.get_rank() == 0


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if process_count() > 1:
        dist.barrier()


def said_by_main(text: str) -> str:
    """What the main process says, in every process.

    :param text: of this process.
    """
    if process_count() == 1:
        return text
    box = [text]
    dist.broadcast_object_list(box, device=_device())
    return box[0]


def averaged(values: Sequence[Tensor]) -> list[Tensor]:
    """The mean over all ranks, in float64; in a single process the values themselves.

    :param values: floating tensors of the same shapes on every rank, on any device.
    :return: tensors of the given dtypes, on the given devices.
    """
    if process_count() == 1:
        return list(values)
    return [(value / process_count()).to(given) for value, given in zip(summed(values), values, strict=True)]


def summed(values: Sequence[Tensor]) -> list[Tensor]:
    """The sum over all ranks, in float64 (for statistics that are streamed); in a single process the values.

    :param values: tensors of the same shapes on every rank, on any device: they travel by the backend's own.
    """
    if process_count() == 1 or not values:
        return list(values)
    shapes = [value.shape for value in values]
    together = torch.cat([value.detach().double().flatten().to(_device()) for value in values])
    dist.all_reduce(together)
    parts = torch.split(together, [shape.numel() for shape in shapes])
    return [part.view(shape).to(value.device) for part, shape, value in zip(parts, shapes, values, strict=True)]


def require_agreement(text: str, what: str) -> None:
    """Compares a text over all ranks, by its SHA-256.

    :param text: what every rank must have alike.
    :param what: what the text is, for the message.
    :raises CompactPruneError: on every rank, if any differs, naming who has which.
    """
    if process_count() == 1:
        return
    mine = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8, device=_device())
    gathered = [torch.empty_like(mine) for _ in range(process_count())]
    dist.all_gather(gathered, mine)
    ranks: dict[str, list[int]] = {}
    for rank, digest in enumerate(gathered):
        ranks.setdefault(bytes(digest.tolist()).hex()[:12], []).append(rank)
    if len(ranks) > 1:
        found = "; ".join(f"ranks {who} have {digest}" for digest, who in ranks.items())
        msg = (
            f"{what} differs between processes: {found}. All ranks must start from the same weights, configuration and "
            "example inputs; a criterion that looks at data must reduce over the ranks."
        )
        raise CompactPruneError(msg)


def refuse_wrapped(model: nn.Module) -> None:
    """Only a plain module can be compressed: its parameters are replaced by smaller ones.

    :raises CompactPruneError: the model was wrapped or compiled, with what to do instead.
    """
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        msg = (
            f"{type(model).__name__}: expected the module inside it. Pass model.module before wrapping, and wrap the "
            "result. Where the model shrinks while training, wrap it again after the epoch's scheduler.epoch_step()."
        )
        raise CompactPruneError(msg)
    if hasattr(model, "_orig_mod"):
        msg = "torch.compile: expected the module before compilation. Compress first, then compile what comes out."
        raise CompactPruneError(msg)
    if isinstance(model, torch.jit.ScriptModule):
        msg = "torch.jit: expected the module before it was scripted or traced. Compress first, then script the result."
        raise CompactPruneError(msg)
    names = {base.__name__ for base in type(model).__mro__}
    if names & {"FullyShardedDataParallel", "FSDPModule"} or any(hasattr(p, "device_mesh") for p in model.parameters()):
        msg = (
            "FSDP: parameters that are spread over the processes cannot be analysed or cut. Prune first "
            '("schedule": "one_shot"), then wrap the compact model.'
        )
        raise CompactPruneError(msg)


def retire_wrappers(model: nn.Module) -> None:
    """Lets every DistributedDataParallel around a model refuse to train on, as the model's parameters are about to be
    replaced: it would wait for gradients that do not come, or, with ``find_unused_parameters``, leave them out of the
    average, so that the ranks drift apart.

    :param model: the module inside.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for wrapper in [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]:
        retired = _refuse_to_train in wrapper._forward_pre_hooks.values()
        if not retired and any(module is model for module in wrapper.modules()):
            wrapper.register_forward_pre_hook(_refuse_to_train)


def _refuse_to_train(wrapper: nn.Module, _: Any) -> None:
    if torch.is_grad_enabled():
        msg = (
            "DistributedDataParallel: this wrapper was made before the network inside was analysed or cut, and does "
            "not average the gradients of its parameters any more. Wrap the network again, after "
            "create_compressed_model and after every scheduler.epoch_step() or strip() that cut it (plan_of(net) is "
            "another plan then), as examples/torchrun_ddp.py does."
        )
        raise CompactPruneError(msg)


def _device() -> torch.device:
    """Where collective operations take place."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
