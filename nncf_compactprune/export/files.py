"""Output files appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nncf_compactprune.errors import ExportError


@contextmanager
def staged(targets: Sequence[Path]) -> Iterator[Path]:
    """Yields an empty directory beside the targets; what was written there under their names replaces them on success.

    Entering proves that the directory can be written, so that an unwritable place is reported before any long work.
    If the body raises, or one of the files cannot be put in place, every existing file is as it was.

    :param targets: the files to write, all in one directory, which is created if it does not exist.
    :raises ExportError: when the directory cannot be created or written, or a target is a directory.
    """
    directory = targets[0].parent
    for target in targets:
        if target.is_dir():
            msg = f"{target}: is a directory, expected a file name. Add one, or choose another path."
            raise ExportError(msg)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # In the target's own directory: a rename within one file system is atomic.
        holder = tempfile.TemporaryDirectory(prefix=".export-", dir=directory)
    except OSError as error:
        raise _unwritable(targets[0], error) from error
    with holder as name:
        stage = Path(name)
        yield stage
        _put_in_place(stage, targets)


def _put_in_place(stage: Path, targets: Sequence[Path]) -> None:
    """Moves the staged files over the targets, and undoes it all when one of the moves fails."""
    before = stage / "before"
    before.mkdir()
    undo: list[tuple[Path, Path | None]] = []
    try:
        for target in targets:
            kept = None
            if target.exists():
                kept = before / target.name
                shutil.copy2(target, kept)
            os.replace(stage / target.name, target)
            undo.append((target, kept))
    except OSError as error:
        for target, kept in reversed(undo):
            if kept is None:
                target.unlink(missing_ok=True)
            else:
                os.replace(kept, target)
        raise _unwritable(targets[len(undo)], error) from error


def _unwritable(target: Path, error: OSError) -> ExportError:
    reason = error.strerror or str(error)
    msg = f"{target}: cannot be written ({reason}: {error.filename}). Choose a directory that you may write to."
    return ExportError(msg)
