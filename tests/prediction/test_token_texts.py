"""The text of single tokens: together they are the text, whatever the tokenizer does to a token that stands alone."""

import dataclasses
import random

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import scalabl_pyro as sp
from scalabl_pyro.prediction.token_texts import EMPTY, TokenTexts, visible

TEXT = "Blue sky, naïve 漢字 and 🙂👩‍👩‍👧.\n\n  def f(x):\treturn 'é'"


def byte_tokenizer():
    """Every token is one byte, so that most characters outside of ASCII have several tokens."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def llama_tokenizer():
    """As Llama 2: words begin with a mark, and decoding drops the space of the first token."""
    words = ["<unk>", "▁the", "▁sky", "▁is", "▁blue", "s", ".", "▁"]
    core = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>"))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_pieces_are_the_text_and_characters_stay_whole():
    tokenizer = byte_tokenizer()
    ids = tokenizer(TEXT).input_ids
    pieces = TokenTexts(tokenizer).pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == TEXT
    assert [p for p in pieces if p] == list(TEXT)


def test_a_text_that_ends_within_a_character_says_so():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a漢").input_ids[:-1]
    assert TokenTexts(tokenizer).pieces(ids) == ["a", "", "\ufffd"]


def test_bytes_that_never_become_a_character_do_not_hold_the_text_back():
    tokenizer = byte_tokenizer()
    broken = tokenizer("漢").input_ids[1]
    ids = [broken] * 6 + tokenizer("ab").input_ids
    assert TokenTexts(tokenizer).pieces(ids)[-1] == "b"


def test_random_bytes_keep_every_readable_character():
    rng, tokenizer = random.Random(0), byte_tokenizer()
    for _ in range(50):
        ids = [rng.randrange(256) for _ in range(20)]
        pieces = TokenTexts(tokenizer).pieces(ids)
        readable = [c for c in tokenizer.decode(ids) if c.isascii()]
        assert [c for p in pieces for c in p if c.isascii()] == readable


def test_the_space_before_a_word_is_kept():
    tokenizer = llama_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["▁the", "▁sky", "▁is", "▁blue", "s", "."])
    assert tokenizer.decode(ids[1:2]) == "sky", "this tokenizer drops it"
    assert TokenTexts(tokenizer).pieces(ids[1:]) == [" sky", " is", " blue", "s", "."]
    assert [TokenTexts(tokenizer).of(i) for i in ids] == [" the", " sky", " is", " blue", "s", "."]


def test_every_token_is_decoded_once(monkeypatch):
    tokenizer = llama_tokenizer()
    texts, calls = TokenTexts(tokenizer), []
    monkeypatch.setattr(texts, "_decode", lambda ids, decode=texts._decode: calls.append(ids) or decode(ids))
    assert texts.pieces([1, 2, 1, 2, 1]) == [" the", " sky", " the", " sky", " the"]
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"),
        ("", EMPTY),
        ("a\n\n", "a↵\n↵\n"),
        ("\t", "⇥   "),
        ("\r\x00\x1b", "<U+000D><U+0000><U+001B>"),
        ("\u202eb\u2067", "<U+202E>b<U+2067>"),
        ("\u200b\ufeff\u2028\ud800", "<U+200B><U+FEFF><U+2028><U+D800>"),
        ("👩\u200d👧", "👩\u200d👧"),
        ("\u200d", "<U+200D>"),
        ("漢\u3000مرحب", "漢\u3000مرحب"),
    ],
)
def test_every_character_can_be_seen(text, shown):
    assert visible(text) == shown


def test_score_gives_the_texts_of_its_tokens():
    tokenizer = tiny.tokenizer()
    task = sp.Completion(tokenizer, end_token=False)
    rows = [{"prompt": "what is", "completion": " red blue"}, {"prompt": "the red", "completion": " is the"}]
    posterior = sp.fit(sp.bayesian_lora(tiny.causal_lm()), task, rows, num_steps=1, progress=False).posterior
    scored = posterior.score(rows, num_draws=3, top=2)
    assert scored.pieces == ([" red", " blue"], [" is", " the"])
    for row, numbers in enumerate(scored.rows):
        words = [[" " + tokenizer.decode([i]) for i in here] for here in numbers.top_tokens]
        assert scored.top_pieces[row] == words
    assert posterior.score(rows, num_draws=3).top_pieces == ()
    assert dataclasses.replace(scored, top_pieces=()).alternatives(0)["token"][0].startswith("#")
    assert "red" in scored._repr_html_()
