"""The token of a label is the one at which an answered prompt goes on, for all kinds of templates and tokenizers."""

import doctest
import importlib

import prompts
import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import scalabl_pyro as sp
from scalabl_pyro.tasks.label_tokens import separator

ROW = {"question": "what color is the sky ?", "choices": ["red", "blue"], "answer": 1}
#: End of a prompt in plain text, and what a writer puts before the answer.
ENDINGS = {
    "colon": ("Answer:", " "),
    "space": ("Answer: ", ""),
    "spaces": ("Answer:  ", ""),
    "newline": ("Answer:\n", ""),
    "empty line": ("Answer:\n\n", ""),
    "bracket": ("Answer: (", ""),
    "quote": ('Answer: "', ""),
    "bold": ("Answer: **", ""),
    "after bold": ("**Answer:**", " "),
    "word": ("the answer is", " "),
    "tag": ("<answer>", ""),
    "special token": ("<|head|>", ""),
}


def check(task, answered):
    """The prompt's tokens and a label's token are the first ones of the answered prompt."""
    ids = task.encode(ROW).inputs["input_ids"]
    for label, token in zip(task.labels[:2], task.label_ids[:2].tolist(), strict=True):
        tokens = task.tokenizer(answered(label), add_special_tokens=not task.chat).input_ids
        assert tokens[: len(ids)] == ids
        assert tokens[len(ids)] == token
        assert task.tokenizer.decode([token]).strip().upper() == label
    # The text of the prompt has these tokens too, but for line ends that a tokenizer reads differently at an end.
    alone = task.tokenizer(task.prompt(ROW), add_special_tokens=not task.chat).input_ids
    assert alone == ids or task.prompt(ROW).endswith("\n\n")


@pytest.mark.parametrize("end", ENDINGS)
@pytest.mark.parametrize("kind", prompts.TOKENIZERS)
def test_a_label_after_plain_text_is_the_next_token_of_the_answered_prompt(kind, end):
    text, space = ENDINGS[end]
    task = sp.MultipleChoice(prompts.tokenizer(kind), template="{question}\n{choices}\n" + text)
    check(task, lambda label: f"{ROW['question']}\nA. red\nB. blue\n{text}{space}{label}")
    assert task.prompt(ROW).rstrip() == f"{ROW['question']}\nA. red\nB. blue\n{text}".rstrip()


@pytest.mark.parametrize("end", ["colon", "space", "newline", "bracket", "word"])
@pytest.mark.parametrize("template", prompts.TEMPLATES)
@pytest.mark.parametrize("kind", prompts.TOKENIZERS)
def test_a_label_in_a_chat_is_the_next_token_of_the_answered_chat(kind, template, end):
    tokenizer = prompts.tokenizer(kind, prompts.TEMPLATES[template])
    text = "{question}\n{choices}\n" + ENDINGS[end][0]
    if (kind, template) == ("metaspace", "ends with a bracket"):  # this tokenizer joins "A" and the ")" after it
        with pytest.raises(ValueError, match=r"joins the label 'A' and the text '\)\\n'.*chat=False"):
            sp.MultipleChoice(tokenizer, template=text)
        return
    task = sp.MultipleChoice(tokenizer, template=text)
    asked = {"role": "user", "content": sp.MultipleChoice(tokenizer, template=text, chat=False)._fill(ROW)}

    def answered(label):
        return tokenizer.apply_chat_template([asked, {"role": "assistant", "content": label}], tokenize=False)

    check(task, answered)


@pytest.mark.parametrize("kind", prompts.TOKENIZERS)
@pytest.mark.parametrize("chat", [False, True])
def test_every_prompt_of_a_data_set_ends_at_its_label(kind, chat):
    """Also where the prompt was cut."""
    tokenizer = prompts.tokenizer(kind, prompts.TEMPLATES["Llama 2"])
    for max_length in (None, 60):
        task = sp.MultipleChoice(tokenizer, chat=chat, max_length=max_length)
        for count in (1, 9):
            row = {**ROW, "question": "the sky " * count}
            ids = task.encode(row).inputs["input_ids"]
            assert tokenizer(task.prompt(row), add_special_tokens=not chat).input_ids[-2:] == ids[-2:]
            assert max_length is None or len(ids) <= max_length


@pytest.mark.parametrize(
    ("text", "after"),
    [("答案\uff1a", ""), ("答案", ""), ("정답은", " "), ("Answer -", " "), ("«", ""), ("", ""), ('"A" or "B"', " ")],
    ids=str,
)
def test_a_space_stands_before_a_label_where_writers_put_one(text, after):
    assert separator(text, ["<s>"]) == after


def test_digits_that_never_take_a_space_follow_a_prompt_with_the_space():
    """As in Llama 3 and Qwen, whose tokenizers keep digits apart."""
    tokenizer = prompts.tokenizer("byte BPE")
    task = sp.MultipleChoice(tokenizer, labels=["1", "2"])
    assert tokenizer.convert_ids_to_tokens(task.label_ids.tolist()) == ["1", "2"]
    assert task.prompt(ROW).endswith("Answer: ")
    assert tokenizer(task.prompt(ROW) + "1").input_ids == [*task.encode(ROW).inputs["input_ids"], task.label_ids[0]]


# labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [2, 5, 26])
def test_default_labels_are_the_letters_that_the_tokenizer_knows(known):
    words = ["<pad>", "<unk>", "Answer", ":", "?", ".", *tiny.LETTERS[:known], "Z"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    task = sp.MultipleChoice(tokenizer)
    assert task.labels == tuple(tiny.LETTERS[:known]) and len(task.label_ids) == known
    assert task.encode({**ROW, "choices": ["?"] * known}).extras == {"num_choices": known}
    with pytest.raises(ValueError, match=rf"{known + 1} choices.* has {known} labels.*pass labels="):
        task.encode({**ROW, "choices": ["?"] * (known + 1)})
    if known < 26:  # a label that was asked for is not left out
        with pytest.raises(ValueError, match=f"does not know the label '{tiny.LETTERS[known]}'"):
            sp.MultipleChoice(tokenizer, labels=tiny.LETTERS[: known + 1])


def test_a_tokenizer_without_two_letters_is_refused():
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "A": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="does not know the label 'B'"):
        sp.MultipleChoice(PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>"))


def test_a_label_that_the_tokenizer_joins_to_the_prompt_is_refused():
    """A space may belong to a label's token, but a bracket belongs to the prompt."""
    words = ["<pad>", "?", "Answer", " ", "(", "A", "B", "\n", ".", "(A", "(B"]
    core = Tokenizer(models.Unigram([(word, -1.0 - 0.1 * len(word)) for word in words], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    task = sp.MultipleChoice(tokenizer, labels="AB", template="{question}\n{choices}\nAnswer")
    assert tokenizer.convert_ids_to_tokens(task.label_ids.tolist()) == ["A", "B"]
    with pytest.raises(ValueError, match=r"joins the end of the prompt and the label 'A' to one token, '\(A'"):
        sp.MultipleChoice(tokenizer, labels="AB", template="{question}\n{choices}\nAnswer (")


@pytest.mark.parametrize("question", ["what is it (", "the answer is\n"])
def test_a_row_after_which_a_label_has_another_token_is_refused(question):
    """This needs a template that ends with a field of the row."""
    task = sp.MultipleChoice(prompts.tokenizer("byte BPE"), template="{choices}\n{question}")
    assert task.encode({**ROW, "question": "the answer is "}) == task.encode({**ROW, "question": "the answer is"})
    with pytest.raises(ValueError, match=r"The prompt ends with .*'Answer:'"):
        task.encode({**ROW, "question": question})


@pytest.mark.parametrize("last", ["</s>", "<|/head|>"])
def test_a_tokenizer_that_closes_every_text_is_refused(last):
    """Those of T5 and RoBERTa do, and that of BERT."""
    tokenizer = prompts.tokenizer("WordPiece")
    special = [(last, tokenizer.convert_tokens_to_ids(last))]
    tokenizer.add_special_tokens({"sep_token": last})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {last}", special_tokens=special)
    with pytest.raises(ValueError, match=r"appends the end-of-text token.*MultipleChoice needs a causal LM.*T5"):
        sp.MultipleChoice(tokenizer)


def test_a_plain_prompt_that_ends_a_text_is_refused():
    with pytest.raises(ValueError, match="The prompt ends with the end-of-text token '</s>'"):
        sp.MultipleChoice(prompts.tokenizer("byte BPE"), template="{question}</s>")


@pytest.mark.parametrize("name", ["label_tokens", "chat"])
def test_examples_of_docstrings_run(name):
    module = importlib.import_module(f"scalabl_pyro.tasks.{name}")
    result = doctest.testmod(module, extraglobs={"tokenizer": prompts.tokenizer("byte BPE")})
    assert result.attempted and not result.failed


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDINGS)
@pytest.mark.parametrize("chat", [False, True])
def test_smollm2_continues_its_prompts_with_the_labels(chat, end, smollm2):
    text, space = ENDINGS[end]
    task = sp.MultipleChoice(smollm2, template="{question}\n{choices}\n" + text, chat=chat)
    plain = f"{ROW['question']}\nA. red\nB. blue\n{text}"
    asked = {"role": "user", "content": plain}

    def answered(label):
        if not chat:
            return plain + space + label
        return smollm2.apply_chat_template([asked, {"role": "assistant", "content": label}], tokenize=False)

    check(task, answered)
    assert task.labels == tuple(tiny.LETTERS)


@pytest.fixture(scope="module")
def smollm2():
    return prompts.smollm2()
