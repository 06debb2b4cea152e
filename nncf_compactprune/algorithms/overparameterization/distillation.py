"""Distillation from a teacher of the same structure: similarities of layer outputs, and logits.

The teacher runs on the student's inputs by itself, from a hook on the student's forward, so that any training loop
distils; it is no part of the student (no parameters, no state, not in copies).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from nncf.common.logging import nncf_logger
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from nncf_compactprune.decide.labelled import class_scores
from nncf_compactprune.errors import DistillationError, nearest
from nncf_compactprune.host.tensors import computes_in_bfloat16, device_of

Precision = Literal["same", "auto", "bfloat16", "float16"]
_POOLS: dict[int, Callable[..., Tensor]] = {
    4: functional.adaptive_avg_pool2d,
    5: functional.adaptive_avg_pool3d,
}


class _Gram(torch.autograd.Function):
    """A Aᵀ of ``[b, n]``. As it is symmetric, its gradient takes one product instead of autograd's two."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a @ a.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        a: Tensor = ctx.saved_tensors[0]
        return (gradient + gradient.t()) @ a


def similarity(features: Tensor, size: int | None = None) -> Tensor:
    """How alike the examples of a batch are to a layer: G = A Aᵀ with each row scaled to length 1, A = ``[b, c·h·w]``
    (Tung & Mori 2019, "Similarity-Preserving Knowledge Distillation", eqs. 1-2).

    :param features: ``[b, ...]``; half precision is computed in float32.
    :param size: of maps ``[b, c, h, w]`` (and volumes) larger than this, averages over so many positions a side are
        taken instead, which is ours: the product costs b²·c·h·w, as much as a convolution.
    :return: ``[b, b]``.
    """
    with torch.autocast(features.device.type, enabled=False):
        if size is not None and features.dim() in _POOLS and max(features.shape[2:]) > size:
            features = _POOLS[features.dim()](features, [min(size, side) for side in features.shape[2:]])
        flat = features.flatten(1)
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        # Dynamo fails on a Function inside NNCF's function mode (torch 2.13, NNCF 3.4).
        gram = flat @ flat.t() if torch.compiler.is_compiling() else _Gram.apply(flat)  # type: ignore[no-untyped-call]
        return functional.normalize(gram, dim=1)


def similarity_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers of ‖G_T − G_S‖²_F / b² (Tung & Mori 2019, eq. 4, who sum; with the mean, one weight does for
    networks of any depth).

    :param student: similarities ``[b, b]``, one a layer; see :func:`similarity`.
    :param teacher: the same of its layers, in the same order.
    :return: a scalar.
    """
    losses = [(s - t).square().sum() / len(s) ** 2 for s, t in zip(student, teacher, strict=True)]
    return torch.stack(losses).mean()


def logits_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch (Hinton et al. 2015).

    :param student: class scores ``[b, ..., classes]``, classes last.
    :param teacher: the same shape.
    :param temperature: T, above 0.
    :return: a scalar.
    """
    students = functional.log_softmax(student.float() / temperature, -1).flatten(0, -2)
    teachers = functional.log_softmax(teacher.float() / temperature, -1).flatten(0, -2)
    return functional.kl_div(students, teachers, reduction="batchmean", log_target=True) * temperature**2


def digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, names included."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue  # a module's extra state
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class _Tap:
    """A module hook that calls a function, and falls silent in a copy of the model (an EMA has no teacher)."""

    def __init__(self, function: Callable[..., None] | None) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self._function is not None:
            self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tap:
        return _Tap(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Tap, (None,)


class Distillation:
    """Teacher and student side by side, for as long as :meth:`remove` was not called.

    At every forward of the student in training mode with gradients on, the teacher sees the same inputs first. Each
    paired layer's output is reduced to its ``[b, b]`` similarities as soon as it is there. :meth:`losses` then belongs
    to the last such forward.

    :param student: gets module hooks.
    :param teacher: is put into eval mode, gets hooks on its paired layers; runs without gradients.
    :param layers: names of the layers whose similarities are compared; empty for logits only.
    :param written_over: those of them whose output the student changes in place; it is copied, as gradients need it.
    :param logits: also compare class scores.
    :param classes: the teacher's classes that the student's outputs stand for; empty: all, in the same order.
    :param feature_size: see :func:`similarity`.
    :param precision: ``"same"`` runs the teacher as the loop runs the student; ``"auto"``, too, but in bfloat16 where
        the loop has no autocast of its own and the device computes in bfloat16; others under that autocast.
    :raises DistillationError: a layer that the teacher does not have, or the teacher is the student itself.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Sequence[str],
        *,
        written_over: Collection[str] = (),
        logits: bool = False,
        classes: Sequence[int] = (),
        precision: Precision = "same",
        feature_size: int | None = None,
    ) -> None:
        self._check(student, teacher, layers)
        self.teacher = teacher.eval()
        self._precision = precision
        self._feature_size = feature_size
        self._classes = list(classes)
        self._written_over = written_over
        self._recording = False
        self._warned = False
        #: whether the student was ever called in training
        self.heard = False
        self._similarities: dict[str, list[tuple[str, Tensor]]] = {"student": [], "teacher": []}
        self._scores: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = [student.register_forward_pre_hook(_Tap(self._begin), with_kwargs=True)]
        for who, model in (("student", student), ("teacher", teacher)):
            for name in layers:
                tap = _Tap(self._reduce(who, name))
                self._handles.append(model.get_submodule(name).register_forward_hook(tap))
            if logits:
                self._handles.append(model.register_forward_hook(_Tap(self._keep_scores(who))))

    def __deepcopy__(self, memo: dict[int, Any]) -> Distillation:
        """A copied student is not taught. Outputs of the last forward stay here: autograd's tensors have no copies."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin._handles = copy.deepcopy(self._handles, memo)
        twin._forget()
        return twin

    @staticmethod
    def _check(student: nn.Module, teacher: nn.Module, layers: Sequence[str]) -> None:
        if teacher is student:
            msg = "teacher: expected another model than the one under compression. Give a copy (copy.deepcopy)."
            raise DistillationError(msg)
        names = dict(teacher.named_modules())
        missing = [name for name in layers if name not in names]
        if missing:
            close = nearest(missing[0], names)
            msg = (
                f"teacher: {len(missing)} of {len(layers)} layers have no partner of the same name in "
                f"{type(teacher).__name__}, first '{missing[0]}'.{close} Give a teacher with the same layer "
                'names, or leave those layers out by ignored_scopes, or set "similarity_weight" to 0.'
            )
            raise DistillationError(msg)

    def remove(self) -> None:
        """Takes all hooks off student and teacher."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    @property
    def compared(self) -> int:
        """Layers whose similarities were compared in the last forward in training mode."""
        return len(self._similarities["student"])

    @property
    def batch(self) -> int:
        """Examples in the last forward in training mode; 1 before it, and where nothing is compared by examples."""
        return len(self._similarities["student"][0][1]) if self._similarities["student"] else 1

    def losses(self, temperature: float) -> Mapping[str, Tensor]:
        """``"similarity"`` and ``"logits"`` of the last forward in training mode; empty before the first.

        A batch of one has no similarities to preserve: its loss is 0, and a warning says so once.

        :raises DistillationError: the two networks ran their paired layers differently.
        """
        result: dict[str, Tensor] = {}
        student, teacher = self._similarities["student"], self._similarities["teacher"]
        if student or teacher:
            self._check_pairs(student, teacher)
            result["similarity"] = similarity_loss([g for _, g in student], [g for _, g in teacher])
        if len(self._scores) == 2:
            result["logits"] = logits_loss(self._scores["student"], self._scores["teacher"], temperature)
        return result

    # -- what the hooks do ---------------------------------------------------------------------------------------

    def _begin(self, student: nn.Module, args: Any, kwargs: Any) -> None:
        self._forget()
        self._recording = student.training and torch.is_grad_enabled()
        if not self._recording:
            return
        self.heard = True
        device = device_of(student)
        if next((p.device for p in self.teacher.parameters()), device) != device:
            self.teacher.to(device)
        with torch.no_grad(), self._autocast(device):
            self.teacher(*args, **kwargs)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        precision = self._precision
        if precision == "auto":
            own = torch.is_autocast_enabled(device.type)
            precision = "bfloat16" if not own and computes_in_bfloat16(device.type) else "same"
        if precision == "same":
            return nullcontext()
        return torch.autocast(device.type, dtype=getattr(torch, precision))

    def _reduce(self, who: str, name: str) -> Callable[..., None]:
        def reduce(module: nn.Module, args: Any, output: Any) -> None:
            if self._recording and isinstance(output, Tensor):
                if name in self._written_over and output.requires_grad:
                    output = output.clone()
                self._similarities[who].append((name, similarity(output, self._feature_size)))

        return reduce

    def _keep_scores(self, who: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if self._recording:
                scores = class_scores(output)
                some = who == "teacher" and self._classes and scores.shape[-1] != len(self._classes)
                self._scores[who] = scores[..., self._classes] if some else scores

        return keep

    def _forget(self) -> None:
        self._similarities = {"student": [], "teacher": []}
        self._scores = {}

    def _check_pairs(self, student: Sequence[tuple[str, Tensor]], teacher: Sequence[tuple[str, Tensor]]) -> None:
        ran = [[(name, len(g)) for name, g in side] for side in (student, teacher)]
        if ran[0] != ran[1]:
            at = next((i for i, (s, t) in enumerate(zip(*ran, strict=False)) if s != t), min(map(len, ran)))
            found = [f"'{side[at][0]}' on {side[at][1]} examples" if at < len(side) else "nothing" for side in ran]
            msg = (
                f"teacher: as layer {at + 1} the student ran {found[0]}, the teacher {found[1]}. Expected the same "
                "layers in the same order on the same batch. Give a teacher of the same structure."
            )
            raise DistillationError(msg)
        if len(student[0][1]) == 1 and not self._warned:
            self._warned = True
            nncf_logger.warning("Similarities need at least two examples: the loss of a batch of one is 0.")
