"""Moments per class, samples per class, labels: against plain formulas on all samples at once."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.networks import images, trained
from torch import Tensor

from nncf_compactprune.algorithms.catro.class_effects import MarginEffects
from nncf_compactprune.algorithms.catro.class_statistics import ClassMoments
from nncf_compactprune.channels import trace
from nncf_compactprune.decide.labelled import FewPerClass, checked_labels
from nncf_compactprune.errors import DataError


def samples(n: int = 60, features: int = 5, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 4, (n,), generator=generator)
    return torch.randn(n, features, generator=generator, dtype=torch.float64) + labels[:, None] + offset, labels


def moments(values: Tensor, labels: Tensor, sizes: list[int], classes: int = 4) -> ClassMoments:
    result = ClassMoments(classes, values.shape[1])
    for x, y in zip(values.split(sizes), labels.split(sizes), strict=True):
        result.update(x, y)
    return result


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_scatter_is_that_of_the_definition(offset: float) -> None:
    """Also far from zero, where Σx² - n·mean² would have lost every digit of float32 and half of float64's."""
    values, labels = samples(offset=offset)
    got = moments(values, labels, [1, 7, 20, 32])
    within = sum((values[labels == c] - values[labels == c].mean(0)).square().sum(0) for c in range(4))
    between = sum(int((labels == c).sum()) * (values[labels == c].mean(0) - values.mean(0)).square() for c in range(4))
    torch.testing.assert_close(got.within, within, rtol=1e-7, atol=0)
    torch.testing.assert_close(got.between, between, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.within + got.between, (values - values.mean(0)).square().sum(0), rtol=1e-6, atol=0)


def test_order_and_split_do_not_matter_and_relabelling_permutes() -> None:
    values, labels = samples()
    base = moments(values, labels, [60])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    other = moments(values[order], labels[order], [13, 1, 46])
    rename = torch.tensor([2, 0, 3, 1])
    renamed = moments(values, rename[labels], [30, 30])
    for got in (other, renamed):
        torch.testing.assert_close(got.within, base.within)
        torch.testing.assert_close(got.between, base.between)
    torch.testing.assert_close(renamed.mean[rename], base.mean)


def test_classes_without_samples_and_constant_features_are_no_trouble() -> None:
    got = moments(torch.ones(3, 2), torch.tensor([0, 0, 2]), [2, 1], classes=5)
    assert got.within.tolist() == got.between.tolist() == [0, 0]
    assert got.count.tolist() == [2, 0, 1, 0, 0]


# -- labels and samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "hold no labels"),
        (torch.tensor([0.0, 1.0]), r"integer class indices as labels, got torch.float32.*argmax"),
        (torch.tensor([[0, 1], [1, 0]]), r"shape \[n\], got \[2, 2\]"),
        (torch.tensor([True, False]), "torch.bool"),
        (torch.tensor([0, 7]), "label 7 is out of range: the model has 5 classes"),
        (torch.tensor([-1, 0]), "label -1 is out of range"),
        (["cat", "dog"], "integer class indices, got list"),
    ],
)
def test_labels_that_are_none_are_refused(labels: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        checked_labels(labels, 5)


def test_labels_of_other_kinds_are_taken() -> None:
    assert checked_labels([0, 3], 5).tolist() == [0, 3]
    assert checked_labels(torch.tensor([[2], [4]], dtype=torch.uint8), 5).tolist() == [2, 4]


def batches(labels: list[int], size: int = 4) -> list[tuple[Tensor, Tensor]]:
    y = torch.tensor(labels)
    x = torch.arange(len(labels), dtype=torch.float32)[:, None]
    return list(zip(x.split(size), y.split(size), strict=True))


def test_the_first_samples_of_every_class_are_taken_and_no_more_batches_than_needed() -> None:
    drawn = 0

    def loader():
        nonlocal drawn
        for batch in batches([0, 0, 0, 1, 1, 0, 2, 2, 0, 1, 2, 0, 1, 1, 1, 1]):
            drawn += 1
            yield batch

    few = FewPerClass(loader(), 3, 2)
    taken = [(x.ravel().tolist(), y.tolist()) for x, y in few]
    assert taken == [([0, 1, 3], [0, 0, 1]), ([4, 6, 7], [1, 2, 2])]
    assert drawn <= 3
    assert few.count.tolist() == [2, 2, 2]


def test_only_the_wanted_classes_are_taken() -> None:
    taken = [y.tolist() for _, y in FewPerClass(batches([0, 1, 2, 3, 3, 2, 1, 0]), 4, 1, wanted=[1, 3])]
    assert taken == [[1, 3]]


def test_dict_batches_keep_what_has_no_rows() -> None:
    inputs = {"pixel_values": torch.zeros(3, 1), "flag": True, "scale": torch.tensor(2.0)}
    ((taken, labels),) = list(FewPerClass([(inputs, torch.tensor([0, 1, 1]))], 2, 1))
    assert taken["pixel_values"].shape == (2, 1)
    assert taken["flag"] is True
    assert taken["scale"].dim() == 0
    assert labels.tolist() == [0, 1]


def test_a_missing_class_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from nncf.common.logging import nncf_logger

    said = []
    monkeypatch.setattr(nncf_logger, "warning", lambda text, *args: said.append(text % args))
    assert len(list(FewPerClass(batches([0, 1, 0, 1]), 3, 2))) == 1
    assert said == ["The training loader holds no sample of class 2: channels are chosen for the others."]
    with pytest.raises(DataError, match="none of class 2"):
        list(FewPerClass(batches([0, 1, 0, 1]), 3, 2, wanted=[1, 2]))
    with pytest.raises(DataError, match="samples of 1 classes, none of classes 0, 2"):
        list(FewPerClass(batches([1, 1]), 3, 2))
    with pytest.raises(DataError, match="samples of 0 classes"):
        list(FewPerClass([], 3, 2))


def test_inputs_and_labels_of_different_number_are_refused() -> None:
    with pytest.raises(DataError, match=r"3 labels for inputs of shapes \[\[2, 1\]\]"):
        list(FewPerClass([(torch.zeros(2, 1), torch.tensor([0, 1, 0]))], 2, 5))


# -- several processes -------------------------------------------------------------------------------------------------


def collected(part: slice) -> MarginEffects:
    model = trained("residual")
    graph = trace(model, images())
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(12, 3, 12, 12, generator=generator, dtype=torch.float64)[part]
    y = (torch.arange(12) % 5)[part]
    effects = MarginEffects(graph, range(len(graph.groups)))
    effects.collect(model, [(x, y)])
    return effects


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    part = slice(0, 5) if rank == 0 else slice(5, 12)
    effects = collected(part)
    values, labels = samples()
    own = moments(values[rank::2], labels[rank::2], [30])
    own.all_reduce()
    grams = [effects.gram(g, 3.0) for g in range(len(effects.graph.groups))]
    torch.save((grams, own.within, own.between), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(worker, (port, str(tmp_path)), nprocs=2, start_method="fork")  # spawned ones import for long
    whole = collected(slice(None))
    values, labels = samples()
    expected = moments(values, labels, [60])
    for rank in range(2):
        grams, within, between = torch.load(tmp_path / f"{rank}.pt")
        for group, gram in enumerate(grams):
            torch.testing.assert_close(gram, whole.gram(group, 3.0))
        torch.testing.assert_close(within, expected.within)
        torch.testing.assert_close(between, expected.between)
