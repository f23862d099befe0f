"""Tasks for what tables hold: each likelihood is that of a hand computation in float64, and stock SVI trains as fit."""

import doctest
import itertools

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import tiny
import torch
from completions import adapted, draws_of
from scipy import stats
from scipy.special import expit, logsumexp
from stock import train_with_stock_svi

import scalabl_pyro as sp
from scalabl_pyro import tasks
from scalabl_pyro._process.random_state import derive_seed
from scalabl_pyro.baselines.predictor import concatenate
from scalabl_pyro.data import TrainingBatches, collate, encode
from scalabl_pyro.prediction import collect, label_sets
from scalabl_pyro.prediction.label_sets import LabelSetPrediction
from scalabl_pyro.tasks.registry import from_options, to_config

EXACT = {"rtol": 0, "atol": 1e-10}
FEW = {"num_steps": 3, "batch_size": 6, "progress": False}
TEXTS = tiny.text_rows(6)


def batch_of(task, rows):
    examples = encode(rows, task.encode, need_target=False)
    return collate(examples, range(len(examples)), task.pad_token_id)


def outputs_of(num, seed=0):
    """Outputs of four draws and six rows, some of them far out."""
    return 3 * torch.randn(4, 6, num, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_prob(task, outputs, rows):
    batch = batch_of(task, rows)
    return task.distribution(outputs, batch).log_prob(batch.target).detach().numpy()


def labeled(values):
    return [{**row, "label": value} for row, value in zip(TEXTS, values, strict=True)]


# ordered classes ----------------------------------------------------------------------------------------------

STARS = [1, 5, 3, 2, 4, 1]


def ordered(**options):
    return tasks.OrderedClassification(tiny.tokenizer(), classes=[1, 2, 3, 4, 5], **options)


def test_ordered_classes_by_hand_and_by_pyro():
    task, outputs = ordered(), outputs_of(1)
    cuts = task.cutpoints.detach().double().numpy()
    np.testing.assert_allclose(cuts, np.log([0.25, 2 / 3, 1.5, 4]), atol=1e-6)
    below = np.concatenate([[0.0], expit(cuts), [1.0]])  # p(y <= k) where the output is 0
    np.testing.assert_allclose(np.diff(below), 0.2, atol=1e-6)
    edges = expit(np.concatenate([[-np.inf], cuts, [np.inf]]) - outputs.numpy())
    index = np.array(STARS) - 1
    by_hand = np.log(np.take_along_axis(np.diff(edges), np.broadcast_to(index[None, :, None], (4, 6, 1)), 2)[..., 0])
    found = log_prob(task, outputs, labeled(STARS))
    np.testing.assert_allclose(found, by_hand, **EXACT)
    theirs = dist.OrderedLogistic(outputs[..., 0], task.cutpoints.double()).log_prob(torch.tensor(index))
    np.testing.assert_allclose(found, theirs.detach().numpy(), **EXACT)


def test_a_surprise_keeps_its_gradient():
    """Pyro's distribution clamps the probability in float32, and the row would teach nothing."""
    output = torch.tensor([[40.0]], requires_grad=True)
    batch = batch_of(ordered(), [{**TEXTS[0], "label": 2}])
    ordered().distribution(output, batch).log_prob(batch.target).sum().backward()
    assert output.grad.item() == pytest.approx(-1.0, abs=1e-3)


# weights of classes -------------------------------------------------------------------------------------------


def test_class_weights_multiply_the_log_likelihood_and_leave_the_probabilities():
    def plain(**options):
        return sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"], **options)

    outputs, rows, weights = outputs_of(3), labeled([0, 1, 2, 0, 1, 2]), np.array([0.5, 1.0, 4.0])
    task = plain(class_weights=weights)
    expected = log_prob(plain(), outputs, rows) * weights[[0, 1, 2, 0, 1, 2]]
    np.testing.assert_allclose(log_prob(task, outputs, rows), expected, **EXACT)
    d = task.distribution(outputs, batch_of(task, rows))
    torch.testing.assert_close(d.probs, outputs.softmax(-1), **EXACT)
    torch.testing.assert_close(
        d.expand((2, 4, 6)).log_prob(torch.tensor(0)), d.log_prob(torch.tensor(0)).expand(2, 4, 6)
    )


def test_balanced_weights_are_those_of_the_training_rows_and_saved():
    task = ordered(class_weights="balanced")
    blora = sp.bayesian_lora(tiny.classifier(num_labels=1), r=2)
    sp.fit(blora, task, labeled(STARS), **FEW)
    assert task.class_weights == pytest.approx((6 / 10, 6 / 5, 6 / 5, 6 / 5, 6 / 5))
    loaded = from_options("OrderedClassification", tiny.tokenizer(), to_config(task)["options"])
    assert loaded.class_weights == task.class_weights
    task.restart()
    assert task.class_weights == "balanced"
    with pytest.raises(ValueError, match="needs the classes of all rows"):
        task.prepare([0, 1], are_all=False)


@pytest.mark.parametrize("wrong", ["even", [1, 2], [1, 2, 3, 4, 0], [1, 2, 3, 4, float("nan")], 3, {"a": 1}])
def test_wrong_class_weights_are_refused(wrong):
    with pytest.raises(ValueError, match=r"class_weights=.*one positive finite number for each of the 5 classes"):
        ordered(class_weights=wrong)


# counts -------------------------------------------------------------------------------------------------------


def test_counts_by_hand():
    task, outputs, counts = tasks.CountRegression(tiny.tokenizer(), mean_count=2.5), outputs_of(1), [0, 1, 7, 2, 300, 3]
    by_hand = stats.poisson.logpmf(counts, 2.5 * np.exp(outputs[..., 0].numpy()))
    np.testing.assert_allclose(log_prob(task, outputs, labeled(counts)), by_hand, rtol=1e-13, atol=1e-10)


def test_the_mean_count_is_learned_once_and_saved():
    task = tasks.CountRegression(tiny.tokenizer())
    blora = sp.bayesian_lora(tiny.classifier(num_labels=1), r=2)
    sp.fit(blora, task, labeled([0, 1, 7, 2, 5, 3]), **FEW)
    assert task.mean_count == 3.0
    loaded = from_options("CountRegression", tiny.tokenizer(), to_config(task)["options"])
    assert loaded.mean_count == 3.0
    sp.fit(blora, task, labeled([10, 10, 10, 10, 10, 10]), **FEW)
    assert task.mean_count == 3.0
    sp.fit(blora, task, labeled([0, 0, 0, 0, 0, 0]), reset=True, **FEW)
    assert task.mean_count == 0.5 / 6


@pytest.mark.parametrize("wrong", [-1, 1.5, "many", True, [1], float("inf")])
def test_what_is_not_a_count_is_refused(wrong):
    with pytest.raises(ValueError, match="is not a count: give a whole number from 0 on"):
        tasks.CountRegression(tiny.tokenizer()).encode({"text": "sky", "label": wrong})


# robust numbers -----------------------------------------------------------------------------------------------


def test_robust_numbers_by_hand():
    options = {"df": 3.5, "standardize": (100.0, 20.0), "noise_scale": 10.0}
    task, outputs, values = tasks.RobustRegression(tiny.tokenizer(), **options), outputs_of(1), [99, 1e4, 0, -3, 5, 120]
    by_hand = stats.t.logpdf(values, 3.5, 100 + 20 * outputs[..., 0].numpy(), 10.0)
    np.testing.assert_allclose(log_prob(task, outputs, labeled(values)), by_hand, **EXACT)
    d = task.distribution(outputs, batch_of(task, labeled(values)))
    np.testing.assert_allclose(d.mean.detach(), 100 + 20 * outputs[..., 0], rtol=1e-12)
    np.testing.assert_allclose(d.variance.detach(), 100 * 3.5 / 1.5, rtol=1e-6)
    assert d.expand((2, 4, 6)).log_prob(torch.zeros(6)).shape == (2, 4, 6)


def test_an_outlier_does_not_move_center_and_unit():
    task = tasks.RobustRegression(tiny.tokenizer())
    task.prepare([1.0, 2.0, 3.0, 4.0, 1e6], are_all=True)
    assert task.standardize == pytest.approx((3.0, 1.4826022))
    task = tasks.RobustRegression(tiny.tokenizer())
    task.prepare([3.0, 3.0, 3.0, 6.0], are_all=True)  # most answers are equal
    assert task.standardize == pytest.approx((3.0, np.std([3, 3, 3, 6])))


@pytest.mark.parametrize("df", [2, 0, -1, float("nan"), float("inf"), "4", None])
def test_degrees_of_freedom_without_a_variance_are_refused(df):
    with pytest.raises(ValueError, match=r"df=.*finite number above 2"):
        tasks.RobustRegression(tiny.tokenizer(), df=df)


# several labels -----------------------------------------------------------------------------------------------

SETS = [[], ["a"], ["c", "a"], ["b", "b"], [0, 2], ["a", "b", "c"]]


def label_rows(sets=SETS):
    return [{**row, "labels": value} for row, value in zip(TEXTS, sets, strict=True)]


def several(**options):
    return tasks.MultiLabelClassification(tiny.tokenizer(), **{"classes": ["a", "b", "c"], **options})


def test_several_labels_by_hand():
    task, outputs = several(), outputs_of(3)
    target = np.array([[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 1, 0], [1, 0, 1], [1, 1, 1]])
    np.testing.assert_array_equal(batch_of(task, label_rows()).target, target)
    p = expit(outputs.numpy())
    by_hand = np.log(np.where(target == 1, p, 1 - p)).sum(-1)
    np.testing.assert_allclose(log_prob(task, outputs, label_rows()), by_hand, **EXACT)


@pytest.fixture(scope="module")
def several_posterior():
    blora = sp.bayesian_lora(tiny.classifier(num_labels=3), r=2)
    return sp.fit(blora, several(), label_rows(), **FEW).posterior


def test_a_prediction_of_label_sets_by_hand(several_posterior):
    found = several_posterior.predict(label_rows(), num_draws=5, seed=1)
    assert isinstance(found, LabelSetPrediction)
    p = expit(found.log_odds.astype(np.float64))
    target = found.target
    np.testing.assert_allclose(found.probs, p.mean(0), **EXACT)
    per_set = np.stack(
        [np.where(s, p, 1 - p).prod(-1).mean(0) for s in itertools.product([False, True], repeat=3)], axis=-1
    )
    np.testing.assert_allclose(per_set.sum(-1), 1, atol=1e-12)
    number = target @ [4, 2, 1]
    np.testing.assert_allclose(np.exp(found.log_mixture), per_set[np.arange(6), number], rtol=1e-5)
    frame = found.to_frame()
    chosen = found.labels @ [4, 2, 1]
    np.testing.assert_allclose(frame["probability"], per_set[np.arange(6), chosen], rtol=1e-9)
    assert frame["target"].tolist() == [[], ["a"], ["a", "c"], ["b"], ["a", "c"], ["a", "b", "c"]]
    assert {"prediction", "p(a)", "p(b)", "p(c)", "total"} <= set(frame)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).sum(-1).mean(0)
    np.testing.assert_allclose(found.aleatoric, entropy, rtol=1e-9)
    assert (found.total >= found.aleatoric - 1e-12).all()
    scores = found.metrics(bootstrap=10).loc["value"]
    assert scores["subset_accuracy"] == (found.labels == target).all(1).mean()
    assert scores["accuracy"] == pytest.approx((found.labels == target).mean())
    assert scores["nll"] == pytest.approx(-found.log_mixture.mean())
    both = (found.labels & (target == 1)).sum()
    assert scores["f1_micro"] == pytest.approx(2 * both / (found.labels.sum() + target.sum()))


def test_rows_without_labels_are_left_out_of_the_metrics(several_posterior):
    rows = label_rows()
    some = [*rows[:3], {k: v for k, v in rows[3].items() if k != "labels"}, {**rows[4], "labels": None}, rows[5]]
    found, whole = (several_posterior.predict(data, num_draws=3) for data in (some, rows))
    np.testing.assert_array_equal(found.log_odds, whole.log_odds)
    assert found.is_answered.tolist() == [True, True, True, False, False, True]
    assert np.isnan(found.log_likelihood[:, 3:5]).all() and found.metrics()["num_answered"].item() == 4
    assert found.to_frame()["target"][3] is None
    bare = several_posterior.predict([{"text": row["text"]} for row in rows], num_draws=3)
    assert bare.target is None and "target" not in bare.to_frame()
    with pytest.raises(ValueError, match="no answers"):
        bare.metrics()
    with pytest.raises(TypeError, match="several labels per row: predict with keep_draws=True"):
        several_posterior.predict(rows, num_draws=3, keep_draws=False)
    assert several_posterior.diagnose(rows, num_draws=200) is not None


def test_fields_of_zero_and_one_are_lists_of_labels():
    wide = several(classes=None, target=("a", "b", "c"))
    row = {"text": "the sky", "a": 1.0, "b": False, "c": np.int64(1)}
    assert wide.encode(row).target == several().encode({"text": "the sky", "labels": ["a", "c"]}).target
    assert wide.encode({"text": "the sky"}).target is None
    assert list(wide.row_fields) == ["text", "a", "b", "c"]
    loaded = from_options("MultiLabelClassification", tiny.tokenizer(), to_config(wide)["options"])
    assert loaded.encode(row) == wide.encode(row)
    with pytest.raises(ValueError, match="field 'b' holds 2: give 0 or 1"):
        wide.encode({**row, "b": 2})
    with pytest.raises(ValueError, match="field 'b' holds None"):
        wide.encode({**row, "b": None})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a", "give a list of labels"),
        (3, "give a list of labels"),
        (["d"], "not a class"),
        ([None], "without a value"),
        ([1, 0, 1], "names a label twice by its number. If it marks each label by 0 or 1"),
        (np.array([0.0, 0.0, 0.0]), "names a label twice by its number"),
    ],
)
def test_wrong_label_sets_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        several().encode({"text": "the sky", "labels": value})


@pytest.mark.parametrize("wrong", [{"classes": None}, {"target": ("a", "b")}, {"target": 3}, {"classes": ["a"]}])
def test_wrong_options_of_several_labels_are_refused(wrong):
    with pytest.raises((ValueError, TypeError)):
        several(**wrong)


# names of several tokens --------------------------------------------------------------------------------------

NAMES = ["red sky", "green", "the night is black"]


def names(**options):
    return tasks.LabelCompletion(tiny.tokenizer(), **{"classes": NAMES, **options})


@pytest.mark.parametrize("end_token", [False, True])
def test_names_of_several_tokens_by_hand(end_token):
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "."
    task = tasks.LabelCompletion(tokenizer, classes=NAMES, end_token=end_token)
    blora = adapted(target_modules=["q_proj", "v_proj"])
    batch, s = batch_of(task, TEXTS), draws_of(blora, 2, 1)
    found = task.distribution(task.outputs(blora, batch, s), batch).logits.detach().numpy()
    for i, row in enumerate(TEXTS):
        prompt = tokenizer(task.prompt(row)).input_ids
        scores = []
        for name in NAMES:
            label = tokenizer(" " + name).input_ids + [tokenizer.eos_token_id] * end_token
            ids = torch.tensor([prompt + label])
            logits = blora(input_ids=ids, s=s).logits.log_softmax(-1)[:, 0, len(prompt) - 1 : -1]
            scores.append(logits.gather(-1, torch.tensor(label)[None, :, None].expand(2, -1, 1)).sum((1, 2)))
        by_hand = torch.stack(scores, -1).detach().numpy()
        by_hand = by_hand - logsumexp(by_hand, axis=-1, keepdims=True)
        np.testing.assert_allclose(found[:, i], by_hand, **EXACT)


def test_names_of_one_token_are_multiple_choice():
    labels = ["red", "green", "blue"]
    task = names(classes=labels, template="{text} :")
    choice = sp.MultipleChoice(tiny.tokenizer(), labels=labels, template="{question} :")
    blora = adapted(target_modules=["q_proj", "v_proj"])
    rows = [{"question": row["text"], "choices": labels, "answer": row["label"]} for row in TEXTS]
    for shape in ((2, 1), (6,), (2, 6)):
        s = draws_of(blora, *shape)
        mine, theirs = batch_of(task, TEXTS), batch_of(choice, rows)
        p = task.distribution(task.outputs(blora, mine, s), mine).logits
        q = choice.distribution(choice.outputs(blora, theirs, s), theirs).logits.log_softmax(-1)[..., :3]
        torch.testing.assert_close(p, q, **EXACT)


@pytest.mark.parametrize("chat", [False, True])
def test_a_long_text_loses_its_end(chat):
    task = tasks.LabelCompletion(tiny.tokenizer(chat=True), classes=NAMES, chat=chat, max_length=8)
    example = task.encode({"text": "the sky is blue . " * 5, "label": "green"})
    assert len(example) <= 8 and example.is_cut and example.target == 1
    short = tasks.LabelCompletion(tiny.tokenizer(chat=True), classes=NAMES, chat=chat).encode({"text": "the sky"})
    assert example.inputs["input_ids"][-2:] == short.inputs["input_ids"][-2:]
    with pytest.raises(ValueError, match="leaves no room for the text"):
        tasks.LabelCompletion(tiny.tokenizer(), classes=NAMES, max_length=1).encode({"text": "the sky is blue"})


def test_names_that_begin_with_each_other_need_an_end():
    with pytest.raises(ValueError, match=r"'red sky' begin with those of 'red'.*end_token=True"):
        names(classes=["red", "red sky"])
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "."
    assert tasks.LabelCompletion(tokenizer, classes=["red", "red sky"], end_token=True).classes == ("red", "red sky")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"template": "Label:"}, r"must contain '\{text\}'"),
        ({"chat": True}, "no chat template"),
        ({"end_token": True}, "no end token"),
        ({"classes": ["red"]}, "at least two classes"),
        ({"text": 3}, "name of a field"),
        ({"classes": ["red", "purple"]}, "does not know the class 'purple'"),
    ],
)
def test_wrong_options_of_names_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        names(**wrong)


def test_several_labels_join_in_an_ensemble(several_posterior):
    parts = [several_posterior.predict(label_rows(), num_draws=2, seed=seed) for seed in (0, 1)]
    joined = concatenate(parts)
    assert joined.log_odds.shape == (4, 6, 3) and joined.num_draws == 4


@pytest.mark.parametrize("module", [label_sets, collect])
def test_examples_of_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


# all of them --------------------------------------------------------------------------------------------------

KINDS = {
    "ordered": (lambda: ordered(), 1, labeled(STARS)),
    "counts": (lambda: tasks.CountRegression(tiny.tokenizer(), mean_count=2.0), 1, labeled([0, 1, 7, 2, 5, 3])),
    "robust": (
        lambda: tasks.RobustRegression(tiny.tokenizer(), standardize=(2.0, 1.0)),
        1,
        labeled([1.0, 2, 3, 4, 2.5, 9]),
    ),
    "several": (lambda: several(), 3, label_rows()),
    "names": (lambda: names(), None, labeled([0, 1, 2, 0, 1, 2])),
}


@pytest.mark.usefixtures("stock_pyro")
@pytest.mark.parametrize("kind", KINDS)
def test_stock_svi_and_fit_reach_equal_parameters(kind):
    make, num_labels, rows = KINDS[kind]
    steps, size, seed = 4, 3, 3

    def adapt():
        plain = num_labels is None
        llm = (
            tiny.causal_lm(dtype=torch.float64)
            if plain
            else tiny.classifier(num_labels=num_labels, dtype=torch.float64)
        )
        return adapted(llm, target_modules=["q_proj"], r=2)

    options = {"lr_scale": 1e-2, "schedule": "constant", "warmup": 0.0}
    rates = {"lr": 1e-2, "lr_A": 1e-2, "optimizer": options}
    fitted = sp.fit(
        adapt(), make(), rows, num_steps=steps, batch_size=size, seed=seed, progress=False, **rates
    ).posterior
    twin, task = adapt(), make()
    guide = sp.guides.as_guide("normal", twin, seed=derive_seed(seed, "initial scales"))
    batches = TrainingBatches(encode(rows, task.encode, need_target=True), size, task.pad_token_id, seed=seed)
    train_with_stock_svi(twin, task, guide, batches, num_data=len(rows), steps=steps, seed=seed)
    near = {"rtol": 0, "atol": 1e-6 if dict(task.named_parameters()) else 1e-10}  # own parameters are float32
    torch.testing.assert_close(fitted.guide.loc, guide.loc.data, **near)
    for (A, B), (own_A, own_B) in zip(fitted.factors, twin.adapter.factors(), strict=True):
        torch.testing.assert_close(A, own_A.data / own_A.data.norm(dim=1, keepdim=True), **near)
        torch.testing.assert_close(B, own_B.data, **near)
    for one, other in zip(fitted.task.parameters(), task.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_predictions_are_equal_and_have_columns(kind, tmp_path):
    make, num_labels, rows = KINDS[kind]

    def llm():
        return tiny.causal_lm() if num_labels is None else tiny.classifier(num_labels=num_labels)

    posterior = sp.fit(sp.bayesian_lora(llm(), r=2), make(), rows, **FEW).posterior
    posterior.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(llm(), tmp_path / "p")
    one, other = (p.predict(rows, num_draws=20).to_frame() for p in (posterior, loaded))
    pd.testing.assert_frame_equal(one, other)
    assert {"prediction", "total", "aleatoric", "epistemic", "target"} <= set(one)
    assert np.isfinite(posterior.predict(rows, num_draws=20).metrics()["nll"]).all()
