"""The top level of a configuration: what older versions of NNCF called its keys, and keys that are nearly right.

The top level is open, as keys such as ``epochs`` belong to the training script. So only a key that is very near one of
ours counts as a mistake.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from nncf_compactprune.config.nncf2 import GONE_SECTIONS
from nncf_compactprune.config.reading import Finding, show

KEYS = (
    "input_info",
    "target_device",
    "compression",
    "compression_lr_multiplier",
    "accuracy_aware_training",
    "ignored_scopes",
    "target_scopes",
)
_NEAR = 0.85
_DEVICES = {"VPU": "NPU", "CPU_SPR": "CPU", "NONE": "ANY", "TRIAL": "ANY"}
#: of an entry, in NNCF 1.x, to today's at the top level
_ACCURACY_KEYS = {"maximal_accuracy_degradation": "maximal_relative_accuracy_degradation"}
_OLD_INPUTS = ("input_infos", "input_sample_size", "input_sample_sizes")
#: keys of entries that some files have at the top level, where NNCF passed over them
_MISPLACED = ("pruning_init", "sparsity_init")
_WITHOUT_LEVEL = ("quantization", "binarization")


def _meant(key: str) -> str | None:
    """What a misspelt key was to be."""
    close = difflib.get_close_matches(key, KEYS, n=1, cutoff=_NEAR)
    return close[0] if close and key not in KEYS else None


def modern_top_level(data: Mapping[str, Any], warnings: list[Finding], findings: list[Finding]) -> dict[str, Any]:
    """Brings the top level into today's spelling.

    :param data: the document.
    :param warnings: is added to, one for each key of an older version.
    :param findings: is added to: misspelt keys.
    """
    result = dict(data)
    _inputs(result, warnings)
    _device(result, warnings)
    _accuracy(result, warnings)
    _from_entries(result, warnings)
    for key in result:
        meant = _meant(key)
        if meant is not None and meant not in (*result, "compression"):  # that this one is missing is told elsewhere
            findings.append(((key,), f"unknown key. Did you mean {show(meant)}?"))
    findings += [((key,), f"not supported: {GONE_SECTIONS[key]}") for key in result if key in GONE_SECTIONS]
    for key in _MISPLACED:
        if key in result:
            warnings.append(((key,), "nothing reads it here. It belongs into the entry of its algorithm."))
    return result


def _inputs(result: dict[str, Any], warnings: list[Finding]) -> None:
    """``input_sample_size(s)`` of NNCF's first versions, and ``input_infos``, as some of its documents wrote it."""
    for old in _OLD_INPUTS:
        if old not in result or "input_info" in result:
            continue
        value = result.pop(old)
        if old != "input_infos":
            many = isinstance(value, list) and value and all(isinstance(item, list) for item in value)
            value = [{"sample_size": size} for size in value] if many else {"sample_size": value}
        result["input_info"] = value
        warnings.append(((old,), 'an older spelling. Write "input_info" today, with "sample_size" inside.'))


def _device(result: dict[str, Any], warnings: list[Finding]) -> None:
    """Devices that have other names today, and the key's own older name."""
    if "hw_config_type" in result and "target_device" not in result:
        value = result.pop("hw_config_type")
        result["target_device"] = value.upper() if isinstance(value, str) else value
        warnings.append((("hw_config_type",), 'an older spelling. Write "target_device" today.'))
    device = result.get("target_device")
    if isinstance(device, str) and device in _DEVICES:
        result["target_device"] = _DEVICES[device]
        said = (
            '"TRIAL" had the limits of no device, and NNCF 3 knows no such one. "ANY" is taken.'
            if device == "TRIAL"
            else f"{show(device)} is {show(_DEVICES[device])} today. That is taken."
        )
        warnings.append((("target_device",), said))


def _accuracy(result: dict[str, Any], warnings: list[Finding]) -> None:
    """Older names inside ``accuracy_aware_training``."""
    section = result.get("accuracy_aware_training")
    params = section.get("params") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(params, dict):
        return
    for old, today in _ACCURACY_KEYS.items():
        if old in params and today not in params:
            params = {today if key == old else key: value for key, value in params.items()}
            warning = f"an older spelling. Write {show(today)} today."
            warnings.append((("accuracy_aware_training", "params", old), warning))
    result["accuracy_aware_training"] = {**section, "params": params}


def _from_entries(result: dict[str, Any], warnings: list[Finding]) -> None:
    """``accuracy_aware_training`` stood inside an entry in NNCF 1.x, without a mode."""
    section = result.get("compression")
    entries = section if isinstance(section, list) else [section]
    moved = []
    for index, entry in enumerate(entries):
        inner = entry.get("accuracy_aware_training") if isinstance(entry, dict) else None
        if not isinstance(inner, dict) or "accuracy_aware_training" in result:
            moved.append(entry)
            continue
        level = entry.get("algorithm") not in _WITHOUT_LEVEL
        mode = "adaptive_compression_level" if level else "early_exit"
        params = {_ACCURACY_KEYS.get(key, key): value for key, value in inner.items()}
        result["accuracy_aware_training"] = inner if "mode" in inner else {"mode": mode, "params": params}
        moved.append({key: value for key, value in entry.items() if key != "accuracy_aware_training"})
        path = ("compression", index) if isinstance(section, list) else ("compression",)
        warning = f'its place in NNCF 1.x. Write it at the top level today, with "mode": {show(mode)} and "params".'
        warnings.append(((*path, "accuracy_aware_training"), warning))
    if "compression" in result:
        result["compression"] = moved if isinstance(section, list) else moved[0]
