"""What hangs together in a network, and what it costs: trace, rules, groups, cost."""

from nncf_compactprune.channels.branches import Branch
from nncf_compactprune.channels.cost import CostModel
from nncf_compactprune.channels.groups import ChannelGraph, ChannelGroup, Member, PinnedGroup
from nncf_compactprune.channels.labels import Pin, ViewByNumber
from nncf_compactprune.channels.tracer import trace

__all__ = [
    "Branch",
    "ChannelGraph",
    "ChannelGroup",
    "CostModel",
    "Member",
    "Pin",
    "PinnedGroup",
    "ViewByNumber",
    "trace",
]
