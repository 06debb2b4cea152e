"""Every rule keeps the law: the cut network computes what the masked one computes. A rule without a network fails."""

from __future__ import annotations

import pytest
import torch
from support.cuts import random_plan
from torch import nn

from nncf_compactprune.channels import trace
from nncf_compactprune.channels.rules import RULES
from nncf_compactprune.channels.tracer import Tracer
from nncf_compactprune.cut.self_check import prune_in_place

A = torch.ops.aten
NAMES = {name.removeprefix("aten.") for name in RULES}
PAIR, ONE = [2, 2], [1, 1]
OTHER_DEVICES = {
    "cudnn_batch_norm", "miopen_batch_norm", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "_fused_rms_norm", "linear", "softmax", "log_softmax",
    "avg_pool1d", "adaptive_avg_pool1d",
}  # fmt: skip
ELSEWHERE = {
    "_weight_norm_interface": "the norm of a masked row is 0, so this takes a network of its own: support.networks",
    "_weight_norm": "the same",
    "_conj": "complex tensors only, which carry no channels",
    "_local_scalar_dense": "test_channels: it pins, and is read outside of inference mode",
    "_grouped_mm": "single precision only: test_experts",
    **dict.fromkeys(
        (
            "lstm",
            "gru",
            "rnn_tanh",
            "rnn_relu",
            "lstm_cell",
            "gru_cell",
            "rnn_tanh_cell",
            "rnn_relu_cell",
            "_pack_padded_sequence",
            "_pad_packed_sequence",
        ),
        "they read sequences: test_recurrent",
    ),
    "resize_": "tensors that require gradients refuse it",
}


def spatial(name, *args, ndim=2):
    def run(y, m):
        x = {1: lambda: y.flatten(2), 2: lambda: y, 3: lambda: y[:, :, None].expand(-1, -1, 2, -1, -1)}[ndim]()
        out = getattr(A, name)(x, *args)
        return out[0] if isinstance(out, tuple) else out

    return run


def plain(name, *args):
    return lambda y, m: getattr(A, name)(y, *args)


def first(name, *args):
    return lambda y, m: getattr(A, name)(y, *args)[0]


def filled(name, *args):
    """What only has the shape of its argument must follow its width."""
    return lambda y, m: y + 0 * getattr(A, name)(y, *args).nan_to_num(0, 0, 0)


def normed(name, *args):
    def run(y, m):
        out = getattr(A, name)(y, m.weight, m.bias, m.mean, m.var, *args)
        return out[0] if isinstance(out, tuple) else out

    return run


def product(f):
    """``f(rows, m)`` on rows ``[n, 8]`` gives ``[n, out]``."""
    return lambda y, m: f(y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1]), m)


def read(f):
    return lambda y, m: y * (1 if f(y) else 2)


def numbers(f):
    return lambda y, m: f(y).to(y.dtype)


def unpooled(m, largest, places):
    return A.max_unpool2d(m.other(largest), places, [6, 6])


POSITIONS = torch.arange(6)
NETWORKS = {
    "pointwise": lambda y, m: torch.relu(y) + m.bias.view(1, -1, 1, 1),
    "hardswish": plain("hardswish"), "silu": plain("silu"),
    "where": lambda y, m: torch.where(y > 0, y, m.other(y)),
    "masked_fill": lambda y, m: y.masked_fill(y > 0, 0.5),
    "addcmul": lambda y, m: torch.addcmul(y, y, y), "addcdiv": lambda y, m: torch.addcdiv(y, y, y.abs() + 1),
    "lerp": lambda y, m: torch.lerp(y, y * 2, 0.3),
    "_prelu_kernel": lambda y, m: nn.functional.prelu(y, m.weight),
    "copy": lambda y, m: A.copy(y, y * 2), "copy_": lambda y, m: torch.empty_like(y).copy_(y),
    **{n: filled(n) for n in ("zeros_like", "ones_like", "empty_like", "rand_like", "randn_like")},
    "full_like": filled("full_like", 2.0), "randint_like": filled("randint_like", 3),
    **{n: (lambda y, m, n=n: y + 0 * getattr(A, n)(y, y.shape).nan_to_num(0, 0, 0)) for n in ("new_zeros", "new_ones",
                                                                                             "new_empty")},
    "new_full": lambda y, m: y + A.new_full(y, y.shape, 2.0),
    "bernoulli": lambda y, m: y + 0 * A.bernoulli(torch.sigmoid(y)),
    **{n: plain(n) for n in ("clone", "detach", "alias", "_to_copy", "lift_fresh", "contiguous", "nan_to_num",
                             "resolve_conj", "resolve_neg", "_conj", "squeeze_copy")},
    "native_dropout": first("native_dropout", 0.5, False),
    "as_strided": lambda y, m: y + 0 * A.as_strided(y, y.shape, y.stride()),
    "as_strided_": lambda y, m: A.as_strided_(y.clone(), y.shape, y.stride()),
    "fill": lambda y, m: y + 0 * A.fill(y, 1.0),
    "zero_": lambda y, m: y + y.clone().zero_(), "fill_": lambda y, m: y + y.clone().fill_(2.0),
    **{n: (lambda y, m, n=n: y + 0 * getattr(y.clone(), n)()) for n in ("normal_", "uniform_", "bernoulli_")},
    "set_": lambda y, m: y + 0 * torch.empty_like(y).set_(y), "resize_": lambda y, m: y.clone().resize_(y.shape),
    "_local_scalar_dense": read(lambda y: A._local_scalar_dense(y.sum()) > 0),
    "item": read(lambda y: A.item(y.sum()) > 0), "equal": read(lambda y: torch.equal(y, y)),
    "is_same_size": read(lambda y: A.is_same_size(y, y)), "_is_all_true": read(lambda y: A._is_all_true(y > -99)),
    "_is_any_true": read(lambda y: A._is_any_true(y > 99)),
    "native_batch_norm": normed("native_batch_norm", False, 0.1, 1e-5),
    "batch_norm": normed("batch_norm", False, 0.1, 1e-5, False),
    "_native_batch_norm_legit": normed("_native_batch_norm_legit", False, 0.1, 1e-5),
    "_native_batch_norm_legit_no_training": normed("_native_batch_norm_legit_no_training", 0.1, 1e-5),
    "_batch_norm_no_update": normed("_batch_norm_no_update", 0.1, 1e-5),
    "_batch_norm_with_update": normed("_batch_norm_with_update", 0.1, 1e-5),
    "_native_batch_norm_legit_functional": normed("_native_batch_norm_legit_functional", False, 0.1, 1e-5),
    **{n: (lambda y, m, n=n: m.layer_norm(n, y)) for n in ("native_layer_norm", "layer_norm", "rms_norm")},
    "native_group_norm": lambda y, m: A.native_group_norm(y, m.weight, m.bias, 2, y.shape[1], 36, y.shape[1] // 2,
                                                          1e-5)[0],
    "group_norm": lambda y, m: A.group_norm(y, y.shape[1] // 2, m.weight, m.bias),
    "_weight_norm_interface": lambda y, m: nn.functional.conv2d(y, A._weight_norm_interface(m.kernel, m.gain)[0]),
    "_weight_norm": lambda y, m: nn.functional.conv2d(y, A._weight_norm(m.kernel, m.gain)),
    "convolution": lambda y, m: A.convolution(y, m.kernel, None, ONE, ONE, ONE, False, [0, 0], 1),
    "_convolution": lambda y, m: A._convolution(y, m.kernel, None, ONE, ONE, ONE, False, [0, 0], 1, False, False,
                                                False, False),
    "mm": product(lambda r, m: r @ m.matrix.t()), "addmm": product(lambda r, m: torch.addmm(m.bias, r, m.matrix.t())),
    "_addmm_activation": product(lambda r, m: A._addmm_activation(m.bias, r, m.matrix.t())),
    "matmul": product(lambda r, m: A.matmul(r, m.matrix.t())),
    "linear": product(lambda r, m: A.linear(r, m.matrix, m.bias)),
    "bmm": lambda y, m: A.bmm(y.flatten(2), torch.ones(2, 36, 3, dtype=y.dtype)),
    "baddbmm": lambda y, m: A.baddbmm(y.flatten(2)[..., :3] * 0, y.flatten(2), torch.ones(2, 36, 3, dtype=y.dtype)),
    "embedding": lambda y, m: y * A.embedding(m.table, torch.tensor([1, 2])).view(2, -1, 1, 1),
    "_scaled_dot_product_flash_attention_for_cpu": lambda y, m: m.attend(y, lambda q, k, v:
        A._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]),
    "_scaled_dot_product_attention_math": lambda y, m: m.attend(y, lambda q, k, v:
        A._scaled_dot_product_attention_math(q, k, v)[0]),
    "scaled_dot_product_attention": lambda y, m: m.attend(y, A.scaled_dot_product_attention),
    **{n: (lambda y, m, n=n: getattr(A, n)(y, [2, 3])) for n in ("mean", "sum", "amax", "amin", "var", "std",
                                                                 "logsumexp", "nansum")},
    "var_mean": lambda y, m: torch.var_mean(y, (2, 3))[0], "std_mean": lambda y, m: torch.std_mean(y, (2, 3))[0],
    "prod": lambda y, m: y.prod(3),
    "any": numbers(lambda y: (y > 0.5).any(3)), "all": numbers(lambda y: (y > 0).all(3)),
    "argmax": numbers(lambda y: y.argmax(3)), "argmin": numbers(lambda y: y.argmin(3)),
    "max": lambda y, m: y * y.max(), "min": lambda y, m: y * y.min(),
    "max.dim": lambda y, m: y.max(3).values, "min.dim": lambda y, m: y.min(3).values,
    "linalg_vector_norm": lambda y, m: torch.linalg.vector_norm(y, dim=3),
    "norm": lambda y, m: A.norm.ScalarOpt_dim(y, 2, [3]), "median": lambda y, m: y.median(3).values,
    "count_nonzero": numbers(lambda y: torch.count_nonzero(y > 0, dim=(2, 3))),
    **{n: plain(n, 3, False) for n in ("_softmax", "_log_softmax")},
    "softmax": plain("softmax", 3), "log_softmax": plain("log_softmax", 3), "cumsum": plain("cumsum", 3),
    "logcumsumexp": plain("logcumsumexp", 3), "sort": first("sort", 3), "topk": first("topk", 2, 3),
    "argsort": numbers(lambda y: A.argsort(y, 3)), "kthvalue": first("kthvalue", 2, 3),
    "max_pool2d_with_indices": spatial("max_pool2d_with_indices", PAIR), "max_pool2d": spatial("max_pool2d", PAIR),
    "max_pool3d_with_indices": spatial("max_pool3d_with_indices", [1, 2, 2], ndim=3),
    "max_pool1d": spatial("max_pool1d", [2], ndim=1), "avg_pool1d": spatial("avg_pool1d", [2], ndim=1),
    "avg_pool2d": spatial("avg_pool2d", PAIR), "avg_pool3d": spatial("avg_pool3d", [1, 2, 2], ndim=3),
    "adaptive_avg_pool1d": spatial("adaptive_avg_pool1d", [2], ndim=1),
    "_adaptive_avg_pool2d": spatial("_adaptive_avg_pool2d", PAIR),
    "_adaptive_avg_pool3d": spatial("_adaptive_avg_pool3d", [1, 2, 2], ndim=3),
    "adaptive_max_pool2d": spatial("adaptive_max_pool2d", PAIR),
    "adaptive_max_pool3d": spatial("adaptive_max_pool3d", [1, 2, 2], ndim=3),
    "fractional_max_pool2d": lambda y, m: A.fractional_max_pool2d(
        y, PAIR, [3, 3], torch.full((2, y.shape[1], 2), 0.5, dtype=y.dtype))[0],
    **{n: spatial(n, [9], ndim=1) for n in ("upsample_nearest1d", "_upsample_nearest_exact1d")},
    **{n: spatial(n, [9, 9]) for n in ("upsample_nearest2d", "_upsample_nearest_exact2d")},
    **{n: spatial(n, [2, 9, 9], ndim=3) for n in ("upsample_nearest3d", "_upsample_nearest_exact3d")},
    **{n: spatial(n, [9, 9], False) for n in ("upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d",
                                              "_upsample_bicubic2d_aa")},
    "upsample_linear1d": spatial("upsample_linear1d", [9], False, ndim=1),
    "upsample_trilinear3d": spatial("upsample_trilinear3d", [2, 9, 9], False, ndim=3),
    **{f"{k}_pad{n}d": spatial(f"{k}_pad{n}d", [1, 0] * n, ndim=n) for k in ("reflection", "replication")
       for n in (1, 2, 3)},
    "grid_sampler_2d": lambda y, m: A.grid_sampler_2d(y, torch.zeros(2, 3, 3, 2, dtype=y.dtype) + 0.2, 0, 0, False),
    "grid_sampler_3d": lambda y, m: A.grid_sampler_3d(
        y[:, :, None], torch.zeros(2, 1, 3, 3, 3, dtype=y.dtype) + 0.2, 0, 0, False),
    "constant_pad_nd": plain("constant_pad_nd", [1, 1]), "pad": plain("pad", [1, 1]),
    "max_unpool2d": lambda y, m: unpooled(m, *A.max_pool2d_with_indices(y, PAIR)),
    "max_unpool3d": lambda y, m: A.max_unpool3d(
        *A.max_pool3d_with_indices(y[:, :, None], [1, 2, 2]), [1, 6, 6], [1, 2, 2], [0, 0, 0]),
    "pixel_shuffle": plain("pixel_shuffle", 2), "pixel_unshuffle": plain("pixel_unshuffle", 2),
    "channel_shuffle": plain("channel_shuffle", 2), "native_channel_shuffle": plain("native_channel_shuffle", 2),
    "im2col": plain("im2col", PAIR, ONE, [0, 0], PAIR),
    "col2im": lambda y, m: A.col2im(y.flatten(2)[..., :9], [6, 6], PAIR, ONE, [0, 0], PAIR),
    "view": lambda y, m: A.view(y, [2, -1, 36]), "_unsafe_view": lambda y, m: A._unsafe_view(y, [2, -1, 36]),
    "reshape": lambda y, m: A.reshape(y, [2, -1, 36]), "view_copy": lambda y, m: A.view_copy(y, [2, -1, 36]),
    "_reshape_alias": lambda y, m: A._reshape_alias(y, [len(y), y.shape[1], 36], [y.shape[1] * 36, 36, 1]),
    "flatten": lambda y, m: A.flatten(y, 2), "unflatten": lambda y, m: A.unflatten(y, 3, [2, 3]),
    "permute": lambda y, m: A.permute(y, [0, 1, 3, 2]), "transpose": lambda y, m: A.transpose(y, 2, 3),
    "t": product(lambda r, m: A.t(A.t(r))), "swapaxes": lambda y, m: A.swapaxes(y, 2, 3),
    "unsqueeze": plain("unsqueeze", 3), "squeeze": lambda y, m: A.squeeze(y[:, :, None], 2),
    "expand": lambda y, m: A.expand(y[:, :, None], [-1, -1, 3, -1, -1]), "repeat": plain("repeat", [1, 1, 2, 1]),
    "tile": plain("tile", [1, 2, 1, 1]), "cat": lambda y, m: torch.cat([y, m.other(y)], 1),
    "concat": lambda y, m: A.concat([y, m.other(y)], 1), "stack": lambda y, m: torch.stack([y, m.other(y)], 2),
    **{n: (lambda y, m, n=n: getattr(A, n)(y, 2, 2)[1]) for n in ("split", "unsafe_split", "chunk", "unsafe_chunk",
                                                                  "tensor_split")},
    **{n: (lambda y, m, n=n: getattr(A, n)(y, [2, 4], 2)[1]) for n in ("split_with_sizes", "unsafe_split_with_sizes")},
    "glu": plain("glu", 1), "slice": lambda y, m: y[:, :, 1:4], "narrow": plain("narrow", 2, 1, 3),
    "select": lambda y, m: y[:, :, 2], "unbind": lambda y, m: torch.unbind(y, 2)[1],
    "index": lambda y, m: y[:, :, POSITIONS], "_unsafe_index": lambda y, m: A._unsafe_index(y, [None, None, POSITIONS]),
    "index_select": plain("index_select", 2, POSITIONS), "roll": plain("roll", [1], [2]), "flip": plain("flip", [3]),
    "rot90": plain("rot90", 1, [2, 3]),
    "gather": lambda y, m: A.gather(y, 3, torch.zeros(2, y.shape[1], 6, 2, dtype=torch.long)),
    "index_add": lambda y, m: A.index_add(torch.zeros_like(y), 3, POSITIONS, y),
    "index_copy": lambda y, m: A.index_copy(y, 3, POSITIONS, y * 2),
    "index_put": lambda y, m: A.index_put(y, [torch.tensor([1, 0])], y * 2),
    **{n: (lambda y, m, n=n: getattr(A, n)(y, 3, torch.zeros_like(y).long(), y)) for n in ("scatter", "scatter_add")},
    "scatter_reduce": lambda y, m: A.scatter_reduce(
        torch.zeros_like(y), 3, torch.zeros_like(y).long(), y, "amax", include_self=False),
    "index_reduce": lambda y, m: A.index_reduce(torch.zeros_like(y), 3, POSITIONS, y, "mean"),
    "mv": lambda y, m: y * A.mv(m.matrix, m.weight).view(1, -1, 1, 1), "dot": lambda y, m: y * A.dot(m.bias, m.weight),
    "vdot": lambda y, m: y * torch.vdot(m.bias, m.weight),
    "_embedding_bag": lambda y, m: y * A._embedding_bag(
        m.table, torch.tensor([1, 2, 3]), torch.tensor([0, 1]))[0][..., None, None],
    "_embedding_bag_forward_only": lambda y, m: y * A._embedding_bag_forward_only(
        m.table, torch.tensor([1, 2, 3]), torch.tensor([0, 1]), False, 1)[0][..., None, None],
    "_trilinear": product(lambda r, m: nn.functional.bilinear(r, m.matrix.tanh()[:1].expand(len(r), -1), m.cube)),
    "_safe_softmax": plain("_safe_softmax", 3),
    "tril": plain("tril"), "triu": plain("triu"), "unfold": plain("unfold", 2, 2, 2),
}  # fmt: skip


class Net(nn.Module):
    """Two layers with an operation between; channels in dimension 1 of what it returns."""

    def __init__(self, operation) -> None:
        super().__init__()
        self.operation = operation
        self.conv, self.side = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.weight, self.bias = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.rand(8) - 0.5)
        self.register_buffer("mean", torch.rand(8))
        self.register_buffer("var", torch.rand(8) + 0.5)
        self.kernel, self.gain = nn.Parameter(torch.randn(8, 8, 1, 1)), nn.Parameter(torch.rand(8, 1, 1, 1))
        self.cube = nn.Parameter(torch.randn(8, 8, 8))
        self.matrix, self.table = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(4, 8))
        self.num_heads = 2
        self.qkv = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.LazyLinear(4)

    def other(self, y):
        return self.side(y)

    def layer_norm(self, name, y):
        rows = y.movedim(1, -1)
        affine = (self.weight,) if name == "rms_norm" else (self.weight, self.bias)
        tail = (1e-5,) if name != "rms_norm" else ()
        out = getattr(A, name)(rows, [rows.shape[-1]], *affine, *tail)
        return (out[0] if isinstance(out, tuple) else out).movedim(-1, 1)

    def attend(self, y, attention):
        rows = y.flatten(2).transpose(1, 2)
        q, k, v = (p(rows).view(2, 36, self.num_heads, -1).transpose(1, 2) for p in self.qkv)
        return attention(q, k, v).transpose(1, 2).reshape(2, 36, -1).transpose(1, 2)

    def forward(self, x):
        out = self.operation(self.conv(x), self)
        return self.head(out if out.dim() < 3 else out.flatten(2).mean(2))


def net(name: str) -> Net:
    torch.manual_seed(0)
    model = Net(NETWORKS[name]).double().eval()
    with torch.no_grad():
        model(images())
    return model


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def keys(func) -> set[str]:
    name = str(func.overloadpacket)
    found = {f"{name}.{func._overloadname}", name, name.removesuffix("_")}
    return {key.removeprefix("aten.") for key in found} | ({"pointwise"} if torch.Tag.pointwise in func.tags else set())


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ELSEWHERE])
def test_masked_is_compact_for_every_rule(name, monkeypatch):
    met: set[str] = set()
    resolve = Tracer._resolve
    monkeypatch.setattr(Tracer, "_resolve", lambda self, func: met.update(keys(func)) or resolve(self, func))
    model = net(name)
    check = prune_in_place(model, random_plan(model, images(), allow_approximate=True), images())
    assert check is not None
    assert check.error <= 1e-12
    if name in NAMES - OTHER_DEVICES:  # torch takes the other operations apart before a rule could see them
        assert name in met


@pytest.mark.parametrize("name", ["vdot", "_embedding_bag", "_trilinear", "max_unpool2d", "max_unpool3d"])
def test_channels_of_less_common_operations_go(name):
    graph = trace(net(name), images())
    assert not graph.unsupported_ops
    assert any(group.size == 8 for group in graph.groups)


def test_every_rule_has_a_network():
    assert {*NETWORKS, *OTHER_DEVICES, *ELSEWHERE} >= NAMES, "give the new rule a network in NETWORKS"
