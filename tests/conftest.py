"""What all tests share."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# On a slow machine NNCF's C++ extension compiles for longer than NNCF waits by default.
os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
# Nothing may be downloaded in a test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


sys.path.append(str(Path(__file__).parent.parent / "examples" / "benchmarks"))
from timm_import import let_torchvision_import

let_torchvision_import()
# Tests run side by side (pytest -n 2): with more threads than cores, torch's threads spend their time waiting in turn.
torch.set_num_threads(1)
# No test asserts on time, hypothesis' own ones included.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nncf_warnings_are_seen(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """NNCF 3.3 passes nothing on to the root logger, where caplog listens."""
    logger = logging.getLogger("nncf")
    if not logger.propagate:
        logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
