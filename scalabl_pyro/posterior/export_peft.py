"""Draws of a posterior as ordinary PEFT adapters, which any tool that reads LoRA can load.

The folder of an export has one folder per draw, ``draw-0``, ``draw-1`` and so on, or ``mean``. Each holds
``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes them. The file ``index.json`` beside them
holds the seed, the guide, the base model and the error of each adapter.
"""

import gc
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from .._arguments import check_path
from .._errors import check_choice, check_count
from .._values import plain
from .._version import __version__
from ..lora.base_module import check_has_values
from ..lora.fingerprint import fingerprint
from ..lora.float8 import original_weights
from ..lora.peft_names import quiet_peft
from ..lora.plain_adapter import as_peft_model, extras_of, put_draw
from ..lora.plain_copy import plain_copy
from ..lora.same_function import probe_output
from ..storage.directories import staged, write_file
from .engines import LIMITS, check_engine, rank_for
from .state import PosteriorState

logger = logging.getLogger(__name__)

INDEX = "index.json"
MEAN = "mean"
FORMAT_VERSION = 1
#: Type of the factors in the files.
Dtype = Literal["float64", "float32", "bfloat16", "float16"]
HALF = ("bfloat16", "float16")
DTYPES = {name: getattr(torch, name) for name in get_args(Dtype)}
#: Largest error of a logit, relative to the largest logit: rounding of bfloat16 and of float32.
HALF_TOLERANCE, TOLERANCE = 0.1, 1e-3

#: Which draws to export.
DrawsToExport = Literal["mean"] | int | Sequence[int]


def export_peft(
    posterior: PosteriorState,
    path: str | Path,
    *,
    draws: DrawsToExport = "mean",
    seed: int = 0,
    for_engine: str | None = None,
    dtype: str | None = None,
) -> list[Path]:
    """Write draws as PEFT adapters; see :meth:`scalabl_pyro.Posterior.export_peft`."""
    check_path("path", path)
    wanted = _wanted(draws)
    if for_engine is not None:
        check_choice("for_engine", for_engine, LIMITS)
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    path = Path(path).resolve()
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty: give the path of a new folder.")
    adapter = posterior.adapter
    adapter.check_attached()
    check_has_values(adapter.module)
    extras = extras_of(adapter, posterior.heads)
    if for_engine is not None:
        check_engine(for_engine, adapter, extras)
        _warn_of_many(for_engine, len(wanted))
    rank = rank_for(for_engine, adapter.subspace.ranks)
    model = as_peft_model(adapter, plain_copy(adapter, share=True), rank=rank, extras=extras)
    latents = draws_of(posterior, wanted, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = []
    names = {number: MEAN if number is None else f"draw-{number}" for number in latents}
    with staged(path) as folder:
        for number, s in latents.items():
            put_draw(model, adapter, posterior.factors, s, dtype=None if dtype is None else DTYPES[dtype])
            with quiet_peft():
                model.save_pretrained(str(folder / names[number]), save_embedding_layers=False)
            error = _error(posterior, s, folder / names[number], rounded=dtype in HALF)
            entries.append({"folder": names[number], "draw": number, **error})
        index = _index(posterior, entries, seed=seed, rank=rank, for_engine=for_engine, dtype=dtype)
        write_file(folder / INDEX, (json.dumps(index, indent=2, allow_nan=False) + "\n").encode())
    return [path / name for name in names.values()]


def draws_of(posterior: PosteriorState, wanted: Sequence[int | None], *, seed: int) -> dict[int | None, Tensor]:
    """Return the chosen draws of s, each (D,), by number; None means the posterior mean."""
    numbers = [number for number in wanted if number is not None]
    s = posterior.sample(max(numbers) + 1, seed=seed).s if numbers else None
    found = {number: posterior.mean() if s is None or number is None else s[number] for number in wanted}
    for number, value in found.items():
        if not torch.isfinite(value).all():
            name = "The posterior mean" if number is None else f"Draw {number}"
            raise ValueError(f"{name} holds NaN or infinity, so it is not exported. Train again with smaller rates.")
    return found


def largest_error(
    posterior: PosteriorState, s: Tensor, module: nn.Module, *, rounded: bool = False
) -> dict[str, float | None]:
    """Compare the outputs of a module with those of the LLM under one draw, for one row of tokens.

    An LLM in 8-bit floats computes in its original precision here, because the module does.

    Args:
        posterior: Posterior that the draw comes from.
        s: The draw, (D,).
        module: Module that should compute the same.
        rounded: Whether its factors were rounded to half precision.

    Returns:
        ``largest_logit_error`` and ``largest_logit``, both None if the LLM takes no tokens alone.

    Raises:
        RuntimeError: The outputs differ by more than rounding.
    """
    adapter = posterior.adapter
    llm = posterior.llm()
    with original_weights(), adapter.bind(s, factors=llm.factors, heads=llm.heads):
        own = probe_output(adapter.module, adapter.module, strict=True)
    other = probe_output(module, adapter.module, strict=True)
    if own is None or other is None:
        return {"largest_logit_error": None, "largest_logit": None}
    error = float((other.double() - own.double()).abs().max())
    size = float(own.double().abs().max())
    # Weights that are codes: kernels for them may round to bfloat16 inside, as that of bitsandbytes for CPUs does.
    coarse = [p for p in module.parameters() if p.dtype in (torch.bfloat16, torch.float16) or not p.is_floating_point()]
    half = bool(coarse) or rounded
    if not error <= (HALF_TOLERANCE if half else TOLERANCE) * max(size, 1e-6):
        raise RuntimeError(
            f"A logit of the result differs by {error:.3g} from that of the posterior, and logits are up to "
            f"{size:.3g}. Nothing was written. Please report this with the class of your model."
        )
    return {"largest_logit_error": error, "largest_logit": size}


def _wanted(draws: object) -> list[int | None]:
    """Return the numbers of the draws to export; None stands for the posterior mean."""
    draws = draws.tolist() if isinstance(draws, np.ndarray | np.generic | Tensor) else draws
    if isinstance(draws, str) and draws == MEAN:
        return [None]
    if isinstance(draws, int) and not isinstance(draws, bool):
        check_count(draws=draws)
        return list(range(draws))
    given = list(draws) if isinstance(draws, Sequence) and not isinstance(draws, str | bytes) else None
    if not given:
        raise ValueError(
            f"draws={draws!r}: give 'mean', a number of draws such as 8, or a list of their indices such as [0, 5]."
        )
    numbers = [plain(index) for index in given]
    for index in numbers:
        check_count(draws=index, least=0)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"draws={draws!r} names a draw twice. Name each index once.")
    return list(numbers)


def _warn_of_many(engine: str, count: int) -> None:
    limit = LIMITS[engine].adapters
    if limit is not None and count > limit:
        logger.warning(
            "%s serves %d adapters in one batch by default, and these are %d: start it with --max-loras-per-batch %d",
            engine,
            limit,
            count,
            count,
        )


def _error(posterior: PosteriorState, s: Tensor, folder: Path, *, rounded: bool) -> dict[str, float | None]:
    """Load an exported adapter with plain PEFT, and compare its logits with those of the draw."""
    with quiet_peft():
        base: Any = plain_copy(posterior.adapter, share=True)
        module = PeftModel.from_pretrained(base, str(folder), torch_device=str(posterior.adapter.device))
    try:
        return largest_error(posterior, s, module, rounded=rounded)
    finally:
        del module, base
        gc.collect()


def _index(
    posterior: PosteriorState,
    entries: list[dict[str, Any]],
    *,
    seed: int,
    rank: int,
    for_engine: str | None,
    dtype: str | None,
) -> dict[str, Any]:
    config = getattr(posterior.adapter.module, "config", None)
    return {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "base_model_name_or_path": getattr(config, "_name_or_path", "") or None,
        "base_model": _finite(fingerprint(posterior.adapter)),
        "posterior": posterior.describe(),
        "seed": seed,
        "rank": rank,
        "dtype": dtype or str(posterior.factors[0][0].dtype).removeprefix("torch."),
        "for_engine": for_engine,
        "draws": entries,
    }


def _finite(value: Any) -> Any:
    """Write numbers that JSON does not have, such as an infinite limit in a configuration, as words."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
