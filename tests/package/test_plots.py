"""Plots draw what they say on the axes they are given, and show and save nothing."""

import matplotlib

matplotlib.use("Agg")

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import toy_scores
from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

import scalabl_pyro as sp
from scalabl_pyro import metrics, plots
from scalabl_pyro.plots.style import METHOD


def prediction(seed=0, rows=60, *, answered=True, concentration=1.0):
    """Calibrated class probabilities of 4 draws."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(3, concentration), (4, rows)).astype(np.float32)
    target = np.array([rng.choice(3, p=p / p.sum()) for p in probs.mean(0).astype(float)]) if answered else None
    return sp.Prediction(np.log(probs), target, ("a", "b", "c"))


def numbers(seed=0, rows=40):
    rng = np.random.default_rng(seed)
    means, variances = rng.normal(size=(4, rows)), rng.uniform(0.5, 1.0, size=(4, rows))
    return sp.NumericPrediction(means, variances, means, None, None)


def evaluated():
    """A history with held-out rows at every fifth step, of which the second is kept."""
    frame = history()
    scored = frame["step"] % 5 == 4
    return frame.assign(eval_nll=np.where(scored, 0.9 - 0.01 * frame["step"], np.nan), kept=frame["step"] == 9)


def history(steps=30, seed=0):
    rng = np.random.default_rng(seed)
    nll, kl = rng.uniform(0.5, 1.0, steps), rng.uniform(1.0, 2.0, steps)
    return pd.DataFrame({"step": np.arange(steps), "loss": nll + kl, "nll": nll, "kl": kl * 100})


def posterior_of(module, **options):
    """The posterior of a module after one step; a stand-in task gives it something to predict."""
    blora = sp.bayesian_lora(module, **options)
    task = sp.MultipleChoice(tiny.tokenizer())
    return sp.fit(blora, task, tiny.question_rows(4), num_steps=1, progress=False).posterior


@pytest.fixture(scope="module")
def posterior():
    return posterior_of(tiny.causal_lm(), r=4)


@pytest.fixture(autouse=True)
def no_window_no_file(monkeypatch):
    """Each test starts without figures; showing or saving one fails it."""

    def refuse(*args, **kwargs):
        raise AssertionError("a plot must not show or save anything")

    plt.close("all")
    for owner, name in ((plt, "show"), (plt, "savefig"), (Figure, "savefig"), (Figure, "show")):
        monkeypatch.setattr(owner, name, refuse)
    yield
    plt.close("all")


PLOTS = {
    "reliability": lambda posterior, **kw: plots.reliability(prediction(), **kw),
    "risk_coverage": lambda posterior, **kw: plots.risk_coverage(prediction(), **kw),
    "confident_mistakes": lambda posterior, **kw: plots.confident_mistakes({"a": prediction()}, threshold=0.6, **kw),
    "history": lambda posterior, **kw: plots.history(history(), **kw),
    "loss": lambda posterior, **kw: plots.loss(evaluated(), **kw),
    "posterior_by_layer": lambda posterior, **kw: plots.posterior_by_layer(posterior, num_draws=20, **kw),
    "tokens": lambda posterior, **kw: plots.tokens(toy_scores.scored([["a", " text"]]), **kw),
    "uncertainty_histogram": lambda posterior, **kw: plots.uncertainty_histogram(prediction(), prediction(1), **kw),
}


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def labeled(ax):
    """Lines that stand in the legend, by their entry."""
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


# every plot ---------------------------------------------------------------------------------------------------


def test_every_plot_is_tested_here():
    assert set(plots.__all__) == set(PLOTS)


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_makes_one_figure_of_its_own(name, posterior):
    ax = PLOTS[name](posterior)
    assert isinstance(ax, Axes)
    assert len(plt.get_fignums()) == 1
    assert ax.figure.axes == [ax]


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_draws_on_the_axes_it_is_given_and_nowhere_else(name, posterior):
    figure, (left, right) = plt.subplots(1, 2)
    other = plt.figure()
    plt.figure(other)  # the current figure is another one
    assert PLOTS[name](posterior, ax=right) is right
    assert right.has_data() and not left.has_data()
    assert figure.axes == [left, right] and not other.axes
    assert plt.get_fignums() == [figure.number, other.number]


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_has_a_title_labels_and_a_legend_and_can_be_rendered(name, posterior):
    ax = PLOTS[name](posterior)
    assert (ax.get_title() or ax.get_title("left")) and ax.get_xlabel() and ax.get_ylabel()
    assert all(legend(ax))
    ax.figure.canvas.draw()


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_leaves_matplotlib_settings_and_random_states_alone(name, posterior, unchanged_rng):
    settings, numpy_state = dict(matplotlib.rcParams), np.random.get_state()[1].copy()  # noqa: NPY002
    PLOTS[name](posterior)
    assert dict(matplotlib.rcParams) == settings
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


def contrast(one, other):
    """Contrast ratio of two colors, 1 to 21 (WCAG 2.1)."""

    def luminance(color):
        parts = np.array(colors.to_rgb(color))
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


DARK = {"figure.facecolor": "#111111", "axes.facecolor": "#111111", "text.color": "white", "axes.labelcolor": "white"}
FACES = {
    "default": {},
    "dark": DARK,
    "transparent": {"figure.facecolor": (1, 1, 1, 0), "axes.facecolor": "none"},
    "transparent under light text": DARK | {"figure.facecolor": "none", "axes.facecolor": (0, 0, 0, 0)},
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", PLOTS)
def test_text_can_be_read_whatever_lies_behind_the_figure(name, face, posterior):
    """A notebook with a dark theme shows through a transparent figure."""
    with matplotlib.rc_context(FACES[face]):
        ax = PLOTS[name](posterior)
        for part in (ax.figure, ax):
            behind = part.get_facecolor()
            assert behind[3] == 1, "the face lets the page through"
            texts = [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts, *ax.get_legend().get_texts()]
            assert min(contrast(text.get_color(), behind) for text in texts) >= 4.5
            assert all(contrast(line.get_color(), behind) >= 2 for line in ax.lines)


def look(line):
    """What is left of a line in a print without color."""
    return line.get_linestyle(), line.get_marker(), tuple(np.round(line._unscaled_dash_pattern[1] or (), 3))


@pytest.mark.parametrize("plot", [plots.reliability, plots.risk_coverage], ids=lambda f: f.__name__)
def test_five_methods_differ_without_color(plot):
    names = ["a", "b", "c", "d", "e"]
    together = plot({name: prediction(i) for i, name in enumerate(names)})
    one_by_one = None
    for i, name in enumerate(names):
        one_by_one = plot(prediction(i), label=name, ax=one_by_one)
    for ax in (together, one_by_one):
        methods = [line for line in ax.lines if line.get_gid() == METHOD]
        assert len({look(line) for line in methods}) == 5
        assert len({line.get_color() for line in methods}) == 5
        assert [text[:3] for text in legend(ax) if ": " in text[:3]] == [f"{name}: " for name in names]
    assert [line.get_xydata().tolist() for line in together.lines] == [
        line.get_xydata().tolist() for line in one_by_one.lines
    ]


@pytest.mark.parametrize("plot", [plots.reliability, plots.risk_coverage], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ({}, {}, ValueError, r"No prediction is given.*\{'ScalaBL': prediction\}"),
        ({"a": None}, {}, TypeError, r"prediction 'a' is None, expected a prediction"),
        ({1: prediction()}, {}, TypeError, r"name of the predictions is an int \(1\)"),
        ({"a": prediction()}, {"label": "b"}, ValueError, r"label='b' is for one prediction.*Leave label out"),
        ({"a": prediction()}, {"color": "red"}, ValueError, r"color='red' is for one prediction.*Leave color out"),
        ({"a": prediction(answered=False)}, {}, ValueError, "no answers"),
    ],
    ids=["empty", "None", "number as name", "label", "color", "no answers"],
)
def test_predictions_by_name_are_checked_before_anything_is_drawn(plot, given, options, error, message):
    with pytest.raises(error, match=message):
        plot(given, **options)
    assert not plt.get_fignums(), "an empty figure was left behind"


@pytest.mark.parametrize("name", PLOTS)
def test_an_axes_is_given_by_name_only(name, posterior):
    ax = plt.figure().add_subplot()
    with pytest.raises(TypeError):
        getattr(plots, name)(prediction(), prediction(), ax)


@pytest.mark.parametrize("plot", [plots.reliability, plots.risk_coverage], ids=lambda f: f.__name__)
def test_rows_without_answers_cannot_be_scored(plot):
    with pytest.raises(ValueError, match=r"no answers.*Predict rows that have answers"):
        plot(prediction(answered=False))
    assert not plt.get_fignums(), "an empty figure was left behind"


@pytest.mark.parametrize("plot", [plots.reliability, plots.risk_coverage], ids=lambda f: f.__name__)
def test_numbers_have_no_confidence_to_plot(plot):
    with pytest.raises(TypeError, match="NumericPrediction"):
        plot(numbers())


# reliability --------------------------------------------------------------------------------------------------


def points(ax):
    """(line of the points, segments of the intervals) of each method of a reliability diagram."""
    drawn = [container.lines for container in ax.containers if hasattr(container, "lines")]
    return [(line, np.array(bars.get_segments())) for line, _, (bars,) in drawn]


def strips(ax):
    """Bars of the numbers of rows of each method."""
    return [c.patches for c in ax.containers if hasattr(c, "patches")]


@pytest.mark.parametrize(("bins", "error"), [("width", metrics.ece), ("mass", metrics.adaptive_ece)])
def test_reliability_is_the_table_over_the_diagonal(bins, error):
    given = prediction()
    ax = plots.reliability(given, bins=bins, num_bins=8, level=0.8)
    table = metrics.reliability(given.probs, given.target, bins=bins, num_bins=8, level=0.8)
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[0, 0], [1, 1]])
    ((line, intervals),) = points(ax)
    np.testing.assert_allclose(line.get_xydata(), table[["confidence", "accuracy"]])
    np.testing.assert_allclose(intervals[:, :, 1], table[["low", "high"]])
    np.testing.assert_allclose(intervals[:, 0, 0], table["confidence"])
    assert legend(ax) == [f"ECE {100 * error(given.probs, given.target, num_bins=8):.1f} %"]
    assert "80 % intervals" in ax.get_title()


def test_the_strip_has_a_bar_per_bin_with_its_number_of_rows():
    given = prediction()
    ax = plots.reliability(given, num_bins=10)
    table = metrics.reliability(given.probs, given.target, num_bins=10)
    (bars_,) = strips(ax)
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars_] == pytest.approx((table.index + 0.5) / 10)
    heights = np.array([bar.get_height() for bar in bars_])
    np.testing.assert_allclose(heights / heights.max(), table["count"] / table["count"].max())
    assert [int(text.get_text()) for text in ax.texts] == table["count"].tolist()
    assert all(bar.get_y() + bar.get_height() < 0 for bar in bars_), "the strip lies in the diagram"


def test_the_strip_of_one_method_has_no_marker_that_reads_as_a_point():
    probs = np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]])
    found = sp.Prediction(np.log(probs)[None], np.array([0, 1, 0]), ("a", "b"))

    def markers(ax):
        return [line for line in ax.lines if list(line.get_xdata()) == [0.015]]

    assert not markers(plots.reliability(found))
    assert len(markers(plots.reliability({"one": found, "two": found}))) == 2


def test_the_strip_of_equal_numbers_says_the_number_once():
    (text,) = plots.reliability(prediction(rows=61), bins="mass", num_bins=10).texts
    assert text.get_text() == "6 to 7 rows per bin"
    (text,) = plots.reliability(prediction(), bins="mass", num_bins=10).texts
    assert text.get_text() == "6 rows per bin"


def test_many_bins_have_no_numbers():
    assert not plots.reliability(prediction(), num_bins=16).texts


@pytest.mark.parametrize(("count", "text"), [(999, "999"), (1000, "1.0k"), (9949, "9.9k"), (12_400, "12k")])
def test_large_numbers_of_rows_are_short(count, text):
    probs = np.tile([0.8, 0.2], (1, count, 1))
    ax = plots.reliability(sp.Prediction(np.log(probs), np.zeros(count, dtype=int), ("a", "b")))
    assert [found.get_text() for found in ax.texts] == [text]


def test_reliabilities_share_axes_and_one_diagonal_and_have_a_strip_each():
    ax = plots.reliability(prediction(), label="mean field", color="black")
    assert plots.reliability(prediction(1), ax=ax, label="MAP", color="red") is ax
    assert sum(line.get_xydata().tolist() == [[0, 0], [1, 1]] for line in ax.lines) == 1
    first, second = legend(ax)
    assert first.startswith("mean field: ECE ") and second.startswith("MAP: ECE ")
    assert [line.get_color() for line, _ in points(ax)] == ["black", "red"]
    upper, lower = ([(bar.get_y(), bar.get_y() + bar.get_height()) for bar in found] for found in strips(ax))
    assert max(top for _, top in lower) < min(bottom for bottom, _ in upper)
    assert [text.get_text() for text in ax.get_yticklabels()].count("rows") == 2


def test_reliability_shows_all_of_the_unit_square():
    ax = plots.reliability(prediction())
    assert ax.get_xlim()[0] <= 0 and ax.get_xlim()[1] >= 1
    assert ax.get_ylim()[0] <= 0 and ax.get_ylim()[1] >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": "equal"}, "bins='equal' is unknown"),
        ({"num_bins": 0}, "num_bins=0 must be a whole number"),
        ({"level": 95}, "level=95 must lie between 0 and 1"),
    ],
    ids=str,
)
def test_reliability_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        plots.reliability(prediction(), **options)
    assert not plt.get_fignums()


# risk and coverage --------------------------------------------------------------------------------------------

BOUNDS = ["rows in random order", "ideal order: right answers first"]


@pytest.mark.parametrize(("label", "prefix"), [(None, ""), ("MAP", "MAP: ")])
def test_risk_coverage_is_the_curve_with_its_area(label, prefix):
    given = prediction()
    ax = plots.risk_coverage(given, label=label, color="black")
    curve = ax.lines[0]
    np.testing.assert_allclose(curve.get_xydata().T, metrics.risk_coverage(given.probs, given.target))
    assert curve.get_color() == "black"
    assert legend(ax) == [f"{prefix}AURC {metrics.aurc(given.probs, given.target):.3f}", *BOUNDS]
    assert ax.get_xlim() == (0, 1) and ax.get_ylim()[0] == 0


def test_risk_coverage_shows_what_a_random_and_an_ideal_order_would_do():
    given = prediction()
    curve, random, ideal = plots.risk_coverage(given).lines
    error = (given.labels != given.target).mean()
    assert random.get_ydata() == pytest.approx([error, error])
    coverage, risk = ideal.get_xydata().T
    np.testing.assert_allclose(risk, np.maximum(0, (coverage - (1 - error)) / coverage), atol=1e-9)  # Geifman, 2019
    assert curve.get_ydata()[-1] == pytest.approx(error) == risk[-1]
    assert (curve.get_ydata() >= risk - 1e-9).all()


@pytest.mark.parametrize("word", ["total", "aleatoric", "epistemic"])
def test_risk_coverage_takes_rows_in_the_order_of_a_score(word):
    given = prediction()
    expected = metrics.risk_coverage(given.probs, given.target, uncertainty=getattr(given, word))
    for score in (word, getattr(given, word)):
        np.testing.assert_allclose(plots.risk_coverage(given, uncertainty=score).lines[0].get_xydata().T, expected)
    by_name = plots.risk_coverage({"a": given}, uncertainty=word)
    np.testing.assert_allclose(by_name.lines[0].get_xydata().T, expected)
    assert legend(by_name)[0] == f"a, {word}: AURC {expected[1].mean():.3f}"


def test_no_score_means_the_maximum_probability():
    curves = [plots.risk_coverage(prediction(), uncertainty=u).lines[0] for u in ("max_probability", None)]
    np.testing.assert_array_equal(*(curve.get_xydata() for curve in curves))


@pytest.mark.parametrize(
    ("given", "score", "message"),
    [
        (prediction(), "entropy", r"uncertainty='entropy' is unknown"),
        (prediction(), np.zeros(3), r"uncertainty has shape \(3,\)"),
        ({"a": prediction()}, np.zeros(60), r"uncertainty is an array, which belongs to one prediction"),
        (replace(prediction(), log_probs=prediction().log_probs[:1]), "epistemic", r"0 for every row.*num_draws=2"),
    ],
    ids=["unknown", "shape", "array for several", "one draw"],
)
def test_a_score_that_does_not_order_the_rows_is_refused(given, score, message):
    with pytest.raises(ValueError, match=message):
        plots.risk_coverage(given, uncertainty=score)
    assert not plt.get_fignums()


def test_bounds_can_be_left_out():
    ax = plots.risk_coverage({"a": prediction(), "b": prediction(1)}, bounds=False)
    assert len(ax.lines) == 2 == len(legend(ax))
    with pytest.raises(TypeError, match="bounds='no'"):
        plots.risk_coverage(prediction(), bounds="no")


def test_the_legend_stands_above_the_highest_point():
    ax = plots.risk_coverage({name: prediction(i) for i, name in enumerate("abc")})
    ax.figure.canvas.draw()
    box = ax.get_legend().get_window_extent().transformed(ax.transData.inverted())
    assert box.y0 > max(np.max(line.get_ydata()) for line in ax.lines)
    ax = plots.reliability({name: prediction(i) for i, name in enumerate("abcde")})
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().transformed(ax.transData.inverted()).y0 > 1


def test_a_higher_curve_that_comes_later_is_not_cut():
    ax = plots.risk_coverage(prediction(concentration=0.1))
    bad = prediction(concentration=0.1)
    plots.risk_coverage(bad, uncertainty=(bad.labels == bad.target).astype(float), ax=ax)  # wrong rows first
    assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] > 1


def test_risk_coverages_share_axes():
    ax = plots.risk_coverage(prediction(), label="a")
    plots.risk_coverage(prediction(1), ax=ax, label="b", color="red")
    assert [text[:2] for text in legend(ax)[:2]] == ["a:", "b:"]
    assert legend(ax)[2:] == BOUNDS, "the bounds are explained once"


# confident mistakes -------------------------------------------------------------------------------------------


def heights(ax):
    """Heights of the bars: confident answers, and wrong ones."""
    return [
        [bar.get_height() for bar in container.patches] for container in ax.containers if hasattr(container, "patches")
    ]


def test_confident_mistakes_are_counted_and_written_on_the_bars():
    given = {"a": prediction(concentration=0.3), "b": prediction(1, concentration=0.3)}
    ax = plots.confident_mistakes(given, threshold=0.5)
    counts = [metrics.confident_mistakes(p.probs, p.target, threshold=0.5) for p in given.values()]
    assert all(0 < count.mistakes < count.confident < count.rows for count in counts), "an empty case proves nothing"
    assert heights(ax) == [[c.confident for c in counts], [c.mistakes for c in counts]]
    texts = [text.get_text() for text in ax.texts]
    assert texts[:2] == [str(c.confident) for c in counts]
    assert texts[2:] == [f"{c.mistakes}\n{100 * c.mistakes / c.confident:.1f} %" for c in counts]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["a", "b"]
    assert "0.5" in legend(ax)[0] and "60" in ax.get_ylabel()
    assert not ax.lines, "one prediction per method has no interval"


def test_several_predictions_give_a_mean_its_interval_and_a_dot_each():
    several = [prediction(i, concentration=0.3) for i in range(3)]
    ax = plots.confident_mistakes({"a": several}, threshold=0.7, level=0.9)
    found = np.array([metrics.confident_mistakes(p.probs, p.target, threshold=0.7)[:2] for p in several])
    mean, half = found.mean(0), stats.t.ppf(0.95, 2) * stats.sem(found)
    assert [h for (h,) in heights(ax)] == pytest.approx(mean[::-1])
    bars_ = [c.lines[2][0].get_segments()[0] for c in ax.containers if hasattr(c, "lines")]
    expected = np.stack([np.maximum(mean - half, 0), mean + half], axis=1)[::-1]
    np.testing.assert_allclose([segment[:, 1] for segment in bars_], expected)
    dots = [line.get_ydata().tolist() for line in ax.lines if line.get_marker() == "o"]
    assert dots == found.T[::-1].tolist()


def test_no_confident_answer_is_a_bar_of_height_zero():
    ax = plots.confident_mistakes({"a": prediction()}, threshold=0.999)
    assert heights(ax) == [[0], [0]] and [text.get_text() for text in ax.texts] == ["0", "0"]


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (prediction(), {}, TypeError, r"expected predictions by the name of their method"),
        ({}, {}, ValueError, "No prediction is given"),
        ({"a": []}, {}, ValueError, "list of predictions of 'a' is empty"),
        ({"a": numbers()}, {}, TypeError, "prediction 'a' is a NumericPrediction"),
        ({"a": prediction(answered=False)}, {}, ValueError, "no answers"),
        ({"a": prediction(), "b": prediction(rows=50)}, {}, ValueError, "50 to 60 rows.*Predict the same rows"),
        ({"a": prediction()}, {"threshold": 90}, ValueError, "threshold=90 must be a probability"),
        ({"a": prediction()}, {"level": 1}, ValueError, "level=1 must lie between"),
    ],
)
def test_confident_mistakes_refuses_what_cannot_be_compared(given, options, error, message):
    with pytest.raises(error, match=message):
        plots.confident_mistakes(given, **options)
    assert not plt.get_fignums()


# history ------------------------------------------------------------------------------------------------------


def test_history_shows_loss_and_parts_raw_and_smoothed():
    frame = history()
    ax = plots.history(frame, smooth=5)
    lines = labeled(ax)
    parts = {"loss = NLL + KL": frame["loss"], "NLL": frame["nll"], "KL": frame["loss"] - frame["nll"]}
    assert legend(ax) == list(lines) == list(parts)
    assert len(ax.lines) == 6
    for name, values in parts.items():
        smooth, raw = lines[name], ax.lines[ax.lines.index(lines[name]) - 1]
        np.testing.assert_array_equal(raw.get_xydata(), np.stack([frame["step"], values], 1))
        assert smooth.get_ydata()[0] == values[0]
        assert smooth.get_ydata()[-1] == pytest.approx(values[-5:].mean())
        assert smooth.get_color() == raw.get_color()


def test_loss_shows_both_nlls_and_the_kept_step():
    frame = evaluated()
    ax = plots.loss(frame, smooth=5)
    lines = labeled(ax)
    assert legend(ax) == list(lines) == ["training batches", "held-out rows", "posterior"]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), frame["nll"])
    assert lines["training batches"].get_ydata()[-1] == pytest.approx(frame["nll"][-5:].mean())
    scored = frame[frame["eval_nll"].notna()]
    np.testing.assert_array_equal(lines["held-out rows"].get_xydata(), scored[["step", "eval_nll"]])
    assert list(lines["posterior"].get_xdata()) == [9, 9]
    assert legend(plots.loss(history(), ax=plt.figure().subplots())) == ["training batches"]


def test_loss_of_a_fit_can_be_plotted():
    blora, task = sp.bayesian_lora(tiny.causal_lm()), sp.MultipleChoice(tiny.tokenizer())
    rows = list({row["question"]: row for row in tiny.question_rows(200)}.values())
    result = sp.fit(blora, task, rows[:10], eval_data=rows[10:], num_steps=4, eval_every=2, progress=False)
    lines = labeled(plots.loss(result.history))
    assert lines["held-out rows"].get_ydata().tolist() == result.evaluations["eval_nll"].tolist()
    assert list(lines["posterior"].get_xdata()) == [3, 3]


def test_history_of_a_fit_can_be_plotted():
    blora, task = sp.bayesian_lora(tiny.causal_lm()), sp.MultipleChoice(tiny.tokenizer())
    result = sp.fit(blora, task, tiny.question_rows(4), num_steps=2, progress=False)
    ax = plots.history(result.history)
    assert all(np.isfinite(line.get_ydata()).all() for line in ax.lines)


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("part", ["nll", "kl"])
def test_history_hides_no_part_below_the_axes(part, sign):
    """A density can make the NLL negative, one sample of Trace_ELBO the KL."""
    values = np.linspace(0.5, 1.0, 20)
    nll, kl = (sign * values, values) if part == "nll" else (values, sign * values)
    frame = pd.DataFrame({"step": np.arange(20), "loss": nll + kl, "nll": nll, "kl": kl})
    ax = plots.history(frame)
    low, high = ax.get_ylim()
    for line in ax.lines:
        assert low <= line.get_ydata().min() and line.get_ydata().max() <= high
    assert low <= 0


# latents ------------------------------------------------------------------------------------------------------


def bars(ax):
    """(color, centers, half lengths) of each layer's error bars."""
    for container in ax.containers:
        line, _, (segments,) = container
        ends = np.array(segments.get_segments())
        yield line.get_color(), line.get_xydata(), (ends[:, 1, 1] - ends[:, 0, 1]) / 2


def test_latents_are_means_with_bars_of_one_standard_deviation(posterior):
    ax = plots.posterior_by_layer(posterior, num_draws=50, seed=3)
    s = posterior.sample(50, seed=3).s
    drawn = list(bars(ax))
    assert len(drawn) == len(posterior.subspace) == 5
    centers = np.concatenate([xy for _, xy, _ in drawn])
    np.testing.assert_array_equal(centers[:, 0], np.arange(posterior.subspace.dim))
    np.testing.assert_allclose(centers[:, 1], s.mean(0), rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([half for _, _, half in drawn]), s.std(0), rtol=1e-4)
    assert str(posterior.subspace.dim) in ax.get_title("left")


def test_layers_of_one_kind_share_a_color_and_a_legend_entry(posterior):
    ax = plots.posterior_by_layer(posterior, num_draws=10)
    assert legend(ax) == ["q_proj", "v_proj", "lm_head"]
    by_kind = {name: colors.to_hex(line.get_color()) for name, line in labeled(ax).items()}
    for name, (color, _, _) in zip(posterior.subspace.names, bars(ax), strict=True):
        assert colors.to_hex(color) == by_kind[name.rsplit(".", 1)[-1]]
    assert len(set(by_kind.values())) == 3


def test_every_kind_of_layer_has_a_color_of_its_own():
    posterior = posterior_of(tiny.causal_lm(), r=1, target_modules="all-linear")
    ax = plots.posterior_by_layer(posterior, num_draws=5)
    kinds = {name.rsplit(".", 1)[-1] for name in posterior.subspace.names}
    assert len(kinds) == 8
    assert set(legend(ax)) == kinds
    assert len({colors.to_hex(line.get_color()) for line in labeled(ax).values()}) == 8


def test_ticks_are_blocks_in_the_middle_of_their_layers(posterior):
    ax = plots.posterior_by_layer(posterior, num_draws=5)
    np.testing.assert_allclose(ax.get_xticks(), [3.5, 11.5, 17.5])
    assert [t.get_text() for t in ax.get_xticklabels()][:2] == ["0", "1"]


def test_a_layer_outside_of_blocks_is_called_by_its_name(posterior):
    ax = plots.posterior_by_layer(posterior, num_draws=5)
    assert ax.get_xticklabels()[-1].get_text() == "lm_head"


def test_the_name_of_a_layer_outside_covers_no_number():
    ax = plots.posterior_by_layer(posterior_of(tiny.causal_lm(num_hidden_layers=28), r=1), num_draws=5)
    ax.figure.canvas.draw()
    *_, last_block, head = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert ax.get_xticklabels()[-1].get_text() == "lm_head" and not head.overlaps(last_block)


class Two(nn.Module):
    """Two layers without blocks, in front of a language model's logits."""

    def __init__(self):
        super().__init__()
        self.embed, self.below, self.above = nn.Embedding(59, 8), nn.Linear(8, 8), nn.Linear(8, 59)

    def forward(self, input_ids, attention_mask=None):
        return CausalLMOutput(logits=self.above(self.below(self.embed(input_ids)).relu()))


def test_a_module_without_blocks_has_a_tick_for_each_layer():
    blora = sp.bayesian_lora(Two(), r=2)
    guide = sp.guides.as_guide("normal", blora)
    task = sp.MultipleChoice(tiny.tokenizer())
    ax = plots.posterior_by_layer(sp.Posterior.capture(blora, task, guide, provenance={}), num_draws=5)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["below", "above"]


@pytest.mark.parametrize("num_draws", [0, 1])
def test_a_spread_needs_two_draws(posterior, num_draws):
    with pytest.raises(ValueError, match=f"num_draws={num_draws}"):
        plots.posterior_by_layer(posterior, num_draws=num_draws)


# uncertainty --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["total", "aleatoric", "epistemic"])
def test_uncertainty_is_two_densities_over_the_same_bins_with_their_auroc(kind):
    inside, outside = prediction(concentration=0.3), prediction(1, rows=30, concentration=3.0)
    ax = plots.uncertainty_histogram(inside, outside, kind=kind)
    a, b = getattr(inside, kind), getattr(outside, kind)
    assert legend(ax) == ["in distribution (60 rows)", "out of distribution (30 rows)"]
    assert ax.get_title() == f"OOD AUROC {metrics.ood_auroc(a, b):.3f}"
    assert ax.get_xlabel() == f"{kind} uncertainty (nats)"
    left, right = ([p.get_x() for p in bars.patches] for bars in ax.containers)
    np.testing.assert_allclose(left, right)
    for bars_, values in zip(ax.containers, (a, b), strict=True):
        areas = np.array([p.get_width() * p.get_height() for p in bars_.patches])
        assert areas.sum() == pytest.approx(1)  # no value lies outside the bins
        edges = np.append([p.get_x() for p in bars_.patches], bars_.patches[-1].get_x() + bars_.patches[-1].get_width())
        np.testing.assert_allclose(areas, np.histogram(values, edges)[0] / len(values), atol=2 / len(values))


def test_uncertainty_of_numbers_is_a_variance():
    ax = plots.uncertainty_histogram(numbers(), numbers(1))
    assert ax.get_xlabel() == "total uncertainty (variance)"


def test_uncertainty_in_different_units_is_not_compared():
    with pytest.raises((TypeError, ValueError), match=r"Prediction.*NumericPrediction"):
        plots.uncertainty_histogram(prediction(), numbers())


def test_answers_are_not_needed_to_compare_uncertainties():
    assert plots.uncertainty_histogram(prediction(answered=False), prediction(1, answered=False)).has_data()


def test_a_posterior_mean_without_any_uncertainty_can_be_plotted():
    certain = sp.Prediction(np.log(np.full((1, 5, 2), 0.5)), None, ("a", "b"), is_mean=True)
    ax = plots.uncertainty_histogram(certain, certain, kind="epistemic")
    assert ax.get_title() == "OOD AUROC 0.500"


@pytest.mark.parametrize("kind", ["variance", "Total", None], ids=repr)
def test_an_unknown_kind_of_uncertainty_is_refused_with_the_known(kind):
    with pytest.raises(ValueError, match=rf"kind={kind!r} is unknown.*'total'.*'aleatoric'.*'epistemic'"):
        plots.uncertainty_histogram(prediction(), prediction(), kind=kind)
    assert not plt.get_fignums()
