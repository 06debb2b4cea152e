"""Files appear whole or not at all: single ones, and sets that belong together.

They are written into a hidden directory beside their place, brought to the disk, and then renamed. A process that is
killed on the way leaves the old files and that directory (``.model.onnx.x7f2.tmp``), which nothing reads.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from nncf_compactprune.errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_whole(path: Path, content: bytes) -> Path:
    """Writes one file; an earlier one is intact until the new one is complete.

    :param path: its directory is created if it does not exist.
    :param content: all of it.
    :return: the path.
    :raises StorageError: when it cannot be written; an earlier file is as it was.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields where to write one file, which then takes the place of an earlier one.

    :param path: its directory is created if it does not exist.
    :raises StorageError: when it cannot be written; an earlier file is as it was.
    """
    with whole_files(path.parent, [path.name]) as stage:
        yield stage / path.name


@contextmanager
def whole_files(directory: Path, names: Sequence[str], *, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Yields an empty directory; what is written there is put into another one, all files of it or none.

    Entering proves that the directory can be written, so that an unwritable place is reported before any long work.
    If the body raises, or one of the files cannot be put in place, every earlier file is as it was.

    :param directory: is created if it does not exist.
    :param names: files in the order in which they are put in place. Those not written are passed over; others that
        were written follow.
    :param stale: patterns (``model-*.safetensors``); earlier files that match one and have no successor are removed.
    :raises StorageError: when a file cannot be written, or a directory has its name.
    """
    meant = directory / names[0] if len(names) == 1 else directory
    existed = directory.is_dir()
    for path in (directory / name for name in names):
        if path.is_dir():
            raise _refused(path, IsADirectoryError(errno.EISDIR, "", str(path)))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Beside the files: a rename within one file system is atomic.
        holder = Path(tempfile.mkdtemp(prefix=f".{meant.name}.", suffix=".tmp", dir=directory))
    except OSError as error:
        raise _refused(meant, error) from error
    try:
        new, old = holder / "new", holder / "old"
        try:
            new.mkdir()
            old.mkdir()
            yield new
            _bring_to_disk(new)
            _put_in_place(_Move(new, old, directory), names, stale)
        except (OSError, SafetensorError) as error:
            raise _refused(_told(error, new, directory) or meant, error) from error
        finally:
            shutil.rmtree(holder, ignore_errors=True)
    except BaseException:
        if not existed:
            with suppress(OSError):  # other files may have come
                directory.rmdir()
        raise


def remove_leftovers(directory: Path) -> None:
    """Removes what killed writers left in a directory that no other process writes to."""
    for path in directory.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


class _Move:
    """Puts files in place one by one, and knows how to take it back.

    :param new: where the new files wait.
    :param old: where earlier ones are kept meanwhile.
    :param directory: their place.
    """

    def __init__(self, new: Path, old: Path, directory: Path) -> None:
        self._new, self._old, self._directory = new, old, directory
        self._begun: list[str] = []

    def files(self) -> list[str]:
        """Names of the new files."""
        return sorted(path.name for path in self._new.iterdir())

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """Names of earlier files."""
        return sorted({path.name for pattern in patterns for path in self._directory.glob(pattern)})

    def place(self, name: str) -> None:
        """Puts a new file over the earlier one."""
        self._keep(name)
        os.replace(self._new / name, self._directory / name)

    def remove(self, name: str) -> None:
        """Takes an earlier file away."""
        self._keep(name)
        os.unlink(self._directory / name)

    def undo(self) -> None:
        """Puts every earlier file back; one that cannot be put back does not stop the others."""
        for name in reversed(self._begun):
            with suppress(OSError):
                if (self._old / name).exists():
                    os.replace(self._old / name, self._directory / name)
                else:
                    (self._directory / name).unlink(missing_ok=True)

    def _keep(self, name: str) -> None:
        earlier = self._directory / name
        if earlier.exists():
            try:
                os.link(earlier, self._old / name)
            except OSError:  # a file system without hard links
                shutil.copy2(earlier, self._old / name)
        self._begun.append(name)


def _put_in_place(move: _Move, names: Sequence[str], stale: Sequence[str]) -> None:
    written = move.files()
    ordered = [name for name in names if name in written]
    try:
        for name in [*ordered, *(name for name in written if name not in ordered)]:
            move.place(name)
        for name in move.matching(stale):
            if name not in written:
                move.remove(name)
    except BaseException:
        move.undo()
        raise


def _bring_to_disk(new: Path) -> None:
    probe = new.parent / "mode"
    probe.touch()
    mode = probe.stat().st_mode
    for path in new.iterdir():
        path.chmod(mode)  # safetensors makes files that only their owner may read
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def _told(error: Exception, new: Path, directory: Path) -> Path | None:
    """The file that an error is about, by its name in its place."""
    for name in (getattr(error, "filename2", None), getattr(error, "filename", None)):
        if isinstance(name, (str, os.PathLike)):
            path = Path(name)
            return directory / path.name if path.parent == new else path
    return None


def _refused(path: Path, error: Exception) -> StorageError:
    """One clear sentence, whoever wrote."""
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"os error (\d+)", str(error))):  # safetensors' words
        number = int(found[1])
    if number == errno.EEXIST:  # where a directory should be
        number = errno.ENOTDIR
    reason = os.strerror(number) if number is not None else str(error)
    place = "Make room on the disk" if number in _FULL else "Choose a directory that you may write to"
    if number == errno.EISDIR:
        place = "Choose another name"
    return StorageError(path, reason, f"{place}. Earlier files are as they were.")
