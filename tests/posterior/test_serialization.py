"""A saved posterior comes back bit for bit, or not at all: what is damaged, foreign or unsafe changes nothing."""

import json
import os
import pickle
import re
import resource
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from pyro.infer import autoguide
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import scalabl_pyro as sp
from scalabl_pyro.data import Example
from scalabl_pyro.guides import AutoFamily, Guide, NormalGuide
from scalabl_pyro.priors import Prior
from scalabl_pyro.storage import directories as storage

CONFIG, ADAPTER, POSTERIOR = "scalabl_config.json", "adapter_model.safetensors", "posterior.safetensors"
QUESTIONS = tiny.question_rows(8)
TEXTS = tiny.text_rows(8)
NUMBERS = [{"text": row["text"], "label": float(row["label"]) - 0.5} for row in TEXTS]
DIM = 40  # latents of the tiny Llama: two blocks x (query, value) + LM head, rank 8 each
Q_PROJ = "model.layers.0.self_attn.q_proj"
LORA_A, LORA_B = f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight"


# posteriors of every kind -----------------------------------------------------------------------------------


def multiple_choice(**options: Any) -> sp.Task:
    return sp.MultipleChoice(tiny.tokenizer(), **options)


def chat_task() -> sp.Task:
    return sp.MultipleChoice(tiny.tokenizer(chat=True), labels="ABCD", template="{question} {choices}", max_length=40)


def classification() -> sp.Task:
    return sp.SequenceClassification(tiny.tokenizer(), classes=["low", "middle", "high"], max_length=12)


def regression() -> sp.Task:
    return sp.Regression(tiny.tokenizer(), noise_scale=0.7)


def unequal_ranks() -> nn.Module:
    return peft.get_peft_model(
        tiny.causal_lm(),
        peft.LoraConfig(
            r=2,
            rank_pattern={"v_proj": 3},
            target_modules=["q_proj", "v_proj"],
            use_rslora=True,
            init_lora_weights=False,
        ),
    )


def flow(blora: sp.BayesianLoRA) -> Guide:
    options: dict[str, Any] = {"hidden_dim": [48], "num_transforms": 2}
    return AutoFamily(blora.prior, autoguide.AutoIAFNormal, init_loc_fn=blora.init_loc, **options)


def low_rank(blora: sp.BayesianLoRA) -> Guide:
    return AutoFamily(blora.prior, autoguide.AutoLowRankMultivariateNormal, init_loc_fn=blora.init_loc, rank=3)


@dataclass(frozen=True)
class Case:
    """How to learn a posterior, and the model that it is loaded into."""

    llm: Callable[[], nn.Module] = tiny.causal_lm
    task: Callable[[], sp.Task] = multiple_choice
    rows: list[dict] = field(default_factory=lambda: QUESTIONS)
    guide: Any = "normal"
    prior: Any = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    base: Callable[[], nn.Module] | None = None

    def learn(self, *, num_steps: int = 2, seed: int = 0) -> sp.Posterior:
        blora = sp.bayesian_lora(self.llm(), prior=self.prior, **self.options)
        fitted = sp.fit(
            blora, self.task(), self.rows, guide=self.guide, num_steps=num_steps, lr=0.05, seed=seed, progress=False
        )
        return fitted.posterior

    def load(self, path: Path) -> sp.Posterior:
        return sp.Posterior.from_pretrained((self.base or self.llm)(), path)


CASES = {
    # families of guide
    "normal": Case(),
    "delta": Case(guide="delta"),
    "AutoDelta": Case(guide=autoguide.AutoDelta),
    "AutoNormal": Case(guide=autoguide.AutoNormal),
    "AutoDiagonalNormal": Case(guide=autoguide.AutoDiagonalNormal),
    "AutoMultivariateNormal": Case(guide=autoguide.AutoMultivariateNormal),
    "AutoLowRankMultivariateNormal": Case(guide=low_rank),
    "AutoIAFNormal": Case(guide=flow),
    # families of prior
    "Laplace prior": Case(prior=dist.Laplace(0.0, 0.5)),
    "StudentT prior": Case(prior=dist.StudentT(4.0, 0.0, 1.0)),
    "Gamma prior": Case(prior=dist.Gamma(2.0, 3.0), guide=autoguide.AutoNormal),
    "LogNormal prior": Case(prior=dist.LogNormal(-0.5, 0.3), guide=autoguide.AutoNormal),
    "Normal prior by latent": Case(prior=dist.Normal(torch.linspace(-1, 1, DIM), 0.5).to_event(1)),
    "MultivariateNormal prior": Case(prior=dist.MultivariateNormal(torch.zeros(DIM), torch.eye(DIM) + 0.1)),
    "prior by layer": Case(prior=lambda layer: dist.Normal(0.0, 1.0 if layer.name == "lm_head" else 0.2)),
    # tasks
    "chat": Case(task=chat_task),
    "classification": Case(llm=tiny.classifier, task=classification, rows=TEXTS),
    "regression": Case(llm=lambda: tiny.classifier("bert", num_labels=1), task=regression, rows=NUMBERS),
    # models
    "gpt2": Case(llm=lambda: tiny.causal_lm("gpt2"), options={"r": 2, "gauge": "free", "lora_alpha": 3}),
    "tied": Case(llm=lambda: tiny.causal_lm("llama-tied")),
    "bfloat16": Case(llm=lambda: tiny.causal_lm(dtype=torch.bfloat16)),
    "unequal ranks": Case(llm=unequal_ranks, base=tiny.causal_lm),
}


def observe(posterior: sp.Posterior, rows: list[dict]) -> dict[str, Tensor]:
    """Everything a user sees of a posterior: its mean, draws, and predictions under them."""
    prediction = posterior.predict(rows[:4], num_draws=2, seed=3)
    fields = ("log_probs", "means", "variances", "replicates", "log_density")
    seen = {n: torch.as_tensor(getattr(prediction, n)).contiguous() for n in fields if hasattr(prediction, n)}
    draws = posterior.sample(3, seed=5).sites
    return seen | {"mean": posterior.mean()} | {f"draws of {name}": value for name, value in draws.items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def look_at_all(root: str) -> None:
    """What the subprocess of ``seen_afresh`` runs: load every posterior under ``root``, save what it shows."""
    for i, case in enumerate(CASES.values()):
        try:
            save_file(observe(case.load(Path(root) / str(i)), case.rows), Path(root) / f"{i}.seen")
        except Exception as error:  # the test of this case fails; the others go on
            (Path(root) / f"{i}.error").write_text(repr(error))


class Saved(dict):
    """Case -> (directory, what the posterior showed before it was saved), learned when first asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> tuple[Path, dict[str, Tensor]]:
        posterior = CASES[name].learn()
        before = observe(posterior, CASES[name].rows)
        path = self.root / str(list(CASES).index(name))
        posterior.save_pretrained(path)
        self[name] = path, before
        return self[name]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Case -> (directory, what the posterior showed before it was saved)."""
    return Saved(tmp_path_factory.mktemp("posteriors"))


@pytest.fixture(scope="module")
def seen_afresh(saved):
    """A function case -> what the loaded posterior shows in a process of its own."""
    for name in CASES:
        with suppress(Exception):  # the test of this case fails; the others go on
            saved[name]
    here, helpers = Path(__file__).parent, Path(tiny.__file__).parent
    code = f"import test_serialization as t; t.look_at_all({str(saved.root)!r})"
    search = os.pathsep.join([str(here), str(helpers), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    def seen(name: str) -> dict[str, Tensor]:
        file = saved.root / f"{list(CASES).index(name)}.seen"
        assert file.exists(), file.with_suffix(".error").read_text()
        return load_file(file)

    return seen


@pytest.fixture
def path(saved, tmp_path):
    """A saved posterior of the tiny Llama, to damage at will."""
    return Path(shutil.copytree(saved["normal"][0], tmp_path / "posterior"))


def copy_of(saved: dict, name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[name][0], tmp_path / "copy"))


def read_config(path: Path) -> dict[str, Any]:
    return json.loads((path / CONFIG).read_text())


def edit_config(path: Path, *keys: str | int, value: Any) -> None:
    """Set one entry; ``...`` removes it."""
    config = read_config(path)
    part = config
    for key in keys[:-1]:
        part = part[key]
    if value is ...:
        del part[keys[-1]]
    else:
        part[keys[-1]] = value
    (path / CONFIG).write_text(json.dumps(config))


def edit_tensors(path: Path, file: str, **changes: Any) -> None:
    """Change tensors by name: a new tensor, a function of the old one, or ``...`` to remove it."""
    tensors = {k: v.clone() for k, v in load_file(path / file).items()}
    for name, change in changes.items():
        if change is ...:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name]).contiguous() if callable(change) else change
    save_file(tensors, path / file)


def snapshot(module: nn.Module) -> dict[str, Any]:
    """All of a module that an untidy error could have changed."""
    modules = dict(module.named_modules())
    return {
        "tensors": {
            name: (t.dtype, tuple(t.shape), t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            for name, t in module.state_dict().items()
        },
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "modules": {name: id(m) for name, m in modules.items()},
        "attributes": {name: sorted(vars(m)) for name, m in modules.items()},
        "training": {name: m.training for name, m in modules.items()},
        "hooks": {
            name: [list(hooks) for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
            for name, m in modules.items()
        },
    }


def assert_same_files(a: Path, b: Path) -> None:
    """The same files with the same bytes."""
    files = [{f.relative_to(root) for f in root.rglob("*") if f.is_file()} for root in (a, b)]
    assert files[0] == files[1]
    for file in files[0]:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


def assert_refused(
    path: Path, message: str, *, llm: nn.Module | None = None, error: Any = ValueError, **kw: Any
) -> None:
    """Loading fails with ``message`` and leaves the model exactly as it was."""
    llm = tiny.causal_lm() if llm is None else llm
    before = snapshot(llm)
    with pytest.raises(error, match=message):
        sp.Posterior.from_pretrained(llm, path, **kw)
    assert snapshot(llm) == before


# round trip -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_loaded_posterior_is_bit_equal(saved, name):
    path, before = saved[name]
    assert_same_bits(observe(CASES[name].load(path), CASES[name].rows), before)


@pytest.mark.parametrize("name", CASES)
def test_loaded_posterior_is_bit_equal_in_a_fresh_process(saved, seen_afresh, name):
    assert_same_bits(seen_afresh(name), saved[name][1])


@pytest.mark.parametrize("name", ["normal", "AutoNormal", "classification", "regression"])
def test_saving_a_loaded_posterior_writes_the_same_files(saved, name, tmp_path):
    path, _ = saved[name]
    CASES[name].load(path).save_pretrained(tmp_path / "again")
    assert_same_files(path, tmp_path / "again")


def test_only_safetensors_and_text_are_written(saved):
    for case in ("normal", "chat", "AutoIAFNormal", "classification"):
        path, _ = saved[case]
        names = {f.name for f in path.rglob("*") if f.is_file()}
        assert {CONFIG, ADAPTER, POSTERIOR} <= names
        assert {Path(n).suffix for n in names} <= {".json", ".safetensors", ".jinja", ".txt"}


def test_learned_noise_and_trained_head_come_back(saved):
    case = CASES["regression"]
    learned, (path, _) = case.learn(), saved["regression"]
    loaded = case.load(path)
    assert learned.task.noise_scale.item() != pytest.approx(0.7, abs=1e-4)
    assert torch.equal(loaded.task.noise_scale, learned.task.noise_scale)
    fresh = case.llm().classifier.state_dict()
    for key, value in learned.heads["classifier"].state_dict().items():
        assert torch.equal(loaded.heads["classifier"].state_dict()[key], value)
        assert not torch.equal(value, fresh[key])


def test_options_of_the_task_come_back(saved):
    task = CASES["chat"].load(saved["chat"][0]).task
    assert task.labels == ("A", "B", "C", "D") and task.template == "{question} {choices}"
    assert task.chat and task.max_length == 40
    assert task.prompt(QUESTIONS[0]) == chat_task().prompt(QUESTIONS[0])
    task = CASES["classification"].load(saved["classification"][0]).task
    assert task.classes == ("low", "middle", "high") and task.max_length == 12


def test_provenance_comes_back(saved):
    provenance = CASES["normal"].load(saved["normal"][0]).provenance
    assert provenance["num_data"] == len(QUESTIONS) and provenance["num_steps"] == 2 and provenance["seed"] == 0


def test_loading_moves_no_random_state(saved, unchanged_rng):
    for name in ("normal", "AutoNormal", "classification"):
        CASES[name].load(saved[name][0])


def test_loaded_posterior_is_frozen_and_the_module_trainable(saved):
    posterior = CASES["classification"].load(saved["classification"][0])
    parts = [posterior.guide, posterior.prior, posterior.task, *posterior.heads.values()]
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    trainable = {n for n, p in posterior.adapter.module.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in n for n in trainable)
    assert all(p.requires_grad for head in posterior.adapter.heads.values() for p in head.parameters())


@pytest.mark.parametrize("name", ["normal", "AutoNormal", "AutoIAFNormal"])
def test_sampling_from_a_loaded_posterior_warns_of_nothing(saved, name):
    posterior = CASES[name].load(saved[name][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.sample(1)


def test_module_rests_at_the_posterior_mean_after_loading(saved):
    llm = tiny.causal_lm()
    posterior = sp.Posterior.from_pretrained(llm, saved["normal"][0])
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        alone = llm(input_ids=ids).logits
        with posterior.draw() as plain:
            assert torch.equal(plain(input_ids=ids).logits, alone)
        with posterior.adapter.disabled():
            assert not torch.equal(llm(input_ids=ids).logits, alone)


def test_unload_after_loading_gives_the_base_model_back(saved):
    llm = tiny.causal_lm()
    before = snapshot(llm)
    assert sp.Posterior.from_pretrained(llm, saved["normal"][0]).blora().unload() is llm
    assert snapshot(llm) == before


def test_training_can_go_on_and_leaves_the_loaded_posterior_alone(saved):
    path, before = saved["normal"]
    posterior = CASES["normal"].load(path)
    onward = sp.fit(posterior.blora(), multiple_choice(), QUESTIONS, num_steps=1, progress=False).posterior
    assert_same_bits(observe(posterior, QUESTIONS), before)
    assert not torch.equal(onward.factors[0][1], posterior.factors[0][1])


def test_float64_guide_keeps_its_precision(tmp_path):
    def guide(blora):
        return NormalGuide(blora.adapter.loc.double() + 1e-12, torch.full((DIM,), 0.1, dtype=torch.float64))

    posterior = Case(guide=guide).learn(num_steps=1)
    posterior.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "p")
    assert_same_bits(observe(loaded, QUESTIONS), observe(posterior, QUESTIONS))


def test_float32_posterior_loads_into_the_bfloat16_copy_of_its_base_model(saved):
    path, before = saved["normal"]
    posterior = sp.Posterior.from_pretrained(tiny.causal_lm().to(torch.bfloat16), path)
    assert torch.equal(posterior.sample(3, seed=5).s, before["draws of s"])
    log_probs = torch.as_tensor(posterior.predict(QUESTIONS[:4], num_draws=2, seed=3).log_probs)
    finite = before["log_probs"].isfinite()
    torch.testing.assert_close(log_probs[finite], before["log_probs"][finite], rtol=0, atol=0.1)


def test_loaded_posterior_does_not_depend_on_its_files(path, saved):
    posterior = sp.Posterior.from_pretrained(tiny.causal_lm(), path)
    for file in (ADAPTER, POSTERIOR):
        with (path / file).open("r+b") as handle:  # in place, as a copy over the file does
            handle.write(bytes((path / file).stat().st_size))
    assert_same_bits(observe(posterior, QUESTIONS), saved["normal"][1])


# into a module that is wrapped already ----------------------------------------------------------------------


def test_wrapped_module_with_the_same_layers_is_shared(saved):
    path, before = saved["normal"]
    llm = tiny.causal_lm()
    blora = sp.bayesian_lora(llm)
    unchanged = snapshot(llm)
    posterior = sp.Posterior.from_pretrained(llm, path)
    assert posterior.adapter is blora.adapter
    assert snapshot(llm) == unchanged
    assert_same_bits(observe(posterior, QUESTIONS), before)


def test_two_posteriors_share_a_module_and_keep_their_own_predictions(saved, tmp_path):
    other = Case(guide="delta").learn(seed=1)
    other.save_pretrained(tmp_path / "other")
    llm = tiny.causal_lm()
    first = sp.Posterior.from_pretrained(llm, saved["normal"][0])
    second = sp.Posterior.from_pretrained(llm, tmp_path / "other")
    for _ in range(2):
        assert_same_bits(observe(first, QUESTIONS), saved["normal"][1])
        assert_same_bits(observe(second, QUESTIONS), observe(other, QUESTIONS))


@pytest.mark.parametrize("guide", [autoguide.AutoDelta, autoguide.AutoNormal, autoguide.AutoMultivariateNormal])
def test_posteriors_of_one_family_do_not_mix_in_one_process(guide, tmp_path):
    # The first steps of Adam go by the sign of the gradient, which can be the same for both seeds.
    learned = [Case(guide=guide).learn(seed=seed, num_steps=6) for seed in (0, 1)]
    shown = [observe(posterior, QUESTIONS) for posterior in learned]
    assert not torch.equal(shown[0]["mean"], shown[1]["mean"])
    for i, posterior in enumerate(learned):
        posterior.save_pretrained(tmp_path / str(i))
    loaded = [sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / str(i)) for i in (0, 1)]
    for posterior, before in zip(loaded, shown, strict=True):
        assert_same_bits(observe(posterior, QUESTIONS), before)


@pytest.mark.parametrize(
    "options",
    [{"r": 4}, {"lora_alpha": 8}, {"target_modules": ["q_proj"]}, {"layers_to_transform": [1]}],
    ids=["rank", "scaling", "targets", "blocks"],
)
def test_wrapped_module_with_other_layers_is_refused(path, options):
    llm = tiny.causal_lm()
    blora = sp.bayesian_lora(llm, **options)
    number = f"Bayesian LoRA on {len(blora.subspace)} layers that are not those of"
    assert_refused(path, rf"{number}.*call \.unload\(\) first, or load into another copy", llm=llm)
    assert blora(input_ids=torch.tensor([[3, 4]]), s=torch.ones(blora.subspace.dim)).logits.isfinite().all()


def test_wrapped_module_with_another_gauge_is_refused(path):
    llm = tiny.causal_lm()
    sp.bayesian_lora(llm, gauge="free")
    assert_refused(path, "gauge.*free.*unit_rows|gauge.*unit_rows.*free", llm=llm)


def test_wrapped_module_with_other_trained_heads_is_refused(saved):
    llm = tiny.classifier()
    sp.bayesian_lora(llm, modules_to_save=[])
    assert_refused(saved["classification"][0], r"trained heads are \['score'\], the module trains \[\]", llm=llm)


@pytest.mark.parametrize("file", [ADAPTER, POSTERIOR])
def test_failed_load_leaves_a_wrapped_module_alone(path, file):
    llm = tiny.causal_lm()
    sp.bayesian_lora(llm)
    edit_tensors(path, file, surplus=torch.zeros(1))
    assert_refused(path, "unexpected", llm=llm)


@pytest.mark.parametrize("wrapped", [True, False], ids=["in a PeftModel", "injected"])
def test_module_with_plain_peft_layers_is_refused(path, wrapped):
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    llm = tiny.causal_lm()
    if wrapped:
        llm = peft.get_peft_model(llm, config)
    else:
        peft.inject_adapter_in_model(config, llm, "other")
    assert_refused(path, "already carries (a )?PEFT", llm=llm)


# into another base model ------------------------------------------------------------------------------------


def same_embeddings_other_blocks() -> nn.Module:
    """As a further training of the blocks leaves a model: instruction-tuned ones share embeddings with their base."""
    llm, other = tiny.causal_lm(), tiny.causal_lm(seed=1)
    llm.model.layers.load_state_dict(other.model.layers.state_dict())
    return llm


@pytest.mark.parametrize(
    ("llm", "message"),
    [
        (lambda: tiny.causal_lm("gpt2"), rf"Another base model: it has no linear layer '{Q_PROJ}'"),
        (tiny.classifier, "Another base model: it has no linear layer 'lm_head'"),
        (lambda: tiny.causal_lm(num_hidden_layers=1), r"no linear layer 'model\.layers\.1.*Did you mean"),
        (lambda: tiny.causal_lm(hidden_size=64), rf"'{Q_PROJ}' is 32 x 64 \(out x in\), but .* learned on 32 x 32"),
        (
            lambda: tiny.causal_lm("mistral"),
            "class is 'MistralForCausalLM', .* learned on a model with 'LlamaForCausalLM'",
        ),
        (
            lambda: tiny.causal_lm(seed=1),
            "weights of the embeddings differ from those on which the posterior was learned",
        ),
        (same_embeddings_other_blocks, "Another base model"),
    ],
    ids=["other family", "other head", "fewer blocks", "wider", "other class", "other weights", "other block weights"],
)
def test_another_base_model_is_refused(path, llm, message):
    assert_refused(path, message, llm=llm())


def test_another_vocabulary_is_refused(tmp_path):
    options = {"target_modules": ["q_proj"]}  # without the LM head, only the embeddings tell
    Case(options=options).learn(num_steps=1).save_pretrained(tmp_path / "p")
    llm = tiny.causal_lm()
    llm.resize_token_embeddings(len(tiny.VOCABULARY) + 5, mean_resizing=False)
    assert_refused(tmp_path / "p", r"embedding_shape is \[64, 32\], .* learned on a model with \[59, 32\]", llm=llm)


def test_another_number_of_classes_is_refused(saved):
    wider = tiny.classifier(num_labels=4)
    assert_refused(saved["classification"][0], r"head 'score': 'weight' is \(3, 32\), expected \(4, 32\)", llm=wider)


# damaged configuration --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"format_version": 1, "layers": [',
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"format_version": ' + b"1" * 5000 + b"}",
        b'["format_version", 1]',
        b"null",
    ],
    ids=["empty", "cut", "not text", "nested", "endless number", "list", "null"],
)
def test_configuration_that_is_no_json_object_is_refused(path, content):
    (path / CONFIG).write_bytes(content)
    assert_refused(path, rf"{CONFIG} is damaged")


def test_oversized_configuration_is_refused_unread(path):
    with (path / CONFIG).open("r+b") as file:
        file.truncate(2**30)
    assert_refused(path, rf"{CONFIG} has {2**30} bytes, more than the {2**23} that are allowed here")


@pytest.mark.parametrize("version", [2, 10**9, 0, "1", None, ...], ids=repr)
def test_another_format_version_is_refused(path, version):
    edit_config(path, "format_version", value=version)
    shown = None if version is ... else version
    assert_refused(path, rf"{CONFIG} has format_version {shown!r}; this version of scalabl_pyro reads 1")


def auto(options: Any) -> dict[str, Any]:
    return {"family": "auto", "class": "AutoFamily", "options": options}


WRONG = {
    "layers-null": (("layers",), None, "'layers' must be of type list, found NoneType"),
    "layers-missing": (("layers",), ..., "'layers' must be of type list, found NoneType"),
    "layers-object": (("layers",), {}, "'layers' must be of type list, found dict"),
    "layers-empty": (("layers",), [], "'layers' must be a list of objects"),
    "layers-numbers": (("layers",), [1, 2], "'layers' must be a list of objects"),
    "name-number": (("layers", 0, "name"), 7, "'name' must be of type str, found int"),
    "name-empty": (("layers", 0, "name"), "", "does not hold the tensors that its configuration asks for"),
    "rank-text": (("layers", 0, "rank"), "8", "'rank' must be of type int, found str"),
    "rank-bool": (("layers", 0, "rank"), True, "'rank' must be of type int, found bool"),
    "rank-fraction": (("layers", 0, "rank"), 8.5, "'rank' must be of type int, found float"),
    "rank-zero": (("layers", 0, "rank"), 0, "ranks and sizes of layers must be positive"),
    "rank-negative": (
        ("layers", 0, "rank"),
        -8,
        "ranks and sizes of layers must be positive",
    ),
    "rank-huge": (("layers", 0, "rank"), 10**12, f"r={10**12} is larger than layer '{Q_PROJ}'"),
    "rank-other": (("layers", 0, "rank"), 4, rf"lora_A of '{Q_PROJ}' is \(8, 32\), expected \(4, 32\)"),
    "in_features-other": (("layers", 0, "in_features"), 31, "is 32 x 32 .*, but .* learned on 32 x 31"),
    "scaling-null": (("layers", 0, "scaling"), None, "'scaling' must be of type float, found NoneType"),
    "scaling-nan": (("layers", 0, "scaling"), float("nan"), "scaling.*finite"),
    "scaling-infinite": (("layers", 0, "scaling"), float("inf"), "scaling.*finite"),
    "gauge-null": (("gauge",), None, "'gauge' must be of type str, found NoneType"),
    "gauge-unknown": (("gauge",), "unit_row", "gauge='unit_row' is unknown. Did you mean 'unit_rows'"),
    "heads-null": (("heads",), None, "'heads' must be of type list, found NoneType"),
    "heads-unknown": (("heads",), ["lm_hea"], "no 'lm_hea'. Did you mean 'lm_head'"),
    "heads-numbers": (("heads",), [3], "heads|no '3'"),
    "heads-untrained": (("heads",), ["lm_head"], "head 'lm_head'"),
    "heads-parameterless": (("heads",), ["model.rotary_emb"], r"model\.rotary_emb"),
    "base_model-null": (("base_model",), None, "'base_model' must be of type dict, found NoneType"),
    "base_model-empty": (("base_model",), {}, "Another base model: its class is 'LlamaForCausalLM'"),
    "probes-missing": (("base_model", "probes"), ..., "probes"),
    "probes-null": (("base_model", "probes"), None, "probes"),
    "probes-text": (("base_model", "probes"), "abc", "probes"),
    "probes-texts": (("base_model", "probes"), ["a", "b"], "probes"),
    "probes-ragged": (("base_model", "probes"), [1.0, [2.0]], "probes"),
    "probes-empty": (("base_model", "probes"), [], "Another base model"),
    "probes-infinite": (("base_model", "probes"), [float("inf")] * 64, "Another base model"),
    "guide-null": (("guide",), None, "'guide' must be of type dict, found NoneType"),
    "guide-options": (
        ("guide",),
        {"family": "auto", "options": None},
        "'options' must be of type dict, found NoneType",
    ),
    "guide-delta": (("guide", "family"), "delta", r"guide does not hold .* unexpected \['scale_unconstrained'\]"),
    "guide-unknown": (("guide", "family"), "nrmal", "'nrmal'.*Did you mean 'normal'"),
    "guide-list": (("guide", "family"), ["normal"], "'family' must be of type str, found list"),
    "auto-none": (("guide",), auto({}), "pyro.infer.autoguide has no class"),
    "auto-module": (("guide",), auto({"class": "guides"}), "pyro.infer.autoguide has no class"),
    "auto-function": (("guide",), auto({"class": "init_to_value"}), "pyro.infer.autoguide has no class"),
    "auto-laplace": (
        ("guide",),
        auto({"class": "AutoLaplaceApproximation"}),
        "needs more than",
    ),
    "auto-option": (("guide",), auto({"class": "AutoNormal", "spread": 1}), "spread"),
    "auto-model": (("guide",), auto({"class": "AutoNormal", "model": "m"}), "model"),
    "auto-init": (
        ("guide",),
        auto({"class": "AutoNormal", "init_loc_fn": "m"}),
        "init_loc_fn",
    ),
    "auto-scale": (("guide",), auto({"class": "AutoNormal", "init_scale": "x"}), "init_scale"),
    "auto-rank": (
        ("guide",),
        auto({"class": "AutoLowRankMultivariateNormal", "rank": 10**15}),
        "rank",
    ),
    "prior-null": (("prior",), None, "'prior' must be of type dict, found NoneType"),
    "prior-number": (("prior", "family"), 3, "'family' must be of type str, found int"),
    "prior-unknown": (("prior", "family"), "Gaussian", "'Gaussian' with parameters .* is not a known prior"),
    "prior-module": (("prior", "family"), "constraints", "'constraints' with parameters .* is not a known prior"),
    "prior-dunder": (("prior", "family"), "__builtins__", "'__builtins__' with parameters .* is not a known prior"),
    "prior-base": (("prior",), {"family": "Distribution", "parameters": []}, "is not a known prior|prior"),
    "prior-other": (("prior", "family"), "Gamma", r"'Gamma' with parameters \['loc', 'scale'\] is not a known prior"),
    "prior-parameters": (("prior", "parameters"), "loc", "'parameters' must be of type list, found str"),
    "prior-surplus": (("prior", "parameters"), ["loc"], r"missing \[\], unexpected \['scale'\]"),
    "prior-twice": (("prior", "parameters"), ["loc", "loc"], "unexpected"),
    "prior-unhashable": (("prior", "parameters"), [["loc"], {}], "is not a known prior"),
    "task-null": (("task",), None, "'task' must be of type dict, found NoneType"),
    "task-class": (("task", "class"), None, "'class' must be of type str, found NoneType"),
    "task-options": (("task", "options"), [], "'options' must be of type dict, found list"),
    "task-option": (("task", "options", "labls"), ["A"], r"unknown options of MultipleChoice: \['labls'\]. .*'labels'"),
    "labels-number": (("task", "options", "labels"), 5, "labels"),
    "labels-numbers": (("task", "options", "labels"), [1, 2], "labels"),
    "template-number": (("task", "options", "template"), 5, "template"),
    "template-null": (("task", "options", "template"), None, "template"),
    "max_length-text": (("task", "options", "max_length"), "long", "max_length"),
    "provenance-null": (("provenance",), None, "'provenance' must be of type dict, found NoneType"),
    "provenance-list": (("provenance",), [], "'provenance' must be of type dict, found list"),
}


@pytest.mark.parametrize(("keys", "value", "message"), WRONG.values(), ids=WRONG)
def test_wrong_entry_of_the_configuration_is_named_and_changes_nothing(path, keys, value, message):
    edit_config(path, *keys, value=value)
    assert_refused(path, message)


@pytest.mark.parametrize(
    ("name", "keys", "value", "message"),
    [
        ("classification", ("task", "options", "classes"), 3, "classes"),
        ("classification", ("task", "options", "classes"), ["one"], "name at least two classes"),
        ("classification", ("task", "options", "classes"), ..., "classes"),
        ("classification", ("heads",), [], "score"),
        ("regression", ("task", "options", "noise_scale"), "loud", "noise_scale"),
    ],
)
def test_wrong_option_of_a_text_task_is_named_and_changes_nothing(saved, tmp_path, name, keys, value, message):
    path = copy_of(saved, name, tmp_path)
    edit_config(path, *keys, value=value)
    assert_refused(path, message, llm=CASES[name].llm())


def test_layer_listed_twice_is_refused(path):
    edit_config(path, "layers", value=[*(layers := read_config(path)["layers"]), layers[0]])
    assert_refused(path, "a layer is listed twice")


def test_layer_left_out_is_refused(path):
    edit_config(path, "layers", value=read_config(path)["layers"][1:])
    assert_refused(path, rf"{ADAPTER} does not hold .* unexpected \['{LORA_A}', '{LORA_B}'\]")


# damaged tensors --------------------------------------------------------------------------------------------


NAN, INF = float("nan"), float("inf")
TENSORS = {
    "A missing": (ADAPTER, {LORA_A: ...}, rf"missing \['{LORA_A}'\], unexpected \[\]"),
    "A surplus": (
        ADAPTER,
        {"model.norm.weight": torch.ones(32)},
        r"missing \[\], unexpected \['model\.norm\.weight'\]",
    ),
    "head surplus": (ADAPTER, {"heads.score.weight": torch.ones(3, 32)}, r"unexpected \['heads\.score\.weight'\]"),
    "A shape": (ADAPTER, {LORA_A: lambda t: t[:4]}, rf"lora_A of '{Q_PROJ}' is \(4, 32\), expected \(8, 32\)"),
    "A transposed": (ADAPTER, {LORA_A: lambda t: t.T}, rf"lora_A of '{Q_PROJ}' is \(32, 8\), expected \(8, 32\)"),
    "B shape": (ADAPTER, {LORA_B: torch.zeros(32, 1)}, rf"lora_B of '{Q_PROJ}' is \(32, 1\), expected \(32, 8\)"),
    "A integers": (ADAPTER, {LORA_A: lambda t: t.long()}, rf"'{LORA_A}'|lora_A of '{Q_PROJ}'"),
    "A complex": (ADAPTER, {LORA_A: lambda t: t.to(torch.complex64)}, rf"'{LORA_A}'|lora_A of '{Q_PROJ}'"),
    "A NaN": (ADAPTER, {LORA_A: lambda t: t.fill_(NAN)}, f"tensor '{LORA_A}' holds values that are not finite"),
    "B one infinity": (
        ADAPTER,
        {LORA_B: lambda t: t.index_put_((torch.tensor(3), torch.tensor(1)), torch.tensor(-INF))},
        f"tensor '{LORA_B}' holds values that are not finite",
    ),
    "loc missing": (POSTERIOR, {"guide.loc": ...}, r"guide does not hold .*missing \['loc'\]"),
    "loc shape": (POSTERIOR, {"guide.loc": torch.zeros(39)}, r"guide: 'loc' is \(39,\), expected \(40,\)"),
    "loc integers": (POSTERIOR, {"guide.loc": lambda t: t.long()}, "guide.*'loc'"),
    "loc infinite": (POSTERIOR, {"guide.loc": lambda t: t + INF}, "'guide.loc' holds values that are not finite"),
    "loc in half precision": (
        POSTERIOR,
        {"guide.loc": lambda t: t.half()},
        r"guide: '\w+' is torch\.float\w+ and '\w+' is torch\.float\w+: both must be saved in one precision",
    ),
    "guide surplus": (POSTERIOR, {"guide.extra": torch.zeros(1)}, r"guide does not hold .*unexpected \['extra'\]"),
    "foreign part": (POSTERIOR, {"optimizer.step": torch.zeros(1)}, r"unexpected \['optimizer\.step'\]"),
    "task surplus": (
        POSTERIOR,
        {"task.label_ids": torch.zeros(26)},
        r"task does not .*unexpected \['label_ids'\]",
    ),
    "prior missing": (POSTERIOR, {"prior.scale": ...}, r"missing \['scale'\]"),
    "prior shape": (POSTERIOR, {"prior.scale": torch.ones(39)}, "prior.*39"),
    "prior not positive": (POSTERIOR, {"prior.scale": lambda t: -t}, "prior.*scale"),
    "prior NaN": (POSTERIOR, {"prior.scale": lambda t: t.fill_(NAN)}, "'prior.scale' holds values that are not finite"),
}


@pytest.mark.parametrize(("file", "changes", "message"), TENSORS.values(), ids=TENSORS)
def test_wrong_tensor_is_named_and_changes_nothing(path, file, changes, message):
    edit_tensors(path, file, **changes)
    assert_refused(path, message)


def test_prior_without_parameters_is_refused(path):
    edit_config(path, "prior", "parameters", value=[])
    edit_tensors(path, POSTERIOR, **{"prior.loc": ..., "prior.scale": ...})
    assert_refused(path, "prior")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads.score.weight": ...}, r"head 'score' does not hold .*missing \['weight'\]"),
        ({"heads.score.bias": torch.zeros(3)}, r"head 'score' does not hold .*unexpected \['bias'\]"),
        ({"heads.other.weight": torch.zeros(3, 32)}, r"unexpected \['heads\.other\.weight'\]"),
        ({"heads.score.weight": torch.full((3, 32), NAN)}, "'heads.score.weight' holds values that are not finite"),
    ],
    ids=["missing", "surplus", "foreign", "NaN"],
)
def test_wrong_tensor_of_a_trained_head_is_named_and_changes_nothing(saved, tmp_path, change, message):
    path = copy_of(saved, "classification", tmp_path)
    edit_tensors(path, ADAPTER, **change)
    assert_refused(path, message, llm=tiny.classifier())


def header(size: int, text: bytes = b"") -> Callable[[bytes], bytes]:
    return lambda content: size.to_bytes(8, "little") + (text or content[8:])


BROKEN = {
    "empty": lambda content: b"",
    "cut in the header": lambda content: content[:40],
    "cut in the data": lambda content: content[:-4],
    "too long": lambda content: content + b"\0" * 4,
    "header larger than the file": header(10**6),
    "header of a terabyte": header(2**40),
    "header that overflows": header(2**64 - 1),
    "header that is not JSON": header(8, b"not json"),
    "header of another type": header(8, b'["loc"] '),
    "zip file": lambda content: b"PK\x03\x04" + content,
    "pickle": lambda content: pickle.dumps({"guide.loc": [1.0, 2.0]}),
}


@pytest.mark.parametrize("file", [ADAPTER, POSTERIOR])
@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_broken_tensor_file_is_named_and_changes_nothing(path, file, damage):
    (path / file).write_bytes(damage((path / file).read_bytes()))
    assert_refused(path, rf"{file} is damaged: it is not a whole safetensors file")


@pytest.mark.parametrize("file", [CONFIG, ADAPTER, POSTERIOR])
def test_missing_file_is_named(path, file):
    (path / file).unlink()
    assert_refused(path, file, error=FileNotFoundError)


@pytest.mark.parametrize("name", ["nowhere", "a/hub-name"])
def test_path_that_does_not_exist_is_named(tmp_path, name):
    message = rf"{name} holds no {CONFIG}: it is not a directory that save_pretrained\(\) wrote"
    assert_refused(tmp_path / name, message, error=FileNotFoundError)


@pytest.mark.parametrize("relative", [False, True])
def test_missing_tokenizer_is_named(path, relative, monkeypatch):
    shutil.rmtree(path / "tokenizer")
    monkeypatch.chdir(path.parent)
    given = Path(path.name) if relative else path  # "posterior/tokenizer" could be the name of a hub repository
    with pytest.raises((ValueError, FileNotFoundError), match=r"tokenizer.* (is missing|damaged)"):
        sp.Posterior.from_pretrained(tiny.causal_lm(), given)


def test_damaged_tokenizer_is_named_and_changes_nothing(path):
    (path / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    assert_refused(path, "tokenizer")


# classes of the user's own ----------------------------------------------------------------------------------


class HalfNoise(Guide):
    """A family the library does not know."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(dim))

    def forward(self, *args, **kwargs):
        return pyro.sample("s", dist.Normal(self.loc, 0.5).to_event(1))

    def mean(self):
        return {"s": self.loc}


class WiderNormal(NormalGuide):
    """A subclass of a built-in family that samples something else."""

    def forward(self, *args, **kwargs):
        return pyro.sample("s", dist.Normal(self.loc, 3 * self.scale).to_event(1))


class Horseshoe(Prior):
    """A prior with a latent of its own."""

    def forward(self):
        scale = pyro.sample("global_scale", dist.HalfCauchy(torch.tensor(1.0)))
        return pyro.sample("s", dist.Normal(torch.zeros(DIM), scale.unsqueeze(-1)).to_event(1))


class ShortAnswer(sp.MultipleChoice):
    """A task with a parameter of its own."""

    def __init__(self, tokenizer, **options):
        super().__init__(tokenizer, **options)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def outputs(self, llm, batch, s):
        return super().outputs(llm, batch, s) / self.temperature


class MyAutoNormal(autoguide.AutoNormal):
    """An AutoGuide that pyro.infer.autoguide lacks."""


OWN = {
    "guide": (Case(guide=lambda blora: HalfNoise()), HalfNoise),
    "prior": (Case(prior=Horseshoe(), guide=autoguide.AutoNormal), Horseshoe),
    "task": (Case(task=lambda: ShortAnswer(tiny.tokenizer())), lambda: ShortAnswer(tiny.tokenizer())),
}


@pytest.mark.parametrize("part", OWN)
def test_class_of_ones_own_is_asked_for_by_name_and_then_loaded(part, tmp_path):
    case, make = OWN[part]
    posterior = case.learn()
    posterior.save_pretrained(tmp_path / "p")
    name = type(getattr(posterior, part)).__name__
    message = rf"learned with the {part} '{name}': pass from_pretrained\(\.\.\., {part}={name}\(\.\.\.\)\)"
    assert_refused(tmp_path / "p", message)
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "p", **{part: make()})
    assert_same_bits(observe(loaded, QUESTIONS), observe(posterior, QUESTIONS))


class Plain(nn.Module):
    """Neither Hugging Face nor text: no embeddings, no configuration."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 3)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, input_ids, attention_mask):
        return self.out(self.hidden(input_ids.float()).tanh())


class Points(sp.Task):
    """Class of a point on a grid."""

    def encode(self, row):
        return Example({"input_ids": row["x"]}, row["y"])

    def outputs(self, llm, batch, s):
        return llm(**batch.inputs, s=s)

    def likelihood(self, outputs, batch):
        return dist.Categorical(logits=outputs)


def test_module_without_embeddings_and_task_without_tokenizer_are_saved_too(tmp_path):
    rows = [{"x": [i % 3, i % 2, i // 4, 1], "y": i % 3} for i in range(8)]
    blora = sp.bayesian_lora(Plain(0), r=2, target_modules="all-linear")
    posterior = sp.fit(blora, Points(), rows, num_steps=2, progress=False).posterior
    posterior.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(Plain(0), tmp_path / "p", task=Points())
    assert_same_bits(observe(loaded, rows), observe(posterior, rows))
    assert_refused(tmp_path / "p", "Another base model", llm=Plain(1), task=Points())


def test_subclass_of_a_family_is_not_loaded_as_its_parent(tmp_path):
    def guide(blora):
        return WiderNormal(blora.adapter.loc, torch.full((DIM,), 0.1))

    posterior = Case(guide=guide).learn()
    posterior.save_pretrained(tmp_path / "p")
    assert_refused(tmp_path / "p", "guide 'WiderNormal'")


def test_autoguide_of_ones_own_is_refused_with_a_way_out(tmp_path):
    Case(guide=MyAutoNormal).learn(num_steps=1).save_pretrained(tmp_path / "p")
    assert_refused(tmp_path / "p", r"MyAutoNormal.*guide=")


@pytest.mark.parametrize(("part", "value"), [("guide", "normal"), ("prior", 1.0), ("task", "MultipleChoice")])
def test_override_of_a_wrong_type_is_named(path, part, value):
    assert_refused(path, rf"{part}={value!r}", error=(TypeError, ValueError), **{part: value})


def test_override_of_a_wrong_shape_is_named(path):
    too_small = NormalGuide(torch.zeros(4), torch.ones(4))
    assert_refused(path, r"guide: .* is \(40,\), expected \(4,\)", guide=too_small)


def test_failed_load_leaves_overrides_alone(path):
    guide, task = NormalGuide(torch.zeros(DIM), torch.ones(DIM)), ShortAnswer(tiny.tokenizer())
    before = snapshot(guide), snapshot(task)
    assert_refused(path, "task does not hold", guide=guide, task=task)
    assert (snapshot(guide), snapshot(task)) == before


def test_override_is_copied_and_stays_trainable(tmp_path):
    case, make = OWN["task"]
    case.learn().save_pretrained(tmp_path / "p")
    own = make()
    before = snapshot(own)
    posterior = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "p", task=own)
    assert not torch.equal(posterior.task.temperature, torch.tensor(2.0))
    assert snapshot(own) == before


# nothing in the directory is executed -----------------------------------------------------------------------


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """A file that comes to exist when planted code runs."""
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Planted(marker)))
    assert marker.exists(), "the trap does not work"
    marker.unlink()
    return marker


PICKLES = [
    "pytorch_model.bin",
    "adapter_model.bin",
    "training_args.bin",
    "posterior.bin",
    "scalabl_config.pkl",
    "rng.pt",
]


@pytest.mark.parametrize("place", [".", "tokenizer"])
def test_planted_pickles_are_never_read(path, saved, marker, place, monkeypatch):
    for name in PICKLES:
        (path / place / name).write_bytes(pickle.dumps(Planted(marker)))

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for module, name in [(torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")]:
        monkeypatch.setattr(module, name, refuse)
    posterior = sp.Posterior.from_pretrained(tiny.causal_lm(), path)
    assert not marker.exists()
    assert_same_bits(observe(posterior, QUESTIONS), saved["normal"][1])


@pytest.mark.parametrize("file", [ADAPTER, POSTERIOR])
def test_pickle_is_no_stand_in_for_a_missing_file(path, marker, file):
    (path / file).unlink()
    for name in [*PICKLES, file.replace(".safetensors", ".bin"), file.replace(".safetensors", ".pt")]:
        (path / name).write_bytes(pickle.dumps(Planted(marker)))
    assert_refused(path, f"{file} is missing", error=FileNotFoundError)
    assert not marker.exists()


@pytest.mark.parametrize("file", [ADAPTER, POSTERIOR])
def test_pickle_under_the_name_of_a_tensor_file_is_never_executed(path, marker, file):
    (path / file).write_bytes(pickle.dumps(Planted(marker)))
    assert_refused(path, f"{file} is damaged")
    assert not marker.exists()


def test_code_beside_the_tokenizer_is_never_executed(path, marker):
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n"
    for place in (path, path / "tokenizer"):
        (place / "evil.py").write_text(code)
    file = path / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
    file.write_text(json.dumps({**config, "auto_map": auto_map, "trust_remote_code": True}))
    (path / "tokenizer" / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    try:
        sp.Posterior.from_pretrained(tiny.causal_lm(), path)
    except (ValueError, OSError):
        pass  # refusing is as good as ignoring
    assert not marker.exists()


@pytest.mark.parametrize(
    "keys",
    [("layers", 0, "name"), ("heads",), ("task", "class"), ("guide",), ("prior", "family"), ("gauge",)],
    ids=lambda keys: str(keys[0]),
)
@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "__class__.__init__"])
def test_names_in_the_configuration_cannot_lead_outside(path, keys, name):
    value = {("heads",): [name], ("guide",): {"family": None, "class": name}}.get(keys, name)
    edit_config(path, *keys, value=value)
    before = sorted(path.parent.rglob("*"))
    assert_refused(path, re.escape(name))
    assert sorted(path.parent.rglob("*")) == before


# saving -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def posterior(saved):
    """A posterior to save."""
    return CASES["normal"].load(saved["normal"][0])


def contents(root: Path) -> dict[str, bytes | None]:
    return {str(f.relative_to(root)): f.read_bytes() if f.is_file() else None for f in root.rglob("*")}


@pytest.mark.parametrize("kind", ["new", "nested", "empty directory", "text"])
def test_posterior_is_saved_at_a_new_path(posterior, tmp_path, kind):
    path = tmp_path / "a" / "b" if kind == "nested" else tmp_path / "a"
    if kind == "empty directory":
        path.mkdir()
    posterior.save_pretrained(str(path) if kind == "text" else path)
    assert sorted(f.name for f in path.iterdir()) == sorted([CONFIG, ADAPTER, POSTERIOR, "tokenizer"])
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    assert [f.name for f in path.parent.iterdir()] == [path.name]


def test_path_relative_to_the_working_directory_works(posterior, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    posterior.save_pretrained("here")
    assert torch.equal(sp.Posterior.from_pretrained(tiny.causal_lm(), "here").mean(), posterior.mean())


def test_saving_over_a_posterior_replaces_it_whole(saved, path):
    (path / "rest_of_an_older_format.safetensors").write_bytes(b"old")
    other = CASES["delta"].load(saved["delta"][0])
    other.save_pretrained(path)
    assert_same_files(path, saved["delta"][0])
    assert [f.name for f in path.parent.iterdir()] == [path.name]


def test_posterior_can_be_saved_over_the_files_it_was_loaded_from(path, saved):
    posterior = sp.Posterior.from_pretrained(tiny.causal_lm(), path)
    posterior.save_pretrained(path)
    assert_same_bits(observe(posterior, QUESTIONS), saved["normal"][1])
    assert_same_files(path, saved["normal"][0])


@pytest.mark.parametrize("kind", ["directory", "hidden file", "model", "file"])
def test_what_is_no_posterior_is_never_overwritten(posterior, tmp_path, kind):
    path = tmp_path / "thesis"
    if kind == "file":
        path.write_text("years of work")
    else:
        path.mkdir()
        name = {"directory": "chapter.tex", "hidden file": ".git", "model": "adapter_model.safetensors"}[kind]
        (path / name).write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(
        FileExistsError, match=rf"{path} exists and does not hold a posterior: give the path of a new directory"
    ):
        posterior.save_pretrained(path)
    assert contents(tmp_path) == before


def fail_at(call: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, which raises at its ``call``-th call as a full disk does."""
    calls = iter(range(1, 1000))

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    return replacement


#: Where a save touches the disk, and how often when it replaces a posterior.
FAULTS = {
    "write": (storage, "write_file", 3),  # two tensor files and the configuration
    "create": (os, "mkdir", 4),  # the parent, the hidden and the new directory, and that of the tokenizer
    "open": (os, "open", 14),  # a marker, three files to write, five and three directories to sync, two to remove
    "sync": (os, "fsync", 11),  # three files written, five files and two directories, and the parent
    "exchange": (storage, "exchange", 1),
}


@pytest.mark.parametrize(("kind", "call"), [(k, n) for k, (_, _, calls) in FAULTS.items() for n in range(1, calls + 1)])
def test_save_that_fails_at_any_call_keeps_the_old_posterior_and_no_litter(saved, path, kind, call, monkeypatch):
    owner, name, _ = FAULTS[kind]
    other, before = CASES["delta"].load(saved["delta"][0]), contents(path.parent)
    failed = False
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_at(call, getattr(owner, name)))
        try:
            other.save_pretrained(path)
        except OSError as error:
            assert "No space left" in str(error)
            failed = True
    assert [f.name for f in path.parent.iterdir()] == [path.name]
    if failed:
        assert contents(path.parent) == before
        assert_same_bits(observe(CASES["normal"].load(path), QUESTIONS), saved["normal"][1])
    else:  # a directory whose names could not be brought to the disk, one not removed at once, a parent that exists
        assert kind in ("sync", "open") or (kind, call) == ("create", 1)
        assert_same_files(path, saved["delta"][0])


def test_the_counts_of_calls_to_fail_at_are_complete(saved, path, monkeypatch):
    other = CASES["delta"].load(saved["delta"][0])
    for owner, name, calls in FAULTS.values():
        count = []
        with monkeypatch.context() as patch:
            original = getattr(owner, name)
            patch.setattr(owner, name, lambda *a, _f=original, _c=count, **k: (_c.append(1), _f(*a, **k))[1])
            other.save_pretrained(path)
        assert len(count) == calls, name


@pytest.mark.parametrize("call", [1, 2])
def test_rename_that_fails_keeps_the_old_posterior_where_there_is_no_exchange(saved, path, call, monkeypatch):
    other, before = CASES["delta"].load(saved["delta"][0]), contents(path.parent)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "exchange", lambda a, b: False)
        patch.setattr(os, "replace", fail_at(call, os.replace))
        with pytest.raises(OSError, match="No space left"):
            other.save_pretrained(path)
    assert contents(path.parent) == before
    with monkeypatch.context() as patch:
        patch.setattr(storage, "exchange", lambda a, b: False)
        other.save_pretrained(path)
    assert_same_files(path, saved["delta"][0])
    assert [f.name for f in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_file_that_the_system_cannot_write_whole_keeps_the_old_posterior(saved, path, share):
    """A limit of the kernel stops any writer at a byte, those in Rust too."""
    other, before = CASES["delta"].load(saved["delta"][0]), contents(path.parent)
    largest = max(f.stat().st_size for f in saved["delta"][0].rglob("*") if f.is_file())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * largest), hard))
    try:
        with pytest.raises(Exception, match=r"too large|File size limit"):
            other.save_pretrained(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(path.parent) == before


def test_save_whose_tokenizer_fails_keeps_the_old_posterior(saved, path, monkeypatch):
    other, before = CASES["delta"].load(saved["delta"][0]), contents(path.parent)
    tokenizer = other.task.tokenizer
    monkeypatch.setattr(tokenizer, "save_pretrained", fail_at(1, tokenizer.save_pretrained))
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(path)
    assert contents(path.parent) == before


@pytest.mark.parametrize("call", [1, 2, 3])
def test_save_that_fails_midway_leaves_nothing_at_a_new_path(posterior, tmp_path, call, monkeypatch):
    monkeypatch.setattr(storage, "write_file", fail_at(call, storage.write_file))
    with pytest.raises(OSError, match="No space left"):
        posterior.save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_guide_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path):
    def guide(blora):
        transform = torch.distributions.transforms.AffineTransform
        return AutoFamily(
            blora.prior,
            autoguide.AutoNormalizingFlow,
            init_loc_fn=blora.init_loc,
            init_transform_fn=lambda dim: transform(0.0, 1.0),
        )

    blora = sp.bayesian_lora(tiny.causal_lm())
    unsaveable = sp.Posterior.capture(blora, multiple_choice(), guide(blora), provenance={})
    with pytest.raises((TypeError, ValueError), match="init_transform_fn"):
        unsaveable.save_pretrained(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077], ids=oct)
def test_permissions_are_those_of_the_users_umask(posterior, tmp_path, mask):
    old = os.umask(mask)
    try:
        posterior.save_pretrained(tmp_path / "p")
    finally:
        os.umask(old)
    for file in [tmp_path / "p", *(tmp_path / "p").rglob("*")]:
        expected = (0o777 if file.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(file.stat().st_mode) == expected, file.name


def test_link_to_a_posterior_is_written_through(posterior, path, saved, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(path, target_is_directory=True)
    CASES["delta"].load(saved["delta"][0]).save_pretrained(link)
    assert link.is_symlink()
    assert_same_files(path, saved["delta"][0])


def test_saving_changes_neither_model_nor_posterior(posterior, tmp_path, unchanged_rng):
    llm = posterior.adapter.module
    before = snapshot(llm), observe(posterior, QUESTIONS)
    posterior.save_pretrained(tmp_path / "p")
    assert snapshot(llm) == before[0]
    assert_same_bits(observe(posterior, QUESTIONS), before[1])
