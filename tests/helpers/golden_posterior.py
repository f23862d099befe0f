"""The posterior that release 0.1.0 saved, and the base model that it was learned on."""

from pathlib import Path

import tiny
import torch

GOLDEN = Path(__file__).resolve().parents[1] / "posterior" / "golden"


def base_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The tiny Llama with weights by a formula, the same with every version of torch."""
    llm = tiny.causal_lm()
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(llm.named_parameters())):
            wave = torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) ** 1.1 + i).reshape(p.shape)
            p.copy_(1 + 0.1 * wave if "norm" in name else 0.3 * wave)
    return llm.to(dtype)
