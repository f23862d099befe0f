"""Pyro's no-U-turn sampler with a record of each kept transition, as ArviZ reads it from other samplers."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer import NUTS
from torch import Tensor


class RecordingNUTS(NUTS):
    """NUTS that records statistics of each transition after the warm-up.

    Pyro keeps neither the energy nor the depth of a transition. Both are read where it makes the leaves of its trees.
    The random numbers and the draws are those of ``NUTS``. All arguments are those of ``NUTS``.

    Attributes:
        records: One number per transition, by the names of ArviZ: ``lp`` (log density of the draw on the unconstrained
            space, nats), ``energy`` (of the draw with its momentum, nats), ``acceptance_rate`` (average over the
            trajectory), ``step_size``, ``tree_depth`` (number of doublings), ``n_steps`` (number of gradients) and
            ``diverging`` (0 or 1).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        names = ("lp", "energy", "acceptance_rate", "step_size", "tree_depth", "n_steps", "diverging")
        self.records: dict[str, list[float]] = {name: [] for name in names}
        self._leaves: dict[int, tuple[Any, Tensor]] = {}
        self._accepted: list[Tensor] = []
        self._start = torch.zeros(())
        self._depth = 0

    def sample(self, params: Mapping[str, Tensor]) -> Any:
        """Take one transition and record it."""
        self._leaves, self._accepted, self._depth = {}, [], 0
        is_kept, divergences, step_size = self._t >= (self._warmup_steps or 0), len(self._divergences), self.step_size
        draw = super().sample(params)
        if is_kept:
            position, potential, _ = self._fetch_from_cache()
            _, energy = self._leaves.get(id(position), (None, self._start))  # a rejected proposal leaves the start
            self._record(
                lp=-float(potential),
                energy=float(energy),
                acceptance_rate=float(torch.stack(self._accepted).mean()) if self._accepted else 1.0,
                step_size=float(step_size),
                tree_depth=self._depth,
                n_steps=len(self._accepted),
                diverging=len(self._divergences) - divergences,
            )
        self._leaves = {}
        return draw

    def statistics(self) -> dict[str, Tensor]:
        """Return the records as tensors (draws,), float64."""
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in self.records.items()}

    def _record(self, **values: float) -> None:
        for name, value in values.items():
            self.records[name].append(value)

    def _build_tree(self, *args: Any) -> Any:
        *_, tree_depth, _ = args
        self._depth = max(self._depth, tree_depth + 1)
        return super()._build_tree(*args)

    def _build_basetree(self, *args: Any) -> Any:
        leaf = super()._build_basetree(*args)
        self._start = args[-1]
        kinetic = self._kinetic_energy(leaf.r_left_unscaled)
        self._leaves[id(leaf.z_proposal)] = (leaf.z_proposal, leaf.z_proposal_pe + kinetic)
        self._accepted.append(torch.as_tensor(leaf.sum_accept_probs))
        return leaf
