"""Files appear whole or not at all, whoever writes them, and a disk without room is one clear sentence."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import STRUCTURES, images
from torch import nn

from nncf_compactprune import CompactPruneError, StorageError, export_model, prune, save_pruned
from nncf_compactprune.report import Comparison, NetworkFigures, write_comparison
from nncf_compactprune.run.models import save_weights
from nncf_compactprune.storage.digests import file_digest, tensors_digest
from nncf_compactprune.storage.snapshots import Snapshots
from nncf_compactprune.storage.writing import remove_leftovers, whole_files, write_whole

CALLS = ((tempfile, "mkdtemp"), (os, "fsync"), (os, "replace"), (os, "unlink"))


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return STRUCTURES["residual"]().eval()


def checkpoint(folder: Path, seed: int) -> None:
    save_pruned(net(seed), folder, config={"seed": seed})


def report(folder: Path, seed: int) -> None:
    figures = NetworkFigures(macs=10 + seed, params=5)
    write_comparison(Comparison(figures, figures), folder / "report.json")


def weights(folder: Path, seed: int) -> None:
    save_weights(net(seed), folder / "dense.safetensors")


def exported(folder: Path, seed: int) -> None:
    export_model(net(seed), images(torch.float32), folder, formats=["openvino"], precisions=["fp32"])


def hugging_face(folder: Path, seed: int) -> None:
    from support.hugging_face import resnet

    from nncf_compactprune.integrations.pretrained import save_pruned_hf

    torch.manual_seed(seed)
    model = resnet()
    prune(model, {"pixel_values": torch.randn(2, 1, 16, 16)}, budget={"macs": 0.6}, round_to=1)
    save_pruned_hf(model, folder)


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "checkpoint": checkpoint,
    "report": report,
    "weights": weights,
    "export": exported,
    "hugging_face": hugging_face,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def failing_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ``step``-th call of the system that makes a file appear fails once, as on a full disk."""
    calls = 0

    def once(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            mine, calls = calls, calls + 1
            if mine == step:
                raise OSError(28, os.strerror(28), *[str(a) for a in args[:1] if isinstance(a, (str, Path))])
            return function(*args, **kwargs)

        return called

    with monkeypatch.context() as patch:
        for target, name in CALLS:
            patch.setattr(target, name, once(getattr(target, name)))
        # Cleaning up unlinks too, and never fails for want of room.
        patch.setattr(shutil, "rmtree", _rmtree)
        yield


def _rmtree(path: Path, **_: Any) -> None:
    os.spawnlp(os.P_WAIT, "rm", "rm", "-rf", str(path))


@contextmanager
def files_end_after(size: int) -> Iterator[None]:
    """The system's own limit on the size of files: what C++ and Rust write meets it as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["checkpoint", "report", "weights"])
def test_a_full_disk_at_any_step_leaves_everything_as_it_was(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = WRITERS[name]
    write(tmp_path, 1)
    before = contents(tmp_path)
    failures: list[StorageError] = []
    while not failures or contents(tmp_path) == before:
        with failing_at(len(failures), monkeypatch):
            try:
                write(tmp_path, 2)
            except StorageError as error:
                failures.append(error)
            else:
                break
        assert contents(tmp_path) == before
    # The stage, then a flush and a move of every file; the checkpoint's last unlink does no harm.
    assert len(failures) >= 1 + 2 * len(before)
    assert {error.reason for error in failures} == {"No space left on device"}
    assert all(str(tmp_path) in str(error) and "Make room on the disk" in str(error) for error in failures)
    assert contents(tmp_path) != before
    assert contents(tmp_path).keys() - before.keys() <= {"plan.json.next"}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("room", [0, 1500])
def test_a_file_that_does_not_fit_is_one_clear_sentence(name: str, room: int, tmp_path: Path) -> None:
    if name == "report" and room:
        pytest.skip("a report is shorter than that")
    write = WRITERS[name]
    write(tmp_path / "old", 1)
    before = contents(tmp_path / "old")
    for folder in ("old", "new"):
        with pytest.raises(StorageError) as caught, files_end_after(room):
            write(tmp_path / folder, 2)
        assert "File too large). Make room on the disk" in str(caught.value)
        assert ".tmp" not in str(caught.value)
    assert contents(tmp_path / "old") == before
    assert not (tmp_path / "new").exists()


def test_a_snapshot_that_does_not_fit_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, kept = net(1), Snapshots(tmp_path, "this run")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kept.save(0, 1, model, optimizer, None, [], compression=None)
    before = contents(tmp_path)
    with files_end_after(1500), caplog.at_level("WARNING", logger="nncf"):
        kept.save(0, 2, model, optimizer, None, [], compression=None)
    assert "File too large). Make room on the disk" in caplog.text
    assert contents(tmp_path) == before


def test_a_file_without_hard_links_is_put_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", b"old")

    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    # Calls 1 to 5: the stage, two flushes, the move of a, the move of b.
    with failing_at(4, monkeypatch), pytest.raises(StorageError, match="b: cannot be written"):
        with_b(tmp_path)
    assert contents(tmp_path) == {"a": b"old"}


def with_b(folder: Path) -> None:
    with whole_files(folder, ["a", "b"]) as stage:
        (stage / "a").write_bytes(b"new")
        (stage / "b").write_bytes(b"new")


def test_files_come_in_order_and_stale_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("part-1", "part-2", "other"):
        (tmp_path / name).write_bytes(b"old")
    order, real = [], os.replace

    def noted(source: Path, target: Path) -> None:
        order.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", noted)
    with whole_files(tmp_path, ["index", "plan"], stale=["part-*"]) as stage:
        for name in ("plan", "part-1", "index"):
            (stage / name).write_bytes(b"new")
    assert order == ["index", "plan", "part-1"]
    assert contents(tmp_path) == {"index": b"new", "plan": b"new", "part-1": b"new", "other": b"old"}


def test_what_the_body_raises_is_passed_on_and_nothing_appears(tmp_path: Path) -> None:
    with pytest.raises(KeyError), whole_files(tmp_path / "new", ["a"]) as stage:  # noqa: PT012
        (stage / "a").write_bytes(b"new")
        raise KeyError
    assert not (tmp_path / "new").exists()


def test_files_have_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    save_weights(net(1), tmp_path / "dense.safetensors")
    assert (tmp_path / "dense.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StorageError, match=r"file.a: cannot be written \(Not a directory\). Choose a directory that you may write to"
    ):
        write_whole(tmp_path / "file" / "a", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=r"folder: cannot be written \(Is a directory\). Choose another name"):
        write_whole(tmp_path / "folder", b"")
    assert issubclass(StorageError, CompactPruneError)


def test_leftovers_of_killed_writers_go(tmp_path: Path) -> None:
    (tmp_path / ".a.x.tmp" / "new").mkdir(parents=True)
    (tmp_path / "a").touch()
    remove_leftovers(tmp_path)
    assert contents(tmp_path).keys() == {"a"}


def test_digests_tell_names_dtypes_shapes_and_contents_apart(tmp_path: Path) -> None:
    x = torch.arange(6.0)
    variants = [{"a": x}, {"b": x}, {"a": x.view(2, 3)}, {"a": x.int()}, {"a": x + 1}, {"a": torch.tensor(0.0)}, {}]
    digests = {tensors_digest(variant, text) for variant in variants for text in ("", "more")}
    assert len(digests) == 2 * len(variants)
    assert tensors_digest({"a": x, "b": x}, "") == tensors_digest({"b": x, "a": x.clone()}, "")
    for content in (b"", b"x" * 3_000_000):
        (tmp_path / "file").write_bytes(content)
        import hashlib

        assert file_digest(tmp_path / "file") == hashlib.sha256(content).hexdigest()
