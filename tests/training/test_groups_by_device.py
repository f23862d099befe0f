"""Parameters on several devices: one group of the optimizer per device, one order of all of them, one gradient norm."""

import pytest
import torch

from scalabl_pyro.distributed.processes import Processes
from scalabl_pyro.distributed.shared_gradients import ALIGNMENT, SharedGradients
from scalabl_pyro.training.optimizer import clip_gradients, parameters_of, set_rates, split_by_device


def parameter(*shape, device="cpu"):
    return torch.nn.Parameter(torch.ones(*shape, device=device))


def test_groups_are_split_by_device_and_the_order_of_parameters_stays():
    a, b, c, d = parameter(1), parameter(2, device="meta"), parameter(3), parameter(4, device="meta")
    groups = [{"name": "A", "params": [a, b, c], "lr": 0.1}, {"name": "B", "params": [d], "lr": 0.2}]
    parts = split_by_device(groups)
    assert [(part["name"], part["lr"], len(part["params"])) for part in parts] == [
        ("A", 0.1, 2),
        ("A", 0.1, 1),
        ("B", 0.2, 1),
    ]
    assert all(len({p.device for p in part["params"]}) == 1 for part in parts)

    class Optimizer:
        param_groups = parts

    assert [id(p) for p in parameters_of(Optimizer)] == [id(p) for p in (a, b, c, d)]


def test_rates_keep_their_precision_on_a_cpu():
    optimizer = torch.optim.AdamW(split_by_device([{"params": [parameter(2)], "lr": 0.1}]), fused=True)
    set_rates(optimizer, 1 / 3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 3, rel=1e-15)


def test_the_norm_is_that_of_all_groups():
    one, other = parameter(3), parameter(4)
    optimizer = torch.optim.AdamW(split_by_device([{"params": [one]}, {"params": [other]}]), fused=True)
    one.grad, other.grad = torch.full((3,), 2.0), torch.full((4,), 1.0)
    assert clip_gradients(optimizer, 1.0).item() == pytest.approx(4.0)
    assert torch.cat([one.grad, other.grad]).norm().item() == pytest.approx(1.0, rel=1e-5)


class Pair(Processes):
    """A process whose messages say that the other one has every gradient."""

    def __init__(self):
        super().__init__(0, 2)

    def synchronize(self, batch, signal, told=()):
        return signal, [told[0], *[1] * (len(told) - 1)]


def test_a_gradient_that_another_process_has_takes_the_place_of_a_missing_one():
    kinds = (torch.float32, torch.float64, torch.float32)
    parameters = [torch.nn.Parameter(torch.zeros(n, 2, dtype=kind)) for n, kind in zip((3, 2, 1), kinds, strict=True)]
    shared = SharedGradients(parameters, Pair())
    parameters[0].grad, parameters[2].grad = torch.full((3, 2), 1.5), torch.full((1, 2), -1.0)
    terms = torch.tensor([1.0, 2.0, 3.0])
    shared.pack(terms)
    assert shared.agree(None, 0, terms) == 0
    assert torch.equal(shared.unpack(), terms.double())
    assert [p.grad.dtype for p in parameters] == list(kinds)
    assert [p.grad.sum().item() for p in parameters] == [9.0, 0.0, -2.0]
    assert all(piece.storage_offset() % ALIGNMENT == 0 for piece in shared._pieces)
    parameters[0].grad = None
    shared.pack(terms)
    assert shared.present == [0, 1, 1] and not shared._pieces[0].any()
