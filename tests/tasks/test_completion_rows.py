"""Rows of completions: the forms of TRL, chat templates, borders between tokens, and rows that are too long."""

import datasets
import numpy as np
import pandas as pd
import prompts
import pytest
import tiny
import transformers as tf
from completions import batch_of, tokenizer
from tokenizers.processors import TemplateProcessing

import scalabl_pyro as sp
from scalabl_pyro.data import encode
from scalabl_pyro.data.rows import rows_for

TALK = [
    {"role": "user", "content": "what color is the sky ?"},
    {"role": "assistant", "content": "blue"},
    {"role": "user", "content": "the color"},
    {"role": "assistant", "content": "red or blue"},
]
ASKED, ANSWER = TALK[:1], TALK[1:2]
#: Like Qwen 3: the last answer begins with an empty thought, and earlier thoughts are dropped.
THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
)


def asking(template=None, kind="byte BPE", **options):
    return sp.Completion(prompts.tokenizer(kind, template), **options)


def counted(task, row):
    """The text of the counted tokens, and the text before the first of them."""
    example = task.encode(row)
    assert [example.inputs["input_ids"][i + 1] for i in example.extras["positions"]] == example.target
    first = example.extras["positions"][0] + 1
    return task.tokenizer.decode(example.target), task.tokenizer.decode(example.inputs["input_ids"][:first])


@pytest.mark.parametrize("template", ["ChatML", "Llama 3", "Llama 2", "Vicuna", "no generation prompt"])
def test_the_forms_of_trl_count_the_same_answer(template):
    task = asking(prompts.TEMPLATES[template])
    as_messages = counted(task, {"messages": TALK[:2]})
    assert as_messages == counted(task, {"prompt": ASKED, "completion": ANSWER})
    texts = {"prompt": TALK[0]["content"], "completion": TALK[1]["content"]}
    assert as_messages == counted(asking(prompts.TEMPLATES[template], chat=True), texts)
    assert as_messages[0].startswith(("blue", " blue")) and "sky" in as_messages[1]
    generation = task.prompt_tokens({"prompt": ASKED})
    assert task.encode({"messages": TALK[:2]}).inputs["input_ids"][: len(generation)] == generation
    assert generation == task.prompt_tokens({"messages": TALK[:2]}) == task.prompt_tokens({"messages": ASKED})


def test_an_answer_ends_with_the_end_token_of_the_template():
    task = asking(prompts.TEMPLATES["Llama 3"])
    assert counted(task, {"messages": TALK[:2]})[0] == "blue</s>"
    assert counted(asking(prompts.TEMPLATES["ChatML"]), {"messages": TALK[:2]})[0] == "blue<|im_end|>\n"


def test_all_or_the_last_of_the_answers_count():
    template = prompts.TEMPLATES["Llama 3"]
    assert counted(asking(template), {"messages": TALK})[0] == "blue</s>red or blue</s>"
    assert counted(asking(template, turns="last"), {"messages": TALK})[0] == "red or blue</s>"
    pair = {"prompt": TALK[:3], "completion": TALK[3:]}
    assert counted(asking(template), pair)[0] == "red or blue</s>", "answers in the prompt do not count"
    long = {"prompt": TALK[:1], "completion": TALK[1:]}
    assert counted(asking(template), long)[0] == "blue</s>red or blue</s>"
    assert counted(asking(template, turns="last"), long)[0] == "red or blue</s>"


def test_texts_are_no_conversation_unless_chat_says_so():
    row = {"prompt": "the sky is", "completion": " blue"}
    assert counted(asking(prompts.TEMPLATES["ChatML"]), row) == (" blue</s>", "the sky is")
    assert counted(asking(prompts.TEMPLATES["ChatML"], chat=True), row)[0] == " blue<|im_end|>\n"


def test_options_reach_the_template_and_are_checked():
    template = "{{ tone }} " + prompts.TEMPLATES["ChatML"]
    task = asking(template, chat_options={"tone": "kind"})
    assert counted(task, {"messages": TALK[:2]})[1].startswith("kind <|im_start|>user")
    for wrong, message in (({"tonne": 1}, "does not read 'tonne'"), ({"tokenize": True}, "sets 'tokenize' itself")):
        with pytest.raises(ValueError, match=message):
            asking(template, chat_options=wrong).encode({"messages": TALK[:2]})


def test_templates_that_rewrite_earlier_turns():
    task = asking(THOUGHTS)
    with pytest.raises(ValueError, match=r"turn 1 in another way when more turns follow.*turns='last'"):
        task.encode({"messages": TALK})
    text, before = counted(asking(THOUGHTS, turns="last"), {"messages": TALK})
    assert text == "red or blue<|im_end|>\n" and before.endswith("<think>\n\n</think>\n\n")
    thinking = [*ASKED, {"role": "assistant", "content": "<think>hm</think>blue"}]
    with pytest.raises(ValueError, match="changes the answer in turn 1 or leaves a part of it out, such as thoughts"):
        task.encode({"messages": thinking})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out the answer"),
        ("{{ messages[-1].content }}", "leaves out text of a message of the role 'user'"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "leaves out the answer, or changes it"),
        ("{% for m in messages %}{{ m.content | replace('blue', 'red') }}{% endfor %}", "changes the answer in turn 1"),
        ("{{ raise_exception('only users') }}", "refuses the conversation: only users"),
        (None, "no chat template: set tokenizer.chat_template"),
    ],
    ids=["no texts", "last turn only", "upper case", "other answer", "raises", "no template"],
)  # fmt: skip
def test_templates_that_lose_text_are_refused(template, message):
    with pytest.raises(ValueError, match=message):
        asking(template).encode({"messages": TALK[:2]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "the sky", "completion": ""}, "the completion is empty"),
        ({"prompt": "", "completion": " blue"}, "the prompt is empty"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"completion": " blue"}, "no field 'prompt'"),
        ({"text": "the sky"}, "no field 'prompt'"),
        ({"prompt": None, "completion": " blue"}, "the field 'prompt' has no value"),
        ({"prompt": "the sky", "completion": ["blue"]}, r"the field 'completion' holds \['blue'\]"),
        ({"prompt": "the sky", "completion": ANSWER}, "the field 'completion' holds .* not a text"),
        ({"prompt": ASKED, "completion": "blue"}, "'completion' must be a list of messages, got 'blue'"),
        ({"messages": "the sky"}, "'messages' must be a list of messages"),
        ({"messages": []}, "'messages' must be a list of messages"),
        ({"messages": [{"role": "user"}]}, "each message is a dict with the texts 'role' and 'content'"),
        ({"messages": ["the sky"]}, "each message is a dict"),
        ({"messages": TALK[:3]}, "ends with a message of the role 'user'.*'assistant'"),
        ({"prompt": ASKED, "completion": ASKED}, "ends with a message of the role 'user'"),
        ({"messages": [*ASKED, {"role": "assistant", "content": " "}]}, "the answer in turn 1 is empty"),
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_are_refused(row, message):
    tok = prompts.tokenizer("byte BPE", prompts.TEMPLATES["ChatML"])
    with pytest.raises(ValueError, match=f"Row 0: .*{message}"):
        encode([row], sp.Completion(tok).encode, need_target=True)


def test_rows_without_a_completion_have_a_prompt_alone():
    task = asking(prompts.TEMPLATES["ChatML"])
    for nothing in ({}, {"completion": None}, {"completion": float("nan")}, {"completion": pd.NA}):
        for prompt in ("the sky is", ASKED):
            example = task.encode({"prompt": prompt, **nothing})
            assert example.target is None
            assert example.inputs["input_ids"] == task.prompt_tokens({"prompt": prompt})
    with pytest.raises(ValueError, match="Row 1 has no answer"):
        encode([{"prompt": "a", "completion": " b"}, {"prompt": "a"}], task.encode, need_target=True)


def test_rows_from_tables_and_data_sets():
    task = asking(prompts.TEMPLATES["ChatML"])
    texts = [{"prompt": "the sky is", "completion": " blue"}, {"prompt": "red or", "completion": " blue ?"}]
    talks = [{"messages": TALK[:2]}, {"messages": TALK}]
    mixed = [{**texts[0], "messages": None}, {"prompt": None, "completion": None, "messages": TALK}]
    expected = {name: [task.encode(row) for row in rows] for name, rows in (("texts", texts), ("talks", talks))}
    expected["mixed"] = [task.encode(texts[0]), task.encode(talks[1])]
    for name, rows in (("texts", texts), ("talks", talks), ("mixed", mixed)):
        frame = pd.DataFrame(rows)
        sources = [frame, datasets.Dataset.from_list(rows)]
        if name == "talks":
            sources.append([{"messages": np.array(row["messages"], dtype=object)} for row in rows])
        if name == "texts":
            sources.append({"prompt": np.array(frame["prompt"]), "completion": np.array(frame["completion"])})
        for source in sources:
            assert encode(rows_for(task.encode, source), task.encode, need_target=True) == expected[name]


# tokens -------------------------------------------------------------------------------------------------------


def test_a_token_over_the_border_is_refused_with_the_remedy():
    task = asking()
    assert counted(task, {"prompt": "the sky is", "completion": " blue"})[0] == " blue</s>"
    with pytest.raises(ValueError, match=r"joins the end of the prompt, 'the sky is ', and .* 'blue'.*Move the space"):
        task.encode({"prompt": "the sky is ", "completion": "blue"})
    with pytest.raises(ValueError, match="joins the end of the prompt"):
        task.encode({"prompt": "what col", "completion": "or"})


def test_letters_for_spaces_as_in_sentencepiece():
    task = asking(kind="metaspace")
    example = task.encode({"prompt": "the sky is", "completion": " blue"})
    assert task.tokenizer.convert_ids_to_tokens(example.target) == ["\u2581blue", "</s>"]
    assert example.inputs["input_ids"][:-2] == task.tokenizer("the sky is").input_ids
    with pytest.raises(ValueError, match="joins the end of the prompt"):
        task.encode({"prompt": "the sky is ", "completion": "blue"})


def with_bos(**options):
    """A tokenizer that writes BOS before a text and EOS behind it."""
    tok = prompts.tokenizer("byte BPE")
    tok._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tok.bos_token_id), ("</s>", tok.eos_token_id)]
    )
    return sp.Completion(tok, **options)


def test_special_tokens_stand_where_generation_has_them():
    task = with_bos()
    assert counted(task, {"prompt": "the sky is", "completion": " blue"}) == (" blue</s>", "<s>the sky is")
    assert counted(task, {"prompt": "", "completion": "blue"}) == ("blue</s>", "<s>"), "BOS is a prompt"
    assert task.tokenizer.decode(task.prompt_tokens({"prompt": "the sky"})) == "<s>the sky"
    assert counted(with_bos(end_token=False), {"prompt": "the sky is", "completion": " blue"})[0] == " blue"


def test_a_long_row_loses_the_start_of_its_prompt_alone(caplog):
    row = {"prompt": "the answer is what color is the sky ?", "completion": " red or blue"}
    whole = asking().encode(row)
    count = len(whole.target)
    for length in range(count + 1, len(whole)):
        task = asking(max_length=length)
        example = task.encode(row)
        assert example.is_cut and len(example) == length and example.target == whole.target
        assert example.inputs["input_ids"] == whole.inputs["input_ids"][-length:]
        kept = with_bos(max_length=length).encode(row)
        assert kept.inputs["input_ids"][0] == task.tokenizer.bos_token_id and kept.target == whole.target
        assert kept.inputs["input_ids"][1:] == whole.inputs["input_ids"][-length + 1 :]
    assert with_bos(max_length=4).prompt_tokens(row) == [task.tokenizer.bos_token_id, *task.prompt_tokens(row)[-3:]]
    assert not asking(max_length=len(whole)).encode(row).is_cut
    for task in (asking(max_length=count), with_bos(max_length=count)):
        with pytest.raises(ValueError, match=rf"max_length={count} is too small: the row has {count} tokens from its"):
            task.encode(row)
    encode([row], asking(max_length=count + 1).encode, need_target=True)
    assert "1 of 1 rows were longer than max_length" in caplog.text


def test_a_long_conversation():
    template = prompts.TEMPLATES["Llama 3"]
    whole = asking(template).encode({"messages": TALK})
    with pytest.raises(ValueError, match="use turns='last'"):
        asking(template, max_length=len(whole.target) + 3).encode({"messages": TALK})
    last = asking(template, turns="last", max_length=8).encode({"messages": TALK})
    assert len(last) == 8 and asking(template).tokenizer.decode(last.target) == "red or blue</s>"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chat": "yes"}, TypeError, "chat"),
        ({"chat": True}, ValueError, "no chat template: use chat=False"),
        ({"turns": "first"}, ValueError, "turns='first'"),
        ({"end_token": 1}, TypeError, "end_token"),
        ({"max_length": 0}, ValueError, "max_length=0"),
        ({"chat_options": [1]}, TypeError, "must be a dict"),
        ({"encoder_decoder": None}, TypeError, "encoder_decoder"),
        ({"chat": True, "encoder_decoder": True}, ValueError, "does not continue the prompt"),
    ],
    ids=str,
)
def test_options_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        asking(**options)


def test_a_tokenizer_without_an_end_token():
    tok = tiny.tokenizer()
    with pytest.raises(ValueError, match=r"no end token.*set tokenizer.eos_token, or pass end_token=False"):
        sp.Completion(tok)
    assert sp.Completion(tok, end_token=False).encode({"prompt": "the", "completion": " sky"}).target == [4 - 1]


# models -------------------------------------------------------------------------------------------------------

ENCODER = {**tiny._SHAPE, "intermediate_size": 48, "pad_token_id": 0, "max_position_embeddings": 128}
ROWS = [{"prompt": "what colour is the sky ?", "completion": " blue"}, {"prompt": "grass", "completion": " green"}]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER)), "looks ahead: a token would be predicted from itself"),
        (lambda: tf.RobertaForCausalLM(tf.RobertaConfig(**ENCODER)), "looks ahead.*is_decoder=True"),
        (lambda: tiny.classifier(), "has no head for tokens"),
    ],
    ids=["BERT", "RoBERTa", "classifier"],
)
def test_models_that_do_not_continue_a_text_are_refused(build, message):
    task, blora = sp.Completion(tokenizer()), sp.bayesian_lora(build())
    with pytest.raises(ValueError, match=message):
        sp.fit(blora, task, ROWS, num_steps=1, progress=False)
    with pytest.raises(ValueError, match=message):
        task.outputs(blora, batch_of(task, ROWS), blora.adapter.loc)


def test_a_decoder_built_from_an_encoder_is_taken():
    llm = tf.RobertaForCausalLM(tf.RobertaConfig(**ENCODER, is_decoder=True))
    sp.fit(sp.bayesian_lora(llm), sp.Completion(tokenizer()), ROWS, num_steps=1, progress=False)


def test_rows_of_one_single_token_do_not_make_a_causal_llm_look_ahead():
    blora = sp.bayesian_lora(tiny.causal_lm())
    same = [{"prompt": "the the the", "completion": " the the"}]
    sp.fit(blora, sp.Completion(tokenizer(), end_token=False), same, num_steps=1, progress=False)


@pytest.mark.slow
def test_the_chat_template_of_smollm2():
    tok = prompts.smollm2()
    task = sp.Completion(tok)
    text, before = counted(task, {"messages": TALK})
    assert text == "blue<|im_end|>red or blue<|im_end|>"
    assert before.endswith("<|im_start|>user\nwhat color is the sky ?<|im_end|>\n<|im_start|>assistant\n")
    ids = task.encode({"messages": TALK}).inputs["input_ids"]
    assert ids == tok.apply_chat_template(TALK, tokenize=True, return_dict=False)
    asked = tok.apply_chat_template(ASKED, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert task.prompt_tokens({"messages": ASKED}) == asked
