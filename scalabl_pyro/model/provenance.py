"""Runs an LLM under Pyro's provenance tensors, by which ``pyro.render_model`` finds what depends on what.

A provenance tensor is a subclass of Tensor whose shapes are plain tuples. The code of a model does not expect that. So
the pass gets plain tensors, and its outputs get the origins of all its inputs.
"""

from collections.abc import Callable
from typing import Any, cast

from pyro.ops.provenance import ProvenanceTensor, extract_provenance

from ..lora.outputs import map_tensors


def run_with_provenance(
    function: Callable[..., Any], *args: Any, origins: frozenset[str] = frozenset(), **kwargs: Any
) -> Any:
    """Call a function with plain tensors; its outputs depend on all its inputs.

    Args:
        function: Function of tensors, such as an LLM.
        args: Positional arguments.
        origins: Names of further sites that the outputs depend on.
        kwargs: Keyword arguments.

    Returns:
        What the function returns, with provenance tensors if an argument was one or ``origins`` is not empty.
    """
    plain, of_inputs = extract_provenance([args, kwargs])
    args, kwargs = cast(Any, plain)
    output = function(*args, **kwargs)
    origins = origins | of_inputs
    return map_tensors(output, lambda t: ProvenanceTensor(t, origins)) if origins else output
