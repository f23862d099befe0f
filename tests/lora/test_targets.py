"""Which layers are adapted, and what a wrong call of bayesian_lora answers."""

import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import scalabl_pyro as sp
from scalabl_pyro.lora.targets import is_linear, new_heads, output_head, resolve_targets


class TwoLayers(nn.Module):
    """No config, no block numbers, no known names."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class PackedLinear(nn.Module):
    """Looks like a quantized layer: features and packed weights, but no nn.Linear."""

    def __init__(self, attribute):
        super().__init__()
        self.in_features = self.out_features = 8
        setattr(self, attribute, torch.zeros(8, 4, dtype=torch.int32))


def suffixes(names):
    return {name.rsplit(".", 1)[-1] for name in names}


def fingerprint(module):
    """All that attaching changes: layers, flags, hooks, and PEFT's mark."""
    layers = [(n, type(m), len(m._forward_hooks) + len(m._forward_pre_hooks)) for n, m in module.named_modules()]
    parameters = [(n, p.requires_grad, p.detach().clone()) for n, p in module.named_parameters()]
    return layers, [p[:2] for p in parameters], [p[2] for p in parameters], hasattr(module, "peft_config")


def assert_untouched(module, before):
    *structure, weights, mark = fingerprint(module)
    *structure_before, weights_before, mark_before = before
    assert structure == structure_before and mark == mark_before
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_before, strict=True))


# defaults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "expected"),
    [(f, {"q_proj", "v_proj", "lm_head"}) for f in ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma")]
    + [("gpt2", {"c_attn", "lm_head"}), ("bert", {"query", "value", "decoder"})],
)
def test_default_is_queries_values_and_the_lm_head_in_every_block(family, expected):
    model = tiny.causal_lm(family)
    names = resolve_targets(model)
    assert suffixes(names) == expected
    head = [name for name in names if model.get_submodule(name) is model.get_output_embeddings()]
    assert len(head) == 1
    assert len(names) == 2 * (len(expected) - 1) + 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_a_new_classification_head_is_trained_in_full_and_not_adapted(family, targets):
    model = tiny.classifier(family)
    (head,) = new_heads(model)
    assert head in ("score", "classifier")
    assert head not in suffixes(resolve_targets(model, targets))


def test_a_module_of_unknown_names_is_adapted_everywhere():
    assert resolve_targets(TwoLayers()) == ["fc1", "fc2"]


# names, patterns, predicates ----------------------------------------------------------------------------------


def test_all_linear_means_every_linear_layer(llm):
    expected = [name for name, m in llm.named_modules() if isinstance(m, nn.Linear)]
    assert resolve_targets(llm, "all-linear") == expected
    assert len(expected) == 2 * 7 + 1


@pytest.mark.parametrize("container", [list, tuple, set, iter], ids=lambda c: c.__name__)
def test_layers_come_in_module_order_however_they_are_named(llm, container):
    names = resolve_targets(llm, container(["lm_head", "v_proj", "q_proj"]))
    assert names == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
        "lm_head",
    ]


@pytest.mark.parametrize(
    "target",
    ["1.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "layers.1.self_attn.q_proj"],
)
def test_a_longer_suffix_or_a_whole_path_names_one_layer(llm, target):
    assert resolve_targets(llm, [target]) == ["model.layers.1.self_attn.q_proj"]


def test_a_layer_that_two_names_match_comes_once(llm):
    assert resolve_targets(llm, ["q_proj", "self_attn.q_proj", "q_proj"]) == resolve_targets(llm, ["q_proj"])


def test_a_part_of_a_name_does_not_match(llm):
    with pytest.raises(ValueError, match=r"'proj' matches no layer.*'q_proj'"):
        resolve_targets(llm, ["proj"])


def test_a_regular_expression_matches_whole_paths(llm):
    assert resolve_targets(llm, r".*\.1\..*\.(q|k)_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    ]


def test_a_predicate_sees_path_and_module_of_linear_layers_only(llm):
    seen = {}

    def narrow(path, module):
        seen[path] = module
        return module.out_features == 16  # two key-value heads of width 8

    assert suffixes(resolve_targets(llm, narrow)) == {"k_proj", "v_proj"}
    assert list(seen) == resolve_targets(llm, "all-linear")
    assert all(llm.get_submodule(path) is module for path, module in seen.items())


# blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, [1], (1,), {1}, range(1, 2)], ids=repr)
def test_layers_to_transform_keeps_these_blocks_and_what_lies_outside_blocks(llm, blocks):
    names = resolve_targets(llm, layers_to_transform=blocks)
    assert names == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "lm_head"]


def test_all_blocks_is_the_same_as_no_choice_of_blocks(llm):
    assert resolve_targets(llm, layers_to_transform=[1, 0]) == resolve_targets(llm)


@pytest.mark.parametrize("blocks", [7, [0, 7], -1])
def test_a_block_that_does_not_exist_is_refused(llm, blocks):
    absent = blocks if isinstance(blocks, int) else 7
    with pytest.raises(ValueError, match=rf"layers_to_transform=.*\[{absent}\].*blocks 0 to 1 exist"):
        resolve_targets(llm, layers_to_transform=blocks)


def test_a_choice_of_blocks_that_leaves_no_layer_is_refused(llm):
    with pytest.raises(ValueError, match=r"layers_to_transform=\[\]"):
        resolve_targets(llm, ["q_proj"], layers_to_transform=[])


def test_a_choice_of_blocks_among_layers_without_blocks_is_refused_in_words(llm):
    with pytest.raises(ValueError, match=r"layers_to_transform=\[1\]") as error:
        resolve_targets(llm, ["lm_head"], layers_to_transform=[1])
    assert "None" not in str(error.value)


# what matches nothing -----------------------------------------------------------------------------------------


def test_a_misspelled_name_is_refused_with_the_nearest_ones(llm):
    with pytest.raises(ValueError, match=r"'q_porj' matches no layer. Did you mean 'q_proj'"):
        resolve_targets(llm, ["q_porj", "v_proj"])


def test_a_name_near_nothing_is_refused_with_the_names_that_exist(llm):
    with pytest.raises(ValueError, match=r"'zzzz' matches no layer. Known names: .*'lm_head'.*'v_proj'"):
        resolve_targets(llm, ["zzzz"])


@pytest.mark.parametrize(
    ("name", "kind"), [("embed_tokens", "Embedding"), ("self_attn", "LlamaAttention"), ("norm", "LlamaRMSNorm")]
)
def test_a_layer_that_is_not_linear_is_refused_by_its_kind(llm, name, kind):
    with pytest.raises(ValueError, match=rf"{name!r} is an? {kind}.*linear layers"):
        resolve_targets(llm, [name])


@pytest.mark.parametrize(
    "targets", [[], "nothing.*", r"model\.layers", lambda *_: False], ids=["list", "pattern", "prefix", "predicate"]
)
def test_targets_that_match_nothing_are_refused_with_the_names_that_exist(llm, targets):
    with pytest.raises(ValueError, match=r"target_modules=.* matches no linear layer.*'q_proj'"):
        resolve_targets(llm, targets)


def test_a_bare_name_is_refused_with_the_hint_that_a_string_is_a_pattern(llm):
    with pytest.raises(ValueError, match=r"target_modules='q_proj'.*(\['q_proj'\]|regular expression)"):
        resolve_targets(llm, "q_proj")


def test_a_broken_pattern_is_refused_as_a_value(llm):
    with pytest.raises(ValueError, match=r"target_modules='\*q_proj'"):
        resolve_targets(llm, "*q_proj")


@pytest.mark.parametrize("targets", [3, [3], [None]], ids=repr)
def test_targets_of_the_wrong_type_are_refused_by_name(llm, targets):
    with pytest.raises(TypeError, match="target_modules"):
        resolve_targets(llm, targets)


def test_a_bare_linear_layer_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"Linear contains no linear layer.*nn.Sequential\(layer\)"):
        resolve_targets(nn.Linear(3, 3))
    assert resolve_targets(nn.Sequential(nn.Linear(3, 3))) == ["0"]


def test_a_module_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="Sequential contains no linear layer"):
        resolve_targets(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))


def test_a_projection_that_torch_reads_without_calling_it_is_not_a_target():
    """nn.MultiheadAttention reads the weight of out_proj: an adapter there would change nothing, silently."""
    attention = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 3))
    assert "out_proj" not in suffixes(resolve_targets(attention))
    with pytest.raises((ValueError, TypeError), match="out_proj"):
        resolve_targets(attention, ["out_proj"])


# small questions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(2, 3), True),
        (Conv1D(3, 2), True),
        (PackedLinear("qweight"), True),
        (PackedLinear("W_q"), True),
        (PackedLinear("weight"), True),
        (PackedLinear("codes"), False),
        (nn.Embedding(2, 3), False),
        (nn.LayerNorm(3), False),
        (nn.Conv1d(2, 3, 1), False),
        (nn.Identity(), False),
    ],
    ids=lambda x: type(x).__name__,
)
def test_is_linear(layer, expected):
    assert is_linear(layer) is expected


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "bert"])
def test_the_output_head_is_what_the_model_says(family):
    model = tiny.causal_lm(family)
    assert output_head(model) is model.get_output_embeddings()
    assert new_heads(model) == []


@pytest.mark.parametrize("make", [tiny.classifier, TwoLayers], ids=["classifier", "plain"])
def test_what_has_no_vocabulary_has_no_output_head(make):
    assert output_head(make()) is None


# the call of bayesian_lora ------------------------------------------------------------------------------------

WRONG_CALLS = {
    "no rank": ({"r": 0}, ValueError, r"r=0: .*positive integer"),
    "negative rank": ({"r": -1}, ValueError, r"r=-1: .*positive integer"),
    "broken rank": ({"r": 2.0}, ValueError, r"r=2.0: .*positive integer"),
    "rank as text": ({"r": "8"}, ValueError, r"r='8': .*positive integer"),
    "large rank": ({"r": 33}, ValueError, r"r=33 .*'model.layers.0.self_attn.q_proj'.* 32 x 32 .*r <= 16"),
    "large rank of one layer": (
        {"r": 20, "target_modules": ["q_proj", "k_proj"]},
        ValueError,
        r"r=20 .*k_proj' .*16 x 32 \(out x in\).*r <= 16, or leave the layer out",
    ),
    "gauge": ({"gauge": "unit"}, ValueError, r"gauge='unit' is unknown. Did you mean 'unit_rows'"),
    "no target": ({"target_modules": ["q_porj"]}, ValueError, r"'q_porj'.*'q_proj'"),
    "no head": ({"modules_to_save": ["lm_haed"]}, ValueError, r"modules_to_save: .*'lm_haed'. Did you mean 'lm_head'"),
    "head as text": ({"modules_to_save": "lm_head"}, (ValueError, TypeError), r"modules_to_save='lm_head'"),
    "head both trained and adapted": (
        {"modules_to_save": ["lm_head"]},
        ValueError,
        r"modules_to_save.*'lm_head'.*target_modules",
    ),
    "no alpha": ({"lora_alpha": 0}, ValueError, "lora_alpha=0"),
    "alpha not a number": ({"lora_alpha": float("nan")}, ValueError, "lora_alpha=nan"),
    "alpha as text": ({"lora_alpha": "16"}, (ValueError, TypeError), "lora_alpha='16'"),
    "negative dropout": ({"lora_dropout": -0.1}, ValueError, r"lora_dropout=-0.1"),
    "alpha as a switch": ({"lora_alpha": True}, ValueError, "lora_alpha=True"),
    "dropout as text": ({"lora_dropout": "0.1"}, ValueError, r"lora_dropout='0.1'"),
    "rank cut in words": ({"cut_rank": "no"}, TypeError, "cut_rank='no': expected True or False"),
    "half a block": ({"layers_to_transform": 0.5}, TypeError, "layers_to_transform=0.5: expected the index"),
    "a block as a switch": ({"layers_to_transform": True}, TypeError, "layers_to_transform=True: expected the index"),
    "the model itself": ({"modules_to_save": [""]}, ValueError, "the module has no ''"),
    "a head in a head": (
        {"modules_to_save": ["model.layers.0.mlp", "model.layers.0"], "layers_to_transform": 1},
        ValueError,
        r"'model\.layers\.0\.mlp' is a part of 'model\.layers\.0'",
    ),
    "a number to save": ({"modules_to_save": 3}, TypeError, "modules_to_save=3: expected a list of names"),
    "numbers to save": ({"modules_to_save": [3]}, TypeError, r"modules_to_save=\[3\]: expected a list of names"),
    "a prior as a switch": ({"prior": True}, TypeError, "prior"),
    "dropout of all": ({"lora_dropout": 1.0}, ValueError, r"lora_dropout=1.0"),
    "prior": ({"prior": -1.0}, ValueError, r"prior=-1.0: .*positive"),
    "prior of another kind": ({"prior": [1.0]}, TypeError, r"prior=\[1.0\]: expected .*dist.Normal"),
    "prior of another name": ({"prior": "norml"}, ValueError, r"prior='norml' is unknown. Did you mean 'normal'"),
    "prior of another shape": ({"prior": torch.distributions.Normal(torch.zeros(3), 1.0)}, ValueError, r"\(3,\).* 40 "),
    "seed": ({"seed": 1.5}, TypeError, r"seed=1.5: expected an integer"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_a_wrong_call_says_what_is_wrong_and_leaves_the_module_untouched(llm, case, unchanged_rng):
    options, kind, message = WRONG_CALLS[case]
    llm.lm_head.weight.requires_grad_(False)
    before = fingerprint(llm)
    with pytest.raises(kind, match=f"(?s){message}"):
        sp.bayesian_lora(llm, **options)
    assert_untouched(llm, before)
    assert len(sp.bayesian_lora(llm).subspace) == 5  # and the right call still works


@pytest.mark.parametrize("module", ["meta-llama/Llama-3.1-8B", None, TwoLayers], ids=repr)
def test_something_that_is_no_module_is_refused(module):
    with pytest.raises(TypeError, match=r"nn.Module|torch.nn|AutoModel"):
        sp.bayesian_lora(module)


def test_a_module_is_not_adapted_twice(llm):
    blora = sp.bayesian_lora(llm)
    with pytest.raises(ValueError, match=r"already carries a Bayesian LoRA adapter.*unload\(\)"):
        sp.bayesian_lora(llm)
    assert sp.bayesian_lora(blora.unload()).subspace == blora.subspace


def test_what_bayesian_lora_returned_is_not_adapted_again(llm):
    blora = sp.bayesian_lora(llm)
    with pytest.raises((ValueError, TypeError), match=r"already|BayesianLoRA.*unload"):
        sp.bayesian_lora(blora)


def test_a_user_chosen_subset_is_what_the_subspace_says(llm):
    (layer,) = sp.bayesian_lora(llm, target_modules=["down_proj"], layers_to_transform=1, r=3).subspace
    assert layer.name == "model.layers.1.mlp.down_proj"
    assert (layer.rank, layer.in_features, layer.out_features) == (3, 48, 32)
