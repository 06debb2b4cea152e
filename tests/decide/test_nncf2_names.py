"""Scopes with names of NNCF 2.x find the same layers on today's graph."""

from __future__ import annotations

import pytest
import torch
from nncf2_networks import UNet
from torch import nn

from nncf_compactprune.channels import trace
from nncf_compactprune.decide.scopes import ScopeRules, operations_out_of_scope, parameters_in_scope, prunable_groups
from nncf_compactprune.errors import ScopeError

X = torch.zeros(1, 3, 12, 12)
NNCF2 = ScopeRules(nncf2=True)


class BasicBlock(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(o, o, 3, padding=1)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = y + self.conv2(y)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.heads = nn.ModuleList([nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)])
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.layer1(self.conv1(x))
        return self.fc(torch.cat([head(x) for head in self.heads], 1).mean((2, 3)))


@pytest.fixture(scope="module")
def model():
    return ResNet().eval()


def left_out(model, scope, rules=NNCF2):
    every = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    return {name.removesuffix(".weight") for name in every - parameters_in_scope(model, X, every, [scope], None, rules)}


@pytest.mark.parametrize(
    ("scope", "layers"),
    [
        ("ResNet/Sequential[layer1]/BasicBlock[0]/NNCFConv2d[conv1]/conv2d_0", {"layer1.0.conv1"}),
        ("ResNet/Sequential[layer1]/BasicBlock[0]/NNCFConv2d[conv1]", {"layer1.0.conv1"}),
        ("ResNet/Sequential[layer1]/BasicBlock[0]/Conv2d[conv1]/conv2d_0", {"layer1.0.conv1"}),
        ("ResNet/Sequential[layer1]/BasicBlock[1]", {"layer1.1.conv1", "layer1.1.conv2"}),
        ("ResNet/NNCFLinear[fc]/linear_0", {"fc"}),
        ("ResNet/ModuleList[heads]/NNCFConv2d[1]/conv2d_0", {"heads.1"}),
        ("ResNet/NNCFConv2d[1]/conv2d_0", {"heads.1"}),  # versions that left uncalled modules out
        ("MyNet/Sequential[layer1]/Bottleneck[0]/NNCFConv2d[conv1]/conv2d_0", {"layer1.0.conv1"}),  # other classes
        ("{re}ResNet/Sequential\\[layer1\\]/BasicBlock\\[0\\]/NNCFConv2d\\[conv1\\]/.*", {"layer1.0.conv1"}),
        ("{re}ResNet/NNCFLinear\\[fc\\]", {"fc"}),
        ("{re}.*NNCFConv2d\\[conv1\\].*", {"conv1", "layer1.0.conv1", "layer1.1.conv1"}),
        ("{re}NNCFConv2d\\[conv1\\]", {"conv1", "layer1.0.conv1", "layer1.1.conv1"}),  # found anywhere
        ("{re}^ResNet/NNCFConv2d\\[conv1\\]", {"conv1"}),
        ("{re}OldNet/Sequential\\[layer1\\]/OldBlock\\[0\\]/NNCFConv2d\\[conv2\\]/.*", {"layer1.0.conv2"}),
        ("{re}conv1", {"conv1", "layer1.0.conv1", "layer1.1.conv1"}),
        ("layer1.0.conv1", {"layer1.0.conv1"}),
        ("layer1/0/conv1/conv2d/0", {"layer1.0.conv1"}),
    ],
)
def test_a_scope_finds_its_layers(model, scope, layers):
    assert left_out(model, scope) == layers


def test_other_entries_read_patterns_as_today_unless_nothing_fits(model):
    today = ScopeRules()
    assert left_out(model, "{re}conv1", today) == {"conv1"}
    assert left_out(model, "{re}ResNet/NNCFLinear\\[fc\\]", today) == {"fc"}
    assert left_out(model, "ResNet/NNCFLinear[fc]/linear_0", today) == {"fc"}


@pytest.mark.parametrize(
    ("scope", "operation"),
    [
        ("ResNet/Sequential[layer1]/BasicBlock[0]/__add___0", "layer1/0/add/0"),
        ("ResNet/Sequential[layer1]/BasicBlock[0]/ReLU[relu]/relu__1", "layer1/0/relu/relu_/1"),
        ("ResNet/cat_0", "/cat/0"),
        ("{re}.*__add__.*", None),
    ],
)
def test_operations_without_parameters(model, scope, operation):
    found = operations_out_of_scope(model, X, [scope], None, NNCF2)
    assert found == ({operation} if operation else {"layer1/0/add/0", "layer1/1/add/0"})


def test_an_operation_of_another_number_is_another(model):
    with pytest.raises(ScopeError, match="matches no operation"):
        left_out(model, "ResNet/NNCFLinear[fc]/linear_1")


def test_scopes_need_not_match_where_they_are_not_validated(model):
    assert left_out(model, "ResNet/NNCFConv2d[none]/conv2d_0", ScopeRules(nncf2=True, validate=False)) == set()
    with pytest.raises(ScopeError, match="matches no operation"):
        left_out(model, "ResNet/NNCFConv2d[none]/conv2d_0")


def test_the_scopes_of_a_real_file():
    """Those of NNCF's U-Net: the layers that enlarge, and the last block."""
    model = UNet(20, width=8).eval()
    up = "{re}UNet/ModuleList\\[up_path\\]/UNetUpBlock"
    scopes = [f"{up}\\[{at}\\]/NNCFConvTranspose2d\\[up\\].*" for at in range(4)]
    scopes += [
        f"{up}\\[3\\]/UNetConvBlock\\[conv_block\\]/Sequential\\[block\\]/NNCFConv2d\\[{at}\\].*" for at in (0, 3)
    ]
    x = torch.zeros(1, 3, 32, 32)
    graph = trace(model, x)
    stays = {
        group.name
        for group, free in zip(graph.groups, prunable_groups(model, x, graph, scopes, None, NNCF2), strict=True)
        if not free
    }
    assert stays == {f"up_path.{at}.up" for at in range(4)} | {f"up_path.3.conv_block.block.{at}" for at in (0, 3)}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        scores = torch.matmul(self.query(x), self.key(x).transpose(1, 2)) / 2.8
        return torch.matmul(scores.softmax(-1), x) + x


SECOND = {"/add/1", "/div/1", "/matmul/2", "/matmul/3", "/softmax/1", "/transpose/1", "key/linear/1", "query/linear/1"}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = Attention(), nn.ModuleList([Attention(), Attention()])

    def forward(self, x):
        x = self.first(x)
        for layer in self.layer:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("scope", "operations"),
    [
        ("{re}.*matmul_0", {"first/matmul/0", "/matmul/0", "/matmul/2"}),
        ("{re}.*__truediv__*", {"first/div/0", "/div/0", "/div/1"}),
        ("{re}.*__add___[0-1]", {"first/add/0", "/add/0", "/add/1"}),
        ("Encoder/Attention[first]/__truediv___0", {"first/div/0"}),
        ("Encoder/ModuleList[layer]/Attention[0]/matmul_1", {"/matmul/1"}),
        ("Encoder/Attention[1]/__add___0", {"/add/1"}),  # some versions left the list out
        ("Encoder/ModuleList[layer]/Attention[1]/__add___0", {"/add/1"}),
        (r"{re}.*ModuleList\[layer\]/Attention\[1\].*", SECOND),
        ("layer.1", SECOND),
    ],
)  # fmt: skip
def test_operations_without_weights_are_found_in_their_modules(scope: str, operations: set[str]) -> None:
    """NNCF 3's names leave out lists of modules and their indices; NNCF 2.x's counted by module."""
    network, x = Encoder().eval(), torch.randn(2, 4, 8)
    rules = ScopeRules(nncf2=True, validate=False)
    assert operations_out_of_scope(network, x, [scope], None, rules) == operations


def test_all_scopes_without_a_match_are_told() -> None:
    with pytest.raises(ScopeError, match=r"'frist' matches no .*Did you mean 'first'.*'lyer' matches no"):
        operations_out_of_scope(Encoder().eval(), torch.randn(2, 4, 8), ["frist", "first", "lyer"], None)
