"""What a network takes and returns may lie in any container: dataclasses, objects, mappings of a tokenizer's kind."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from support.networks import conv_bn
from torch import Tensor, nn

from nncf_compactprune import analyse, create_compressed_model, export_model, prune
from nncf_compactprune.decide.labelled import class_scores
from nncf_compactprune.host.torch_internals import results_of


@dataclass(frozen=True, slots=True)
class Found:
    features: Tensor
    logits: Tensor


Pair = namedtuple("Pair", ["features", "logits"])
CONTAINERS: dict[str, Any] = {
    "dataclass": Found,
    "named tuple": Pair,
    "object": lambda features, logits: SimpleNamespace(features=[features], logits=logits, note="two"),
    "objects in each other": lambda features, logits: {"found": SimpleNamespace(found=Found(features, logits))},
    "mapping": lambda features, logits: UserDict(features=features, logits=logits),
}


class Net(nn.Module):
    """Gives features beside the scores that are computed from them."""

    def __init__(self, container: Any) -> None:
        super().__init__()
        self.container = container
        self.first, self.second, self.head = conv_bn(3, 16), conv_bn(16, 16), nn.Linear(16, 5)

    def forward(self, image: Tensor) -> Any:
        features = self.second(self.first(image))
        return self.container(features, self.head(features.mean((2, 3))))


IMAGE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CONTAINERS)
def test_what_is_returned_keeps_its_width_and_is_compared(name: str) -> None:
    net = Net(CONTAINERS[name])
    graph = analyse(net, IMAGE)
    assert {pin.name: pin.reason for pin in graph.pinned}["second.0"] == "model output"
    assert [group.name for group in graph.groups] == ["first.0"]
    check = prune(net, IMAGE, budget={"macs": 0.6}).self_check
    assert check is not None
    assert not check.silent
    assert [tensor.shape for tensor in results_of(net(IMAGE))] == [(2, 16, 12, 12), (2, 5)]


class FeatureCache:
    """What a network hands to itself, in its next call."""

    def __init__(self, features: Tensor, logits: Tensor) -> None:
        self.features = features


def test_a_cache_is_no_result() -> None:
    net = Net(lambda features, logits: SimpleNamespace(logits=logits, past=FeatureCache(features, logits)))
    assert [group.name for group in analyse(net, IMAGE).groups] == ["first.0", "second.0"]
    assert [tensor.shape for tensor in results_of(net(IMAGE))] == [(2, 5)]


@pytest.mark.parametrize("name", ["dataclass", "named tuple", "object", "mapping"])
def test_scores_are_what_is_called_logits(name: str) -> None:
    output = CONTAINERS[name](torch.zeros(2, 4, 3, 3), torch.ones(2, 5))
    assert class_scores(output).shape == (2, 5)
    batches = [(IMAGE, torch.tensor([at, at + 1])) for at in range(4)]
    assert prune(Net(CONTAINERS[name]), IMAGE, "catro", budget={"macs": 0.6}, train_loader=batches).self_check
    assert class_scores({"boxes": torch.zeros(2, 4), "nothing": None}).shape == (2, 4)


def test_files_name_a_dataclass_by_its_fields(tmp_path: Path) -> None:
    (file,) = export_model(Net(Found), IMAGE, tmp_path / "net.onnx")
    assert [one.name for one in onnx.load(file.path).graph.output] == ["features", "logits"]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.head = nn.Embedding(20, 8), nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.up(self.words(words)).relu() * mask[..., None]).mean(1))


def test_inputs_may_be_a_mapping_of_a_tokenizer() -> None:
    words = torch.arange(60).view(10, 6) % 20
    tokens = UserDict(words=words, mask=(words != 3).float())
    labelled = [UserDict(**tokens, labels=words[:, 0] % 3)] * 2
    assert analyse(Words(), tokens).groups
    for loader in (labelled, [(tokens, words[:, 0] % 3)]):
        assert prune(Words(), tokens, budget={"macs": 0.6}, initializer={"refit": {}}, train_loader=loader).self_check
        document = {"compression": {"algorithm": "quantization"}}
        ctrl, _ = create_compressed_model(Words(), document, loader, example_inputs=tokens)
        assert ctrl.strip()(**tokens).shape == (10, 3)
