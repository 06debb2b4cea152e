"""A model that is cut several times while it trains: what is left of the dense one, and how the two are told apart.

Decisions are made in the dense model's channels, as if everything that went were masked. So the widths that are
allowed, budgets, plans and states mean the same at every moment, and a run that shrinks decides as one that masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nncf_compactprune.channels import ChannelGraph
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.plan import PruningPlan, graph_after, kept_channels, make_plan

Scores = list[npt.NDArray[np.float64]]
Kept = list[npt.NDArray[np.bool_]]


class Shrunk:
    """What is left of a dense model.

    :param dense: its channels.
    """

    def __init__(self, dense: ChannelGraph) -> None:
        self.dense = dense
        #: the channels of the model as it is
        self.graph = dense
        #: in the dense model's channels; None while nothing was cut
        self.plan: PruningPlan | None = None
        self._left: Kept = [np.ones(group.size, bool) for group in dense.groups]
        self._scores: Scores = [np.zeros(group.size) for group in dense.groups]

    @property
    def widths(self) -> npt.NDArray[np.int64] | None:
        """The width of every group now, ``[groups]``; None while nothing was cut."""
        return None if self.plan is None else self.graph.sizes

    def scores(self, present: Scores) -> Scores:
        """Scores for all channels of the dense model. One that went keeps its last score, but ranks behind all that are
        left.

        :param present: one score a channel that is left, for every group.
        """
        result = []
        for known, left, now in zip(self._scores, self._left, present, strict=True):
            known[left] = now
            behind = np.nextafter(now.min(), -np.inf)
            result.append(np.where(left, known, np.minimum(known, behind)))
        return result

    def curves(self, present: Scores) -> Scores:
        """Losses by the number of channels removed from the dense model; those that went already cost nothing.

        :param present: for every group the losses by the number removed from what is left, from 0 on.
        """
        return [np.pad(loss, (int((~left).sum()), 0)) for left, loss in zip(self._left, present, strict=True)]

    def in_dense(self, present: Sequence[npt.NDArray[np.bool_]]) -> Kept:
        """Channels that stay, counted in the dense model.

        :param present: which channels of the model as it is stay, for every group.
        """
        result = []
        for left, now in zip(self._left, present, strict=True):
            keep = left.copy()
            keep[left] = now
            result.append(keep)
        return result

    def from_here(self, plan: PruningPlan) -> PruningPlan:
        """What a plan for the dense model still takes from the model as it is.

        :param plan: keeps nothing that went already.
        :raises CompactPruneError: it does.
        """
        if self.plan is None:
            return plan
        keep = kept_channels(self.dense, plan)
        back = [
            group.name
            for group, wanted, left in zip(self.dense.groups, keep, self._left, strict=True)
            if (wanted & ~left).any()
        ]
        if back:
            msg = (
                f"'{back[0]}': the plan keeps channels that were cut already. A model that has shrunk cannot go back: "
                "build it anew from the dense one, or leave out shrink_every."
            )
            raise CompactPruneError(msg)
        now = [wanted[left] for wanted, left in zip(keep, self._left, strict=True)]
        return make_plan(self.graph, now, algorithm=plan.algorithm)

    def with_branches(self, plan: PruningPlan) -> PruningPlan:
        """The same plan, but for the branches that it removes: they keep what they have.

        :param plan: in the dense model's channels.
        """
        if not plan.removed:
            return plan
        keep = kept_channels(self.dense, plan)
        wide = [wanted if wanted.any() else left for wanted, left in zip(keep, self._left, strict=True)]
        return make_plan(self.dense, wide, algorithm=plan.algorithm)

    def cut(self, plan: PruningPlan) -> None:
        """The model was cut.

        :param plan: in the dense model's channels.
        """
        self.graph = graph_after(self.dense, plan)
        self.plan = plan
        self._left = kept_channels(self.dense, plan)

    def get_state(self) -> dict[str, Any] | None:
        """JSON-able; None while nothing was cut."""
        if self.plan is None:
            return None
        gone = [known[~left].tolist() for known, left in zip(self._scores, self._left, strict=True)]
        return {"plan": self.plan.to_json(), "scores": gone}

    def load_scores(self, state: Mapping[str, Any]) -> None:
        """Takes the last scores of what went from a state.

        :param state: what :meth:`get_state` gave, for the same cut.
        """
        for known, left, gone in zip(self._scores, self._left, state["scores"], strict=True):
            known[~left] = gone
