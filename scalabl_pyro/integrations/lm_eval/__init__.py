"""Bridge to lm-evaluation-harness: the model ``scalabl``, and calibration from logged samples.

lm-evaluation-harness 0.4 looks for models among its own files only. So its command runs through this package, which
registers the model first::

    python -m scalabl_pyro.integrations.lm_eval run --model scalabl \
        --model_args pretrained=MODEL,posterior=PATH,num_draws=10 --tasks arc_easy

All arguments are those of ``lm_eval``. In Python, call :func:`register`, or pass the model itself.

Example:
    >>> from scalabl_pyro.integrations.lm_eval import ScalaBLLM
    >>> lm = ScalaBLLM(pretrained="HuggingFaceTB/SmolLM2-135M", posterior="my-posterior", num_draws=10)
    >>> lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])
"""

from typing import TYPE_CHECKING, Any

from .registration import MODEL_NAME, register
from .sample_scores import calibration, read_samples

if TYPE_CHECKING:
    from .model import ScalaBLLM as ScalaBLLM

__all__ = ["MODEL_NAME", "ScalaBLLM", "calibration", "read_samples", "register"]


def __getattr__(name: str) -> Any:
    """Import the model when it is asked for: it needs lm-evaluation-harness."""
    if name != "ScalaBLLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    from .model import ScalaBLLM

    return ScalaBLLM


def __dir__() -> list[str]:
    """Public names."""
    return sorted(__all__)
