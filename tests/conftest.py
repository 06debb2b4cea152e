"""What all tests share."""

from __future__ import annotations

import os
import sys

import pytest
import torch

# On a slow machine NNCF's C++ extension compiles for longer than NNCF waits by default.
os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
# Nothing may be downloaded in a test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _let_torchvision_import() -> None:
    """Makes a CUDA build of torchvision importable beside a CPU build of torch.

    That build registers fake kernels for two operators of its compiled extension, which does not load here. Models
    need neither operator, so their schemas are enough. timm and parts of transformers import torchvision.
    """
    try:
        import torchvision
    except ImportError:
        return
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _let_torchvision_import.library = library  # type: ignore[attr-defined]  # schemas live as long as it does
        import torchvision  # noqa: F401


_let_torchvision_import()
# Tests run side by side (pytest -n 2): with more threads than cores, torch's threads spend their time waiting in turn.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
