"""Report files appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from nncf_compactprune.errors import ExportError


def write_whole(path: Path, content: bytes) -> Path:
    """Writes a file beside its place and moves it there; an existing file is intact until then.

    :raises ExportError: when the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=path.parent) as stage:
            staged = Path(stage, path.name)
            staged.write_bytes(content)
            os.replace(staged, path)
    except OSError as error:
        msg = f"{path}: cannot be written ({error.strerror or error}). Choose a directory that you may write to."
        raise ExportError(msg) from error
    return path
