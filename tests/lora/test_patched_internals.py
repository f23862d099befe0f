"""Internals of other libraries that this one patches or reads: each test fails when a release changes one of them.

``docs/internals-patches.md`` says for each what it is needed for.
"""

import ast
import datetime
import inspect
import re
import tomllib
from importlib import metadata
from pathlib import Path

import peft
import pyro
import pytest
import tiny
import torch
from packaging.requirements import Requirement
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO, autoguide
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import distributed as dist
from torch import nn
from transformers import masking_utils
from transformers.utils import import_utils

import scalabl_pyro as sp
from scalabl_pyro.lora.causal_masks import NAMES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "internals-patches.md"
BOUNDED = ("peft", "pyro-ppl", "torch", "transformers")


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {r.name: r.specifier for r in map(Requirement, project["dependencies"])}


@pytest.mark.parametrize("name", BOUNDED)
def test_libraries_whose_internals_are_used_have_an_upper_bound_that_the_page_names(name):
    bounds = requirements()[name]
    (upper,) = [str(bound) for bound in bounds if bound.operator == "<"]
    assert bounds.contains(metadata.version(name), prereleases=True)
    assert re.search(rf"`{name}`.*`{re.escape(upper)}`", PAGE.read_text(encoding="utf-8"))


def test_the_versions_that_are_tested_fit_the_bounds():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    for name in BOUNDED:
        assert requirements()[name].contains(pins[name]), name


def test_each_canary_that_the_page_names_exists():
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named
    found = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert not named - found
    for file in re.findall(r"`(scalabl_pyro/[\w/]+\.py)`", text):
        assert (ROOT / file).is_file(), file


def private_names(tree):
    """Names with a leading underscore that a file reads from objects other than its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()"):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            yield getattr(node.args[1], "value", "")
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (alias.name for alias in node.names)


#: Of this library itself, and of a named tuple, where it is public.
OWN = {"_summary", "_set_options", "_asdict", "_fields"}


@pytest.mark.parametrize("path", sorted((ROOT / "scalabl_pyro").rglob("*.py")), ids=lambda p: p.name)
def test_each_private_name_that_a_file_reads_stands_on_the_page_beside_the_file(path):
    rows = [row for row in PAGE.read_text(encoding="utf-8").splitlines() if str(path.relative_to(ROOT)) in row]
    names = {n for n in private_names(ast.parse(path.read_text("utf-8"))) if re.match(r"_[^_]", str(n))} - OWN
    assert not [name for name in names if not any(name in row for row in rows)]


# transformers


def test_transformers_tells_over_how_many_processes_layers_are_split():
    assert tiny.causal_lm()._tp_size in (None, 1)


def test_transformers_asks_these_names_for_masks():
    for name in NAMES:
        assert callable(getattr(masking_utils, name))
    assert inspect.signature(masking_utils.is_tracing).bind()  # called without a tensor
    assert list(inspect.signature(masking_utils.find_packed_sequence_indices).parameters) == ["position_ids"]
    assert import_utils.is_cuda_stream_capturing() is False
    source = inspect.getsource(masking_utils)
    assert all(re.search(rf"(?<!def ){name}\(", source) for name in NAMES), "transformers no longer calls them there"


# peft


def test_peft_layers_have_a_variant_and_a_cast_switch():
    llm = tiny.causal_lm()
    layer = peft.get_peft_model(llm, peft.LoraConfig(r=2, target_modules=["q_proj"])).base_model.model.model.layers[0]
    layer = layer.self_attn.q_proj
    assert isinstance(layer, LoraLayer)
    assert layer.cast_input_dtype_enabled is True
    for attribute in ("lora_variant", "lora_A", "lora_B", "lora_dropout", "lora_bias", "scaling", "r"):
        assert hasattr(getattr(layer, attribute), "__getitem__"), attribute


def test_peft_calls_a_variant_object_in_place_of_its_own_update():
    class Doubled(LoraVariant):
        def forward(self, module, active_adapter, x, result, **kwargs):
            return 2 * result

    assert {"init", "forward", "merge_safe", "merge_unsafe", "unmerge"} <= set(vars(LoraVariant))
    net = nn.Sequential(nn.Linear(4, 3))
    base = net[0]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), net, "name")
    net[0].lora_variant["name"] = Doubled()
    x = torch.randn(5, 4)
    assert torch.equal(net(x), 2 * base(x))


def test_peft_has_default_targets_by_model_type():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as mapping

    assert mapping["llama"] == ["q_proj", "v_proj"] and mapping["gpt2"] == ["c_attn"]


def test_peft_wraps_what_it_trains_besides_lora_in_these_classes():
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    llm = peft.get_peft_model(tiny.causal_lm(), config).base_model.model
    assert isinstance(llm.lm_head, ModulesToSaveWrapper) and isinstance(llm.lm_head, AuxiliaryTrainingWrapper)
    assert llm.lm_head.original_module is not llm.lm_head.modules_to_save["default"]
    assert "default" in llm.model.embed_tokens.lora_embedding_A
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1])
    tokens = peft.get_peft_model(tiny.causal_lm(), config).base_model.model.model.embed_tokens
    assert isinstance(tokens, TrainableTokensWrapper) and "default" in tokens.token_adapter.trainable_tokens_delta
    assert (
        tokens.token_adapter.get_merged_weights(["default"]).shape == tokens.token_adapter.get_base_layer().weight.shape
    )


# pyro


class Looks(Messenger):
    """Keeps what stands in Pyro's stack while a site is sampled."""

    def __init__(self):
        self.found = []

    def _pyro_sample(self, msg):
        self.found += [h for h in _PYRO_STACK if isinstance(h, TraceMessenger) and h.param_only]


def a_program():
    def model():
        return pyro.sample("s", pyro.distributions.Normal(0.0, 1.0))

    with pyro.settings.context(module_local_params=True):
        guide = autoguide.AutoNormal(model)
        guide()
    return model, guide


def test_stock_svi_traces_parameters_alone_and_the_stack_tells():
    looks = Looks()

    def model():
        with looks:
            return pyro.sample("s", pyro.distributions.Normal(0.0, 1.0))

    def guide():
        pyro.sample("s", pyro.distributions.Normal(pyro.param("loc_of_canary", torch.zeros(())), 1.0))

    try:
        SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
    finally:
        pyro.get_param_store().clear()
    assert looks.found
    looks.found = []
    pyro.poutine.trace(model).get_trace()
    assert not looks.found


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_elbos_give_their_traces(elbo):
    model, guide = a_program()
    with pyro.settings.context(module_local_params=True):
        ((p, q),) = elbo()._get_traces(model, guide, (), {})
    assert "log_prob_sum" in p.nodes["s"] and "score_parts" in q.nodes["s"]


def test_autoguides_keep_model_master_and_context_under_these_names():
    _, guide = a_program()
    assert guide._model and hasattr(guide, "master") and hasattr(guide, "prototype_trace")
    assert guide._pyro_context.used in (True, False)


# torch


def test_a_forward_on_the_instance_is_the_one_that_is_called():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    layer.forward = lambda x: x + 1
    assert torch.equal(layer(x), x + 1)
    del layer.forward
    assert "forward" not in layer.__dict__ and torch.equal(layer(x), layer.forward(x))


def test_a_method_on_the_instance_hides_the_one_of_the_class():
    llm = tiny.causal_lm()
    sp.bayesian_lora(llm, layers_to_transform=[1])
    with pytest.raises(RuntimeError, match="without the latents"):
        llm.save_pretrained("never")


def test_modules_keep_their_own_tensors_under_these_names():
    layer = nn.BatchNorm1d(2)
    layer.register_buffer("computed", torch.zeros(1), persistent=False)
    assert set(layer._parameters) == {"weight", "bias"} and layer._parameters is vars(layer)["_parameters"]
    assert {"running_mean", "computed"} <= set(layer._buffers) and layer._non_persistent_buffers_set == {"computed"}
    net = nn.Sequential(layer)
    assert net._modules["0"] is layer
    layer._buffers["computed"] = torch.ones(1)
    assert layer.computed.item() == 1


def test_a_module_moves_and_casts_through_apply():
    class Counts(nn.Linear):
        calls = 0

        def _apply(self, fn, recurse=True):
            self.calls += 1
            return super()._apply(fn, recurse)

    layer = Counts(2, 2)
    layer.to(torch.float64).float().half()
    assert layer.calls == 3


def test_a_tensor_counts_its_changes_in_place():
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1


def test_modules_keep_their_hooks_under_these_names():
    layer = nn.Linear(2, 2)
    assert not layer._forward_hooks and not layer._forward_pre_hooks
    layer.register_forward_hook(lambda *args: None)
    layer.register_forward_pre_hook(lambda *args: None)
    assert layer._forward_hooks and layer._forward_pre_hooks


def test_torch_multiplies_8_bit_floats_with_a_scale_per_row_under_this_name():
    """The products themselves are compared on a GPU, in test_gpu_float8.py."""
    schema = torch.ops.aten._scaled_mm.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names == ["self", "mat2", "scale_a", "scale_b", "bias", "scale_result", "out_dtype", "use_fast_accum"]
    assert callable(torch._scaled_mm)


def test_a_fused_optimizer_skips_the_update_where_found_inf_is_one():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(parameter.data, torch.ones(3))
    optimizer.found_inf.zero_()
    optimizer.step()
    assert (parameter.data < 1).all()


def test_a_failed_capture_can_end_its_memory_pool():
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch was built without CUDA")
    assert callable(torch._C._cuda_endAllocateToPool)


def test_default_generators_are_where_random_states_are_read():
    assert isinstance(torch.default_generator, torch.Generator)
    assert len(torch.cuda.default_generators) in (0, torch.cuda.device_count())


def test_a_process_group_tells_its_timeout(tmp_path):
    timeout = datetime.timedelta(seconds=77)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=timeout)
    try:
        assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout == timeout
        assert "cpu:gloo" in str(dist.get_backend_config())
    finally:
        dist.destroy_process_group()


def test_foreach_copies_in_place():
    to, values = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.full((3,), 2.0)]
    torch._foreach_copy_(to, values)
    assert all(torch.equal(a, b) for a, b in zip(to, values, strict=True))
    torch._foreach_zero_(to)
    assert not any(a.any() for a in to)


def test_normals_keep_these_factors_of_their_covariance():
    full = torch.distributions.MultivariateNormal(torch.zeros(2), scale_tril=torch.eye(2))
    assert full._unbroadcasted_scale_tril.shape == (2, 2)
    low = torch.distributions.LowRankMultivariateNormal(torch.zeros(3), torch.ones(3, 1), torch.ones(3))
    assert low._unbroadcasted_cov_factor.shape == (3, 1) and low._unbroadcasted_cov_diag.shape == (3,)
    assert low._capacitance_tril.shape == (1, 1)


def test_sharded_weights_and_modules_are_known_by_these_names():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    assert FSDPModule.__name__ == "FSDPModule"
    assert hasattr(DTensor, "full_tensor") and hasattr(DTensor, "device_mesh")


def test_attention_of_torch_reads_the_weight_of_this_class_itself():
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

    assert isinstance(nn.MultiheadAttention(4, 2).out_proj, NonDynamicallyQuantizableLinear)


def test_unloading_undoes_every_patch_of_the_module():
    llm = tiny.causal_lm()
    sp.bayesian_lora(llm, layers_to_transform=[1]).unload()
    assert not [n for n, m in llm.named_modules() if "forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks]
