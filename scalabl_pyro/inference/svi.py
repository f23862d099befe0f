"""Pyro's SVI for a model of your own, with one fused optimizer and, on a GPU, steps captured as CUDA graphs."""

import logging
from collections.abc import Callable
from typing import Any, Literal, cast

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import torch_item
from pyro.optim import PyroOptim
from pyro.util import warn_if_nan
from torch import Tensor

from .._arguments import suggest
from .._errors import describe
from .._process.cuda_capture import is_capturing
from .._process.lock import LOCK
from ..training.cuda_graphs import BatchReplay, Recorder
from ..training.device_elbo import device_losses, stays_on_device
from ..training.graph_choice import why_not
from .call_arguments import CallArguments
from .host_draws import no_host_draws
from .joint_optimizer import JointOptimizer, why_apart
from .prototypes import prototypes_without_gradients

logger = logging.getLogger(__name__)

#: Arguments of Pyro's SVI that Pyro itself has deprecated, or that no ELBO needs, and what to do instead.
LEFT_OUT = {
    "num_samples": "Draw from the posterior with pyro.infer.Predictive(model, guide=guide, num_samples=...).",
    "num_steps": "Call step() in a loop.",
    "loss_and_grads": "Pass an ELBO as loss; it computes its gradients itself.",
}
#: From this number of captured shapes on, a message says that each costs memory.
MANY_SHAPES = 64


class SVI(pyro.infer.SVI):
    """Stochastic variational inference with the interface and the numbers of :class:`pyro.infer.SVI`, but faster.

    Pyro makes one torch optimizer per parameter. Here all parameters share one, which is fused on a GPU. Each step
    equals one of Pyro's, up to rounding.

    On a GPU, a step is captured as a CUDA graph when it sees arguments of the same shapes for the third time, and then
    replayed. A replay repeats the kernels, and not the Python code. So all that changes between steps must come in as
    an argument of ``step``: a tensor on the GPU (its values may change), or a number, string or None (each new value
    is captured anew). What model and guide read elsewhere is read once: an attribute, a global variable, the train
    mode. Pass ``cuda_graph=False`` if your model needs such values. Steps are not captured if the ELBO is another one
    than ``Trace_ELBO`` and ``TraceMeanField_ELBO``, if the guide has draws without a gradient, if model or guide read
    values of tensors in Python or draw random numbers on the CPU, or if the optimizer is another one than Adam, AdamW,
    SGD and ClippedAdam. A log message says once why. Pyro validates arguments of distributions in steps that are not
    captured.

    Parameters are in Pyro's global store, as with stock SVI. ``optim.save``, ``optim.load``, ``optim.get_state`` and
    ``optim.set_state`` work, and states fit stock SVI too.

    Args:
        model: Pyro model.
        guide: Pyro guide with the arguments of the model.
        optim: Optimizer of Pyro such as ``pyro.optim.Adam({"lr": 1e-3})``, or a pair such as
            ``(torch.optim.AdamW, {"lr": 1e-3})``. As in Pyro, the options can be a function of the parameter's name.
        loss: ELBO of Pyro.
        cuda_graph: Whether steps are captured: where they can (``"auto"``), never, or always.
        kwargs: Arguments of stock SVI that it has deprecated; they are refused with what to use instead.

    Attributes:
        optim: The optimizer of Pyro, which holds the states.
        num_captured: Number of shapes of arguments that are replayed.

    Raises:
        TypeError: ``optim`` is not an optimizer, ``loss`` is not an ELBO, or an argument is deprecated.
        ValueError: ``cuda_graph`` has another value.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from scalabl_pyro.infer import SVI
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        >>> with pyro.get_param_store().scope():
        ...     type(svi.step(torch.ones(3)))
        <class 'float'>
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        loss: ELBO,
        *,
        cuda_graph: bool | Literal["auto"] = "auto",
        **kwargs: Any,
    ) -> None:
        for name, advice in LEFT_OUT.items():
            if name in kwargs:
                raise TypeError(f"{name} is not an argument of scalabl_pyro.infer.SVI. {advice}")
        for name in kwargs:
            known = ("model", "guide", "optim", "loss", "cuda_graph")
            raise TypeError(f"SVI() has no argument {name!r}. {suggest(name, known)}")
        if cuda_graph not in (True, False, "auto"):
            raise ValueError(f"cuda_graph={cuda_graph!r}: expected True, False or 'auto'.")
        if not isinstance(loss, ELBO):
            raise TypeError(f"loss={describe(loss)}: expected an ELBO such as pyro.infer.Trace_ELBO().")
        super().__init__(model, guide, _as_optimizer(optim), loss)
        self.elbo = loss
        self.cuda_graph = cuda_graph
        self._reason = why_apart(self.optim)
        self._joint = None if self._reason else JointOptimizer(self.optim)
        self._replay: BatchReplay | None = None
        self._said: set[str] = set()
        if self._reason:
            logger.info("%s: each parameter has its own optimizer, as in stock SVI", self._reason)

    @property
    def num_captured(self) -> int:
        """Number of shapes of arguments that are replayed."""
        return 0 if self._replay is None else len(self._replay.captured)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take one step of the optimizer on the loss.

        Args:
            args: Positional arguments of model and guide.
            kwargs: Keyword arguments of model and guide.

        Returns:
            Loss before the update, nats per data set: a float, or a tuple of floats for a loss that has several.

        Raises:
            RuntimeError: Pyro keeps parameters in their modules (``module_local_params=True``), where SVI does not
                find them.
            ValueError: Model and guide have no parameters; or ``cuda_graph=True``, and the step cannot be captured.

        Example:
            >>> import pyro, torch
            >>> import pyro.distributions as dist
            >>> from pyro.infer import Trace_ELBO
            >>> from scalabl_pyro.infer import SVI
            >>> def model():
            ...     pyro.sample("x", dist.Normal(0.0, 1.0))
            >>> def guide():
            ...     pyro.sample("x", dist.Delta(pyro.param("loc", torch.tensor(1.0))))
            >>> svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.5}), Trace_ELBO())
            >>> with pyro.get_param_store().scope():
            ...     round(svi.step(), 3), round(svi.step(), 3)  # log N(1 | 0, 1) and log N(0.5 | 0, 1)
            (1.419, 1.044)
        """
        if pyro.settings.get("module_local_params"):
            raise RuntimeError(
                "SVI finds parameters in Pyro's global store, which module_local_params=True leaves empty. Set it to "
                "False, or train with Trace_ELBO()(model, guide) and a torch optimizer."
            )
        with LOCK:  # Pyro's handlers and torch's generators belong to the whole process
            if self._joint is None:
                self._report(self._reason)
                return super().step(*args, **kwargs)
            given = CallArguments(args, kwargs, context=self._joint.settings())
            if not self._can_replay(given, self._joint):
                return self._take(self._joint, given)
            loss = torch_item(self._replayed(self._joint, given))
        warn_if_nan(loss, "loss")
        if self.num_captured == MANY_SHAPES:
            self._say(f"{MANY_SHAPES} shapes of arguments were captured, and each holds memory: pad batches to fewer")
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Estimate the loss without an update.

        Args:
            args: Positional arguments of model and guide.
            kwargs: Keyword arguments of model and guide.

        Returns:
            Loss, nats per data set: a float, or a tuple of floats for a loss that has several.

        Example:
            >>> import pyro, torch
            >>> import pyro.distributions as dist
            >>> from pyro.infer import Trace_ELBO
            >>> from scalabl_pyro.infer import SVI
            >>> def model():
            ...     pyro.sample("x", dist.Normal(0.0, 1.0))
            >>> def guide():
            ...     pyro.sample("x", dist.Delta(pyro.param("loc", torch.tensor(1.0))))
            >>> svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.5}), Trace_ELBO())
            >>> with pyro.get_param_store().scope():
            ...     round(svi.evaluate_loss(), 3)  # log N(1 | 0, 1)
            1.419
        """
        with LOCK:
            return super().evaluate_loss(*args, **kwargs)

    def _can_replay(self, given: CallArguments, joint: JointOptimizer) -> bool:
        if joint.drop_replaced():  # the store was cleared or loaded
            self._replay = None
        if not joint.known or self.cuda_graph is False:  # the first step finds the parameters
            return False
        devices = joint.devices
        reason = why_not(devices, stays_on_device=stays_on_device(self.elbo), keeps_prefix=False)
        has_gpu = reason is None or any(device.type == "cuda" for device in devices)
        if reason is None and not joint.stays_on_device:
            reason = f"{self.optim.pt_optim_constructor.__name__} keeps numbers on the host"
        if reason is None:
            reason = given.why_not(next(iter(devices)))
        self._report(reason, quiet=not has_gpu)
        return reason is None

    def _report(self, reason: str | None, *, quiet: bool = False) -> None:
        """Say why a step is not captured: once, or by an error if it must be."""
        if reason is None:
            return
        if self.cuda_graph is True:
            raise ValueError(f"cuda_graph=True, but {reason}. Use cuda_graph='auto', the default, or False.")
        if not quiet and self.cuda_graph:
            self._say(f"steps run without CUDA graphs: {reason}")

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.info(message)

    def _replayed(self, joint: JointOptimizer, given: CallArguments) -> Tensor:
        """Take a step, by a replay where it was captured."""
        if self._replay is None:
            self._replay = BatchReplay(
                lambda given, weight: _as_tensor(self._take(joint, cast(Any, given))),
                recorder=Recorder(next(iter(joint.devices))),
                clear_gradients=joint.clear_gradients,
            )
        with self._replay.recorder.on_stream():
            return self._replay(cast(Any, given), 1.0)

    def _take(self, joint: JointOptimizer, given: CallArguments) -> Any:
        """Run model, guide, gradients and update; the loss as a number, or as a tensor during a capture."""
        captures = is_capturing()
        with poutine.trace(param_only=True) as found:
            if captures:
                loss = self._loss_on_device(given)
            else:
                with prototypes_without_gradients(self.guide):
                    loss = self.loss_and_grads(self.model, self.guide, *given.args, **given.kwargs)
        sites = cast(Any, found).trace.nodes.values()
        parameters = [site["value"].unconstrained() for site in sites]
        if not parameters:
            raise ValueError("Model and guide have no parameters (pyro.param, PyroModule): there is nothing to learn.")
        joint.step(parameters, grow=not captures)
        if isinstance(loss, tuple):
            return type(loss)(map(torch_item, loss))
        return loss if captures else torch_item(loss)

    def _loss_on_device(self, given: CallArguments) -> Tensor:
        """Accumulate the gradients of the loss; no number is read on the host."""
        elbo = cast(Any, self.elbo)
        total: Tensor | None = None  # a zero would stand on the host, and a capture copies nothing from there
        # Validation reads values on the host; steps that are not captured have done it.
        with pyro.validation_enabled(False), no_host_draws():
            for loss in device_losses(elbo, self.model, self.guide, given.args, given.kwargs):
                if loss is None:
                    raise RuntimeError("a site of the guide has draws without a gradient")
                part = torch.as_tensor(loss / elbo.num_particles)
                if part.requires_grad:
                    part.backward(retain_graph=elbo.retain_graph)
                total = part.detach() if total is None else total + part.detach()
        assert total is not None
        return total


def _as_tensor(loss: Tensor | float) -> Tensor:
    return loss if torch.is_tensor(loss) else torch.tensor(loss, dtype=torch.float64)


def _as_optimizer(optim: Any) -> PyroOptim:
    if isinstance(optim, PyroOptim):
        return optim
    if isinstance(optim, tuple) and len(optim) == 2 and callable(optim[0]) and isinstance(optim[1], dict):
        return PyroOptim(optim[0], optim[1])
    if isinstance(optim, torch.optim.Optimizer):
        name = type(optim).__name__
        raise TypeError(
            f"optim={describe(optim)} has parameters already, and SVI finds them at the first step: pass the class and "
            f"its options, optim=(torch.optim.{name}, {{'lr': 1e-3}}), or an optimizer of pyro.optim."
        )
    raise TypeError(
        f"optim={describe(optim)}: expected an optimizer of Pyro such as pyro.optim.Adam({{'lr': 1e-3}}), or a class "
        "of torch and its options such as (torch.optim.AdamW, {'lr': 1e-3})."
    )
