"""One small network for every structure that channel analysis must know. Width 16 unless there is a reason."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE = (2, 3, 12, 12)


class Classifier(nn.Module):
    """Features, global pooling, linear."""

    def __init__(self, features: nn.Module, width: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def conv_bn(i: int, o: int, k: int = 3, **kw: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **kw), nn.BatchNorm2d(o), nn.ReLU())


def plain() -> nn.Module:
    return Classifier(nn.Sequential(conv_bn(3, 16), nn.MaxPool2d(2), conv_bn(16, 24), conv_bn(24, 16, 1)), 16)


class ResidualBlock(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.shortcut = nn.Conv2d(i, o, 1, stride, bias=False) if (i, stride) != (o, 1) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def residual() -> nn.Module:
    return Classifier(nn.Sequential(conv_bn(3, 16), ResidualBlock(16, 16), ResidualBlock(16, 24, 2)), 24)


class OptionABlock(nn.Module):
    """The CIFAR ResNet's shortcut: subsample, then pad with zero channels on both sides."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, o // i, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.pad = (o - i) // 2
        self.stride = o // i

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        s = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(s, (0, 0, 0, 0, self.pad, self.pad)))


def option_a() -> nn.Module:
    return Classifier(nn.Sequential(conv_bn(3, 16), OptionABlock(16, 16), OptionABlock(16, 32)), 32)


def depthwise() -> nn.Module:
    """An inverted residual and a depthwise convolution with channel multiplier 2."""
    features = nn.Sequential(
        conv_bn(3, 16),
        conv_bn(16, 32, 1),
        conv_bn(32, 32, 3, groups=32),
        conv_bn(32, 16, 1),
        nn.Conv2d(16, 32, 3, padding=1, groups=16),
        nn.Hardswish(),
    )
    return Classifier(features, 32)


def grouped() -> nn.Module:
    return Classifier(nn.Sequential(conv_bn(3, 16), conv_bn(16, 32, 3, groups=4), conv_bn(32, 16, 1)), 16)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, reduced: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, reduced, 1), nn.Conv2d(reduced, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


def squeeze_excite() -> nn.Module:
    return Classifier(nn.Sequential(conv_bn(3, 16), SqueezeExcite(16, 8), conv_bn(16, 16)), 16)


class DenseBlock(nn.Module):
    def __init__(self, i: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(i + k * growth), nn.ReLU(), nn.Conv2d(i + k * growth, growth, 3, padding=1))
            for k in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def dense_concat() -> nn.Module:
    return Classifier(nn.Sequential(conv_bn(3, 16), DenseBlock(16, 8, 3), conv_bn(40, 16, 1)), 16)


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def shuffle() -> nn.Module:
    features = nn.Sequential(
        conv_bn(3, 16), conv_bn(16, 16, 1, groups=4), Shuffle(4), conv_bn(16, 16, 3, groups=4), nn.ChannelShuffle(2),
        conv_bn(16, 16, 1),
    )  # fmt: skip
    return Classifier(features, 16)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2: one half passes, the other is worked on, both meet in a shuffle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv_bn(width // 2, width // 2, 1), conv_bn(width // 2, width // 2))
        self.shuffle = Shuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        passed, worked = x.chunk(2, 1)
        return self.shuffle(torch.cat([passed, self.branch(worked)], 1))


def shuffle_unit() -> nn.Module:
    return Classifier(nn.Sequential(conv_bn(3, 16), ShuffleUnit(16), ShuffleUnit(16)), 16)


def transposed() -> nn.Module:
    """A small encoder and decoder with skip connection by concatenation, transposed grouped and depthwise too."""

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down1, self.down2 = conv_bn(3, 16), conv_bn(16, 32)
            self.up = nn.ConvTranspose2d(32, 16, 2, 2)
            self.up_grouped = nn.ConvTranspose2d(32, 16, 3, padding=1, groups=4)
            self.up_depthwise = nn.ConvTranspose2d(16, 16, 3, padding=1, groups=16)
            self.out = nn.Conv2d(16, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            a = self.down1(x)
            b = self.up(F.max_pool2d(self.down2(a), 2).relu())
            return self.out(self.up_depthwise(self.up_grouped(torch.cat([a, b[:, :, :12, :12]], 1)).relu()))

    return UNet()


class GLUBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(width, 32, 1), nn.Conv2d(16, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.inner(x).chunk(2, 1)
        return x + self.outer(value * torch.sigmoid(gate))


def glu() -> nn.Module:
    class ByOp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 32, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.glu(self.conv(x), 1)

    return Classifier(nn.Sequential(conv_bn(3, 16), GLUBlock(16), ByOp(), conv_bn(16, 16, 1)), 16)


def flatten() -> nn.Module:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv_bn(3, 16)
            self.hidden, self.head = nn.Linear(16 * 9, 24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.hidden(F.avg_pool2d(self.conv(x), 4).flatten(1))))

    return Flat()


def group_norm() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(8, 16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.GroupNorm(6, 24),
        nn.SiLU(), nn.Conv2d(24, 16, 1), nn.InstanceNorm2d(16, affine=True),
    )  # fmt: skip
    return Classifier(features, 16)


class LayerNormBlock(nn.Module):
    """ConvNeXt's block: the hidden width is exact, the residual width only approximate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, 32), nn.Linear(32, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.outer(F.gelu(self.inner(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))
        return x + (y * self.scale).permute(0, 3, 1, 2)


def layer_norm() -> nn.Module:
    return Classifier(nn.Sequential(nn.Conv2d(3, 16, 2, 2), LayerNormBlock(16), nn.GroupNorm(1, 16)), 16)


def pixel_shuffle() -> nn.Module:
    features = nn.Sequential(
        conv_bn(3, 64), nn.PixelShuffle(2), conv_bn(16, 16), nn.PixelUnshuffle(2), conv_bn(64, 16, 1), nn.PReLU(16)
    )
    return Classifier(features, 16)


def weight_norm() -> nn.Module:
    features = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.Conv2d(16, 16, 3)
    )
    return Classifier(features, 16)


def tied() -> nn.Module:
    """One convolution used twice, one weight shared by two modules."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.twice, self.a, self.b = (nn.Conv2d(i, 16, 3, padding=1) for i in (3, 16, 16, 16))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(F.relu(self.twice(F.relu(self.stem(x)))))
            return self.b(F.relu(self.a(x)))

    return Classifier(Tied(), 16)


class Attention(nn.Module):
    """Fused or explicit, with the head count as an attribute, as timm and Hugging Face write it."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim, self.fused = heads, width // heads, width, fused
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, self.attn_dim))


def attention() -> nn.Module:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 4, 4)
            self.fused, self.explicit = Attention(16, 4, True), Attention(16, 4, False)
            self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            y = x.flatten(2).transpose(1, 2)
            y = y + self.fused(y)
            y = y + self.explicit(y)
            y = y + self.outer(F.gelu(self.inner(y)))
            return y.transpose(1, 2).reshape(x.shape)

    return Classifier(Tokens(), 16)


class GroupedQueryAttention(nn.Module):
    """Two query heads share a head of keys and values, which is repeated for them or left to the fused operation."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim, self.fused = heads, heads // 2, width // heads, fused
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj, self.v_proj = nn.Linear(width, width // 2), nn.Linear(width, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def grouped_query_attention() -> nn.Module:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 4, 4)
            self.fused, self.repeated = GroupedQueryAttention(16, 8, True), GroupedQueryAttention(16, 8, False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            y = x.flatten(2).transpose(1, 2)
            y = y + self.fused(y)
            y = y + self.repeated(y)
            return y.transpose(1, 2).reshape(x.shape)

    return Classifier(Tokens(), 16)


class MixedConvolution(nn.Module):
    """MixNet: a kernel size for each part of the channels, the parts' sizes in a list."""

    def __init__(self, splits: list[int]) -> None:
        super().__init__()
        self.splits = splits
        self.parts = nn.ModuleList(nn.Conv2d(n, n, 2 * i + 1, padding=i, groups=n) for i, n in enumerate(splits))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(y) for part, y in zip(self.parts, x.split(self.splits, 1), strict=True)], 1)


def mixed_convolution() -> nn.Module:
    features = nn.Sequential(
        conv_bn(3, 16), MixedConvolution([8, 8]), conv_bn(16, 20, 1), MixedConvolution([10, 6, 4]), conv_bn(20, 16, 1)
    )
    return Classifier(features, 16)


class MultiScale(nn.Module):
    """Res2Net: parts of equal width, each worked on with what became of the one before."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.inner, self.outer = conv_bn(inputs, 4 * width, 1), nn.Conv2d(4 * width, inputs, 1)
        self.convs = nn.ModuleList(conv_bn(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, *parts = self.inner(x).split(self.width, 1)
        done = [first]
        for conv, part in zip(self.convs, parts, strict=True):
            done.append(conv(part + done[-1]))
        return F.relu(x + self.outer(torch.cat(done, 1)))


def multi_scale() -> nn.Module:
    return Classifier(nn.Sequential(conv_bn(3, 16), MultiScale(16, 6), MultiScale(16, 6)), 16)


class PartialConvolution(nn.Module):
    """FasterNet, GhostNet and the like: slices and splits by one number, by the last channels, by the whole width."""

    def __init__(self, width: int, part: int) -> None:
        super().__init__()
        self.width, self.part, self.last = width, part, width // 4
        self.conv, self.beside = nn.Conv2d(part, part, 3, padding=1), nn.Conv2d(width // 2, width // 2, 1)
        self.tail = nn.Conv2d(self.last, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.conv(x[:, : self.part]), x[:, self.part :]], 1)
        worked, rest = x.split([self.part, self.width - self.part], 1)
        x = torch.cat([F.relu(worked), rest], 1)
        x = x + self.tail(x[:, -self.last :])
        left, right = x.split(self.width // 2, 1)
        return torch.cat([self.beside(left), right], 1)


def partial_convolution() -> nn.Module:
    return Classifier(nn.Sequential(conv_bn(3, 16), PartialConvolution(16, 6), conv_bn(16, 16, 1)), 16)


class Recurrent(nn.Module):
    """Columns of feature maps as a sequence, read in both directions by two layers: text recognition, speech."""

    def __init__(self, kind: Callable[..., nn.Module] = nn.LSTM, **options: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 16), nn.Conv2d(16, 16, 3, (4, 1), 1), nn.Sigmoid())
        self.layers = kind(16 * 3, 12, **{"num_layers": 2, "bidirectional": True, "batch_first": True, **options})
        width = self.layers.proj_size or self.layers.hidden_size
        self.head = nn.Linear(width * (2 if self.layers.bidirectional else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        sequence = self.features(x).flatten(1, 2).transpose(1, 2)
        return self.head(self.layers(sequence)[0].mean(1))


def recurrent() -> nn.Module:
    return Recurrent()


class ConvLSTM(nn.Module):
    """Rows of an image as steps of a convolutional LSTM, whose states begin as zeros of a width that it keeps."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.conv = nn.Conv2d(inputs + hidden, 4 * hidden, 3, padding=1)

    def states(self, batch: int, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        made = self.conv.weight
        return tuple(torch.zeros(batch, self.hidden, *size, dtype=made.dtype) for _ in range(2))  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.states(len(x), (4, x.shape[3]))
        for step in x.split(4, 2):
            i, f, o, g = self.conv(torch.cat([step, h], 1)).split(self.hidden, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h


def convolutional_recurrent() -> nn.Module:
    return Classifier(nn.Sequential(ConvLSTM(3, 16), conv_bn(16, 16, 1)), 16)


class Basis(nn.Module):
    """Every feature in values of several functions, which become one long row: radial bases, Kolmogorov-Arnold."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.centres, self.linear = nn.Parameter(torch.linspace(-1, 1, 5)), nn.Linear(inputs * 5, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((-((x[..., None] - self.centres) ** 2)).exp().flatten(-2))


def basis_functions() -> nn.Module:
    model = Classifier(conv_bn(3, 16), 16)
    model.head = nn.Sequential(nn.Linear(16, 24), Basis(24, 12), Basis(12, 5))
    return model


class Words(nn.Module):
    """Words and their mask, a dictionary of scores."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(200, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head((self.words(ids) * mask[..., None]).sum(1))}


class Decoder(nn.Module):
    """Features become small pictures, of a number that the module keeps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.up = nn.Linear(12, width * 2 * 3)
        self.conv = nn.Sequential(nn.ConvTranspose2d(width, 16, 2, 2), nn.BatchNorm2d(16), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.up(x)).view(-1, self.width, 2, 3))


def decoders() -> nn.Module:
    """Autoencoders and generators: nn.Unflatten, and a view by a number."""
    encoder = [conv_bn(3, 8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 12), nn.ReLU()]
    first = [*encoder, nn.Linear(12, 10 * 4), nn.Unflatten(1, (10, 2, 2)), nn.ConvTranspose2d(10, 8, 3, 2), nn.ReLU()]
    between = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12), nn.ReLU()]
    return Classifier(nn.Sequential(*first, *between, Decoder(14)), 16)


class Pairs(nn.Module):
    """Each group of a convolution makes one channel of two; transposed ones make two of one, and one of two."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.other = nn.Conv2d(width, width, 1)
        self.merge = nn.Conv2d(2 * width, width, 3, padding=1, groups=width)
        self.up = nn.ConvTranspose2d(width, 2 * width, 2, 2, groups=width, bias=False)
        self.down = nn.ConvTranspose2d(2 * width, width, 2, 2, groups=width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.merge(torch.stack([x, self.other(x)], 2).flatten(1, 2))))


def merging_groups() -> nn.Module:
    return Classifier(nn.Sequential(conv_bn(3, 16), Pairs(16), conv_bn(16, 16, 1)), 16)


class Blur(nn.Module):
    """One filter stretched over all channels; a gate of one channel stretched over all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(width, 1, 1)
        self.register_buffer("filter", torch.tensor([1.0, 2.0, 1.0]).view(1, 1, 3, 1) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.filter.expand(x.shape[1], -1, -1, -1), padding=(1, 0), groups=x.shape[1])
        return x * self.gate(x).sigmoid().expand_as(x)


def stretched() -> nn.Module:
    return Classifier(nn.Sequential(conv_bn(3, 16), Blur(16), conv_bn(16, 24)), 24)


STRUCTURES: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f
    for f in (
        plain, residual, option_a, depthwise, grouped, squeeze_excite, dense_concat, shuffle, shuffle_unit,
        transposed, glu,
        flatten, group_norm, layer_norm, pixel_shuffle, weight_norm, tied, attention,
        grouped_query_attention, mixed_convolution, multi_scale, partial_convolution,
        recurrent, convolutional_recurrent, basis_functions, decoders, merging_groups, stretched,
    )
}  # fmt: skip


def trained(name: str, *, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A structure with statistics, scales and biases as unlike their initial values as training makes them."""
    torch.manual_seed(0)
    model = STRUCTURES[name]().to(dtype)
    generator = torch.Generator().manual_seed(1)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 1 and tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator, dtype=dtype) + 0.5
    return model.eval()


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(IMAGE, generator=torch.Generator().manual_seed(2), dtype=dtype)


def model32(name: str = "residual") -> nn.Module:
    """A trained network in single precision."""
    return trained(name, dtype=torch.float32)


def labelled_batches(number: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of four images at random, labels of five classes."""
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(4, 3, 12, 12, generator=generator), torch.randint(0, 5, (4,), generator=generator))
        for _ in range(number)
    ]
