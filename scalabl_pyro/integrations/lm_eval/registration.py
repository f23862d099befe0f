"""Make lm-evaluation-harness know the model ``scalabl``."""

import importlib

#: Name of the model in lm-evaluation-harness.
MODEL_NAME = "scalabl"
#: Where the harness finds the class once it is asked for.
TARGET = "scalabl_pyro.integrations.lm_eval.model:ScalaBLLM"


def register() -> None:
    """Register the model ``scalabl``, so that ``simple_evaluate(model="scalabl", model_args=...)`` finds it.

    The class is imported when it is asked for. A second call changes nothing.

    Raises:
        ImportError: lm-evaluation-harness, or a package that it needs, is not installed.

    Example:
        >>> import lm_eval
        >>> from scalabl_pyro.integrations.lm_eval import register
        >>> register()
        >>> lm_eval.simple_evaluate("scalabl", {"pretrained": "my-model", "posterior": "my-posterior"}, tasks=["piqa"])
    """
    try:
        importlib.import_module("lm_eval.models")  # registers the models of the harness itself
        registry = importlib.import_module("lm_eval.api.registry").model_registry
    except ImportError as error:
        raise ImportError(
            f"The model {MODEL_NAME!r} runs inside lm-evaluation-harness: pip install 'scalabl-pyro[lm-eval]'. Python "
            f"says: {error}"
        ) from error
    if MODEL_NAME not in registry:
        registry.register(MODEL_NAME, target=TARGET)
