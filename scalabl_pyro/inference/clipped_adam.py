"""Pyro's ClippedAdam for many parameters at once, with step counts and rates on the device."""

from typing import Any

import torch
from torch import Tensor


class ClippedAdam(torch.optim.Optimizer):
    """Adam with clipped gradients and a decaying learning rate, as :class:`pyro.optim.clipped_adam.ClippedAdam`.

    Pyro's class launches ten kernels per parameter and counts steps on the host, which a CUDA graph would repeat.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate before the first decay.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: L2 penalty.
        clip_norm: Largest absolute value of each number of a gradient.
        lrd: Factor of the learning rate per step.
        centered_variance: Whether the second moment is that of the gradient less the first moment.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float = 10.0,
        lrd: float = 1.0,
        centered_variance: bool = False,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clip_norm": clip_norm}
        super().__init__(params, options | {"lrd": lrd, "centered_variance": centered_variance})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return the state of a parameter, made at its first step.

        Returns:
            ``step``, ``decay`` (product of the factors of the learning rate), ``exp_avg`` and ``exp_avg_sq``.
        """
        state = self.state[parameter]
        if "exp_avg" not in state:
            state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        exact = torch.float32 if parameter.device.type == "mps" else torch.float64
        for name, start in (("step", 0), ("decay", 1)):
            state[name] = torch.as_tensor(state.get(name, start), dtype=exact, device=parameter.device)
        return state

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state_of(p) for p in params]
        first, second, steps, decays = (
            [s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step", "decay")
        )
        beta1, beta2 = group["betas"]
        grads: Any = [p.grad for p in params]
        torch._foreach_clamp_min_(grads, -group["clip_norm"])
        torch._foreach_clamp_max_(grads, group["clip_norm"])
        torch._foreach_add_(steps, 1)
        torch._foreach_mul_(decays, group["lrd"])
        if group["weight_decay"]:
            grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, grads, alpha=1 - beta1)
        spread = torch._foreach_sub(grads, first) if group["centered_variance"] else grads
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, spread, spread, value=1 - beta2)
        below = torch._foreach_sqrt(second)
        torch._foreach_add_(below, group["eps"])
        updates = torch._foreach_div(first, below)
        torch._foreach_mul_(updates, _step_sizes(steps, decays, group["lr"], beta1, beta2))
        torch._foreach_sub_(params, updates)


def _step_sizes(
    steps: list[Tensor], decays: list[Tensor], lr: float | Tensor, beta1: float, beta2: float
) -> tuple[Tensor, ...]:
    """Return the decayed learning rate of each parameter, corrected for moments that began at 0."""
    sizes = torch._foreach_pow(beta2, steps)
    torch._foreach_mul_(sizes, -1)
    torch._foreach_add_(sizes, 1)
    torch._foreach_sqrt_(sizes)
    below = torch._foreach_pow(beta1, steps)
    torch._foreach_mul_(below, -1)
    torch._foreach_add_(below, 1)
    torch._foreach_div_(sizes, below)
    torch._foreach_mul_(sizes, decays)
    torch._foreach_mul_(sizes, lr)
    return sizes
