"""Chat templates: the prompt ends where the template writes the answer, and options of the template are kept."""

import logging

import numpy as np
import prompts
import pytest
import tiny

import scalabl_pyro as sp
from scalabl_pyro.training.run_identity import differences

ROW = {"question": "what color is the sky ?", "choices": ["red", "blue"], "answer": 1}
TEXT = "what color is the sky ?\nA. red\nB. blue\nAnswer:"
FEW = {"num_steps": 2, "batch_size": 4, "progress": False}


def asking(chat_template, **options):
    return sp.MultipleChoice(prompts.tokenizer("byte BPE", chat_template), **options)


@pytest.mark.parametrize("template", prompts.TEMPLATES)
def test_the_prompt_is_what_the_template_writes_before_an_answer(template):
    task = asking(prompts.TEMPLATES[template])
    turns = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "B"}]
    answered = task.tokenizer.apply_chat_template(turns, tokenize=False)
    begun = task.tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    prompt = task.prompt(ROW)
    assert answered.removeprefix(prompt).lstrip().startswith("B")
    if template not in ("no generation prompt", "empty thought", "end of text after the generation prompt"):
        assert prompt == begun.rstrip(" ")


def test_a_prompt_that_goes_on_behind_the_generation_prompt_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="scalabl_pyro"):
        task = asking(prompts.TEMPLATES["empty thought"])
    assert task.prompt(ROW).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert "'<think>\\n\\n</think>'" in caplog.text


def test_a_template_that_lets_the_llm_think_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"ends with '<think>'.*such as its thoughts. Use chat=False"):
        asking(prompts.THINKING)
    with pytest.raises(ValueError, match=r"Use chat_options=\{'enable_thinking': False\} or chat=False"):
        asking(prompts.SWITCH)
    task = asking(prompts.SWITCH, chat_options={"enable_thinking": False})
    assert task.prompt(ROW) == asking(prompts.TEMPLATES["ChatML"]).prompt(ROW)
    assert asking(prompts.THINKING, chat=False).prompt(ROW) == TEXT


def test_a_template_that_ends_a_text_before_the_answer_is_refused():
    with pytest.raises(ValueError, match=r"ends with the end-of-text token '</s>'.*chat=False"):
        asking(prompts.END_OF_TEXT)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['role'] }}: {% endfor %}answer: ", "leaves out the answer"),
        ("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}:",
         "leaves out the answer"),
        ("user assistant: {{ messages[-1]['content'] }}", "leaves out the text of the question"),
        ("{% for m in messages %}{{ m['content'][0].text }}{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}",
         "leaves out the text of the question"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "leaves out"),
        ("{{ raise_exception('only users') }}", "refuses a question with an answer: only users"),
    ],
    ids=["no texts", "no answer", "last turn only", "texts in parts", "upper case", "raises"],
)  # fmt: skip
def test_a_template_that_loses_question_or_answer_is_refused(template, message):
    with pytest.raises(ValueError, match=f"{message}.*chat=False"):
        asking(template)


def test_a_row_whose_text_the_template_changes_is_refused():
    changing = prompts.TEMPLATES["ChatML"].replace("m['content']", "m['content'].split('&')[-1]")
    task = asking(changing)
    assert task.encode(ROW)
    with pytest.raises(ValueError, match="leaves out the text of the question, or changes it"):
        task.encode({**ROW, "question": "red & blue ?"})


def test_whitespace_that_a_template_trims_is_allowed():
    trimming = prompts.TEMPLATES["ChatML"].replace("m['content']", "m['content'] | trim")
    task = asking(trimming, template="{choices}\n{question} ")
    assert task.prompt({**ROW, "question": " what ? "}) == task.prompt({**ROW, "question": " what ?"})


def test_a_template_that_writes_the_date_is_reported(caplog):
    dated = prompts.turns("user: #\n", "assistant: #\n", "assistant:", first="DATE").replace(
        "'DATE'", "date_string if date_string is defined else strftime_now('%d %b %Y')"
    )
    with caplog.at_level(logging.WARNING, logger="scalabl_pyro"):
        task = asking(dated, chat_options={"date_string": "26 Jul 2024"})
        assert task.prompt(ROW).startswith("26 Jul 2024user: ") and not caplog.text
        asking(dated)
    assert "date of today" in caplog.text and "chat_options={'date_string':" in caplog.text


# options ------------------------------------------------------------------------------------------------------

TONE = prompts.TEMPLATES["ChatML"].replace("{% for", "{{ tone | default('plain') }}{{ levels | default('') }}{% for", 1)


def test_options_reach_the_template_and_repr():
    task = asking(TONE, chat_options={"tone": "kind", "levels": (1, 2)})
    assert task.prompt(ROW).startswith("kind[1, 2]<|im_start|>user")
    assert asking(TONE).prompt(ROW).startswith("plain<|im_start|>")
    assert "chat_options={'tone': 'kind', 'levels': [1, 2]}" in repr(task)
    assert "chat_options" not in repr(asking(TONE))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chat": {"tone": "kind"}}, TypeError, r"chat=\{'tone': 'kind'\} must be True, False or None.*chat_options="),
        ({"chat": "no"}, TypeError, "chat='no' must be True, False or None"),
        ({"chat": 1}, TypeError, "chat=1 must be"),
        ({"chat_options": True}, TypeError, r"chat_options=True must be a dict"),
        ({"chat_options": {1: 2}}, TypeError, r"chat_options=\{1: 2\} must be a dict"),
        ({"chat_options": {"tone": object}}, ValueError, "JSON cannot store"),
        ({"chat_options": {"tone": float("nan")}}, ValueError, "JSON cannot store"),
        ({"chat_options": {"enable_thinking": False}}, ValueError, "does not read 'enable_thinking'"),
        ({"chat_options": {"tools": []}}, ValueError, "does not read 'tools'"),
        ({"chat_options": {"tokenize": True}}, ValueError, "sets 'tokenize' itself"),
        ({"chat_options": {"add_generation_prompt": False}}, ValueError, "sets 'add_generation_prompt' itself"),
        ({"chat_options": {"tone": "kind"}, "chat": False}, ValueError, "chat_options has no effect"),
    ],
    ids=str,
)
def test_options_that_have_no_effect_or_cannot_be_saved_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        asking(TONE, **options)


def test_a_misspelled_switch_is_refused_with_the_right_one():
    with pytest.raises(ValueError, match=r"does not read 'enable_thnking'. Did you mean 'enable_thinking'"):
        asking(prompts.SWITCH, chat_options={"enable_thnking": False})


def test_options_are_saved_with_a_posterior_and_belong_to_the_run(tmp_path):
    tokenizer = tiny.tokenizer(chat=True)
    tokenizer.chat_template = "{{ tone | default('rose') }} " + tokenizer.chat_template
    rows, task = tiny.question_rows(8), sp.MultipleChoice(tokenizer, chat_options={"tone": "sky"})
    posterior = sp.fit(sp.bayesian_lora(tiny.causal_lm()), task, rows, **FEW).posterior
    posterior.save_pretrained(tmp_path / "posterior")
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "posterior")
    assert loaded.task.chat_options == {"tone": "sky"}
    assert loaded.task.prompt(rows[0]) == task.prompt(rows[0])
    was, now = (p.predict(rows, num_draws=2, seed=0).probs for p in (posterior, loaded))
    np.testing.assert_array_equal(now, was)
    # The template of this option writes the same text here, so only the option tells the runs apart.
    other = sp.MultipleChoice(tokenizer, chat_options={"tone": "sky", "chat_template": tokenizer.chat_template})
    runs = [{"task": sp.tasks.to_config(each)} for each in (task, other)]
    assert "chat_options" in str(differences(*runs))
