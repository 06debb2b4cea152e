"""Runs without pictures: tests/report and tests/test_cli.py look at these, and drawing takes longer than training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nncf_compactprune.run import compare


@pytest.fixture(scope="module", autouse=True)
def _no_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "_pictures", lambda *given: [])
        yield
