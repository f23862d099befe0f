"""Tasks: the prompt and target of a row, and the distribution of its answer given the LLM."""

import doctest
import importlib
import inspect
import logging
from threading import Event, Thread

import numpy as np
import pyro.distributions as dist
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import scalabl_pyro as sp
from scalabl_pyro._process.lock import LOCK
from scalabl_pyro.data import Example, collate, encode, read_rows

QUESTION = {"id": "q0", "question": "what is the sky ?", "choices": ["red", "green", "blue"], "answer": 2}
TEXT = {"id": "t0", "text": "the sky is blue", "label": 1}


class Counts(sp.Task):
    """Counts from a text: Poisson with a log rate from a classification model with one output."""

    def encode(self, row):
        return Example({"input_ids": self.tokenizer(row["text"]).input_ids}, row.get("count"))

    def likelihood(self, outputs, batch):
        return dist.Poisson(outputs[..., 0].exp())


def encode_one(task, row, *, need_target=False):
    return encode([row], task.encode, need_target=need_target)[0]


def batch_of(task, rows):
    return collate(encode(rows, task.encode, need_target=False), range(len(rows)), task.pad_token_id)


def classifying(tokenizer, **options):
    return sp.SequenceClassification(tokenizer, classes=["no", "yes", "maybe"], **options)


def regressing(tokenizer, **options):
    return sp.Regression(tokenizer, **options)


# multiple choice: prompt and target ---------------------------------------------------------------------------


def test_the_prompt_lists_labeled_choices_and_asks_for_a_label(task):
    assert task.prompt(QUESTION) == "what is the sky ?\nA. red\nB. green\nC. blue\nAnswer:"


def test_the_prompt_can_be_a_template_of_ones_own(tokenizer):
    task = sp.MultipleChoice(tokenizer, labels=["green", "red"], template="Question: {question} color:")
    assert task.prompt({**QUESTION, "choices": ["x", "y"]}) == "Question: what is the sky ? color:"
    assert task.classes == ("green", "red")


@pytest.mark.parametrize("words", ["{choices}", "{question}", "{0} {} }{ {answer}"])
def test_braces_in_the_data_are_plain_text(task, words):
    assert task.prompt({**QUESTION, "question": words}).startswith(f"{words}\nA. red\n")
    assert task.prompt({**QUESTION, "choices": [words, "x"]}) == f"what is the sky ?\nA. {words}\nB. x\nAnswer:"


def test_an_example_is_the_tokens_of_the_prompt_the_answer_and_the_number_of_choices(task, tokenizer):
    example = encode_one(task, QUESTION)
    assert example.inputs == {"input_ids": tokenizer(task.prompt(QUESTION)).input_ids}
    assert (example.target, example.extras, example.is_cut) == (2, {"num_choices": 3}, False)


@pytest.mark.parametrize("answer", [1, "B", np.int64(1), np.int32(1)], ids=lambda a: f"{type(a).__name__} {a}")
def test_an_answer_is_an_index_or_a_label(task, answer):
    target = encode_one(task, {**QUESTION, "answer": answer}).target
    assert target == 1
    assert isinstance(target, int)


@pytest.mark.parametrize("row", [{**QUESTION, "answer": None}, {k: v for k, v in QUESTION.items() if k != "answer"}])
def test_an_answer_may_be_missing(task, row):
    assert encode_one(task, row).target is None


@pytest.mark.parametrize("answer", [3, -2, "D", "bleu", 1.5, "", [1], True], ids=repr)
def test_an_answer_outside_the_choices_is_refused_with_what_was_given(task, answer):
    with pytest.raises(ValueError, match=r"Row 0 \(id 'q0'\): answer=.*3 choices.*0 to 2.*from A to C") as error:
        encode_one(task, {**QUESTION, "answer": answer})
    assert f"answer={answer!r}" in str(error.value)


@pytest.mark.parametrize("choices", [("red", "green"), np.array(["red", "green"]), [1, 2]], ids=lambda c: str(type(c)))
def test_choices_may_be_any_sequence(task, choices):
    row = {**QUESTION, "choices": choices, "answer": 1}
    assert encode_one(task, row).extras == {"num_choices": 2}
    assert f"A. {choices[0]}\nB. {choices[1]}" in task.prompt(row)


@pytest.mark.parametrize("count", [0, 1, 27])
def test_more_choices_than_labels_or_fewer_than_two_are_refused(task, count):
    with pytest.raises(ValueError, match=rf"Row 0 \(id 'q0'\): the row has {count} choices.*2 to 26"):
        encode_one(task, {**QUESTION, "choices": ["red"] * count})


@pytest.mark.parametrize(
    "choices",
    [{"text": ["red", "blue"], "label": ["A", "B"]}, "ABCD", None, 3, ["red", None]],
    ids=["dict of the hub", "text", "None", "number", "missing choice"],
)
def test_choices_that_are_no_list_of_texts_are_refused(task, choices):
    with pytest.raises(ValueError, match=r"Row 0 \(id 'q0'\).*choices.*(list|None|str)"):
        encode_one(task, {**QUESTION, "choices": choices, "answer": 0})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"questoin": "x", "choices": ["a", "b"]}, r"no field 'question'. Did you mean 'questoin'"),
        ({"question": "x", "choice": ["a", "b"]}, r"no field 'choices'. Did you mean 'choice'"),
        ({"stem": "x"}, r"no field 'choices'. Known names: 'stem'"),
    ],
    ids=["question", "choices", "nothing near"],
)
def test_a_missing_field_is_refused_with_the_nearest(task, row, message):
    with pytest.raises(ValueError, match=f"Row 0: the row has {message}"):
        encode_one(task, row)


@pytest.mark.parametrize("given", ["answerKey", "label"])
def test_an_answer_in_another_field_is_missed_with_the_fields_there_are(task, given):
    row = {k: v for k, v in QUESTION.items() if k != "answer"} | {given: 1}
    with pytest.raises(
        ValueError, match=rf"Row 0 \(id 'q0'\) has no answer, but training and the likelihood need one.*'{given}'"
    ):
        encode_one(task, row, need_target=True)


@pytest.mark.parametrize("nothing", [None, float("nan")], ids=str)
def test_a_missing_text_is_refused_and_not_read_as_a_word(task, tokenizer, nothing):
    for each, row, name in (
        (task, QUESTION, "question"),
        (classifying(tokenizer), TEXT, "text"),
        (classifying(tokenizer, text_pair="pair"), {**TEXT, "pair": "x"}, "pair"),
    ):
        with pytest.raises(ValueError, match=f"Row 0 .*{name!r}"):
            encode_one(each, {**row, name: nothing})


# multiple choice: the tokens of labels ------------------------------------------------------------------------


def byte_level_tokenizer(*, chat):
    """Like GPT-2's: a word behind a space is another token than the word at the start of a line."""
    words = ["<pad>", "<unk>", "A", "B", "ĠA", "ĠB", "Answer", ":", ".", "?", "Ċ", "assistant"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    if chat:
        turns = "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
        fast.chat_template = turns + "{% if add_generation_prompt %}assistant\n{% endif %}"
    return fast


@pytest.mark.parametrize(("chat", "tokens"), [(False, ["ĠA", "ĠB"]), (True, ["A", "B"])], ids=["plain", "chat"])
def test_a_label_is_the_token_that_comes_behind_the_prompt(chat, tokens):
    tokenizer = byte_level_tokenizer(chat=chat)
    task = sp.MultipleChoice(tokenizer, labels=["A", "B"])
    assert tokenizer.convert_ids_to_tokens(task.label_ids.tolist()) == tokens


def test_a_chat_template_is_used_where_there_is_one():
    tokenizer = tiny.tokenizer(chat=True)
    wrapped, plain = sp.MultipleChoice(tokenizer), sp.MultipleChoice(tokenizer, chat=False)
    assert wrapped.prompt(QUESTION) == f"user {plain.prompt(QUESTION)} assistant "
    assert wrapped.chat and not plain.chat
    assert not sp.MultipleChoice(tiny.tokenizer()).chat


@pytest.mark.parametrize("chat", [False, True])
def test_special_tokens_are_added_to_plain_prompts_only(chat):
    """A chat template writes its own; a second beginning-of-text token would harm."""
    tokenizer = tiny.tokenizer(chat=chat)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="user $A", special_tokens=[("user", 57)])
    plain = sp.MultipleChoice(tiny.tokenizer(chat=chat))
    task = sp.MultipleChoice(tokenizer)
    own, without = encode_one(task, QUESTION).inputs["input_ids"], encode_one(plain, QUESTION).inputs["input_ids"]
    assert own == (without if chat else [57, *without])
    assert torch.equal(task.label_ids, plain.label_ids)


def test_a_tokenizer_that_ends_every_text_is_refused(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A user", special_tokens=[("user", 57)])
    tokenizer.eos_token = "user"
    with pytest.raises(ValueError, match=r"end-of-text token.*add_eos_token = False"):
        sp.MultipleChoice(tokenizer)


@pytest.mark.parametrize("label", ["sky rose", "the.", ""])
def test_a_label_that_is_not_one_token_is_refused(tokenizer, label):
    with pytest.raises(ValueError, match=rf"The label {label!r} is not one token.*choose labels"):
        sp.MultipleChoice(tokenizer, labels=["A", label])


@pytest.mark.parametrize("labels", [["A", "zebra"], ["zebra", "lion"]], ids=["one", "all"])
def test_a_label_that_the_tokenizer_does_not_know_is_refused(tokenizer, labels):
    with pytest.raises(ValueError, match="zebra"):
        sp.MultipleChoice(tokenizer, labels=labels)


def test_labels_of_one_token_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"labels=\('A', 'B', 'A'\) \(a tuple\): two labels become the same token"):
        sp.MultipleChoice(tokenizer, labels=["A", "B", "A"])


@pytest.mark.parametrize("labels", [[], ["A"]])
def test_fewer_than_two_labels_are_refused(tokenizer, labels):
    with pytest.raises(ValueError, match=r"labels=\[.*two"):
        sp.MultipleChoice(tokenizer, labels=labels)


@pytest.mark.parametrize("template", ["{choices}\nAnswer:", "{q}", ""])
def test_a_template_without_the_question_is_refused(tokenizer, template):
    with pytest.raises(ValueError, match=r"template=.* must contain '\{question\}'"):
        sp.MultipleChoice(tokenizer, template=template)


def test_a_field_that_is_not_filled_is_named_in_the_log(tokenizer, caplog):
    sp.MultipleChoice(tokenizer, template='{"a": {}} {question} {choices} :')
    assert not caplog.records
    sp.MultipleChoice(tokenizer, template="{context} {question} {choices} :")
    assert "The template contains {context}, which stands in each prompt as it is" in caplog.text


def test_a_chat_without_a_template_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"chat=True, but the tokenizer has no chat template: use chat=False"):
        sp.MultipleChoice(tokenizer, chat=True)


# lengths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [40, 25, 19])
@pytest.mark.parametrize("chat", [False, True])
def test_a_long_question_loses_its_end_and_keeps_choices_and_cue(max_length, chat):
    tokenizer = tiny.tokenizer(chat=chat)
    long = {**QUESTION, "question": "rose " + "the " * 40 + "night"}
    example = encode_one(sp.MultipleChoice(tokenizer, max_length=max_length), long)
    words = tokenizer.decode(example.inputs["input_ids"])
    assert len(example) == max_length and example.is_cut
    assert words.removeprefix("user ").startswith("rose") and "night" not in words
    assert words.removesuffix(" assistant").endswith("A . red B . green C . blue Answer :")


def test_a_prompt_that_fits_is_not_cut(task, tokenizer):
    length = len(encode_one(task, QUESTION))
    assert encode_one(sp.MultipleChoice(tokenizer, max_length=length), QUESTION) == encode_one(task, QUESTION)


def test_choices_longer_than_the_limit_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"Row 0 \(id 'q0'\): max_length=8 is too small: .* no room for the question"):
        encode_one(sp.MultipleChoice(tokenizer, max_length=8), QUESTION)


@pytest.mark.parametrize("make", [classifying, regressing])
def test_a_long_text_loses_its_end(tokenizer, make, caplog):
    with caplog.at_level(logging.WARNING, logger="scalabl_pyro"):
        example = encode_one(make(tokenizer, max_length=2), TEXT)
    assert tokenizer.decode(example.inputs["input_ids"]) == "the sky" and example.is_cut
    assert "1 of 1 rows were longer than max_length" in caplog.text
    assert not encode_one(make(tokenizer, max_length=4), TEXT).is_cut


@pytest.mark.parametrize("make", [sp.MultipleChoice, classifying, regressing], ids=lambda f: f.__name__)
@pytest.mark.parametrize("max_length", [0, -1, 2.5, "10"], ids=repr)
def test_a_length_that_is_no_positive_integer_is_refused(tokenizer, make, max_length):
    with pytest.raises((ValueError, TypeError), match=f"max_length={max_length!r}"):
        make(tokenizer, max_length=max_length)


# text tasks: rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [1, "yes", 1.0, np.int64(1)], ids=lambda a: f"{type(a).__name__} {a}")
def test_a_class_is_an_index_or_a_name(tokenizer, label):
    example = encode_one(classifying(tokenizer), {**TEXT, "label": label})
    assert example.target == 1 and isinstance(example.target, int)
    assert example.inputs["input_ids"] == tokenizer(TEXT["text"]).input_ids


@pytest.mark.parametrize("label", [3, -2, 1.5, float("inf"), [1]], ids=repr)
def test_a_class_outside_the_classes_is_refused_with_what_was_given(tokenizer, label):
    with pytest.raises(ValueError, match=r"Row 0 \(id 't0'\): label .*3 classes \(0 to 2\)") as error:
        encode_one(classifying(tokenizer), {**TEXT, "label": label})
    assert f"label {label!r} " in str(error.value)


def test_an_unknown_class_name_is_refused_with_the_nearest(tokenizer):
    with pytest.raises(ValueError, match=r"Row 0 \(id 't0'\): label 'mabe' is not a class. Did you mean 'maybe'"):
        encode_one(classifying(tokenizer), {**TEXT, "label": "mabe"})


@pytest.mark.parametrize("value", [2.5, 2, "2.5", np.float32(2.5), -1.0], ids=lambda a: f"{type(a).__name__} {a}")
def test_a_number_is_read_as_a_float(tokenizer, value):
    target = encode_one(regressing(tokenizer), {**TEXT, "label": value}).target
    assert isinstance(target, float) and target == float(value)


@pytest.mark.parametrize(("value", "shown"), [("many", "'many'"), (float("inf"), "inf"), (True, "True")])
def test_a_target_that_is_no_finite_number_is_refused(tokenizer, value, shown):
    with pytest.raises(ValueError, match=rf"Row 0 \(id 't0'\): .*{shown}"):
        encode_one(regressing(tokenizer), {**TEXT, "label": value})


@pytest.mark.parametrize("make", [classifying, regressing])
def test_fields_go_by_the_names_that_are_given(tokenizer, make):
    task = make(tokenizer, text="premise", text_pair="hypothesis", target="gold")
    example = encode_one(task, {"premise": "the sky", "hypothesis": "is blue", "gold": 2, "label": 0})
    assert example.target == 2
    assert example.inputs["input_ids"] == tokenizer("the sky", "is blue").input_ids
    with pytest.raises(ValueError, match=r"no field 'hypothesis'. Did you mean 'hypotesis'"):
        encode_one(task, {"premise": "the sky", "hypotesis": "is blue"})


def test_token_types_of_a_pair_reach_the_model(tokenizer):
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    task = classifying(tokenizer, text_pair="pair")
    batch = batch_of(
        task, [{**TEXT, "text": "the sky", "pair": "rose"}, {**TEXT, "text": "the", "pair": "sky is blue"}]
    )
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "classes"),
        (["one"], r"classes=\['one'\]: name at least two"),
        (["a", "a"], "classes.*'a'"),
        ("ab", "classes"),
    ],
    ids=repr,
)
def test_classes_that_are_no_names_of_two_classes_are_refused(tokenizer, classes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sp.SequenceClassification(tokenizer, classes=classes)


@pytest.mark.parametrize("noise_scale", [0, -1.0, float("nan"), float("inf")])
def test_a_noise_that_is_no_standard_deviation_is_refused(tokenizer, noise_scale):
    with pytest.raises(ValueError, match=f"noise_scale={noise_scale}"):
        sp.Regression(tokenizer, noise_scale=noise_scale)


# tokenizers ---------------------------------------------------------------------------------------------------

EVERY_TASK = [sp.MultipleChoice, classifying, regressing]


@pytest.mark.parametrize("make", EVERY_TASK, ids=lambda f: f.__name__)
def test_a_tokenizer_without_a_pad_token_is_refused_with_the_remedy(tokenizer, make):
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no pad token.*tokenizer.pad_token = tokenizer.eos_token"):
        make(tokenizer)


@pytest.mark.parametrize("make", EVERY_TASK, ids=lambda f: f.__name__)
@pytest.mark.parametrize("wrong", ["gpt2", None], ids=repr)
def test_a_task_over_text_needs_a_tokenizer(make, wrong):
    with pytest.raises(TypeError, match="tokenizer"):
        make(wrong)


@pytest.mark.parametrize(
    "task",
    [
        sp.MultipleChoice(
            tiny.tokenizer(), labels=["red", "blue", "green"], template="{question} {choices}", max_length=30
        ),
        sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b"], text="question", target="answer", max_length=3),
        sp.Regression(tiny.tokenizer(), noise_scale=2.0, text="question", text_pair="id", target="answer"),
        Counts(tiny.tokenizer(), max_length=9),
    ],
    ids=lambda t: type(t).__name__,
)
def test_the_options_of_a_task_build_it_again(task):
    def options(of):
        values = {name: getattr(of, name) for name in of.options}
        return {name: value.item() if torch.is_tensor(value) else value for name, value in values.items()}

    again = type(task)(task.tokenizer, **options(task))
    assert options(again) == options(task)
    row = {**QUESTION, "answer": 1, "text": "sky", "count": 1}
    assert again.encode(row) == task.encode(row)


def test_repr_of_a_task_is_one_short_line_of_options(tokenizer, task):
    assert repr(task) == (
        r"MultipleChoice(labels=('A', ..., 'Z'), template='{question}\n{choices}\nAnswer:', chat=False)"
    )
    assert repr(sp.MultipleChoice(tokenizer, labels="AB", template="{question}" * 9, max_length=40)) == (
        "MultipleChoice(labels=('A', 'B'), template='{question}{question}{question}{ques...', chat=False, "
        "max_length=40)"
    )
    assert repr(classifying(tokenizer)) == (
        "SequenceClassification(classes=('no', 'yes', 'maybe'), text='text', target='label')"
    )
    assert repr(regressing(tokenizer, noise_scale=0.25, text_pair="other")) == (
        "Regression(noise_scale=0.25, standardize=True, text='text', text_pair='other', target='label')"
    )
    assert repr(Counts(tokenizer)) == "Counts()"
    assert repr(Counts(tokenizer, max_length=5)) == "Counts(max_length=5)"
    many = [f"class {i}" for i in range(1000)]
    assert "classes=('class 0', ..., 'class 999')" in repr(sp.SequenceClassification(tokenizer, classes=many))


def test_a_notebook_shows_the_options_of_a_task_as_a_table(tokenizer, task):
    table = sp.MultipleChoice(tokenizer, template="{question}" * 9, max_length=40)._repr_html_()
    assert table.startswith("<table><caption>MultipleChoice</caption>")
    for cells in (
        "<tr><th>max_length</th><td>40</td></tr>",
        "<th>labels</th>",
        "{question}{ques...",
        "(&#x27;A&#x27;, ...",
    ):
        assert cells in table
    assert "<th>classes</th><td>(&#x27;no&#x27;, &#x27;yes&#x27;" in classifying(tokenizer)._repr_html_()
    for one in (task, regressing(tokenizer), Counts(tokenizer)):
        rows = one._repr_html_().count("<tr>")
        usual = [name for name, value in one.added_options.items() if getattr(one, name) == value]
        assert rows == len([name for name in one.options if getattr(one, name) is not None and name not in usual])


TASK_FILES = [
    "base",
    "multiple_choice",
    "regression",
    "standardized_normal",
    "text",
    "choice_columns",
    "choice_options",
]
TABLE_FILES = ["counts", "from_data", "label_completion", "label_prompt", "multi_label", "ordered", "robust"]


@pytest.mark.parametrize("name", [*TASK_FILES, *TABLE_FILES, "weighted_categorical"])
def test_examples_of_docstrings_run(name, tokenizer):
    module = importlib.import_module(f"scalabl_pyro.tasks.{name}")
    result = doctest.testmod(module, extraglobs={"tokenizer": tokenizer})
    assert result.attempted and not result.failed


# likelihoods --------------------------------------------------------------------------------------------------


def test_choices_that_a_row_lacks_have_no_probability(task):
    rows = [{**QUESTION, "choices": ["x"] * count, "answer": 0} for count in (3, 2, 26)]
    outputs = torch.randn(3, 26, generator=torch.Generator().manual_seed(0))
    probs = task.likelihood(outputs, batch_of(task, rows)).probs
    for row, count in enumerate([3, 2, 26]):
        torch.testing.assert_close(probs[row, :count], outputs[row, :count].softmax(-1))
        assert (probs[row, count:] == 0).all()


@pytest.mark.parametrize("draws", [(), (4,), (4, 2)], ids=str)
def test_a_likelihood_keeps_the_dimensions_of_draws(task, tokenizer, draws):
    generator = torch.Generator().manual_seed(0)
    texts, questions = [TEXT, TEXT], [QUESTION, QUESTION]
    for each, rows, num_outputs in (
        (task, questions, 26),
        (classifying(tokenizer), texts, 3),
        (regressing(tokenizer), texts, 1),
        (Counts(tokenizer), texts, 1),
    ):
        outputs = torch.randn(*draws, 2, num_outputs, generator=generator)
        d = each.likelihood(outputs, batch_of(each, rows))
        assert d.batch_shape == (*draws, 2)
        assert d.event_shape == ()


def test_distribution_is_the_likelihood_built_while_the_lock_is_held(task, monkeypatch):
    batch = batch_of(task, [QUESTION, QUESTION])
    outputs = torch.zeros(2, len(batch), 26)
    expected = task.likelihood(outputs, batch)
    entered = Event()

    def wait_for_the_lock():
        with LOCK:
            entered.set()

    other = Thread(target=wait_for_the_lock)

    def likelihood(outputs, batch):
        other.start()
        assert not entered.wait(0.2)
        return expected

    monkeypatch.setattr(task, "likelihood", likelihood)
    assert task.distribution(outputs, batch) is expected
    assert entered.wait(10)
    other.join()


def test_classes_are_categorical_in_the_logits_of_the_head(tokenizer):
    task, outputs = classifying(tokenizer), torch.tensor([[0.0, 1.0, -1.0]])
    d = task.likelihood(outputs, batch_of(task, [TEXT]))
    torch.testing.assert_close(d.log_prob(torch.tensor([1])), outputs.log_softmax(-1)[:, 1])


def test_a_number_is_normal_around_the_output(tokenizer):
    task = sp.Regression(tokenizer, noise_scale=0.5)
    d = task.likelihood(torch.tensor([[2.0], [-1.0]]), batch_of(task, [TEXT, TEXT]))
    torch.testing.assert_close(d.mean, torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(d.variance, torch.tensor([0.25, 0.25]))


@pytest.mark.parametrize(
    ("make", "num_outputs", "message"),
    [
        (classifying, 2, r"head has 2 outputs, but the task has 3 classes\. .*num_labels=3"),
        (classifying, 59, r"head has 59 outputs, but the task has 3 classes\. .*num_labels=3"),
        (regressing, 2, r"head has 2 outputs; regression needs num_labels=1"),
    ],
)
def test_a_head_of_the_wrong_size_is_refused_with_the_right_one(tokenizer, make, num_outputs, message):
    task = make(tokenizer)
    with pytest.raises(ValueError, match=message):
        task.likelihood(torch.zeros(1, num_outputs), batch_of(task, [TEXT]))


def test_a_task_that_lacks_a_method_says_which():
    class Empty(sp.Task):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty must define encode\(row\) -> Example"):
        Empty(tiny.tokenizer()).encode({})
    with pytest.raises(NotImplementedError, match=r"Empty must define likelihood\(outputs, batch\)"):
        Empty(tiny.tokenizer())(torch.zeros(1, 1), None)


# outputs of the LLM -------------------------------------------------------------------------------------------


def latents(blora, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, B in blora.adapter.factors():
            B.copy_(torch.randn(B.shape, generator=generator))
    return torch.randn(blora.subspace.dim, generator=generator).to(blora.adapter.loc.dtype)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_outputs_of_a_question_are_the_label_logits_behind_its_last_token(task, family):
    blora, rows = sp.bayesian_lora(tiny.causal_lm(family)), tiny.question_rows(3)
    s = latents(blora)
    with torch.no_grad():
        outputs = task.outputs(blora, batch_of(task, rows), s)
        for row, found in zip(rows, outputs, strict=True):
            ids = torch.tensor([encode_one(task, row).inputs["input_ids"]])
            expected = blora(input_ids=ids, s=s).logits[0, -1, task.label_ids]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_outputs_of_a_text_do_not_depend_on_the_rows_beside_it(tokenizer, family):
    blora, task, rows = sp.bayesian_lora(tiny.classifier(family)), classifying(tokenizer), tiny.text_rows(3)
    s = latents(blora)
    with torch.no_grad():
        together = task.outputs(blora, batch_of(task, rows), s)
        alone = torch.cat([task.outputs(blora, batch_of(task, [row]), s) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert len(together.unique(dim=0)) > 1


def test_outputs_of_a_half_precision_model_are_single_precision(task, tokenizer):
    for each, llm, row in (
        (task, tiny.causal_lm(dtype=torch.bfloat16), QUESTION),
        (classifying(tokenizer), tiny.classifier(dtype=torch.bfloat16), TEXT),
    ):
        blora = sp.bayesian_lora(llm)
        assert each.outputs(blora, batch_of(each, [row]), blora.adapter.loc).dtype == torch.float32


@pytest.mark.parametrize("pad", [5, None])
def test_a_model_that_pads_otherwise_than_the_tokenizer_is_refused(tokenizer, pad):
    llm = tiny.classifier()
    llm.config.pad_token_id = pad
    blora, task = sp.bayesian_lora(llm), classifying(tokenizer)
    with pytest.raises(
        ValueError, match=rf"model pads with token {pad}, the tokenizer with 0.*model.config.pad_token_id"
    ):
        task.outputs(blora, batch_of(task, [TEXT]), blora.adapter.loc)


@pytest.mark.parametrize(
    "make", [tiny.classifier, lambda: tiny.causal_lm(vocab_size=30)], ids=["a classifier", "another vocabulary"]
)
def test_a_model_without_logits_for_the_labels_is_refused_in_words(task, make):
    blora = sp.bayesian_lora(make())
    with pytest.raises(ValueError, match=r"(causal|ForCausalLM|vocabulary).*tokenizer"):
        task.outputs(blora, batch_of(task, [QUESTION]), blora.adapter.loc)


# a task of one's own ------------------------------------------------------------------------------------------

COUNT_ROWS = [{"text": r["question"], "count": r["answer"]} for r in tiny.question_rows(12)]


@pytest.fixture(scope="module")
def counting():
    """A posterior of counts, after a few steps."""
    blora = sp.bayesian_lora(tiny.classifier(num_labels=1))
    return sp.fit(blora, Counts(tiny.tokenizer()), COUNT_ROWS, num_steps=4, lr=1e-2, progress=False)


def test_a_task_of_ones_own_takes_at_most_15_lines():
    assert len(inspect.getsource(Counts).splitlines()) <= 15


def test_a_task_of_ones_own_learns(counting):
    assert counting.history["nll"].iloc[-1] < counting.history["nll"].iloc[0]
    assert np.isfinite(counting.history.to_numpy()).all()


def test_a_task_of_ones_own_predicts_moments_and_densities(counting):
    prediction = counting.posterior.predict(COUNT_ROWS, num_draws=3, batch_size=5)
    assert isinstance(prediction, sp.NumericPrediction)
    np.testing.assert_allclose(prediction.variances, prediction.means, rtol=1e-6)  # Poisson
    np.testing.assert_array_equal(prediction.target, [row["count"] for row in COUNT_ROWS])
    expected = dist.Poisson(torch.tensor(prediction.means)).log_prob(torch.tensor(prediction.target))
    np.testing.assert_allclose(prediction.log_likelihood, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(prediction.replicates, prediction.replicates.round())
    assert np.isfinite(prediction.metrics().to_numpy()).all()


def test_a_task_of_ones_own_is_saved_and_needed_to_load(counting, tmp_path):
    path = tmp_path / "posterior"
    counting.posterior.save_pretrained(path)
    with pytest.raises(ValueError, match=r"task 'Counts': pass from_pretrained\(\.\.\., task=Counts\(\.\.\.\)\)"):
        sp.Posterior.from_pretrained(tiny.classifier(num_labels=1), path)
    llm = tiny.classifier(num_labels=1)
    loaded = sp.Posterior.from_pretrained(llm, path, task=Counts(tiny.tokenizer()))
    was, now = (p.predict(COUNT_ROWS, num_draws=2, seed=3) for p in (counting.posterior, loaded))
    np.testing.assert_array_equal(now.means, was.means)
    np.testing.assert_array_equal(now.replicates, was.replicates)


@pytest.fixture(scope="module")
def regression():
    """A posterior of numbers with learned noise."""
    blora = sp.bayesian_lora(tiny.classifier(num_labels=1))
    rows = [{"text": r["text"], "label": float(r["label"])} for r in tiny.text_rows(12)]
    return rows, sp.fit(blora, sp.Regression(tiny.tokenizer(), noise_scale=2.0), rows, num_steps=3, progress=False)


def test_the_noise_of_a_regression_is_learned_saved_and_predicted(regression, tmp_path):
    rows, result = regression
    noise = result.posterior.task.noise_scale.item()
    assert 0 < noise != 2.0
    result.posterior.save_pretrained(tmp_path / "posterior")
    loaded = sp.Posterior.from_pretrained(tiny.classifier(num_labels=1), tmp_path / "posterior")
    assert loaded.task.noise_scale.item() == noise
    np.testing.assert_allclose(loaded.predict(rows, num_draws=2).variances, noise**2, rtol=1e-5)


@pytest.mark.parametrize("longest_first", [False, True])
def test_numbers_with_and_without_answers_are_predicted_together(regression, longest_first):
    rows, result = regression
    by_length = sorted(rows, key=lambda row: len(row["text"]), reverse=longest_first)
    half = [{**row, "label": None} if i < 6 else row for i, row in enumerate(by_length)]
    prediction = result.posterior.predict(half, num_draws=2, batch_size=3)
    np.testing.assert_array_equal(
        prediction.means, result.posterior.predict(by_length, num_draws=2, batch_size=3).means
    )
    known = [i for i, row in enumerate(half) if row["label"] is not None]
    np.testing.assert_array_equal(prediction.target[known], [half[i]["label"] for i in known])
    np.testing.assert_array_equal(prediction.is_answered, [row["label"] is not None for row in half])
    answered = result.posterior.predict([half[i] for i in known], num_draws=2, batch_size=3)
    assert prediction.metrics().pop("num_answered").tolist() == [6]
    np.testing.assert_allclose(prediction.metrics()[["rmse", "mae", "nll"]], answered.metrics(), rtol=1e-5)
    assert np.isnan(prediction.log_likelihood[:, ~prediction.is_answered]).all()


# real data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "mcqa/openbookqa_test",
        "mcqa/arc_easy_test",
        "mcqa/boolq_test",
        "text/rte_test",
        "text/trec_test",
        "text/sst2_test",
    ],
)
def test_real_questions_become_prompts_with_their_answers(shared_data, task, name):
    rows = read_rows(shared_data / f"{name}.jsonl")[:250]
    batch = batch_of(task, rows)
    assert batch.target.tolist() == [row["answer"] for row in rows]
    assert batch.extras["num_choices"].tolist() == [len(row["choices"]) for row in rows]
    assert (batch.inputs["input_ids"][torch.arange(len(rows)), batch.last] == task.tokenizer(":").input_ids[0]).all()


def test_real_texts_become_classes_by_index_or_name(shared_data, tokenizer):
    rows = read_rows(shared_data / "text" / "trec_test.jsonl")
    task = sp.SequenceClassification(tokenizer, classes=rows[0]["choices"], text="question", target="answer")
    by_index = encode(rows, task.encode, need_target=True)
    named = [{**row, "answer": row["choices"][row["answer"]]} for row in rows]
    assert encode(named, task.encode, need_target=True) == by_index
    assert {example.target for example in by_index} == set(range(6))
