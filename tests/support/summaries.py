"""A summary of a run with something in every field."""

from __future__ import annotations

from typing import Any


def summary_document() -> dict[str, Any]:
    """Fields of a summary; everything but the version."""
    labels = ("ONNX FP32", "OpenVINO FP32")
    names = [f"stages.{stage}.blocks.{block}.conv{n}" for stage in range(3) for block in range(2) for n in (1, 2)]
    widths = [{"name": name, "before": 64, "after": 63 if at == 0 else 64 - 4 * at} for at, name in enumerate(names)]
    served = {
        "runtime": "OpenVINO 2026.4.1",
        "samples": 200,
        "batch_sizes": [1, 32],
        "agreement": 0.995,
        "accuracy": 0.755,
        "torch_accuracy": 0.755,
    }
    return {
        "version": "0.1.0",
        "torch": "2.13.0",
        "created": "2026-01-01T00:00:00+00:00",
        "command": ["nncf-compactprune", "run", "config.json", "--set", "epochs=3"],
        "environment": {"Processor": "a processor, 2 cores", "openvino": "2026.4.1"},
        "config": {"model": "timm:resnet50", "compression": {"algorithm": "fbnet_pruning", "budget": {"macs": 0.25}}},
        "model": "timm:resnet50",
        "dataset": "imagefolder:pictures",
        "algorithm": "fbnet_pruning",
        "classes": None,
        "dense": _figures(0.76, 4_000_000_000, 25_000_000, dict.fromkeys(labels, 2**21), dict.fromkeys(labels, 40.0)),
        "pruned": _figures(0.755, 1_000_000_000, 9_000_000, dict.fromkeys(labels, 2**20), dict.fromkeys(labels, 12.5)),
        "ratio": {
            "macs": 0.25,
            "params": 0.36,
            "file_bytes": dict.fromkeys(labels, 0.5),
            "latency_ms": dict.fromkeys(labels, 0.3125),
        },
        "widths": widths,
        "pinned": [{"name": "head", "channels": 1000, "reason": "model output"}],
        "verification": {
            "pruned/model.onnx": {
                "runtime": "ONNX Runtime",
                "max_rel_error": 1e-7,
                "tolerance": 1e-4,
                "batch_sizes": [1, 3],
            }
        },
        "served": [
            {
                **served,
                "file": "pruned/model.xml",
                "arithmetic": "bf16",
                "error": 5e-3,
                "tolerance": 5e-2,
                "problems": [],
            },
            {
                **served,
                "file": "pruned/model_int8.xml",
                "arithmetic": "int8 + f32",
                "error": 0.2,
                "tolerance": None,
                "problems": ["differs from torch by 2.0e-01."],
            },
        ],
        "self_check": {
            "fbnet_pruning": {"proof": True, "error": 1e-7, "inside": 2e-7, "compared": names, "unseen": []}
        },
        "epochs": [
            *({"phase": "dense", "epoch": n, "loss": 2 / n, "accuracy": 0.1 * n, "lr": 0.1} for n in range(1, 5)),
            *(
                {"phase": "pruned", "epoch": n, "loss": 1 / n, "accuracy": 0.5 + 0.05 * n, "compression_rate": 0.2 * n}
                for n in range(1, 4)
            ),
        ],
        "layers": [
            {
                "name": name,
                "macs_dense": 10**7,
                "macs_pruned": 10**6 * (10 - at // 2),
                "us_dense": 500.0,
                "us_pruned": 480.0 - 20 * at,
                "precision": "bf16",
                "note": ""
                if at
                else "60% of the MACs saved, 2% of the time; memory-bound: 4.0 MACs for each number moved",
            }
            for at, name in enumerate(names)
        ],
    }


def _figures(
    accuracy: float, macs: int, params: int, sizes: dict[str, int], latency: dict[str, float]
) -> dict[str, Any]:
    return {"accuracy": accuracy, "macs": macs, "params": params, "file_bytes": sizes, "latency_ms": latency}
