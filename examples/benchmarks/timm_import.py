"""Makes timm importable beside a CPU build of torch.

timm imports torchvision, whose CUDA build registers fake kernels for two operators of its compiled extension; that
extension does not load beside a CPU torch. The models need neither operator, so their schemas are enough.
"""

from __future__ import annotations

import sys

import torch

_libraries: list[torch.library.Library] = []


def let_torchvision_import() -> None:
    """Imports torchvision, defining the two missing schemas where that is what it takes; nothing where it is absent."""
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
        _libraries.append(library)  # schemas live as long as it does
        import torchvision  # noqa: F401
