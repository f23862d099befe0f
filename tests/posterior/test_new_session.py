"""A posterior predicts the same in the next session, where new heads are random again, or it refuses to load."""

import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

import scalabl_pyro as sp

VOCABULARY = len(tiny.VOCABULARY)
EOS = tiny.VOCABULARY.index("<unk>")
SIZE = {"vocab_size": VOCABULARY, "pad_token_id": 0}
ENCODER = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24}
SEQ2SEQ = {"eos_token_id": EOS, "decoder_start_token_id": 0}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
DECODER = {**ENCODER, "num_key_value_heads": 1}
TEXTS = [{**row, "text": row["text"] + " <unk>"} for row in tiny.text_rows(6)]
QUESTIONS = tiny.question_rows(6)

CONFIGS: dict[str, Callable[..., Any]] = {
    "bart": lambda **o: tf.BartConfig(**SIZE, **BART, **SEQ2SEQ, **o),
    "t5": lambda **o: tf.T5Config(**SIZE, **SEQ2SEQ, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, **o),
    "deberta": lambda **o: tf.DebertaV2Config(**SIZE, **ENCODER, pooler_hidden_size=16, **o),
    "distilbert": lambda **o: tf.DistilBertConfig(**SIZE, dim=16, hidden_dim=24, n_heads=2, n_layers=1, **o),
    "bert": lambda **o: tf.BertConfig(**SIZE, **ENCODER, **o),
    "roberta": lambda **o: tf.RobertaConfig(**SIZE, **ENCODER, **o),
    "xlnet": lambda **o: tf.XLNetConfig(**SIZE, d_model=16, n_layer=1, n_head=2, d_inner=24, **o),
    "xlm": lambda **o: tf.XLMConfig(vocab_size=VOCABULARY, pad_index=0, emb_dim=16, n_layers=1, n_heads=2, **o),
    "gpt2": lambda **o: tf.GPT2Config(**SIZE, n_embd=16, n_head=2, n_layer=1, **o),
    "llama": lambda **o: tf.LlamaConfig(**SIZE, **DECODER, **o),
}
LMS = {"xlnet": {}, "gpt2": {}, "llama": {}, "tied": {"tie_word_embeddings": True}, "bert": {"is_decoder": True}}


@cache
def checkpoint(family: str, kind: str = "backbone", **options: Any) -> str:
    """A directory with the weights of a backbone, or of a whole language model."""
    config = CONFIGS[family](**options)
    auto = {"backbone": tf.AutoModel, "masked": tf.AutoModelForMaskedLM, "lm": tf.AutoModelForCausalLM}[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))  # biases are not all 0, norms not all 1
    path = tempfile.mkdtemp()
    model.save_pretrained(path)
    return path


def session(family: str, seed: int, *, kind: str = "backbone", **options: Any) -> nn.Module:
    """The classifier of a checkpoint in a session of its own: what the checkpoint lacks is drawn anew."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tf.AutoModelForSequenceClassification.from_pretrained(
            checkpoint(family, kind), num_labels=3, **options
        ).eval()


def classify() -> sp.Task:
    return sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"])


def learn(llm: nn.Module, task: sp.Task, rows: list[dict], **options: Any) -> sp.Posterior:
    blora = sp.bayesian_lora(llm, **{"r": 1, **options})
    return sp.fit(
        blora,
        task,
        rows,
        num_steps=2,
        batch_size=6,
        lr=0.05,
        optimizer={"warmup": 0},
        draws="shared",  # the only way for XLNet, whose layers get tokens x rows
        progress=False,
    ).posterior


def assert_same_predictions(
    posterior: sp.Posterior, llm: nn.Module, rows: list[dict], path: Any, tol: float = 0
) -> None:
    """A posterior that is saved, and loaded into ``llm``, predicts what it predicted before; ``llm`` comes back."""
    posterior.save_pretrained(path)
    state = {name: tensor.clone() for name, tensor in llm.state_dict().items()}
    loaded = sp.Posterior.from_pretrained(llm, path)
    expected, found = (p.predict(rows, num_draws=2, seed=1, draws_per_pass=1).log_probs for p in (posterior, loaded))
    np.testing.assert_allclose(found, expected, rtol=tol, atol=tol)
    loaded.save_pretrained(path.with_name("again"))
    assert (path.with_name("again") / "scalabl_config.json").exists()
    loaded.blora().unload()
    assert state.keys() == llm.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in llm.state_dict().items())


@pytest.mark.parametrize("family", CONFIGS)
def test_a_classifier_predicts_the_same_with_another_random_head(family, tmp_path):
    posterior = learn(session(family, seed=1), classify(), TEXTS)
    assert_same_predictions(posterior, session(family, seed=2), TEXTS, tmp_path / "p")
    llm = posterior.adapter.module
    backbone = {id(p) for p in llm.base_model.parameters()}
    outside = {name for name, p in llm.named_parameters() if id(p) not in backbone}
    assert {name.split(".")[0] for name in outside} == set(posterior.heads)  # the whole head is trained
    before = session(family, seed=1).state_dict()
    for path, head in posterior.heads.items():
        changed = [not torch.equal(p, before[f"{path}.{name}"]) for name, p in head.named_parameters()]
        assert any(changed), path


def reload(folder: Path) -> None:
    """Load each saved posterior into its checkpoint with another random head; write what it predicts."""
    for family, path in json.loads((folder / "checkpoints.json").read_text()).items():
        torch.manual_seed(2)
        llm = tf.AutoModelForSequenceClassification.from_pretrained(path, num_labels=3).eval()
        loaded = sp.Posterior.from_pretrained(llm, folder / family)
        np.save(folder / f"{family}.npy", loaded.predict(TEXTS, num_draws=2, seed=1, draws_per_pass=1).log_probs)


@pytest.mark.slow  # a process that imports everything
def test_every_family_predicts_the_same_in_a_new_process(tmp_path):
    expected = {}
    for family in CONFIGS:
        posterior = learn(session(family, seed=1), classify(), TEXTS)
        posterior.save_pretrained(tmp_path / family)
        expected[family] = posterior.predict(TEXTS, num_draws=2, seed=1, draws_per_pass=1).log_probs
    (tmp_path / "checkpoints.json").write_text(json.dumps({family: checkpoint(family) for family in CONFIGS}))
    code = f"from test_new_session import Path, reload; reload(Path({str(tmp_path)!r}))"
    here = Path(__file__)
    paths = [str(p) for p in (here.parent, here.parents[1] / "helpers", here.parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=200)
    for family, log_probs in expected.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{family}.npy"), log_probs, err_msg=family)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_head_that_is_kept_frozen_is_saved_too(family, tmp_path):
    options = {"modules_to_save": (), "target_modules": "all-linear"}
    posterior = learn(session(family, seed=1), classify(), TEXTS, **options)
    assert not posterior.heads
    assert_same_predictions(posterior, session(family, seed=2), TEXTS, tmp_path / "p")


@pytest.mark.parametrize("family", ["deberta", "distilbert", "bart"])
def test_a_classifier_in_half_precision_predicts_the_same(family, tmp_path):
    a, b = (session(family, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    assert_same_predictions(learn(a, classify(), TEXTS), b, TEXTS, tmp_path / "p")


@pytest.mark.parametrize("name", LMS)
def test_a_language_model_predicts_the_same(name, tmp_path):
    family = "llama" if name == "tied" else name
    path = checkpoint(family, "lm", **LMS[name])
    load = tf.AutoModelForCausalLM.from_pretrained
    task = sp.MultipleChoice(tiny.tokenizer())
    posterior = learn(load(path).eval(), task, QUESTIONS)
    assert not posterior.adapter.base_tensors
    assert_same_predictions(posterior, load(path).eval(), QUESTIONS, tmp_path / "p")


def test_a_new_pooler_inside_the_backbone_is_saved_and_named(tmp_path):
    with pytest.warns(sp.ScalaBLWarning, match=r"did not hold 'bert\.pooler\.dense\.weight' and 1 more"):
        posterior = learn(session("bert", seed=1, kind="masked"), classify(), TEXTS)
    assert set(posterior.adapter.base_tensors) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert_same_predictions(posterior, session("bert", seed=2, kind="masked"), TEXTS, tmp_path / "p")


def test_a_replaced_module_is_saved(tmp_path):
    def rebuilt(seed: int) -> nn.Module:
        llm = tf.AutoModelForCausalLM.from_pretrained(checkpoint("llama", "lm"))
        llm.lm_head = nn.Linear(16, VOCABULARY)
        nn.init.normal_(llm.lm_head.weight, generator=torch.Generator().manual_seed(seed))
        return llm.eval()

    with pytest.warns(sp.ScalaBLWarning, match=r"did not hold 'lm_head\.weight' and 1 more"):
        posterior = learn(rebuilt(1), sp.MultipleChoice(tiny.tokenizer()), QUESTIONS)
    assert_same_predictions(posterior, rebuilt(2), QUESTIONS, tmp_path / "p")


# what is neither saved nor reproduced -------------------------------------------------------------------------


def tensors(llm: nn.Module) -> list[str]:
    return [name for name, tensor in llm.state_dict().items() if tensor.is_floating_point()]


@dataclass(frozen=True)
class Kind:
    llm: Callable[[], nn.Module]
    task: Callable[[], sp.Task]
    rows: list[dict]


KINDS = {
    "llama": Kind(
        lambda: tf.AutoModelForCausalLM.from_pretrained(checkpoint("llama", "lm")).eval(),
        lambda: sp.MultipleChoice(tiny.tokenizer()),
        QUESTIONS,
    ),
    "bert": Kind(lambda: session("bert", seed=1), classify, TEXTS),
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    kind = KINDS[request.param]
    path = tmp_path_factory.mktemp(request.param) / "p"
    posterior = learn(kind.llm(), kind.task(), kind.rows)
    posterior.save_pretrained(path)
    return kind, path, set(posterior.heads)


def test_a_change_of_any_tensor_is_found(saved):
    kind, path, heads = saved
    plain = kind.llm()
    for name in tensors(plain):
        llm = copy.deepcopy(plain)
        llm.state_dict()[name].add_(0.1)
        if name.split(".")[0] in heads:
            sp.Posterior.from_pretrained(llm, path)
        else:
            with pytest.raises(ValueError, match="Another base model"):
                sp.Posterior.from_pretrained(llm, path)


def test_another_configuration_of_the_base_model_is_found(tmp_path):
    posterior = learn(tiny.causal_lm(), sp.MultipleChoice(tiny.tokenizer()), QUESTIONS)
    posterior.save_pretrained(tmp_path / "p")
    other = tiny.causal_lm(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(ValueError, match="inv_freq"):
        sp.Posterior.from_pretrained(other, tmp_path / "p")
    biased = tiny.causal_lm(attention_bias=True)
    biased.load_state_dict(tiny.causal_lm().state_dict(), strict=False)
    with pytest.raises(ValueError, match=r"_proj\.bias' is in only one of"):
        sp.Posterior.from_pretrained(biased, tmp_path / "p")


SETTINGS = [{"rms_norm_eps": 0.5}, {"hidden_act": "relu"}]


@pytest.mark.parametrize("change", SETTINGS, ids=str)
def test_a_setting_that_changes_the_function_alone_is_named(change, tmp_path):
    posterior = learn(tiny.causal_lm(), sp.MultipleChoice(tiny.tokenizer()), QUESTIONS)
    posterior.save_pretrained(tmp_path / "p")
    ((name, value),) = change.items()
    with pytest.warns(sp.ScalaBLWarning, match=rf"{name}={value!r} \(in training"):
        sp.Posterior.from_pretrained(tiny.causal_lm(**change), tmp_path / "p")
    with warnings.catch_warnings():
        warnings.simplefilter("error", sp.ScalaBLWarning)
        same = tiny.causal_lm(attention_dropout=0.5, use_cache=False, eos_token_id=1)  # no matter for predictions
        sp.Posterior.from_pretrained(same, tmp_path / "p")


class OddHead(nn.Module):
    """A head with buffers, one of which no state dict holds."""

    def __init__(self, seed: int, *, shift: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 3)
        nn.init.normal_(self.out.weight, generator=generator)
        self.register_buffer("saved", torch.randn(3, generator=generator))
        self.register_buffer("unsaved", torch.full((3,), shift), persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(hidden)) + self.saved + self.unsaved


def test_buffers_of_a_head_are_saved_or_compared(tmp_path):
    def model(seed: int, shift: float) -> nn.Module:
        llm = session("llama", seed)
        llm.score = OddHead(seed, shift=shift)
        return llm

    posterior = learn(model(1, 0.0), classify(), TEXTS)
    assert_same_predictions(posterior, model(2, 0.0), TEXTS, tmp_path / "p")
    with pytest.raises(ValueError, match=r"score\.unsaved' differs"):
        sp.Posterior.from_pretrained(model(2, 1.0), tmp_path / "p")


def test_a_plain_checkpoint_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", sp.ScalaBLWarning)
        sp.bayesian_lora(session("roberta", seed=1), r=1)


def test_a_file_that_did_not_save_the_whole_head_warns(tmp_path):
    options = {"modules_to_save": ["classifier"], "target_modules": ["q_lin"]}
    posterior = learn(session("distilbert", seed=1), classify(), TEXTS, **options)
    posterior.save_pretrained(tmp_path / "p")
    file = tmp_path / "p" / "adapter_model.safetensors"
    config = json.loads((tmp_path / "p" / "scalabl_config.json").read_text())
    tensors = load_file(file)
    for name in config.pop("base_tensors"):  # as version 0.1.0 wrote it
        del tensors[f"base.{name}"]
    save_file(tensors, file)
    del config["base_model"]["tensor_probes"], config["base_model"]["quantized"]
    config["files"]["adapter_model.safetensors"] = {
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    (tmp_path / "p" / "scalabl_config.json").write_text(json.dumps(config))
    with pytest.warns(sp.ScalaBLWarning, match=r"did not save the modules \['pre_classifier'\]"):
        sp.Posterior.from_pretrained(session("distilbert", seed=2), tmp_path / "p")
