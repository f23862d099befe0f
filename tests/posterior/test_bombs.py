"""Small files that ask for much memory or time: each loads as a usual posterior, or is refused in words, at once.

The cases are made from the grammar of the library's own formats: every number, shape, name and link of a valid
posterior, baseline or checkpoint may be replaced, enlarged, nested or copied. A process with limits loads them.
``-m slow`` runs 30,000 cases; SCALABL_TEST_BOMBS sets another number.
"""

import json
import os
import sys
import time

import pytest
from bombs import MAX_CHARACTERS, Bomber
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro import distributions as dist

SLOW = int(os.environ.get("SCALABL_TEST_BOMBS", "30000"))
TENSORS, ADAPTER, CONFIG = "posterior.safetensors", "adapter_model.safetensors", "scalabl_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"


@pytest.fixture(scope="module")
def bomber(tmp_path_factory):
    process = Bomber(tmp_path_factory.mktemp("bombs"))
    kinds = process.start()
    yield process, kinds
    process.stop()


# by name ----------------------------------------------------------------------------------------------------

DIM = 8  # latents of the valid posteriors


def guide(family, tensors=None, **options):
    case = {"edits": [(CONFIG, "part", 0, 0, {"guide": {"family": family, "class": "x", "options": options}})]}
    return case | ({} if tensors is None else {"tensors": {f"guide.{name}": value for name, value in tensors.items()}})


def points(shape):
    return {"guide": {"family": "empirical", "class": "x", "options": {"num_chains": 2, "shapes": {"s": shape}}}}


def prior(family, **tensors):
    entry = {"family": family, "class": "FixedPrior", "parameters": list(tensors), "options": {}}
    edits = [(CONFIG, "part", 0, 0, {"prior": entry})]
    return {"edits": edits, "tensors": {f"prior.{name}": value for name, value in tensors.items()}}


def task(**options):
    known = {"labels": ["A", "B"], "template": "{question}", "chat": False, "chat_options": None, "max_length": None}
    entry = {"class": "MultipleChoice", "options": known | options}
    return {"edits": [(CONFIG, "part", 0, 0, {"task": entry})]}


def raw(file, text, count, kind="normal", place="posterior"):
    return {"kind": kind, "place": place, "edits": [(file, "raw", 0, count, text)]}


def normalizer(step):
    return {"edits": [(TOKENIZER, "part", 0, 0, {"normalizer": {"type": "Sequence", "normalizers": [step]}})]}


def unigram(*pieces):
    vocabulary = [["<unk>", 0.0], *([piece, -1.0] for piece in pieces)]
    return {"edits": [(TOKENIZER, "part", 0, 0, {"model": {"type": "Unigram", "unk_id": 0, "vocab": vocabulary}})]}


REGEX = {"type": "Replace", "content": ""}
NORMALS = [["normal", {}]] * 10_000
NEGATIVE = [
    ["empirical", {"num_chains": None, "shapes": {"s": [60_000_000, 16]}}],
    ["normal", {"shapes": {"a": [-(10**12)]}}],
]
THOUSAND_LINKS = {"links": [("children", 200, "")], "place": "baseline", "kind": "deep_ensemble"}
#: An added token with an option that the tokenizers library does not know. It would print the name of the option.
LOUD = {"content": "x", "\nok       all is well\x1b[2J": True}
#: What is wrong, and a word of the message.
NAMED = {
    "a listed file of 1 TiB": ({"links": [("sparse", 2**40, "")]}, "bytes to read or to hash"),
    "1,000 spellings of a file": ({"links": [("spellings", 1000, "")]}, "write it as 'posterior.safetensors'"),
    "a tensor file of 1 TiB": ({"edits": [(TENSORS, "shape", 0, 1, 2**38)]}, "numbers in tensors"),
    "32 million points in a sparse file": (
        {
            "kind": "points",
            "edits": [
                (TENSORS, "shape", 0, 1, [4_000_000, DIM]),
                (CONFIG, "part", 0, 0, points([4_000_000, DIM])),
            ],
        },
        "has changed since it was saved",  # only its hash is wrong: all of it was read and built
    ),
    "a sampler that never accepts": (
        prior("VonMises", loc=([DIM], 0), concentration=([DIM], 1e38)),
        "must be at most 1e",
    ),
    "another class of Pyro": (prior("LKJ", concentration=([], 1)), "is not a known prior"),
    "a broadcast to 29 GB": (prior("Normal", loc=([1, 60_000], 0), scale=([60_000, 1], 1)), "do not fit 8 latents"),
    "a rank without end": (
        prior("LowRankMultivariateNormal", loc=([DIM], 0), cov_factor=([DIM, 200_000], 0), cov_diag=([DIM], 1)),
        "do not fit 8 latents",
    ),
    "negative sizes in a mixture": (guide("mixture", components=NEGATIVE), "does not hold the tensors"),
    "10,000 components": (guide("mixture", components=NORMALS), "posteriors or components"),
    "many deep flows": (
        guide("auto", **{"class": "AutoIAFNormal", "hidden_dim": [70] * 40, "num_transforms": 80}),
        "layers of networks",
    ),
    "no layer": (guide("auto", **{"class": "AutoIAFNormal", "hidden_dim": []}), "a list of one or more widths"),
    "half a transform": (guide("flow", num_transforms=1.5), "num_transforms=1.5 must be a whole number"),
    "a hidden width as a text": (guide("flow", hidden="9"), "hidden='9' must be a whole number"),
    "10,000 dimensions": (guide("empirical", shapes={"s": [1] * 10_000}), "must map each site"),
    "a tensor of 10,000 dimensions": (
        {"edits": [(TENSORS, "shape", 0, 1, [1] * 10_000)]},
        "expected up to 8 whole numbers",
    ),
    "points that are not there": (guide("empirical", shapes={"s": [10**8, DIM]}), "does not hold the tensors"),
    "guides in guides in guides": (
        guide("with_hyperparameters", of_s="with_hyperparameters"),
        "must be the name of a guide",
    ),
    "20,000 equal labels": (task(labels=["A"] * 20_000), "stands there 20000 times"),
    "20,000 labels": (task(labels=[f"l{i}" for i in range(20_000)], template="{question}" + " the" * 300), "tokenize"),
    "a template of a million words": (task(labels=list("ABCDE"), template="{question}" + " the" * 10**6), "tokenize"),
    "60 MB of {}": (raw(TOKENIZER_CONFIG, "[" + "{}," * 10**6, 20), "bytes, more than the"),
    "8 MB of {} for the tokenizer": (raw(TOKENIZER_CONFIG, "{},", 2_600_000), "values, more than the"),
    "8 MB of {}": (raw(CONFIG, "{},", 2_700_000), "values, more than the"),
    "a vocabulary of {}": (raw(TOKENIZER, "{},", 10_000_000), "values, more than the"),
    "200,000 added tokens": (raw(TOKENIZER, '{"id":7}', 200_000), "added tokens, more than the"),
    "64 MB of {} in a checkpoint": (
        raw("record.json", "{},", 22_000_000, kind="rows", place="run"),
        "ended",  # the damaged checkpoint is logged and passed over
    ),
    "200 links to one folder": (THOUSAND_LINKS, "is the same folder as another part"),
    "a baseline in itself": (THOUSAND_LINKS | {"links": [("children", 3, "itself")]}, "is the same folder as another"),
    "a name of 300 characters": (
        {"edits": [(CONFIG, "part", 0, 0, {"files": {"a" * 300: {"bytes": 1, "sha256": "x"}}})]},
        "a name of more than 255 bytes",
    ),
    "a text that fills the message": ({"edits": [(CONFIG, "part", 0, 0, {"gauge": "x" * 10**6})]}, "gauge='xxx"),
    "options that are no options": (
        guide("normal") | {"place": "doctor", "edits": [(CONFIG, "part", 0, 0, {"guide": {"options": 3}})]},
        "'options' must be of type dict",
    ),
    "two gigabytes of nothing for the doctor": (
        {
            "place": "doctor",
            "kind": "AutoLowRankMultivariateNormal",
            "edits": [("adapter_model.safetensors", "shape", 3089, 1, 2**24)],
        },
        "has changed since it was saved",
    ),
    "lines of its own in the doctor": (
        {
            "place": "doctor",
            "edits": [(CONFIG, "part", 0, 0, {"library_version": "1\nok       all is well\u2028\x1b[2J"})],
        },
        "1\\nok       all is well\\u2028\\x1b[2J",
    ),
    **{
        f"lines of its own by the tokenizer, {where}": ({"place": place, "edits": [edit]}, "added token")
        for place in ("posterior", "doctor")
        for where, edit in {
            "decoder": (TOKENIZER_CONFIG, "part", 0, 0, {"added_tokens_decoder": {"0": LOUD}}),
            "type": (TOKENIZER_CONFIG, "part", 0, 0, {"x": [{"y": {"__type": "AddedToken", **LOUD}}]}),
            "vocabulary": (TOKENIZER, "part", 0, 0, {"added_tokens": [{"id": 0, **LOUD}]}),
        }.items()
    },
    "a table of characters that says it is long": (
        normalizer({"type": "Precompiled", "precompiled_charsmap": "/////wAAAAAAAAAAAAAAAAAAAAA="}),
        "shorter than it says",
    ),
    "a long regular expression": (normalizer(REGEX | {"pattern": {"Regex": "(?i)" + "\u00df" * 20_000}}), "regular"),
    "a long piece": (unigram("a" * 8_000_000), "nodes in the tree"),
    "long pieces": (unigram(*(f"{i:06}{'a' * 40}" for i in range(100_000))), "nodes in the tree"),
    "a piece that is hidden by another model": (
        raw(TOKENIZER, '{"model":{"type":"Unigram","vocab":[["x",0]]},"model":{}}', 1),
        "stands twice",
    ),
    "a long added token": (
        {"edits": [(TOKENIZER, "part", 0, 0, {"added_tokens": [{"id": 9, "content": "b" * 8_000_000}]})]},
        "characters of added tokens",
    ),
    "a long special token": (
        {"edits": [(TOKENIZER_CONFIG, "part", 0, 0, {"extra_special_tokens": ["b" * 4_000_000]})]},
        "characters of tokens",
    ),
    "a chat template without an end": (
        {
            "edits": [
                (
                    TOKENIZER_CONFIG,
                    "part",
                    0,
                    0,
                    {"chat_template": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"},
                )
            ]
        },
        "loaded",  # it is not rendered before the task is used
    ),
}


@pytest.mark.parametrize(("case", "word"), NAMED.values(), ids=NAMED)
def test_bomb_is_refused_at_once(bomber, case, word):
    found = bomber[0].load({"place": "posterior", "kind": "normal", **case})
    assert word in found["outcome"]


# from the grammar -------------------------------------------------------------------------------------------

ANYWHERE = st.integers(0, 10**6)
NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 3, 7, 8, 9, 64, 1000, 10**5, 2**24, 2**31, 2**38, 2**63, -(10**12), 10**15, 10**39, 1.5, 1e38, 1e308]
)
TEXTS = ("", "a" * 300, "b" * 100_000, "../x", "/etc/passwd", "./" * 50 + "x", "x\nok       y", "\x00", "\u202e")
WORDS = ("s", "loc", "normal", "lowrank", "flow", "mixture", "empirical", "auto", "mean_field", "AutoIAFNormal", "auto")
NAMES = st.sampled_from([*TEXTS, *WORDS])
VALUES = NUMBERS | NAMES | st.none() | st.booleans() | st.lists(NUMBERS, max_size=3) | st.just([]) | st.just({})
SIZES = st.sampled_from([1, 2, 3, 5, 17, 31, 40, 59, 200, 1000, 20_000, 200_000])
EDIT = st.tuples(
    st.sampled_from([CONFIG, CONFIG, CONFIG, "json", TOKENIZER_CONFIG, TOKENIZER, TENSORS, ADAPTER, "safetensors"]),
    st.sampled_from(["put", "number", "number", "enlarge", "enlarge", "nest", "copy", "rename", "add", "shape"]),
    ANYWHERE,
    SIZES,
    VALUES,
)
EDITS = st.lists(EDIT, min_size=1, max_size=3)
COUNTS = st.sampled_from([1, 2, 3, 8, 9, 16, 100, 10**5, 10**9, -1, 0, 1.5, "2", None, [], [9], [9, 9], [70] * 40])
LEAF = st.sampled_from(["normal", "delta", "rank_mask", "mean_field", "covariance", "lowrank", "flow", "empirical"])
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "structure": st.sampled_from(["layer", "full", "x", 3]),
        "rank": COUNTS,
        "num_transforms": COUNTS,
        "hidden": COUNTS,
        "shapes": st.dictionaries(
            st.sampled_from(["s", "layer_scale", "x"]), st.lists(NUMBERS, max_size=3), max_size=3
        ),
        "num_chains": COUNTS,
        "statistics": st.sampled_from([[], ["energy"], ["energy"] * 2, 3]),
        "gradient": st.sampled_from(["straight_through", "x"]),
    },
)
AUTO = st.fixed_dictionaries(
    {
        "class": st.sampled_from(["AutoNormal", "AutoDelta", "AutoIAFNormal", "AutoLowRankMultivariateNormal"])
        | st.sampled_from(["AutoGaussian", "AutoMultivariateNormal", "AutoNormalizingFlow", "AutoGuideList", "AutoX"])
    },
    optional={"rank": COUNTS, "hidden_dim": COUNTS, "num_transforms": COUNTS, "init_scale": COUNTS},
)


def repeated(components, count):
    """The components many times. A case stays small: mixtures of mixtures would multiply to gigabytes."""
    return components * max(1, min(count, MAX_CHARACTERS // len(json.dumps(components))))


GUIDES = st.recursive(
    st.tuples(LEAF, OPTIONS) | st.tuples(st.just("auto"), AUTO),
    lambda inner: (
        st.tuples(
            st.just("mixture"),
            st.tuples(st.lists(inner, max_size=3), st.sampled_from([1, 1, 1, 50, 5000])).map(
                lambda drawn: {"components": repeated([list(one) for one in drawn[0]], drawn[1])}
            ),
        )
        | inner.map(lambda one: ("with_hyperparameters", {"of_s": one[0], **one[1]}))
    ),
    max_leaves=4,
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 7, DIM, DIM + 1, 1000, 60_000]), max_size=3).filter(
    lambda shape: all(n < 1000 for n in shape) or (len(shape) < 3 and sum(n >= 1000 for n in shape) < 2)
)
FILLS = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, 1e-38, 1e-45, 1e38, 3e38, 1e20])
DISTRIBUTIONS = sorted(name for name in dist.__all__ if isinstance(getattr(dist, name), type))


def parameters(name):
    known = getattr(getattr(dist, name), "arg_constraints", None)
    return sorted(known) if isinstance(known, dict) and known else ["high", "low"]


PRIORS = st.sampled_from(DISTRIBUTIONS).flatmap(
    lambda name: st.fixed_dictionaries({p: st.tuples(st.just([DIM]) | SHAPES, FILLS) for p in parameters(name)}).map(
        lambda tensors: prior(name, **tensors)
    )
)
LINKS = st.tuples(
    st.sampled_from(["sparse", "spellings", "children", "link"]),
    st.sampled_from([1, 2, 3, 20, 200, 2000]),
    st.sampled_from(["itself", "inner", "/dev/zero", "/etc/passwd", "posterior.safetensors", "../p", "tokenizer"]),
)


@st.composite
def cases(draw, kinds):
    place = draw(st.sampled_from(["posterior", "carrier", "carrier", "carrier", "doctor", "baseline", "run"]))
    case = {"place": place, "kind": draw(st.sampled_from(kinds[place]))}
    how = draw(st.sampled_from(["edits", "edits", "guide", "guide", "prior", "links"]))
    if place == "run":
        return case | {"edits": draw(EDITS)}
    if place == "baseline":
        return case | ({"links": [draw(LINKS)]} if how == "links" else {"edits": draw(EDITS)})
    if how == "guide":
        family, options = draw(GUIDES)
        return case | guide(family, **options)
    if how == "prior":
        return case | draw(PRIORS)
    return case | ({"links": [draw(LINKS)]} if how == "links" else {"edits": draw(EDITS)})


@pytest.mark.parametrize("count", [100, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_bomb_from_the_grammar_loads_or_is_refused_at_once(bomber, count):
    process, kinds = bomber
    outcomes = {"loaded": 0, "refused": 0}
    start = time.perf_counter()

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=count <= 100,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(kinds))
    def every(case):
        outcome = process.load(case)["outcome"]
        outcomes["loaded" if outcome in ("loaded", "ended") else "refused"] += 1

    every()
    worst = "{seconds:.1f} s and {megabytes:.0f} MB at the worst, {kept:.0f} MB kept".format(**process.worst)
    sys.stdout.write(f"\n{outcomes} in {time.perf_counter() - start:.0f} s, {worst}\n")  # shown by -s
    assert outcomes["loaded"] and outcomes["refused"]
