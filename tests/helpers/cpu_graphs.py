"""CUDA graphs as a tape on the CPU: a step is recorded operation by operation, and replayed on the same tensors.

A tape shows what a graph would do on a GPU. A number that the host computed in the step is fixed on it. Whatever a
capture forbids raises an error: to read from the device, or to bring a number of the host to it.
"""

import contextlib
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import import_utils

from scalabl_pyro.training import build_trainer, cuda_graphs, gradient_check, graph_choice, optimizer

#: What waits for a GPU, and what copies a number of the host to it, by the name of the operation.
FORBIDDEN = {
    "_local_scalar_dense": "reads a number on the host",
    "is_nonzero": "reads a number on the host",
    "equal": "reads a number on the host",
    "nonzero": "has a size that the host must know",
    "masked_select": "has a size that the host must know",
    "_unique2": "has a size that the host must know",
    "_linalg_check_errors": "reads on the host whether a factorization failed",
    "lift_fresh": "brings a number of the host to the device",
}


class CaptureError(RuntimeError):
    """What a capture on a GPU would not allow."""


class Tape(TorchDispatchMode):
    """Records all operations inside the context, and refuses those that a capture refuses."""

    running = 0  # number of tapes that record now

    def __init__(self):
        super().__init__()
        self.operations, self.lifted = [], None
        self.is_fresh = True

    def __enter__(self):
        Tape.running += 1
        return super().__enter__()

    def __exit__(self, *error):
        Tape.running -= 1
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        lifted, self.lifted = self.lifted, None
        if lifted is not None and not (name == "index_put_" and args[2] is lifted):  # x[mask] = 0 fills x on the device
            raise CaptureError(f"aten::lift_fresh {FORBIDDEN['lift_fresh']}")
        if name == "index" and any(torch.is_tensor(i) and i.dtype == torch.bool for i in args[1]):
            raise CaptureError("aten::index has a size that the host must know")
        if name == "lift_fresh" and args[0].numel():
            self.lifted = args[0]
        elif reason := FORBIDDEN.get(name) if name != "lift_fresh" else None:
            raise CaptureError(f"aten::{name} {reason}")
        output = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, output))
        return output

    def replay(self):
        """Compute all operations again, on the tensors of the recording."""
        if self.is_fresh:  # on a CPU the recording has computed the step already
            self.is_fresh = False
            return
        with torch.no_grad():
            for func, args, kwargs, output in self.operations:
                again = func(*args, **kwargs)
                for old, new in zip(_tensors(output), _tensors(again), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _tensors(value: Any):
    return [leaf for leaf in tree_leaves(value) if torch.is_tensor(leaf)]


class CpuRecorder(cuda_graphs.Recorder):
    """A recorder whose graphs are tapes."""

    made: ClassVar[list] = []

    def __init__(self, device):
        self.device, self.failure, self.tapes = device, None, []
        CpuRecorder.made.append(self)

    @contextlib.contextmanager
    def on_stream(self):
        yield

    def on_device(self, batch):
        return batch.map(torch.clone)  # another tensor than the host's

    def _capture(self, function):
        self.before = torch.get_rng_state()
        with Tape() as tape:
            output = function()
        self.tapes.append(tape)
        return tape, output

    def _recover(self):
        torch.set_rng_state(self.before)  # on a GPU a capture that fails has drawn nothing


def use_tapes(monkeypatch=None):
    """Let ``fit`` capture its steps on the CPU. Without ``monkeypatch`` for good, as in a forked process."""
    put = monkeypatch.setattr if monkeypatch else setattr
    put(cuda_graphs, "Recorder", CpuRecorder)
    put(import_utils, "is_cuda_stream_capturing", lambda: Tape.running > 0)
    put(gradient_check, "is_capturing", lambda: Tape.running > 0)
    put(optimizer, "_is_on_gpu", lambda group: True)
    put(graph_choice, "devices_of", lambda module: {torch.device("cuda", 0)})
    check = build_trainer.UpdateCheck

    def on_device(*args, **kwargs):
        made = check(*args, **kwargs)
        made.stays_on_device = True
        return made

    put(build_trainer, "UpdateCheck", on_device)
    CpuRecorder.made.clear()
