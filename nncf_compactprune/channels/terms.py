"""What a trace notes beside labels: terms of the cost, and integers that modules keep about their channels."""

from __future__ import annotations

from dataclasses import dataclass

from nncf_compactprune.channels.labels import LabelArray

HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_heads", "n_head", "heads")
HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size", "dim_head", "d_head", "key_dim")
HEAD_PRODUCTS = ("attn_dim", "all_head_size", "inner_dim", "nh_kd")
COUNTING_ATTRIBUTES = frozenset((*HEAD_COUNTS, *HEAD_PRODUCTS))


@dataclass(frozen=True)
class AttributeTerm:
    """An integer that a module keeps about its channels and that parameters do not show.

    :param module: name of the module; :param attribute: its attribute.
    :param unit: what one kept channel counts.
    :param labels: the channels.
    """

    module: str
    attribute: str
    unit: int
    labels: LabelArray


@dataclass(frozen=True)
class MacTerm:
    """Multiply-accumulates of one operation: ``constant`` times the kept counts of its channel dimensions.

    :param constant: MACs for one kept channel in each of ``dims`` (whole example batch).
    :param dims: label arrays; an unlabelled dimension is already in the constant.
    :param module: name of the module that ran the operation.
    """

    constant: int
    dims: tuple[LabelArray, ...]
    module: str
