"""Every prior, guide and task of the library by name, the pairs that are refused, and a tiny fit of any other."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import tiny
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

import scalabl_pyro as sp
from scalabl_pyro.guides import Guide, as_guide

LAYERS, RANK = ["q_proj", "v_proj"], 4
DIM = len(LAYERS) * RANK
EQUAL_CORRELATION = torch.full((DIM, DIM), 0.4).fill_diagonal_(1.0)

PRIORS: dict[str, Any] = {
    **{
        word: word
        for word in (
            "normal",
            "laplace",
            "student_t",
            "lognormal",
            "horseshoe",
            "hierarchical",
            "empirical",
            "rank_mask",
        )
    },
    "scale": 0.7,
    "distribution": dist.MultivariateNormal(torch.full((DIM,), 0.2), EQUAL_CORRELATION),
    "by_layer": lambda layer: dist.Laplace(
        torch.linspace(0.1, 0.4, layer.rank), 0.5 if "q_proj" in layer.name else 1.0
    ),
}
GUIDES: dict[str, Any] = {
    **{
        word: word
        for word in (
            "normal",
            "layer_covariance",
            "full_covariance",
            "lowrank",
            "flow",
            "delta",
            "svgd",
            "rank_mask",
        )
    },
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
}
#: Guides that are a class of Pyro.
AUTO = ("AutoNormal", "AutoMultivariateNormal")
#: Latents besides s that a prior samples.
HYPERLATENTS: dict[str, dict[str, tuple[int, ...]]] = {
    "horseshoe": {"slab_variance": (), "global_scale": (), "local_scale": (DIM,)},
    "hierarchical": {"layer_scale": (len(LAYERS),)},
}
NOT_REAL = "needs latents on the real line; this prior's are GreaterThan.*use 'normal'"
NEEDS_MASKS = "guide='rank_mask'"
NEEDS_NO_MASKS = "guide='rank_mask' is for masks: use it with prior='rank_mask'"
S_ALONE = "moves particles of s alone; this prior has other latents too: use 'normal'"
#: What the message says of each pair that does not go together.
REFUSED: dict[tuple[str, str], str] = {
    ("lognormal", "layer_covariance"): NOT_REAL,
    ("lognormal", "full_covariance"): NOT_REAL,
    ("lognormal", "lowrank"): NOT_REAL,
    ("lognormal", "flow"): NOT_REAL,
    ("lognormal", "svgd"): NOT_REAL,
    ("rank_mask", "layer_covariance"): NEEDS_MASKS,
    ("rank_mask", "full_covariance"): NEEDS_MASKS,
    ("rank_mask", "lowrank"): NEEDS_MASKS,
    ("rank_mask", "flow"): NEEDS_MASKS,
    ("rank_mask", "delta"): NEEDS_MASKS,
    ("rank_mask", "svgd"): NEEDS_MASKS,
    ("rank_mask", "AutoNormal"): NEEDS_MASKS,
    ("rank_mask", "AutoMultivariateNormal"): NEEDS_MASKS,
    ("normal", "rank_mask"): NEEDS_NO_MASKS,
    ("laplace", "rank_mask"): NEEDS_NO_MASKS,
    ("student_t", "rank_mask"): NEEDS_NO_MASKS,
    ("lognormal", "rank_mask"): NEEDS_NO_MASKS,
    ("horseshoe", "rank_mask"): NEEDS_NO_MASKS,
    ("hierarchical", "rank_mask"): NEEDS_NO_MASKS,
    ("empirical", "rank_mask"): NEEDS_NO_MASKS,
    ("scale", "rank_mask"): NEEDS_NO_MASKS,
    ("distribution", "rank_mask"): NEEDS_NO_MASKS,
    ("by_layer", "rank_mask"): NEEDS_NO_MASKS,
    ("horseshoe", "svgd"): S_ALONE,
    ("hierarchical", "svgd"): S_ALONE,
}


@dataclass(frozen=True)
class TaskKind:
    """A task, the tiny LLM it asks, and six rows."""

    make: Callable[[], sp.Task]
    llm: Callable[[], nn.Module]
    rows: list[dict[str, Any]]
    num_classes: int | None


ROWS = 6
TASKS = {
    "choice": TaskKind(
        lambda: sp.MultipleChoice(tiny.tokenizer()),
        tiny.causal_lm,
        tiny.question_rows(ROWS),
        num_classes=4,
    ),
    "classification": TaskKind(
        lambda: sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"]),
        lambda: tiny.classifier("llama", num_labels=3),
        tiny.text_rows(ROWS),
        num_classes=3,
    ),
    "regression": TaskKind(
        lambda: sp.Regression(tiny.tokenizer()),
        lambda: tiny.classifier("llama", num_labels=1),
        [{**row, "label": row["label"] / 2} for row in tiny.text_rows(ROWS)],
        num_classes=None,
    ),
    "labels": TaskKind(
        lambda: sp.tasks.MultiLabelClassification(tiny.tokenizer(), classes=["a", "b", "c"]),
        lambda: tiny.classifier("llama", num_labels=3),
        [{**row, "labels": [[], ["a"], ["a", "c"], ["b"]][i % 4]} for i, row in enumerate(tiny.text_rows(ROWS))],
        num_classes=3,
    ),
    "names": TaskKind(
        lambda: sp.tasks.LabelCompletion(tiny.tokenizer(), classes=["red sky", "green", "the night"]),
        tiny.causal_lm,
        tiny.text_rows(ROWS),
        num_classes=3,
    ),
    "stars": TaskKind(
        lambda: sp.tasks.OrderedClassification(tiny.tokenizer(), classes=[0, 1, 2]),
        lambda: tiny.classifier("llama", num_labels=1),
        tiny.text_rows(ROWS),
        num_classes=3,
    ),
    "counts": TaskKind(
        lambda: sp.tasks.CountRegression(tiny.tokenizer()),
        lambda: tiny.classifier("llama", num_labels=1),
        tiny.text_rows(ROWS),
        num_classes=None,
    ),
    "windows": TaskKind(
        lambda: sp.SequenceClassification(
            tiny.tokenizer(), classes=["a", "b", "c"], max_length=4, windows="probs", overlap=1
        ),
        lambda: tiny.classifier("llama", num_labels=3),
        tiny.text_rows(ROWS),
        num_classes=3,
    ),
    "robust": TaskKind(
        lambda: sp.tasks.RobustRegression(tiny.tokenizer()),
        lambda: tiny.classifier("llama", num_labels=1),
        [{**row, "label": row["label"] / 2} for row in tiny.text_rows(ROWS)],
        num_classes=None,
    ),
}
#: Tasks that are like others but for the likelihood: one pair of prior and guide is enough for the default suite.
ALIKE = ("labels", "names", "stars", "counts", "windows", "robust")
#: Tasks with parameters of their own.
LEARNED = ("regression", "stars", "robust")


@dataclass(frozen=True)
class Case:
    """Names of a prior, a guide and a task."""

    prior: str
    guide: str
    task: str

    def __str__(self) -> str:
        return f"{self.prior}-{self.guide}-{self.task}"

    @property
    def kind(self) -> TaskKind:
        return TASKS[self.task]

    @property
    def is_point(self) -> bool:
        return self.guide == "delta"

    @property
    def has_density(self) -> bool:
        return self.guide not in ("delta", "svgd")

    @property
    def sites(self) -> dict[str, tuple[int, ...]]:
        """Shape of each latent site."""
        return {"s": (DIM,), **HYPERLATENTS.get(self.prior, {})}

    @property
    def learned(self) -> set[str]:
        """Which parts have something to train."""
        extras = {"prior": self.prior == "empirical", "task": self.task in LEARNED}
        return {"point", "guide", *(part for part, has in extras.items() if has)}

    def blora(self) -> sp.BayesianLoRA:
        """A fresh tiny LLM with the prior, adapted in the upper of its two blocks."""
        return sp.bayesian_lora(
            self.kind.llm(), r=RANK, target_modules=LAYERS, layers_to_transform=[1], prior=PRIORS[self.prior]
        )

    def fit(self, blora: sp.BayesianLoRA, *, task: sp.Task | None = None, guide: Guide | None = None, **options: Any):
        """Three steps, in all of which each row is seen."""
        options = {
            "num_steps": 3,
            "batch_size": ROWS,
            "lr": 1e-2,
            "optimizer": {"warmup": 0.0},
            "progress": False,
            **options,
        }
        guide = GUIDES[self.guide] if guide is None else guide
        return sp.fit(blora, task or self.kind.make(), self.kind.rows, guide=guide, **options)


PAIRS = [pair for prior in PRIORS for guide in GUIDES if (pair := (prior, guide)) not in REFUSED]
#: Each prior with the default guide, and each guide with the default prior: what differs between tasks is not a pair.
BESIDE_CHOICE = [pair for pair in PAIRS if "normal" in pair]
CASES = [
    *[Case(*pair, "choice") for pair in PAIRS],
    *[Case(*pair, task) for task in ("classification", "regression") for pair in BESIDE_CHOICE],
    *[Case("normal", guide, task) for task in ALIKE for guide in ("normal", "delta")],
]
#: All other combinations, for which the default suite has no time.
REST = [
    *[Case(*pair, task) for task in ("classification", "regression") for pair in PAIRS if pair not in BESIDE_CHOICE],
    *[case for task in ALIKE for pair in BESIDE_CHOICE if (case := Case(*pair, task)) not in CASES],
]


@dataclass(frozen=True)
class Fitted:
    """What a fit left behind, and what it did on the way.

    Attributes:
        start: value of each trainable tensor before the fit.
        end: the same tensors afterwards.
        reached: which of their entries had a gradient other than 0 in some step.
    """

    result: sp.FitResult
    start: Mapping[str, Tensor]
    end: Mapping[str, Tensor]
    reached: Mapping[str, Tensor]


def frozen(posterior: sp.Posterior) -> dict[str, Tensor]:
    """What a posterior holds of the trained tensors, under the names of :func:`trainable`."""
    point: dict[str, Tensor] = {}
    for layer, (A, B) in zip(posterior.subspace, posterior.factors, strict=True):
        point |= {f"{layer.name}/A": A, f"{layer.name}/B": B}
    for path, head in posterior.heads.items():
        point |= {f"{path}/{name}": value for name, value in head.named_parameters()}
    held = {"point." + name.replace(".", "/"): value for name, value in point.items()}
    parts = {"guide": posterior.guide, "prior": posterior.prior, "task": posterior.task}
    held |= {f"{part}.{name}": value for part, module in parts.items() for name, value in module.named_parameters()}
    if "guide.points_s" in held:  # particles are points from then on
        held["guide.particles"] = held.pop("guide.points_s")
    return held


def trainable(**modules: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of modules by name, those of all parts together."""
    return {f"{part}.{n}": p for part, m in modules.items() for n, p in m.named_parameters() if p.requires_grad}


@functools.cache
def fitted(case: Case) -> Fitted:
    """Fit a case once, watching the gradients of all that can be trained."""
    blora, task = case.blora(), case.kind.make()
    guide = as_guide(GUIDES[case.guide], blora)
    live = trainable(point=blora.point_estimates, prior=blora.prior, task=task, guide=guide)
    start = {name: p.detach().clone() for name, p in live.items()}
    reached = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in live.items()}

    def watch(record: Any) -> None:
        for name, p in live.items():
            if p.grad is not None:
                reached[name] |= p.grad != 0

    result = case.fit(blora, task=task, guide=guide, callbacks=[watch])
    return Fitted(result, start, {name: p.detach().clone() for name, p in live.items()}, reached)
