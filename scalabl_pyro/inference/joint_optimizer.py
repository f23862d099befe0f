"""One torch optimizer in the place of the many that a PyroOptim makes, one per parameter."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, cast

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam as StockClippedAdam
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from .clipped_adam import ClippedAdam

#: Optimizers of torch that keep all their numbers on the device, so that a CUDA graph can hold their step.
ON_DEVICE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, StockClippedAdam)
#: Options that this class sets on a GPU. Saved states leave them out, so that they fit every device.
ADDED = {"fused": None, "capturable": False}


def why_apart(optim: PyroOptim) -> str | None:
    """Say why the parameters of an optimizer cannot share one torch optimizer; None if they can."""
    kind = optim.pt_optim_constructor
    if type(optim) is not PyroOptim:
        return f"{type(optim).__name__} makes one optimizer per parameter"
    own = isinstance(kind, type) and kind.__module__.startswith("torch.optim.") and kind is not torch.optim.LBFGS
    if not own and kind is not StockClippedAdam:
        return f"{getattr(kind, '__name__', kind)} may treat several parameters differently than each alone"
    return None


class JointOptimizer:
    """Update parameters as a PyroOptim does, step for step, but with one torch optimizer.

    Parameters join when they appear first. Those with equal options share a group. On a GPU the optimizer is fused.
    States can be saved and loaded by the methods of the PyroOptim, also between this class and stock SVI.

    Args:
        optim: Gives the kind of the optimizer, and the options of each parameter.

    Attributes:
        optimizer: The torch optimizer; None before the first step.
        known: Name in Pyro's store of each parameter.
    """

    def __init__(self, optim: PyroOptim) -> None:
        self.optim = optim
        self.optimizer: torch.optim.Optimizer | None = None
        self.known: dict[Tensor, str] = {}
        self._clips: dict[Tensor, dict[str, float]] = {}
        self._had_gradient: set[Tensor] = set()
        self._rates: dict[int, Tensor] = {}

    @property
    def stays_on_device(self) -> bool:
        """Whether a CUDA graph can hold a step."""
        return self.optim.pt_optim_constructor in ON_DEVICE

    @property
    def devices(self) -> set[torch.device]:
        """Devices of all parameters."""
        return {p.device for p in self.known}

    def step(self, parameters: Iterable[Tensor], *, grow: bool = True) -> None:
        """Update the parameters of one step.

        Args:
            parameters: Unconstrained parameters that the step has used.
            grow: Whether parameters, or their states, may be new.

        Raises:
            RuntimeError: Something is new that may not be.
        """
        used = dict.fromkeys(parameters)
        for p in used:
            is_new = p not in self.known or (p.grad is not None and p not in self._had_gradient)
            if is_new and not grow:
                raise RuntimeError("a parameter was new in the step that was to be captured")
            if p not in self.known:
                self._add(p)
            if p.grad is not None:
                self._had_gradient.add(p)
            elif p in self._had_gradient:  # stock SVI leaves a gradient of 0 behind, which moves the moments
                p.grad = torch.zeros_like(p)
        for p in self.known:
            if p not in used:
                p.grad = None
        for p in used:
            if p.grad is not None and (clip := self._clips[p]):
                if clip.get("clip_norm") is not None:
                    clip_grad_norm_(p, clip["clip_norm"])
                if clip.get("clip_value") is not None:
                    clip_grad_value_(p, clip["clip_value"])
        cast(torch.optim.Optimizer, self.optimizer).step()
        # As in stock SVI, whose next step adds to them. In a graph this makes them ready for a step outside of it.
        torch._foreach_zero_([p.grad for p in used if p.grad is not None])

    def clear_gradients(self) -> None:
        """Drop the gradients of all parameters, so that the next ones get memory of their own."""
        for p in self.known:
            p.grad = None

    def drop_replaced(self) -> bool:
        """Forget parameters that Pyro's store no longer holds, and tell whether there were any."""
        stored = dict(pyro.get_param_store().named_parameters())
        old = {p for p, name in self.known.items() if stored.get(name) is not p}
        for p in old:
            for own in (self.known, self._clips, self.optim.optim_objs, self.optim.grad_clip):
                own.pop(p, None)
            self._had_gradient.discard(p)
            cast(torch.optim.Optimizer, self.optimizer).state.pop(p, None)
        for group in self.optimizer.param_groups if old and self.optimizer else ():
            group["params"] = [p for p in group["params"] if p not in old]
        return bool(old)

    def settings(self) -> tuple[Any, ...]:
        """Return all options of all groups but the rates on the device, which a captured step would hold fixed."""
        groups = self.optimizer.param_groups if self.optimizer else ()
        for i, group in enumerate(groups):
            own = self._rates.get(i)
            if own is not None and group["lr"] is not own:  # somebody has set another rate
                own.fill_(float(group["lr"]))
                group["lr"] = own
        return tuple(str([(k, v) for k, v in group.items() if k not in ("params", "lr")]) for group in groups)

    def _add(self, parameter: Tensor) -> None:
        """Let a parameter join, with the state of an earlier training if there is one."""
        name = str(pyro.get_param_store().param_name(parameter))
        options = self.optim._get_optim_args(parameter)
        # A state that was loaded, or that of stock SVI with the same PyroOptim.
        state = self.optim._state_waiting_to_be_consumed.pop(name, None)
        if state is None and parameter in self.optim.optim_objs:
            state = self.optim.optim_objs[parameter].state_dict()
        single = self._single(parameter, options, state)
        self.known[parameter] = name
        self._clips[parameter] = dict(cast(Any, self.optim)._get_grad_clip_args(parameter))
        self.optim.optim_objs[parameter] = _StateOfOne(self, parameter)
        self.optim.grad_clip[parameter] = None
        group = single.param_groups[0]
        if self.optimizer is None:
            self.optimizer = single
            self._keep_rate(0, parameter)
            return
        if parameter in single.state:
            self.optimizer.state[parameter] = single.state[parameter]
        for present in self.optimizer.param_groups:
            if (
                _options(present) == _options(group)
                and present["params"][:1]
                and (present["params"][0].device == parameter.device)
            ):
                present["params"].append(parameter)
                return
        self.optimizer.add_param_group(group)
        self._keep_rate(len(self.optimizer.param_groups) - 1, parameter)

    def _single(self, parameter: Tensor, options: Mapping[str, Any], state: Any) -> torch.optim.Optimizer:
        """Make an optimizer of one parameter."""
        kind = cast(Any, self.optim.pt_optim_constructor)
        kind = ClippedAdam if kind is StockClippedAdam else kind
        added: dict[str, Any] = {}
        if parameter.is_cuda and not any(options.get(k) for k in ("foreach", "fused", "differentiable")):
            accepted = inspect.signature(kind).parameters
            added = {name: True for name in ADDED if name in accepted}
        single: torch.optim.Optimizer = kind([parameter], **{**options, **added})
        if state is not None:
            single.load_state_dict(state)
            single.param_groups[0].update(added)
            own = single.state[parameter]
            if added and "step" in own:
                own["step"] = torch.as_tensor(own["step"], dtype=torch.float32, device=parameter.device)
        return single

    def _keep_rate(self, index: int, parameter: Tensor) -> None:
        """Put the learning rate of a group on the GPU, where a captured step reads it."""
        if parameter.is_cuda and self.stays_on_device:
            group = cast(torch.optim.Optimizer, self.optimizer).param_groups[index]
            self._rates[index] = torch.tensor(float(group["lr"]), device=parameter.device)
            group["lr"] = self._rates[index]

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return the state of one parameter in the form of stock SVI, whose optimizers have one parameter each."""
        optimizer = cast(torch.optim.Optimizer, self.optimizer)
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        options = {k: v for k, v in group.items() if k != "params"} | {"lr": float(group["lr"]), "params": [0]}
        state = {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state.get(parameter, {}).items()}
        if any(options.get(name) for name in ADDED):
            options |= {k: v for k, v in ADDED.items() if k in options}
            state |= {"step": state["step"].cpu()} if "step" in state else {}
        if isinstance(optimizer, ClippedAdam) and state:
            options["lr"] *= float(state.pop("decay"))
            state["step"] = int(state["step"])
        return {"state": {0: state} if state else {}, "param_groups": [options]}


class _StateOfOne:
    """What stands in ``PyroOptim.optim_objs`` for a parameter, so that its ``get_state`` and ``save`` work.

    Args:
        joint: The optimizer of all parameters.
        parameter: The parameter.
    """

    def __init__(self, joint: JointOptimizer, parameter: Tensor) -> None:
        self.joint = joint
        self.parameter = parameter

    def state_dict(self) -> dict[str, Any]:
        """Return the state as stock SVI has it."""
        return self.joint.state_of(self.parameter)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: parameters of a joint optimizer are not updated one by one.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "This optimizer belongs to a scalabl_pyro.infer.SVI. For stock SVI make a new one, and give it the state: "
            "new.set_state(old.get_state())."
        )


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a group as values that can be compared."""
    plain = {k: float(v) if torch.is_tensor(v) else v for k, v in group.items() if k != "params"}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
