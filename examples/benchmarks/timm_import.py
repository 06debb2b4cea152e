"""Makes timm importable beside a CPU build of torch.

timm imports torchvision, whose CUDA build registers fake kernels for two operators of its compiled extension; that
extension does not load beside a CPU torch. The models need neither operator, so their schemas are enough.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

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


def let_detectors_run() -> None:
    """torchvision's detectors suppress boxes by a compiled operator; where that is not there, this one does."""
    import torchvision
    from torchvision.ops import boxes as of_boxes

    if torchvision.extension._has_ops():
        return

    def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        overlap = of_boxes.box_iou(boxes, boxes) > threshold
        gone, kept = torch.zeros(len(boxes), dtype=torch.bool), []
        for best in scores.sort(descending=True, stable=True).indices.tolist():
            if not gone[best]:
                kept.append(best)
                gone |= overlap[best]
        return torch.tensor(kept, dtype=torch.long)

    _libraries.append(torch.library.Library("torchvision", "IMPL"))
    _libraries[-1].impl("nms", nms, "CPU")
    of_boxes._assert_has_ops = lambda: None
