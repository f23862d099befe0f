"""The plot of a text with shaded tokens: every character once, in its place, in the shade of its number."""

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import toy_scores
from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from scalabl_pyro import plots
from scalabl_pyro.plots.wrapped_text import wrapped
from scalabl_pyro.prediction.tokens_html import MAX_ALPHA, STEPS

WORDS = [f" word{i}" for i in range(60)]


@pytest.fixture(autouse=True)
def no_figures():
    plt.close("all")
    yield
    plt.close("all")


def lines(pieces, columns):
    """The characters by line, at their columns."""
    found = {}
    for part in wrapped(pieces, columns):
        before = found.get(part.line, "")
        assert len(before) == part.column, "a gap or an overlap"
        found[part.line] = before + part.text
    return list(found.values())


def shades(ax):
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


@pytest.mark.parametrize(
    ("pieces", "columns", "expected"),
    [
        (["the", " sky", " is", " blue"], 10, ["the sky is", "blue"]),
        (["un", "break", "able"], 6, ["unbrea", "kable"]),
        (["a", "\n", "\n", "b\n", " c"], 6, ["a↵", "↵", "b↵", " c"]),
        (["the", " ", "sky"], 5, ["the", " sky"]),
        (["one", " two\n", "three"], 8, ["one two↵", "three"]),
        (["", "x\x00"], 20, ["·x<U+0000>"]),
        (["a" * 10], 4, ["aaaa", "aaaa", "aa"]),
    ],
    ids=["words", "no space", "breaks", "space token", "break inside", "no shape", "long word"],
)
def test_lines_break_at_spaces(pieces, columns, expected):
    assert lines(pieces, columns) == expected


def test_wide_characters_take_two_cells():
    parts = wrapped(["漢", "字", "e\u0301"], 4)
    assert [(part.line, part.column, part.width) for part in parts] == [(0, 0, 2), (0, 2, 2), (1, 0, 1)]


@pytest.mark.parametrize("columns", [2, 7, 30, 400])
def test_every_token_has_a_place_and_no_line_is_too_long(columns):
    pieces = [*WORDS, "", "\n", " ", "\t", "漢字", "  ", "x" * 50]
    parts = wrapped(pieces, columns)
    assert {part.token for part in parts} == set(range(len(pieces)))
    ends = [part.column + part.width for part in parts if part.text != "↵"]
    assert max(ends) <= columns
    assert [part.token for part in parts] == sorted(part.token for part in parts)


@pytest.mark.parametrize("by", ["epistemic", "total"])
def test_tokens_are_shaded_in_the_order_of_their_values(by):
    scored = toy_scores.scored([["x"], ["a", " b", " c", " d", " e"]])
    ax = plots.tokens(scored, row=1, by=by)
    values = getattr(scored.rows[1], by)
    alphas = [patch.get_facecolor()[3] for patch in shades(ax)]
    np.testing.assert_allclose(alphas, MAX_ALPHA * values / values.max(), rtol=1e-6)
    assert "".join(text.get_text() for text in ax.texts) == "a b c d e"
    assert ax.get_title() == f"{by.capitalize()} uncertainty (nats)" and ax.get_ylabel() == "text 1"
    assert ax.get_xlabel() == f"5 tokens, log probability {scored.log_prob[1]:.4g} nats\n4 draws"
    scale = [text.get_text() for text in ax.get_legend().get_texts()]
    assert scale == [f"{v:.2g}" for v in np.linspace(0, values.max(), STEPS)]
    swatches = [patch.get_facecolor()[3] for patch in ax.get_legend().get_patches()]
    np.testing.assert_allclose(swatches, np.linspace(0, MAX_ALPHA, STEPS), rtol=1e-6)


@pytest.mark.parametrize("dpi", [50, 72, 100, 117])
def test_text_stands_on_its_shade_and_keeps_its_dollars(dpi):
    with plt.rc_context({"figure.dpi": dpi}):
        ax = plots.tokens(toy_scores.scored([["a", " $x^2$", " costs", " $5"]]))
    ax.figure.canvas.draw()
    assert [text.get_text() for text in ax.texts] == ["a", " $x^2$", " costs", " $5"]
    assert not any(text.get_parse_math() for text in ax.texts), "dollars are no formulas"
    for text, patch in zip(ax.texts, shades(ax), strict=True):
        inner, outer = text.get_window_extent(), patch.get_window_extent()
        assert outer.x0 - 1 <= inner.x0 and inner.x1 <= outer.x1 + 2
        assert outer.y0 - 2 <= inner.y0 and inner.y1 <= outer.y1 + 2


@pytest.mark.parametrize(("is_mean", "said"), [(True, "posterior mean"), (False, "1 draw")])
def test_one_model_has_no_shade_and_says_why(is_mean, said):
    scored = toy_scores.scored([["word"]], draws=1, is_mean=is_mean)
    scored.rows[0].aleatoric[:] -= 1e-7
    ax = plots.tokens(scored)
    assert [patch.get_facecolor()[3] for patch in shades(ax)] == [0.0]
    assert ax.get_xlabel().endswith(f"{said}: one model, so it is 0")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["0"]
    assert "one model" not in plots.tokens(scored, by="total").get_xlabel()


def inside(ax):
    ax.figure.canvas.draw()
    box = ax.get_window_extent()
    legend = ax.get_legend().get_window_extent()
    for patch in shades(ax):
        own = patch.get_window_extent()
        assert own.x1 <= box.x1 + 1 and own.y0 >= box.y0 - 1
        assert own.y1 <= legend.y0 + 1, "the legend hides the text"


@pytest.mark.parametrize("count", [1, 60, 600])
def test_a_figure_is_as_high_as_its_text(count):
    ax = plots.tokens(toy_scores.scored([(WORDS * 10)[:count]], top=0))
    assert len({text.get_fontsize() for text in ax.texts}) == 1 and len(ax.texts) >= count
    assert ax.get_xlabel().startswith(f"{count} token")
    assert ax.figure.get_figheight() < 11
    inside(ax)


def test_a_text_that_is_too_long_is_cut_and_said_to_be():
    ax = plots.tokens(toy_scores.scored([WORDS * 100], top=0))
    shown = len({text.get_text() for text in ax.texts}), ax.get_xlabel().split("\n")[0]
    count = int(shown[1].split()[2])
    assert shown[1].startswith(f"the first {count} of 6000 tokens") and 1000 < count < 6000
    inside(ax)


def test_small_axes_get_small_letters():
    _, (left, right) = plt.subplots(1, 2)
    ax = plots.tokens(toy_scores.scored([WORDS * 2], top=0), ax=right)
    large = plots.tokens(toy_scores.scored([["a"]], top=0), ax=left)
    assert ax.texts[0].get_fontsize() < large.texts[0].get_fontsize()
    inside(ax)


def test_shaded_text_can_be_read_on_light_and_on_dark_faces():
    def luminance(color):
        parts = np.array(color)
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    for style in ("default", "dark_background"):
        with plt.style.context(style):
            ax = plots.tokens(toy_scores.scored([list("abcd")]))
        face = np.array(colors.to_rgb(ax.get_facecolor()))
        for text, patch in zip(ax.texts, shades(ax), strict=True):
            *color, alpha = patch.get_facecolor()
            low, high = sorted(
                [luminance(colors.to_rgb(text.get_color())), luminance(alpha * np.array(color) + (1 - alpha) * face)]
            )
            assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"by": "aleatoric"}, ValueError, "by='aleatoric' is unknown"),
        ({"row": 2}, ValueError, r"row=2: the texts have the numbers 0 to 1\."),
        ({"row": -1}, ValueError, "row=-1"),
        ({"row": 1}, ValueError, "row=1: this text has no tokens"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        plots.tokens(toy_scores.scored([["a"], []]), **options)
    assert not plt.get_fignums()


@pytest.mark.parametrize("given", [None, "text", [1.0]])
def test_something_else_than_scored_texts_is_refused(given):
    with pytest.raises(TypeError, match=r"scored is .*expected scored texts, such as posterior.score\(rows\)"):
        plots.tokens(given)
