"""Which residual branches a block's code shows, and the block without one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nncf_compactprune.channels import trace
from nncf_compactprune.channels.branches import Branch, NoBranchError, branches_of, shortcut
from nncf_compactprune.cut.depth import with_branches


class Block(nn.Module):
    """Adds as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.act = nn.ReLU(inplace=True)
        self.side = nn.Conv2d(4, 4, 1)

    def branch(self, x):
        return self.second(self.act(self.first(x)))

    def forward(self, x):
        out = self.branch(x)
        out += self.side(x)
        return self.act(out)


class Projected(Block):
    def forward(self, x):
        return self.side(x) + self.branch(x)


class Plain(Block):
    def forward(self, x):
        return F.relu(x + self.branch(self.side(x)), inplace=True)


class Scaled(Block):
    def forward(self, x):
        return torch.add(x, 0.5 * self.branch(self.side(x)))


class WritesItsInput(Block):
    def forward(self, x):
        return x + self.branch(self.side(self.act(x)))


class Constant(Block):
    def forward(self, x):
        return x + torch.sigmoid(self.branch(self.side(x)))


class Joined(Block):
    def forward(self, x):
        return torch.cat([x, self.branch(self.side(x))], 1)


class OnlyTrains(Block):
    def forward(self, x):
        return x + self.branch(self.side(x)) if self.training else x - self.branch(self.side(x))


class ByValue(Block):
    def forward(self, x):
        return x + self.branch(self.side(x)) if x.sum() > -1e9 else x


class Shares(Block):
    def forward(self, x):
        return self.side(x) + self.branch(self.side(x))


class Idle(Block):
    def forward(self, x):
        return x + self.branch(x)


class Two(Block):
    def forward(self, x):
        x = x + self.branch(x)
        return x + self.side(x)


class InPlaceBehind(Block):
    def forward(self, x):
        return (x + self.branch(self.side(x))).relu_()


class Wrapped(nn.Module):
    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 4, 1), block(), nn.Linear(4 * (1 + (block is Joined)), 5)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("block", "layers"),
    [
        (Block, [("first", "second"), ("side",)]),
        (Projected, [("side",), ("first", "second")]),
        (Plain, [("side", "first", "second")]),
        (Scaled, [("side", "first", "second")]),
        (Shares, [("first", "second")]),
        (Two, [("first", "second"), ("side",)]),
        (Joined, []),
    ],
)
def test_branches_are_read_off_the_code(block, layers):
    assert branches_of(block()) == layers


@pytest.mark.parametrize("block", [Block, Projected, Plain, Scaled])
def test_the_shortcut_is_the_block_with_zeros_for_the_branch(block):
    dense = block().eval()
    layers = next(found for found in branches_of(dense) if "first" in found)
    rest = shortcut(dense, layers)
    for name in layers:
        for parameter in getattr(dense, name).parameters():
            nn.init.zeros_(parameter)
    x = torch.randn(2, 4, 5, 5)
    for module in (rest, copy.deepcopy(rest), pickle.loads(pickle.dumps(rest))):
        given = x.clone()
        assert torch.equal(module(given), dense(x.clone()))
        assert torch.equal(given, x), "the shortcut is what came in: nothing may write into it"
    assert not {name.split(".")[0] for name, _ in rest.named_parameters()} & set(layers)


def test_what_is_left_is_shared_and_keeps_its_hooks_and_its_mode():
    dense, seen = Block().train(), []
    handle = dense.register_forward_hook(lambda *_: seen.append(1))
    rest = shortcut(dense, ("first", "second"))
    assert rest.side is dense.side
    assert rest.training
    assert not rest.eval().act.training
    rest(torch.randn(1, 4, 3, 3))
    handle.remove()
    rest(torch.randn(1, 4, 3, 3))
    assert seen == [1]
    assert dense.act.inplace, "the dense block may come back"


@pytest.mark.parametrize(
    ("block", "layers", "said"),
    [
        (Plain, ("first",), "adds no branch of the layers first"),
        (OnlyTrains, ("side", "first", "second"), "other code in training"),
        (ByValue, ("side", "first", "second"), "cannot be recorded"),
        (Idle, ("first", "second"), "weights that its code does not use"),
        (InPlaceBehind, ("side", "first", "second"), "writes in place behind its addition"),
    ],
)
def test_blocks_without_such_a_branch_say_why(block, layers, said):
    with pytest.raises(NoBranchError, match=said):
        shortcut(block(), layers)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Plain, ""),
        (Scaled, ""),
        (Constant, "with zeros for weights is not the shortcut alone"),
        (WritesItsInput, "with zeros for weights is not the shortcut alone"),
        (Joined, "no residual branch holds all of its layers"),
        (OnlyTrains, "runs other code in training than in evaluation in 'block'"),
        (ByValue, "cannot be recorded"),
        (Idle, "weights that its code does not use"),
    ],
)
def test_every_group_has_a_branch_or_a_reason(block, reason):
    model, x = Wrapped(block).eval(), torch.randn(2, 3, 5, 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = with_branches(model, trace(model, x), x)
    inner = [index for index, group in enumerate(graph.groups) if group.name == "block.first"]
    assert len(inner) == 1
    if reason:
        assert reason in graph.keep_one[inner[0]]
        assert inner[0] not in graph.in_branches
    else:
        assert inner[0] in graph.in_branches
    assert set(graph.keep_one) | graph.in_branches == set(range(len(graph.groups)))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert type(model.block) is block


def test_weights_that_are_used_elsewhere_stay():
    model, x = Wrapped(Plain).eval(), torch.randn(2, 3, 5, 5)
    model.second_block = Plain()
    model.second_block.second.weight = model.block.second.weight
    model.forward = lambda x: model.head(model.second_block(model.block(model.stem(x))).mean((2, 3)))
    graph = with_branches(model, trace(model, x), x)
    assert not graph.branches
    assert any("are one weight" in reason for reason in graph.keep_one.values())


def test_a_name_belongs_to_a_branch_as_a_whole():
    branch = Branch("layer1.1", ("conv1", "gamma"))
    assert branch.owns("layer1.1.conv1.weight")
    assert branch.owns("layer1.1.gamma")
    assert not branch.owns("layer1.1.conv10.weight")
    assert not branch.owns("layer1.10.conv1.weight")
