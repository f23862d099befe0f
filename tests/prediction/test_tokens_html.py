"""What a notebook shows of scored texts: every token once, shaded by its number, and nothing that runs."""

import html
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import toy_scores

from scalabl_pyro.prediction.tokens_html import LEAST_END, MAX_ALPHA, MOST, STEPS

NASTY = [
    "<script>",
    "alert('x')",
    "</script>",
    ' "',
    "&amp;",
    "\n",
    "a\x00b",
    "\u202ereversed",
    "\u2066",
    "  ",
    "\ttab",
]
#: Elements and attributes that forges and notebooks keep, besides the style.
ELEMENTS = {"div", "span", "b", "br", "hr", "details", "summary", "table", "tr", "th", "td"}


class Page(HTMLParser):
    """Elements, attributes and tokens of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.attributes, self.open, self.tokens, self.text = set(), set(), [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, "an element is not closed"

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("br", "hr"):
            self.open.append((tag, dict(attrs)))
        elif tag == "br" and self.token:
            self.token["text"] += "<br>"
        if tag == "span" and "title" in dict(attrs):
            self.tokens.append({**dict(attrs), "text": ""})

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    @property
    def token(self):
        return self.tokens[-1] if any(t == "span" and "title" in a for t, a in self.open) else None

    def handle_data(self, data):
        self.text += data
        if self.token:
            self.token["text"] += data


def alphas(page):
    return np.array([float(re.search(r"rgba\(200, 85, 61, ([\d.]+)\)", t["style"])[1]) for t in page.tokens])


@pytest.mark.parametrize("by", ["epistemic", "total"])
def test_every_token_is_shaded_in_the_order_of_its_value(by):
    scored = toy_scores.scored([list("abcdefgh"), list("xyz")])
    page = Page(scored.to_html(by=by))
    assert [t["text"] for t in page.tokens] == list("abcdefghxyz")
    values = np.concatenate([getattr(row, by) for row in scored.rows])
    np.testing.assert_allclose(alphas(page), MAX_ALPHA * values / values.max(), atol=6e-4)
    assert f"{by} uncertainty per token, nats" in page.text
    scale = re.findall(r'">&nbsp;([^&]+)&nbsp;<', scored.to_html(by=by))
    assert scale == [f"{v:.2g}" for v in np.linspace(0, values.max(), STEPS)]


def test_the_notebook_shows_the_epistemic_uncertainty():
    scored = toy_scores.scored([list("abc")])
    assert scored._repr_html_() == scored.to_html(by="epistemic") != scored.to_html(by="total")


def test_a_tooltip_has_the_numbers_of_its_token_and_of_the_most_probable_ones():
    scored = toy_scores.scored([["one", " two"]], top=2)
    row = scored.rows[0]
    lines = Page(scored.to_html()).tokens[1]["title"].split("\n")
    assert lines[:4] == [
        '\u2068" two"\u2069, token 2',
        f"probability {np.exp(row.log_mixture[1]):.3g}",
        f"total (nats) {row.total[1]:.3f}",
        f"epistemic (nats) {row.epistemic[1]:.3f}",
    ]
    assert lines[4] == "most probable in the mixture (range over draws):"
    low, high = (f(row.top_probs_by_draw[:, 1], 0) for f in (np.min, np.max))
    assert lines[5:] == [
        f'\u2068" w{row.top_tokens[1, i]}"\u2069 {row.top_probs[1, i]:.3g} ({low[i]:.2g} to {high[i]:.2g})'
        for i in range(2)
    ]
    assert len(Page(toy_scores.scored([["one", " two"]], top=0).to_html()).tokens[1]["title"].split("\n")) == 4


def test_the_alternatives_as_a_table():
    scored = toy_scores.scored([list("ab"), list("cde")], top=2)
    table = scored.alternatives(1)
    assert table["place"].tolist() == [0, 0, 1, 1, 2, 2]
    assert table["token"].tolist() == [f" w{i}" for i in scored.rows[1].top_tokens.ravel()]
    np.testing.assert_array_equal(table["prob"], scored.rows[1].top_probs.ravel())
    np.testing.assert_array_equal(table["low"], scored.rows[1].top_probs_by_draw.min(0).ravel())
    assert (table["low"] <= table["prob"]).all() and (table["prob"] <= table["high"]).all()
    assert replace(scored, top_pieces=()).alternatives(1)["token"][0] == f"#{scored.rows[1].top_tokens[0, 0]}"
    assert toy_scores.scored([list("ab")], top=0).alternatives(0).empty


def test_texts_cannot_break_out_of_the_page():
    nasty = toy_scores.scored([NASTY], top=2)
    nasty.top_pieces[0][0][:] = ['"><img src=x onerror=alert(1)>', "'\n"]
    text = nasty.to_html()
    page = Page(text)
    assert page.elements <= ELEMENTS and page.attributes <= {"title", "style", "dir", "colspan"}
    assert not re.search(r"url\(|http|<script|<img", text)
    shown = [t["text"] for t in page.tokens]
    assert shown == [
        *("<script>", "alert('x')", "</script>", ' "', "&amp;", "↵<br>"),
        *("a<U+0000>b", "<U+202E>reversed", "<U+2066>", "\u00a0\u00a0", "⇥\u00a0\u00a0 tab"),
    ]
    assert '">' in page.tokens[0]["title"]
    text.encode("utf-8")


def test_only_isolates_that_are_closed_change_the_direction():
    text = html.unescape(toy_scores.scored([NASTY], top=2).to_html())
    assert text.count("\u2068") == text.count("\u2069") > 0
    assert not re.search("[\x00-\x09\x0b-\x1f\u200e\u200f\u202a-\u202e\u2066\u2067]", text)


def test_what_a_forge_without_styles_keeps_says_which_tokens_are_uncertain():
    scored = toy_scores.scored([[f" t{i}" for i in range(12)]], top=2)
    text = re.sub(r' style="[^"]*"', "", scored.to_html())
    largest = np.argsort(-scored.rows[0].epistemic)[:MOST]
    assert set(re.findall(r"<b> (t\d+)</b>", text)) == {f"t{i}" for i in largest}
    table = text[text.index("<table>") :]
    assert re.findall(r"<tr><td>(\d+)</td>", table) == [str(i + 1) for i in largest]
    for i in largest:
        assert f"<td>{scored.rows[0].epistemic[i]:.3f}</td>" in table
    assert table.count("range over draws") == MOST


@pytest.mark.parametrize(("is_mean", "said"), [(True, "posterior mean is one model"), (False, "One draw is one model")])
def test_one_model_has_no_epistemic_uncertainty(is_mean, said):
    scored = toy_scores.scored([["word"]], draws=1, is_mean=is_mean)
    scored.rows[0].aleatoric[:] -= 1e-7  # rounding, as of an LLM in float32
    page = Page(scored._repr_html_())
    assert alphas(page).tolist() == [0.0] and "epistemic (nats) 0.000" in page.tokens[0]["title"]
    assert said in page.text and "to_html(by='total')" in page.text
    assert "table" not in page.elements and "b" in page.elements
    assert f"1 text, {'posterior mean' if is_mean else '1 draw'}" in page.text
    total = Page(scored.to_html(by="total"))
    assert said not in total.text and alphas(total).tolist() == [MAX_ALPHA]


def test_draws_that_agree_are_not_shaded_by_rounding_errors():
    scored = toy_scores.scored([list("ab")])
    scored.rows[0].aleatoric[:] = scored.rows[0].total - np.array([1e-7, 2e-7])
    assert alphas(Page(scored.to_html())).max() < 1e-3 * MAX_ALPHA * 1e-3 / LEAST_END


def test_long_texts_and_many_texts_are_cut_and_said_to_be():
    scored = toy_scores.scored([["x"] * 30, ["y"] * 5, ["z"]])
    page = Page(scored.to_html(max_texts=2, max_tokens=20))
    assert "the first 2 of 3 texts" in page.text and "... and 10 more tokens." in page.text
    assert [t["text"] for t in page.tokens] == ["x"] * 20 + ["y"] * 5
    assert "Text 0: 30 tokens" in page.text, "sums are those of the whole text"
    whole = Page(scored.to_html()).text
    assert "3 texts, 4 draws" in whole and "more tokens" not in whole


def test_a_very_long_text_gives_a_page_of_bounded_size():
    text = toy_scores.scored([[" word"] * 20_000] * 12, top=5)._repr_html_()
    assert len(text) < 4_000_000
    assert "the first 10 of 12 texts" in text and "... and 19600 more tokens." in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "aleatoric"}, "by='aleatoric' is unknown.*'epistemic'"),
        ({"max_texts": 0}, "max_texts=0 must be"),
        ({"max_tokens": 1.5}, "max_tokens=1.5 must be"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        toy_scores.scored([["a"]]).to_html(**options)


def test_a_text_without_tokens_is_shown():
    scored = toy_scores.scored([[], ["a"]])
    assert "Text 0: 0 tokens" in Page(scored._repr_html_()).text
