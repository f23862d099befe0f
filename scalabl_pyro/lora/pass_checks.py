"""Checks of the first passes: each adapted layer has an effect, and rows do not mix.

A model may read the weight of a layer without calling the layer, as Mamba does with ``dt_proj.weight``. The latents of
such a layer would have no effect. Other models compare all rows with each other, as CLIP does. Rows with different
draws would then mix.
"""

import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._errors import ScalaBLWarning, stacklevel_outside
from .._process.cuda_capture import is_capturing
from .adapter import Adapter
from .outputs import tensors_in
from .sharding import is_sharded
from .train_mode import apart

logger = logging.getLogger(__name__)

Run = Callable[[], Any]
"""Function that repeats the present pass."""


class EffectCheck:
    """Check once that the model calls every adapted layer.

    The first pass records which layers are called, which costs nothing. If it calls all layers, the check is over.
    Otherwise the pass runs once more, and the graph of autograd shows whether the output depends on the weight of a
    layer that was not called. Such a layer is bypassed. If the output does not depend on it, the layer is idle, as an
    expert without rows is.

    Args:
        adapter: Adapter of the model.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._is_over = False

    def begin(self) -> set[int] | None:
        """Return an empty set for the indices of called layers, or None if this pass need not be checked."""
        if self._is_over or is_capturing():
            return None
        return set()

    def finish(self, called: set[int] | None, run: Run) -> None:
        """End the check.

        Args:
            called: Indices of the layers that the pass has called; None if it was not checked.
            run: Function that repeats the pass.

        Raises:
            RuntimeError: Some layers are bypassed. The message names them.
        """
        if called is None:
            return
        uncalled = [i for i in range(len(self.adapter.layers)) if i not in called]
        if uncalled and not is_sharded(self.adapter.module):  # other processes would wait for ever
            names = self.adapter.subspace.names
            read = [names[i] for i in self._read(uncalled, run)]
            if read:
                raise RuntimeError(
                    f"The model reads the weights of {_some(read)} without calling these layers, so their latents "
                    "would have no effect. Leave them out of target_modules, or add "
                    f"exclude_modules={sorted({n.rsplit('.', 1)[-1] for n in read})}."
                )
            idle = [names[i] for i in uncalled if "expert" not in names[i]]
            if idle:
                warnings.warn(
                    f"The first pass did not use {_some(idle)}. Their latents learn from other inputs only. If no "
                    "input uses these layers, leave them out with exclude_modules.",
                    ScalaBLWarning,
                    stacklevel=stacklevel_outside(),
                )
        self._is_over = True

    def _read(self, uncalled: list[int], run: Run) -> list[int]:
        """Return which layers have an effect on the output although the model does not call them."""
        weights: dict[int, Tensor] = {}
        for index in uncalled:
            weight = getattr(self.adapter.layers[index].get_base_layer(), "weight", None)
            if torch.is_tensor(weight) and weight.is_floating_point() and weight.is_leaf:
                weights[index] = weight
        flags = [(weight, weight.requires_grad) for weight in weights.values()]
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            with (
                apart(self.adapter.module),
                torch.enable_grad(),
                torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing),
            ):
                leaves = _leaves(tensors_in(run()))
        finally:
            for weight, flag in flags:
                weight.requires_grad_(flag)
        return [index for index, weight in weights.items() if id(weight) in leaves]


class RowCheck:
    """Check that no output compares rows with each other, if rows have different draws.

    An output (rows, n) with n equal to the number of rows is ambiguous: n may be a number of classes. A pass of one row
    decides it, once per n.
    """

    def __init__(self) -> None:
        self._fixed: set[int] = set()
        self._has_rows_first = False

    def check_order(self, module: nn.Module, inputs: Any, rows: Iterable[int], run_one_row: Run) -> None:
        """Check once that layers get rows first, if a batch has as many tokens as rows.

        The layers of XLNet get (tokens, rows, features). Draws for rows would then go to tokens without an error. A
        pass of one row decides it, because its tokens cannot be taken for rows.

        Args:
            module: Adapted module.
            inputs: Inputs of the pass.
            rows: Numbers of rows, before and after they are repeated for each draw.
            run_one_row: Function that runs the model on the first row alone, with latents (1, D).

        Raises:
            ValueError: A layer gets another number of rows than the one of the pass.
        """
        if self._has_rows_first or torch.jit.is_tracing():
            return
        counts = {n for n in rows if n > 1}
        is_ambiguous = any(t.dim() > 1 and t.shape[1] in counts for t in tensors_in(inputs))
        if is_ambiguous and not is_capturing() and not is_sharded(module):
            run_one_row()
            self._has_rows_first = True

    def __call__(self, output: Any, rows: int, run_one_row: Run) -> None:
        """Check an output.

        Args:
            output: Output of a pass.
            rows: Number of rows of the pass, which have several draws.
            run_one_row: Function that runs the model on the first row alone.

        Raises:
            ValueError: An output has one column per row.
        """
        if rows in self._fixed:
            return
        square = [i for i, t in enumerate(tensors_in(output)) if t.shape == (rows, rows)]
        if not square or rows == 1 or is_capturing():
            return
        single = tensors_in(run_one_row())
        if any(i >= len(single) or single[i].shape[-1] != rows for i in square):
            raise ValueError(
                f"An output of the model has shape ({rows}, {rows}), one column per row: the model compares rows with "
                "each other (CLIP), so rows with different draws would mix. Call it once per draw, with s of shape "
                "(D,)."
            )
        self._fixed.add(rows)


def _leaves(outputs: list[Tensor]) -> set[int]:
    """Return the ids of the leaf tensors that outputs depend on."""
    waiting = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen, leaves = set(waiting), set()
    while waiting:
        node = cast(Any, waiting.pop())
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return leaves


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more layers" if len(names) > 5 else "")
