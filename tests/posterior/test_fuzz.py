"""Mutated files of posteriors and rows: each loads and works, or is refused in words that name the file.

The default suite runs a few hundred cases, always the same; ``-m slow`` runs tens of thousands and prints how many.
"""

import hashlib
import json
import os
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro.infer import autoguide
from safetensors import torch as safe

import scalabl_pyro as sp
from scalabl_pyro.data import encode, read_rows
from scalabl_pyro.data.training_batches import TrainingBatches
from scalabl_pyro.guides import AutoFamily, EmpiricalGuide, MixtureGuide, as_guide
from scalabl_pyro.lora.attach import find_adapter
from scalabl_pyro.posterior.config import parse_config
from scalabl_pyro.training.checkpoint_files import MANIFEST, RECORD, TENSORS

CONFIG, ADAPTER, POSTERIOR = "scalabl_config.json", "adapter_model.safetensors", "posterior.safetensors"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"
SECONDS_A_CASE = 20  # a hang, not a slow machine
MEGABYTES = 500  # that all cases of a test together may add to the peak of memory


def fuzz(default: int, slow: int) -> Any:
    """The number of cases in the default suite and in the slow one."""
    return pytest.mark.parametrize("cases", [default, pytest.param(slow, marks=pytest.mark.slow)])


def run(cases: int, check: Callable[..., None], **strategies: Any) -> None:
    """Draw ``cases`` cases and check each of them."""
    before, start, count = peak_megabytes(), time.perf_counter(), 0

    @settings(
        max_examples=cases,
        deadline=1000 * SECONDS_A_CASE,
        derandomize=cases < 1000,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(**strategies)
    def every(**drawn: Any) -> None:
        nonlocal count
        count += 1
        check(**drawn)

    every()
    seconds, megabytes = time.perf_counter() - start, peak_megabytes() - before
    sys.stdout.write(f"\n{count} cases, {seconds:.0f} s, {megabytes:.0f} MB more at the peak\n")  # shown by -s
    assert megabytes < MEGABYTES


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# what a stranger may write ----------------------------------------------------------------------------------

WORDS = (
    *("", "normal", "auto", "delta", "mixture", "flow", "empirical", "lowrank", "mean_field", "with_hyperparameters"),
    *("Normal", "Gamma", "Cauchy", "Uniform", "horseshoe", "rank_mask", "AutoNormal", "AutoIAFNormal", "free"),
    *("../x", "/etc/passwd", "\0", "\ud800", "__class__", "lm_head", "model", "MultipleChoice", "Regression"),
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([2**31, 2**63, -(2**63), 2**64, 10**19, 10**30, 1e308, -0.0, 1e-320])
    | st.floats(width=32)
    | st.text(max_size=6)
    | st.sampled_from(WORDS)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
ANYWHERE = st.integers(0, 10**6)
JSON_EDITS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "remove", "rename", "add", "swap", "double"]), ANYWHERE, ANYWHERE, JSON),
    min_size=1,
    max_size=3,
)
BYTE_EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "repeat", "end"]), ANYWHERE, ANYWHERE, st.binary(max_size=9)),
    min_size=1,
    max_size=4,
)
TENSOR_EDITS = st.lists(
    st.tuples(
        st.sampled_from(["dtype", "shape", "cut", "fill", "one", "remove", "rename", "add", "swap"]), ANYWHERE, ANYWHERE
    ),
    min_size=1,
    max_size=3,
)
DTYPES = [getattr(torch, name) for name in ("float64", "float16", "bfloat16", "int64", "uint8", "bool", "complex64")]
DTYPES += [torch.float8_e4m3fn, torch.int32, torch.uint16]
FILLS = [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e30, -1e30, 3e38, 1e-40, 88.0, 89.0]


class Pairs(list):
    """A JSON object as pairs, in which a key may stand twice."""


def places(value: Any) -> list[tuple[Any, int]]:
    """Every entry of a nest of lists and pairs: (container, index)."""
    found = []
    for i, entry in enumerate(value if isinstance(value, list) else []):
        found.append((value, i))
        found += places(entry[1] if isinstance(value, Pairs) else entry)
    return found


def edit_json(content: bytes, edits: list[tuple[str, int, int, Any]]) -> bytes:
    """Apply each edit somewhere in the JSON text."""
    root = [json.loads(content, object_pairs_hook=lambda pairs: Pairs([list(pair) for pair in pairs]))]
    for kind, where, other, value in edits:
        spots = places(root)
        if not spots:
            break
        container, i = spots[where % len(spots)]
        pair = isinstance(container, Pairs)
        if kind == "swap":
            donor, j = spots[other % len(spots)]
            value = json.loads(dump(donor[j][1] if isinstance(donor, Pairs) else donor[j]))
        if kind in ("put", "swap"):
            container[i] = [container[i][0], value] if pair else value
        elif kind == "remove":
            del container[i]
        elif kind == "rename" and pair:
            container[i] = [str(value), container[i][1]]
        elif kind == "double":
            container.insert(i, container[i])
        else:
            container.append([str(value)[:9], value] if pair else value)
    return dump(root[0] if root else None).encode("utf-8", "surrogatepass")


def dump(value: Any) -> str:
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(k)}: {dump(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


def edit_bytes(content: bytes, edits: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, where, length, new in edits:
        start = where % (len(content) + 1)
        stop = min(start + length % 64, len(content))
        if kind == "flip":
            content = (
                content[:start]
                + bytes(b ^ (1 << length % 8) for b in content[start : start + 1])
                + content[start + 1 :]
            )
        elif kind == "cut":
            content = content[:start] + content[stop:]
        elif kind == "insert":
            content = content[:start] + new + content[start:]
        elif kind == "repeat":
            content = content[:stop] + content[start:stop] + content[stop:]
        else:
            content = content[:start]
    return content


def edit_tensors(content: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    tensors = dict(safe.load(content))
    for kind, where, other in edits:
        names = sorted(tensors)
        if not names:
            break
        name = names[where % len(names)]
        tensor = tensors[name]
        if kind == "dtype":
            tensors[name] = tensor.to(DTYPES[other % len(DTYPES)])
        elif kind == "shape":
            shapes = [(-1,), (1, *tensor.shape), (*tensor.shape, 1), tensor.T.shape if tensor.dim() == 2 else (-1, 1)]
            tensors[name] = tensor.reshape(shapes[other % len(shapes)])
        elif kind == "cut" and tensor.dim():
            tensors[name] = tensor[: other % (len(tensor) + 1)]
        elif kind == "fill" and tensor.is_floating_point():
            tensors[name] = torch.full_like(tensor, FILLS[other % len(FILLS)])
        elif kind == "one" and tensor.is_floating_point() and tensor.numel():
            tensors[name] = tensor.clone()
            tensors[name].view(-1)[other % tensor.numel()] = FILLS[other % len(FILLS)]
        elif kind == "remove":
            del tensors[name]
        elif kind == "rename":
            tensors[["guide.x", "prior.loc", "task.label_ids", name + ".x", "x"][other % 5]] = tensors.pop(name)
        elif kind == "swap":
            tensors[name] = tensors[names[other % len(names)]]
        else:
            tensors[["guide.x", "prior.x", "task.x", "x", "heads.lm_head.weight"][other % 5]] = torch.ones(other % 3)
    return safe.save({k: v.contiguous().clone() for k, v in tensors.items()})


def edit_header(content: bytes, edits: list[tuple[str, int, int, Any]]) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = edit_json(content[8 : 8 + size], edits)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


# valid posteriors -------------------------------------------------------------------------------------------


def auto(name: str, **options: Any) -> Callable[[sp.BayesianLoRA], sp.guides.Guide]:
    return lambda b: AutoFamily(b.prior, getattr(autoguide, name), init_loc_fn=b.init_loc, **options)


def points(blora: sp.BayesianLoRA) -> sp.guides.Guide:
    generator = torch.Generator().manual_seed(0)
    return EmpiricalGuide({"s": torch.randn(6, blora.subspace.dim, generator=generator)}, num_chains=2)


def mixture(blora: sp.BayesianLoRA) -> sp.guides.Guide:
    return MixtureGuide([as_guide("normal", blora), as_guide("lowrank", blora)])


#: Guide and prior of each kind of posterior.
KINDS: dict[str, tuple[Any, Any]] = {
    "normal": ("normal", 1.0),
    "covariance": ("layer_covariance", "laplace"),
    "low rank": ("lowrank", "student_t"),
    "flow": ("flow", 1.0),
    "point": ("delta", 1.0),
    "positive": ("normal", "lognormal"),
    "with hyperparameters": ("normal", "horseshoe"),
    "by layer": ("lowrank", "hierarchical"),
    "empirical Bayes": ("normal", "empirical"),
    "mask": ("rank_mask", "rank_mask"),
    "points": (points, 1.0),
    "mixture": (mixture, 1.0),
    "AutoNormal": (auto("AutoNormal", init_scale=0.1), 1.0),
    "AutoLowRankMultivariateNormal": (auto("AutoLowRankMultivariateNormal", rank=2), 1.0),
}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def owners(name: str) -> list[str]:
    """Where the hash of a file may stand: in what describes a posterior, baseline or checkpoint, beside it or above."""
    return [(folder / c).as_posix() for folder in Path(name).parents for c in (CONFIG, "baseline.json", MANIFEST)]


class Place:
    """A model, and a directory for the files of one posterior at a time.

    Args:
        folder: where the files are put.
        llm: the model.
        task: given on loading; None to have the saved one read.
        sources: directories of valid posteriors, by kind.
        rows: that their task predicts.
    """

    def __init__(
        self, folder: Path, llm: torch.nn.Module, task: sp.Task | None, sources: Mapping[str, Path], rows: list[dict]
    ) -> None:
        self.folder, self.llm, self.task, self.rows = folder, llm, task, rows
        self.valid = {
            kind: {f.relative_to(source).as_posix(): f.read_bytes() for f in source.rglob("*") if f.is_file()}
            for kind, source in sources.items()
        }
        self.modules = [id(m) for m in llm.modules()]
        self.bits = [p.detach().clone() for p in llm.parameters()]
        self.loaded = 0

    load = staticmethod(sp.Posterior.from_pretrained)

    def put(self, kind: str, changed: Mapping[str, bytes], *, rehash: bool = True) -> None:
        """Write the files of a kind, some of them changed, with hashes that belong to them, or no longer do."""
        shutil.rmtree(self.folder, ignore_errors=True)
        contents = {**self.valid[kind], **changed}
        for name, content in changed.items() if rehash else ():
            owner = next(o for o in owners(name) if o in contents)
            if name != owner and owner not in changed:
                config = json.loads(contents[owner])
                inside = Path(name).relative_to(Path(owner).parent).as_posix()
                config["files"][inside] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                contents[owner] = json.dumps(config).encode()
        for name, content in contents.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)

    def check(self) -> None:
        """The promise: a posterior that works, or an error that says where; nothing else changes."""
        around = sorted(p.name for p in self.folder.parent.iterdir())
        override = {} if self.task is None else {"task": self.task}
        posterior = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                posterior = self.load(self.llm, self.folder, **override)
            except (ValueError, FileNotFoundError) as error:
                assert str(self.folder) in str(error), f"the message does not name the file: {error}"
            if posterior is not None:
                self.loaded += 1
                try:
                    self.check_works(posterior)
                finally:
                    if [id(m) for m in self.llm.modules()] != self.modules:
                        find_adapter(self.llm).unload()
        assert [id(m) for m in self.llm.modules()] == self.modules
        assert sorted(p.name for p in self.folder.parent.iterdir()) == around

    def check_works(self, posterior: sp.Posterior) -> None:
        """Mean, draws and predictions are what they are of any posterior."""
        self.check_draws(posterior)
        try:
            prediction = posterior.predict(self.rows, num_draws=2)
        except FloatingPointError as error:  # finite factors whose products overflow
            assert "NaN" in str(error)
        except ValueError as error:  # a template or tokenizer that makes other prompts, an option that fits no row
            assert str(error)
        else:
            if isinstance(prediction, sp.Prediction):
                np.testing.assert_allclose(prediction.probs.sum(1), 1, atol=1e-4)

    def check_draws(self, posterior: sp.Posterior) -> None:
        """The mean and draws are finite, and the same each time."""
        dim = posterior.subspace.dim
        assert posterior.mean().shape == (dim,) and posterior.mean().isfinite().all()
        draws = posterior.sample(3, seed=1).s
        assert draws.shape == (3, dim) and torch.equal(draws, posterior.sample(3, seed=1).s)

    def check_unchanged(self) -> None:
        """The base model is what it was, bit for bit."""
        for old, new in zip(self.bits, self.llm.parameters(), strict=True):
            assert torch.equal(old, new)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Directories of valid posteriors, by kind."""
    root, llm, task = tmp_path_factory.mktemp("valid"), tiny.causal_lm(), sp.MultipleChoice(tiny.tokenizer())
    found = {}
    for kind, (guide, prior) in KINDS.items():
        blora = sp.bayesian_lora(llm, prior=prior, **LORA)
        posterior = sp.Posterior.capture(blora, task, as_guide(guide, blora), provenance={"seed": 0})
        posterior.save_pretrained(root / kind)
        found[kind] = root / kind
        blora.unload()
    return found


@pytest.fixture(scope="module")
def place(sources, tmp_path_factory):
    """A plain base model, and a posterior with a tokenizer."""
    here = Place(tmp_path_factory.mktemp("place") / "posterior", tiny.causal_lm(), None, sources, tiny.question_rows(2))
    yield here
    here.check_unchanged()


@pytest.fixture(scope="module")
def carrier(sources, tmp_path_factory):
    """A model that carries the layers already, and a task of the caller's own: the parts that are quick to load."""
    llm, task = tiny.causal_lm(), sp.MultipleChoice(tiny.tokenizer())
    sp.bayesian_lora(llm, **LORA)
    here = Place(tmp_path_factory.mktemp("carrier") / "posterior", llm, task, sources, tiny.question_rows(2))
    yield here
    here.check_unchanged()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier with a trained head, or a regression with a learned noise."""
    root, llm = tmp_path_factory.mktemp("heads"), tiny.classifier(num_labels=1)
    blora, task = sp.bayesian_lora(llm, **LORA), sp.Regression(tiny.tokenizer())
    sp.Posterior.capture(blora, task, as_guide("normal", blora), provenance={}).save_pretrained(root / "valid")
    blora.unload()
    rows = [{"text": row["text"], "label": 0.5} for row in tiny.text_rows(2)]
    here = Place(tmp_path_factory.mktemp("classifier") / "posterior", llm, None, {"valid": root / "valid"}, rows)
    yield here
    here.check_unchanged()


# posteriors -------------------------------------------------------------------------------------------------

KIND = st.sampled_from(list(KINDS))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loads_unless_it_is_edited(place, carrier, kind):
    for here in (place, carrier):
        here.put(kind, {})
        before = here.loaded
        here.check()
        assert here.loaded == before + 1


@fuzz(60, 3000)
def test_edited_configuration_loads_or_is_refused(carrier, cases):
    def check(kind: str, edits: Any) -> None:
        carrier.put(kind, {CONFIG: edit_json(carrier.valid[kind][CONFIG], edits)})
        carrier.check()

    run(cases, check, kind=KIND, edits=JSON_EDITS)


@pytest.mark.parametrize("part", ["guide", "prior", pytest.param("task", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["by layer", "mixture", "AutoLowRankMultivariateNormal", "empirical Bayes"])
def test_value_of_another_type_anywhere_in_an_option_loads_or_is_refused(place, kind, part):
    """A list or an object cannot be looked up among names, for instance."""
    config = json.loads(place.valid[kind][CONFIG])
    for spot in range(len(places([pairs(config[part])]))):
        for value in ([], {}, ["x"], {"x": 1}, None, True, 3, 0.5, "x"):
            root = [pairs(config[part])]
            container, i = places(root)[spot]
            container[i] = [container[i][0], value] if isinstance(container, Pairs) else value
            place.put(kind, {CONFIG: json.dumps({**config, part: json.loads(dump(root[0]))}).encode()})
            place.check()


def pairs(value: Any) -> Any:
    return json.loads(json.dumps(value), object_pairs_hook=lambda found: Pairs([list(pair) for pair in found]))


@fuzz(25, 1500)
def test_edited_options_of_guide_prior_and_task_load_or_are_refused(place, cases):
    """Edits that hit only what builds objects, on a model that is adapted anew."""

    def check(kind: str, part: str, edits: Any) -> None:
        config = json.loads(place.valid[kind][CONFIG])
        content = edit_json(json.dumps(config[part]).encode(), edits)
        config[part] = "HERE"
        text = json.dumps(config).replace('"HERE"', content.decode("utf-8", "surrogatepass"))
        place.put(kind, {CONFIG: text.encode("utf-8", "surrogatepass")})
        place.check()

    run(cases, check, kind=KIND, part=st.sampled_from(["guide", "prior", "task", "heads", "layers"]), edits=JSON_EDITS)


@fuzz(50, 3000)
def test_edited_tensors_load_or_are_refused(carrier, cases):
    def check(kind: str, file: str, edits: Any) -> None:
        carrier.put(kind, {file: edit_tensors(carrier.valid[kind][file], edits)})
        carrier.check()

    run(cases, check, kind=KIND, file=st.sampled_from([POSTERIOR, POSTERIOR, ADAPTER]), edits=TENSOR_EDITS)


@fuzz(15, 1000)
def test_edited_heads_and_noise_load_or_are_refused(classifier, cases):
    def check(file: str, edits: Any, options: Any) -> None:
        valid = classifier.valid["valid"]
        classifier.put(
            "valid",
            {file: edit_tensors(valid[file], edits)}
            if options is None
            else {CONFIG: edit_json(valid[CONFIG], options)},
        )
        classifier.check()

    run(cases, check, file=st.sampled_from([POSTERIOR, ADAPTER]), edits=TENSOR_EDITS, options=st.none() | JSON_EDITS)


@fuzz(30, 2000)
def test_edited_lists_of_tensors_load_or_are_refused(carrier, cases):
    def check(kind: str, file: str, edits: Any) -> None:
        carrier.put(kind, {file: edit_header(carrier.valid[kind][file], edits)})
        carrier.check()

    run(cases, check, kind=KIND, file=st.sampled_from([POSTERIOR, ADAPTER]), edits=JSON_EDITS)


@fuzz(30, 1500)
def test_edited_bytes_of_any_file_load_or_are_refused(place, cases):
    def check(kind: str, file: str, edits: Any, rehash: bool) -> None:
        place.put(kind, {file: edit_bytes(place.valid[kind][file], edits)}, rehash=rehash)
        place.check()

    names = st.sampled_from([CONFIG, ADAPTER, POSTERIOR, TOKENIZER, TOKENIZER_CONFIG])
    run(cases, check, kind=KIND, file=names, edits=BYTE_EDITS, rehash=st.booleans())


@fuzz(30, 2000)
def test_edited_tokenizer_loads_or_is_refused(place, cases):
    def check(file: str, edits: Any) -> None:
        place.put("normal", {file: edit_json(place.valid["normal"][file], edits)})
        place.check()

    run(cases, check, file=st.sampled_from([TOKENIZER, TOKENIZER_CONFIG]), edits=JSON_EDITS)


# baselines --------------------------------------------------------------------------------------------------


class BaselinePlace(Place):
    """Directories that hold a baseline, and in it posteriors."""

    load = staticmethod(sp.baselines.load)

    def check_draws(self, posterior) -> None:
        """A baseline has draws of its own kind."""


@pytest.fixture(scope="module")
def baselines(tmp_path_factory):
    """Baselines of every kind, on a model that carries the layers already."""
    root, llm, task = tmp_path_factory.mktemp("baselines"), tiny.causal_lm(), sp.MultipleChoice(tiny.tokenizer())
    options: dict[str, Any] = {"num_steps": 2, "progress": False, "lora": LORA}
    rows = tiny.question_rows(8)
    sources, b = {}, sp.baselines
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        point = b.mle(llm, task, rows, **options).posterior
        made = {
            "temperature": b.temperature_scaling(point, rows),
            "laplace": b.laplace_lora(point, rows),
            "tfb": b.tfb(point, rows, num_draws=2, num_bisections=2),
        }
        for name, baseline in made.items():
            baseline.save_pretrained(root / name)
        point.blora().unload()
        for method in (b.blob, b.mc_dropout, b.deep_ensemble):
            posterior = method(llm, task, rows, **options).posterior
            posterior.save_pretrained(root / method.__name__)
            posterior.blora().unload()
    sources = {path.name: path for path in root.iterdir()}
    base = tiny.causal_lm()
    sp.bayesian_lora(base, gauge="free", **LORA)
    here = BaselinePlace(tmp_path_factory.mktemp("baseline") / "b", base, task, sources, tiny.question_rows(2))
    yield here
    here.check_unchanged()


def files_of(here: Place, kind: str) -> list[str]:
    """Those that belong to the baseline itself."""
    return [name for name in here.valid[kind] if "/" not in name]


@pytest.mark.parametrize("kind", ["temperature", "laplace", "tfb", "blob", "mc_dropout", "deep_ensemble"])
def test_every_baseline_loads_unless_it_is_edited(baselines, kind):
    baselines.put(kind, {})
    before = baselines.loaded
    baselines.check()
    assert baselines.loaded == before + 1


@fuzz(60, 3000)
def test_edited_baseline_loads_or_is_refused(baselines, cases):
    kinds = sorted(baselines.valid)

    def check(kind: str, which: int, how: str, edits: Any, tensors: Any, raw: Any) -> None:
        names = files_of(baselines, kind)
        name = names[which % len(names)]
        content = baselines.valid[kind][name]
        if how == "bytes":
            content = edit_bytes(content, raw)
        elif name.endswith(".json"):
            content = edit_json(content, edits)
        else:
            content = edit_tensors(content, tensors) if how == "parts" else edit_header(content, edits)
        baselines.put(kind, {name: content})
        baselines.check()

    run(
        cases,
        check,
        kind=st.sampled_from(kinds),
        which=st.integers(0, 1),
        how=st.sampled_from(["parts", "parts", "header", "bytes"]),
        edits=JSON_EDITS,
        tensors=TENSOR_EDITS,
        raw=BYTE_EDITS,
    )


def test_baseline_that_holds_itself_is_refused(baselines):
    baselines.put("temperature", {})
    shutil.rmtree(baselines.folder / "base")
    (baselines.folder / "base").symlink_to(baselines.folder)
    with pytest.raises(ValueError, match="is the same folder as another part of the baseline"):
        sp.baselines.load(baselines.llm, baselines.folder)


def test_part_of_a_baseline_that_lies_elsewhere_is_refused(baselines, tmp_path):
    baselines.put("temperature", {})
    shutil.move(baselines.folder / "base", tmp_path / "elsewhere")
    (baselines.folder / "base").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of its directory"):
        sp.baselines.load(baselines.llm, baselines.folder)


# checkpoints ------------------------------------------------------------------------------------------------


class RunPlace(Place):
    """A run that was stopped after 2 of 3 steps, on rows or on batches, and the model that it goes on with."""

    def __init__(self, root: Path) -> None:
        llm, task = tiny.causal_lm(), sp.MultipleChoice(tiny.tokenizer())
        rows = tiny.question_rows(4)
        plan = TrainingBatches(encode(rows, task.encode, need_target=True), 2, 0, seed=0)
        self.data: dict[str, Any] = {"rows": rows, "batches": [plan(step) for step in range(2)]}
        self.blora = sp.bayesian_lora(llm, **LORA)
        self.task = task
        for kind in self.data:
            self.fit(kind, root / kind, callbacks=[lambda row: row["step"] == 1])
            shutil.rmtree(root / kind / "step-00000000")
        self.step = "step-00000002"
        self.start = [p.detach().clone() for p in self.blora.point_estimates.parameters()]
        self.loc = self.blora.adapter.loc.clone()
        super().__init__(root / "run", llm, task, {kind: root / kind for kind in self.data}, rows)

    def fit(self, kind: str, folder: Path, **options: Any) -> sp.FitResult:
        options = {"num_steps": 3, "batch_size": 2, "num_data": 4 if kind == "batches" else None, **options}
        return sp.fit(self.blora, self.task, self.data[kind], checkpoint_dir=folder, progress=False, **options)

    def check_run(self, kind: str) -> str:
        """The promise: it goes on from there, or starts anew, and ends; or it is refused in words that say where."""
        around = sorted(p.name for p in self.folder.parent.iterdir())
        with torch.no_grad():  # a run before may have left anything
            for own, start in zip(self.blora.point_estimates.parameters(), self.start, strict=True):
                own.copy_(start)
        self.blora.adapter.rest_at(self.loc.clone())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                result = self.fit(kind, self.folder)
            except sp.TrainingError as error:  # finite numbers whose products overflow
                assert "At step 2" in str(error)
                how = "went on, and overflowed"
            except ValueError as error:
                assert str(self.folder) in str(error), f"the message does not name the file: {error}"
                how = "refused"
                for own, start in zip(self.blora.point_estimates.parameters(), self.start, strict=True):
                    torch.testing.assert_close(own, start, rtol=0, atol=1e-6)  # unit rows, once more
            else:
                assert all(t.isfinite().all() for pair in result.posterior.factors for t in pair)
                assert result.posterior.sample(2).s.isfinite().all()
                assert len(result.history) <= 3 and result.history["step"].iloc[-1] == 2
                how = "ended"
        assert sorted(p.name for p in self.folder.parent.iterdir()) == around
        return how


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return RunPlace(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("kind", ["rows", "batches"])
def test_every_run_goes_on_unless_its_checkpoint_is_edited(runs, kind, caplog):
    runs.put(kind, {})
    with caplog.at_level("INFO"):
        assert runs.check_run(kind) == "ended"
    assert "resumed from" in caplog.text


@fuzz(60, 2000)
def test_edited_checkpoint_is_gone_on_from_or_refused(runs, cases):
    def check(kind: str, file: str, how: str, edits: Any, tensors: Any, raw: Any, rehash: bool) -> None:
        name = f"{runs.step}/{file}"
        content = runs.valid[kind][name]
        if how == "bytes":
            content = edit_bytes(content, raw)
        elif file != TENSORS:
            content = edit_json(content, edits)
        else:
            content = edit_tensors(content, tensors) if how == "parts" else edit_header(content, edits)
        runs.put(kind, {name: content}, rehash=rehash)
        runs.check_run(kind)

    run(
        cases,
        check,
        kind=st.sampled_from(["rows", "batches"]),
        file=st.sampled_from([TENSORS, RECORD, RECORD, MANIFEST]),
        how=st.sampled_from(["parts", "parts", "header", "bytes"]),
        edits=JSON_EDITS,
        tensors=TENSOR_EDITS,
        raw=BYTE_EDITS,
        rehash=st.sampled_from([True, True, False]),
    )


#: What somebody may write into the state of a record, or the tensors, by hand.
FORGED: dict[str, tuple[str, Any, str]] = {
    "a step before the first": ("step", -5, "'step'"),
    "a step of another folder": ("step", 1, "'step'"),
    "endless data": ("data", {"count": 10**12, "sha256": ""}, "'data'"),
    "no data": ("data", None, "does not say where in the data"),
    "columns of another table": ("columns", ["step", "hope"], "'columns'"),
    "no seconds": ("seconds", "long", "'seconds'"),
    "a text that counts": ("recovery", {"skipped": "2", "in_a_row": 0, "restored_at": None}, "'recovery'"),
    "no state": ("state", [], "does not say where the run was"),
    "no base model": ("base_model", None, "does not say which"),
    "NaN": ("module.guide.guide.loc", torch.nan, "'module.guide.guide.loc' was saved with numbers that are not finite"),
    "another prior": ("module.model.blora.prior.scale", 9.0, "is held fixed in a run, but was saved with other"),
    "NaN of the optimizer": ("optimizer.0.exp_avg", torch.nan, "'optimizer.0.exp_avg' was saved with numbers"),
    "a history that counts nothing": ("history.step", torch.nan, "the saved history has steps that are not finite"),
    "no random state": ("random.cpu", 0, "the random states are not states of torch's generators"),
}


@pytest.mark.parametrize(("name", "value", "message"), FORGED.values(), ids=FORGED)
def test_forged_checkpoint_is_refused_by_what_is_wrong_in_it(runs, name, value, message):
    files = runs.valid["batches"]
    if "." in name:
        tensors = dict(safe.load(files[f"{runs.step}/{TENSORS}"]))
        tensors[name] = torch.full_like(tensors[name], value)
        changed = {f"{runs.step}/{TENSORS}": safe.save(tensors)}
    else:
        record = json.loads(files[f"{runs.step}/{RECORD}"])
        part = record if name == "state" else record["run"] if name == "base_model" else record["state"]
        assert name in part
        part[name] = value
        changed = {f"{runs.step}/{RECORD}": json.dumps(record).encode()}
    runs.put("batches", changed)
    with pytest.raises(ValueError, match=rf"{runs.folder}.*{message}"):
        runs.fit("batches", runs.folder)
    runs.check_run("batches")


@pytest.mark.parametrize("file", [TENSORS, RECORD, MANIFEST])
@pytest.mark.parametrize("kind", ["link outside", "pipe", "device"])
def test_what_is_no_file_of_a_checkpoint_is_passed_over_without_waiting(runs, tmp_path, file, kind, caplog):
    runs.put("rows", {})
    path = runs.folder / runs.step / file
    (tmp_path / file).write_bytes(path.read_bytes())
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / file if kind == "link outside" else "/dev/zero")
    assert runs.check_run("rows") == "ended"
    assert f"{runs.step} cannot be used" in caplog.text


# the configuration alone, and rows --------------------------------------------------------------------------


@fuzz(150, 6000)
def test_edited_configuration_is_parsed_to_its_types_or_refused(sources, cases):
    valid = {kind: (source / CONFIG).read_bytes() for kind, source in sources.items()}

    def check(kind: str, edits: Any, raw: Any) -> None:
        content = edit_json(valid[kind], edits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sp.ScalaBLWarning)
            try:
                config = parse_config(edit_bytes(content, raw) if raw else content)
            except ValueError:
                return
        assert isinstance(config.gauge, str) and all(isinstance(name, str) for name in config.heads)
        assert all(layer["rank"] >= 1 and np.isfinite(layer["scaling"]) for layer in config.layers)
        assert all(type(layer["rank"]) is int and type(layer["name"]) is str for layer in config.layers)
        assert isinstance(config.task["options"], dict) and isinstance(config.task["class"], str)
        assert all(
            type(file["bytes"]) is int and not Path(name).is_absolute() for name, file in config.files.to_json().items()
        )

    run(cases, check, kind=KIND, edits=JSON_EDITS, raw=st.none() | BYTE_EDITS)


TASKS = {
    "choice": lambda: sp.MultipleChoice(tiny.tokenizer(), max_length=30),
    "class": lambda: sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"], max_length=20),
    "number": lambda: sp.Regression(tiny.tokenizer()),
}


@fuzz(150, 5000)
def test_edited_rows_are_read_and_encoded_or_refused_by_line_and_row(tmp_path, cases):
    file, tasks = tmp_path / "rows.jsonl", {name: make() for name, make in TASKS.items()}
    lines = {name: [json.dumps(row).encode() for row in tiny.question_rows(3)] for name in TASKS}
    lines["class"] = lines["number"] = [json.dumps(row).encode() for row in tiny.text_rows(3)]

    def check(name: str, edits: Any, line: int, raw: Any) -> None:
        edited = list(lines[name])
        edited[line] = edit_json(edited[line], edits)
        content = b"\n".join(edited)
        file.write_bytes(edit_bytes(content, raw) if raw else content)
        try:
            rows = read_rows(file)
        except ValueError as error:
            assert str(file) in str(error)
            return
        assert rows and all(isinstance(row, dict) for row in rows)
        try:
            examples = encode(rows, tasks[name].encode, need_target=False)
        except (ValueError, TypeError) as error:
            assert "Row " in str(error)
        else:
            assert len(examples) == len(rows) and all(len(example) for example in examples)

    which = st.sampled_from(list(TASKS))
    run(cases, check, name=which, edits=JSON_EDITS, line=st.integers(0, 2), raw=st.none() | st.none() | BYTE_EDITS)


# what is not a file, or lies elsewhere -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CONFIG, ADAPTER, POSTERIOR, TOKENIZER, TOKENIZER_CONFIG])
@pytest.mark.parametrize("kind", ["link outside", "link to nowhere", "link to itself", "pipe", "directory", "device"])
def test_what_is_no_file_of_the_directory_is_refused_without_waiting(place, tmp_path, name, kind):
    place.put("normal", {})
    file = place.folder / name
    outside = tmp_path / file.name
    outside.write_bytes(file.read_bytes())
    file.unlink()
    if kind == "link outside":
        file.symlink_to(outside)
    elif kind == "link to nowhere":
        file.symlink_to(tmp_path / "nowhere")
    elif kind == "link to itself":
        file.symlink_to(file)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises((ValueError, FileNotFoundError), match=str(place.folder)):
        sp.Posterior.from_pretrained(place.llm, place.folder)
    place.check()


@pytest.mark.parametrize("within", [True, False], ids=["inside", "outside"])
def test_tokenizer_behind_a_link_is_read_from_inside_the_directory_alone(place, tmp_path, within):
    place.put("normal", {})
    elsewhere = (place.folder if within else tmp_path) / "elsewhere"
    shutil.move(place.folder / "tokenizer", elsewhere)
    (place.folder / "tokenizer").symlink_to(elsewhere)
    if within:
        sp.Posterior.from_pretrained(place.llm, place.folder).blora().unload()
    else:
        with pytest.raises(ValueError, match="leads out of its directory"):
            sp.Posterior.from_pretrained(place.llm, place.folder)


def test_snapshot_in_the_cache_of_the_hub_may_link_to_its_blobs(sources, tmp_path):
    root = tmp_path / "models--me--posterior"
    snapshot, blobs = root / "snapshots" / "abc", root / "blobs"
    shutil.copytree(sources["normal"], snapshot)
    blobs.mkdir()
    for file in [f for f in snapshot.rglob("*") if f.is_file()]:
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.move(file, blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    llm = tiny.causal_lm()
    assert sp.Posterior.from_pretrained(llm, snapshot).mean().isfinite().all()
    (snapshot / POSTERIOR).unlink()
    (snapshot / POSTERIOR).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of its directory"):
        sp.Posterior.from_pretrained(tiny.causal_lm(), snapshot)


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file", "source_spm", "vocab", "init_inputs"])
def test_tokenizer_that_names_files_elsewhere_is_refused(place, key):
    config = json.loads(place.valid["normal"][TOKENIZER_CONFIG])
    place.put("normal", {TOKENIZER_CONFIG: json.dumps({**config, key: ["/etc/passwd"]}).encode()})
    with pytest.raises(ValueError, match=rf"names files of its own choice: \['{key}'\]"):
        sp.Posterior.from_pretrained(place.llm, place.folder)


@pytest.mark.parametrize(
    "options",
    [
        {"family": "auto", "options": {"class": "AutoIAFNormal", "hidden_dim": [70] * 500}},
        {"family": "auto", "options": {"class": "AutoIAFNormal", "num_transforms": 80}},
        {"family": "auto", "options": {"class": "AutoLowRankMultivariateNormal", "rank": 80}},
        {"family": "flow", "options": {"num_transforms": 10**6, "hidden": 9}},
        {"family": "empirical", "options": {"shapes": {"s": [10**8, 8]}}},
        {"family": "mixture", "options": {"components": [["normal", {}]] * 10_000}},
    ],
    ids=lambda entry: entry["family"],
)
def test_options_that_would_only_fill_memory_are_refused_before_they_do(place, options):
    config = json.loads(place.valid["normal"][CONFIG])
    place.put("normal", {CONFIG: json.dumps({**config, "guide": {"class": "x", **options}}).encode()})
    start = peak_megabytes()
    with pytest.raises(ValueError, match=r"must be a whole number|does not hold the tensors|asks for .* (lay|post)"):
        sp.Posterior.from_pretrained(place.llm, place.folder)
    assert peak_megabytes() - start < 50


def doubled(text: bytes, key: str) -> bytes:
    """The same JSON, but for a key that stands once more, before the first, with another value."""
    assert f'"{key}"'.encode() in text
    return text.replace(b"{", f'{{"{key}": null, '.encode(), 1)


@pytest.mark.parametrize("file", [CONFIG, ADAPTER, TOKENIZER_CONFIG])
def test_key_that_stands_twice_is_refused(place, file):
    """Two readers could take different values of it."""
    content = place.valid["normal"][file]
    if file == ADAPTER:
        size = int.from_bytes(content[:8], "little")
        key = next(name for name in safe.load(content))
        header = doubled(content[8 : 8 + size], key)
        content = len(header).to_bytes(8, "little") + header + content[8 + size :]
    else:
        key = next(iter(json.loads(content)))
        content = doubled(content, key)
    place.put("normal", {file: content})
    with pytest.raises(ValueError, match=f"the key '{key}' stands twice"):
        sp.Posterior.from_pretrained(place.llm, place.folder)


def test_sparse_file_is_refused_unread(place):
    place.put("normal", {})
    with (place.folder / POSTERIOR).open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=rf"{POSTERIOR} is damaged: .* the file has 10995"):
        sp.Posterior.from_pretrained(place.llm, place.folder)


@pytest.mark.parametrize("name", [ADAPTER, POSTERIOR, TOKENIZER])
def test_bit_that_has_fallen_over_is_found(place, name):
    content = bytearray(place.valid["normal"][name])
    content[-9 if name != TOKENIZER else content.index(b"rose")] ^= 1
    place.put("normal", {name: bytes(content)}, rehash=False)
    with pytest.raises(ValueError, match="has changed since it was saved: its SHA-256 is another"):
        sp.Posterior.from_pretrained(place.llm, place.folder)


def test_line_without_an_end_is_refused_before_it_fills_memory(tmp_path):
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as handle:
        handle.truncate(2**36)
    with pytest.raises(ValueError, match=rf"{file}, line 1: longer than"):
        read_rows(file)
