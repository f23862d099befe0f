"""The model ``scalabl`` of lm-evaluation-harness: with one draw it is HFLM, with several it is their mixture."""

import json
import math
import subprocess
import sys
from pathlib import Path

import completions
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, T5Config, T5ForConditionalGeneration

import scalabl_pyro as sp
from scalabl_pyro.integrations import lm_eval as bridge
from scalabl_pyro.metrics import brier, ece, nll

pytest.importorskip("lm_eval")
pytest.importorskip("sqlitedict")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from scalabl_pyro.integrations.lm_eval.continuations import ContinuationReadout
from scalabl_pyro.integrations.lm_eval.model import ScalaBLLM

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*tie_word_embeddings")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
PAIRS = [
    ("what colour is the sky ?", " blue"),
    ("what colour is the sky ?", " red"),  # shares its input with the one before
    ("what colour is the sky ?", " blue is the sky"),
    ("", " red blue"),
    ("the rose is ", "red"),  # the harness moves the space
    ("the " * 200, " blue sky"),  # loses its start
]
NO_SEEDS = dict.fromkeys(["random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"])


def posterior_of(llm, scale=0.5, **options):
    blora = completions.spread(sp.bayesian_lora(llm))
    guide = sp.guides.NormalGuide(blora.adapter.loc + 0.1, scale * torch.ones_like(blora.adapter.loc))
    return sp.Posterior.capture(blora, sp.Completion(completions.tokenizer(**options)), guide, provenance={})


def plain(posterior, draw=None, **options):
    return HFLM(pretrained=posterior.merge(draw), tokenizer=posterior.task.tokenizer, **{"batch_size": 2, **options})


def requests(pairs, kind="loglikelihood"):
    return [Instance(kind, {}, tuple(pair), 0) for pair in pairs]


def written(lm, prompts, **options):
    options = {"until": ["?"], "max_gen_toks": 6, **options}
    return lm.generate_until(requests([(prompt, options) for prompt in prompts], "generate_until"))


def log_mean(values):
    return torch.tensor(values, dtype=torch.float64).logsumexp(0) - math.log(len(values))


@pytest.fixture(scope="module")
def posterior():
    return posterior_of(tiny.causal_lm("llama-tied", dtype=torch.float64))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_draw_is_the_model_of_the_harness_with_this_draw(family, dtype):
    own = posterior_of(tiny.causal_lm(family, dtype=dtype))
    lm, hf = ScalaBLLM(posterior=own, num_draws=1, batch_size=2), plain(own, 0)
    for (found, greedy), (expected, is_greedy) in zip(
        lm.loglikelihood(requests(PAIRS)), hf.loglikelihood(requests(PAIRS)), strict=True
    ):
        assert abs(found - expected) < TOLERANCE[dtype] * max(abs(expected), 1) and greedy == is_greedy
    texts = requests([("the sky is blue . " * 100,), ("red",)], "loglikelihood_rolling")
    expected = hf.loglikelihood_rolling(texts)
    np.testing.assert_allclose(lm.loglikelihood_rolling(texts), expected, rtol=TOLERANCE[dtype])
    prompts = ["the sky is", "what colour is the rose", "the " * 200]
    assert written(lm, prompts) == written(hf, prompts)


def test_special_tokens_and_chat_templates_are_those_of_the_harness():
    own = posterior_of(tiny.causal_lm("llama"), chat=True)
    options = {"add_bos_token": True, "prefix_token_id": 5}
    lm, hf = ScalaBLLM(posterior=own, num_draws=1, **options), plain(own, 0, **options)
    history = [{"role": "user", "content": "what is red ?"}]
    assert lm.apply_chat_template(history) == hf.apply_chat_template(history)
    assert lm.tokenizer_name == hf.tokenizer_name and lm.chat_template(True) == hf.chat_template(True)
    found, expected = (x.loglikelihood(requests(PAIRS)) for x in (lm, hf))
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], rtol=1e-5)


def test_a_log_likelihood_is_that_of_the_mixture_of_whole_continuations(posterior):
    lm = ScalaBLLM(posterior=posterior, num_draws=3, batch_size=2)
    draws = [plain(posterior, draw) for draw in range(3)]
    by_draw = [[value for value, _ in one.loglikelihood(requests(PAIRS))] for one in draws]
    found = [value for value, _ in lm.loglikelihood(requests(PAIRS))]
    np.testing.assert_allclose(found, log_mean(by_draw), rtol=1e-10)
    assert np.abs(np.asarray(found) - np.mean(by_draw, axis=0)).min() > 1e-3  # not the mean of logarithms


def test_a_long_text_is_one_mixture_over_all_its_windows(posterior):
    texts = requests([("the sky is blue . " * 100,), ("red",)], "loglikelihood_rolling")
    by_draw = [plain(posterior, draw).loglikelihood_rolling(texts) for draw in range(3)]
    lm = ScalaBLLM(posterior=posterior, num_draws=3, batch_size=2)
    np.testing.assert_allclose(lm.loglikelihood_rolling(texts), log_mean(by_draw), rtol=1e-10)


def test_no_draws_mean_the_posterior_mean(posterior):
    lm, hf = ScalaBLLM(posterior=posterior, num_draws=0), plain(posterior)
    found, expected = (x.loglikelihood(requests(PAIRS)) for x in (lm, hf))
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], rtol=1e-9)


def test_continuations_that_begin_at_different_places_of_one_input(posterior):
    """HFLM 0.4.13 reads the tokens of the shorter one at the wrong places, unless ``logits_cache=False``."""
    pairs = [("the sky", " is blue ."), ("the sky is", " blue ."), ("the sky is blue", " ?")]
    by_draw = [plain(posterior, i, logits_cache=False).loglikelihood(requests(pairs)) for i in range(3)]
    expected = log_mean([[value for value, _ in one] for one in by_draw])
    for options in ({}, {"logits_cache": False}, {"batch_size": 3}):
        found = ScalaBLLM(posterior=posterior, num_draws=3, **options).loglikelihood(requests(pairs))
        np.testing.assert_allclose([value for value, _ in found], expected, rtol=1e-10)


def test_greedy_means_that_the_mixture_would_write_it(posterior):
    lm = ScalaBLLM(posterior=posterior, num_draws=4)
    context = torch.tensor([[3, 5, 9, 4]])
    tokens = lm._model_generate(context, max_length=9, stop=[])[0, 4:].tolist()
    other = [*tokens[:-1], (tokens[-1] + 1) % 50]
    found = lm._loglikelihood_tokens([(None, context[0].tolist(), given) for given in (tokens, other, tokens[:2])])
    assert [greedy for _, greedy in found] == [True, False, True]


def test_parts_of_the_head_change_nothing():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 7, 5, generator=generator, dtype=torch.float64)  # 3 draws of 2 rows
    head = torch.randn(5, 11, generator=generator, dtype=torch.float64)
    tokens = torch.randint(11, (2, 2, 7), generator=generator)
    tokens[1, :, :3] = -100
    found = [ContinuationReadout(tokens, 3, max_logits=n)(lambda h: h @ head, hidden) for n in (1, 150, 10**6)]
    torch.testing.assert_close(found[0], found[2], **completions.EXACT)
    torch.testing.assert_close(found[1], found[2], **completions.EXACT)
    log_p = (hidden @ head).log_softmax(-1).gather(-1, tokens[0].repeat(3, 1).unsqueeze(-1))[..., 0]
    torch.testing.assert_close(found[0][..., 0], log_p, **completions.EXACT)


def test_batches_change_nothing(posterior):
    found = [
        ScalaBLLM(posterior=posterior, num_draws=3, batch_size=size, max_batch_size=4).loglikelihood(requests(PAIRS))
        for size in (1, 4, "auto")
    ]
    for other in found[1:]:
        np.testing.assert_allclose([a for a, _ in other], [a for a, _ in found[0]], rtol=1e-10)


def test_a_model_that_changes_its_logits_after_the_head():
    shape = {"vocab_size": len(tiny.VOCABULARY), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = Gemma2Config(
        **shape, num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0
    )
    own = posterior_of(AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval())
    found = ScalaBLLM(posterior=own, num_draws=2).loglikelihood(requests(PAIRS))
    by_draw = [[a for a, _ in plain(own, draw).loglikelihood(requests(PAIRS))] for draw in range(2)]
    np.testing.assert_allclose([a for a, _ in found], log_mean(by_draw), rtol=1e-6)  # its norms are in float32
    with pytest.raises(ValueError, match="changes its logits after the head"):
        written(ScalaBLLM(posterior=own, num_draws=2), ["the sky"])


def test_texts_come_from_the_mixture_the_mean_or_one_draw(posterior):
    prompts = ["the sky is", "what colour is the rose"]
    assert written(ScalaBLLM(posterior=posterior, decode="mean"), prompts) == written(plain(posterior), prompts)
    by_draw = [written(ScalaBLLM(posterior=posterior, decode="draw", draw=i), prompts) for i in (0, 2)]
    assert by_draw == [written(plain(posterior, i), prompts) for i in (0, 2)]
    expected = posterior.generate(prompts, num_draws=3, decode="mixture", max_new_tokens=6).answers
    found = written(ScalaBLLM(posterior=posterior, num_draws=3), prompts, until=["?"])
    assert found == [text.split("?")[0] for text in expected]
    with pytest.raises(ValueError, match="no beam search"):
        written(ScalaBLLM(posterior=posterior, num_draws=3), prompts, num_beams=2)


def test_mistakes_are_named(posterior):
    with pytest.raises(ValueError, match="pretrained= is missing"):
        ScalaBLLM(posterior="somewhere")
    with pytest.raises(ValueError, match="holds its adapter already"):
        ScalaBLLM(posterior=posterior, peft="adapter")
    with pytest.raises(ValueError, match="is not the LLM"):
        ScalaBLLM(tiny.causal_lm(), posterior=posterior)
    with pytest.raises(TypeError, match="directory of a saved posterior"):
        ScalaBLLM("model", posterior=3)
    with pytest.raises(ValueError, match="decode='beam'"):
        ScalaBLLM(posterior=posterior, decode="beam")
    with pytest.raises(ValueError, match="num_draws"):
        ScalaBLLM(posterior=posterior, num_draws=-1)
    with pytest.raises(ValueError, match="at most max_length=8"):
        ScalaBLLM(posterior=posterior, max_length=8).loglikelihood(requests([("red", " blue" * 9)]))
    pair = T5ForConditionalGeneration(T5Config(vocab_size=60, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    task = sp.Completion(completions.tokenizer(), encoder_decoder=True)
    blora = sp.bayesian_lora(pair)
    guide = sp.guides.NormalGuide(blora.adapter.loc, torch.ones_like(blora.adapter.loc))
    with pytest.raises(ValueError, match="encoder-decoder"):
        ScalaBLLM(posterior=sp.Posterior.capture(blora, task, guide, provenance={}))


def test_nan_is_not_an_answer():
    own = posterior_of(tiny.causal_lm())
    with torch.no_grad():
        own.adapter.module.model.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        ScalaBLLM(posterior=own, num_draws=2).loglikelihood(requests(PAIRS))


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    with pytest.raises(ImportError, match=r"pip install 'scalabl-pyro\[lm-eval\]'"):
        bridge.register()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base model, its posterior, an exported draw and two tasks, on the disk."""
    folder = tmp_path_factory.mktemp("saved")
    llm = tiny.causal_lm("llama")
    llm.save_pretrained(folder / "base")
    completions.tokenizer().save_pretrained(folder / "base")
    own = posterior_of(llm)
    own.save_pretrained(folder / "posterior")
    own.export_peft(folder / "adapters", draws=2)
    rows = tiny.question_rows(12)
    for row in rows:
        row["target"] = row["choices"][row["answer"]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "Question : {{question}} Answer :",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    choice["metric_list"] = [{"metric": name} for name in ("acc", "brier_score")]
    text = {"output_type": "generate_until", "doc_to_target": "{{target}}"}
    text["generation_kwargs"] = {"until": ["?"], "max_gen_toks": 4}
    text["metric_list"] = [{"metric": "exact_match"}]
    for name, own_part in (("colors_choice", choice), ("colors_text", text)):
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **own_part}))
    return folder


def evaluate(folder, model, **options):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = ["colors_choice", "colors_text"]
    return simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **NO_SEEDS, **options)


def test_two_tasks_from_end_to_end(saved):
    """One draw has the results of the harness' own model with the exported adapter; ten have their calibration."""
    bridge.register()
    assert get_model("scalabl") is ScalaBLLM and get_model("hf") is HFLM
    base = {"pretrained": str(saved / "base"), "device": "cpu", "dtype": "float32"}
    own = {**base, "posterior": str(saved / "posterior")}
    one = evaluate(saved, "scalabl", model_args={**own, "num_draws": 1})
    hf = evaluate(saved, "hf", model_args={**base, "peft": str(saved / "adapters" / "draw-0")})
    for task in ("colors_choice", "colors_text"):
        for mine, theirs in zip(one["samples"][task], hf["samples"][task], strict=True):
            if task == "colors_text":
                assert mine["filtered_resps"] == theirs["filtered_resps"]
            else:
                values = [[a for a, _ in given["filtered_resps"]] for given in (mine, theirs)]
                np.testing.assert_allclose(*values, rtol=1e-5)
    ten = evaluate(saved, "scalabl", model_args=own, use_cache=str(saved / "answers"))
    again = evaluate(saved, "scalabl", model_args=own, use_cache=str(saved / "answers"))
    assert again["results"] == ten["results"]
    assert ten["config"]["num_draws"] == 10 and ten["config"]["decode"] == "mixture"
    table = bridge.calibration(ten)
    assert table["task"].tolist() == ["colors_choice"] and table["num_rows"].item() == 12
    results = ten["results"]["colors_choice"]
    assert table["accuracy"].item() == pytest.approx(results["acc,none"], abs=1e-12)
    assert table["brier"].item() == pytest.approx(results["brier_score,none"], abs=1e-12)


@pytest.mark.slow
def test_the_command_line(saved, tmp_path):
    arguments = f"pretrained={saved / 'base'},posterior={saved / 'posterior'},num_draws=3,decode=mean,dtype=float32"
    command = [sys.executable, "-m", "scalabl_pyro.integrations.lm_eval", "run", "--model", "scalabl"]
    command += ["--model_args", arguments, "--tasks", "colors_choice,colors_text", "--include_path", str(saved)]
    command += ["--device", "cpu", "--log_samples", "--output_path", str(tmp_path / "out"), "--batch_size", "4"]
    done = subprocess.run(command, cwd=Path(sp.__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "colors_text" in done.stdout and "brier_score" in done.stdout
    table = bridge.calibration(tmp_path / "out")
    (results,) = [json.loads(p.read_text())["results"] for p in (tmp_path / "out").rglob("results_*.json")]
    assert table["task"].tolist() == ["colors_choice"]
    assert table["brier"].item() == pytest.approx(results["colors_choice"]["brier_score,none"], abs=1e-12)


def sample(values, target, choices=("a", "b", "c"), **more):
    arguments = [("q", f" {choice}") for choice in choices[: len(values)]]
    return {"target": target, "filtered_resps": [(v, False) for v in values], "arguments": arguments, **more}


def test_calibration_of_samples_whose_numbers_are_known():
    samples = [sample([-1.0, -3.0, -2.0], 0), sample([-1.0, -0.5], "b"), sample([-4.0, -1.0, -2.0], "2")]
    probs = np.exp([[-1.0, -3.0, -2.0], [-1.0, -0.5, -np.inf], [-4.0, -1.0, -2.0]])
    probs /= probs.sum(1, keepdims=True)
    labels = np.array([0, 1, 2])
    found = bridge.calibration({"letters": samples}).iloc[0]
    assert found["accuracy"] == pytest.approx(2 / 3)
    for name, metric in (("nll", nll), ("brier", brier), ("ece", ece)):
        assert found[name] == pytest.approx(metric(probs, labels), abs=1e-12)


def test_a_number_may_be_an_index_or_a_choice():
    values = [-1.0, -3.0, -2.0]
    digits = ("2", "0", "1")
    assert bridge.calibration({"t": [sample(values, "0", digits, acc=1.0)]})["accuracy"].item() == 1
    assert bridge.calibration({"t": [sample(values, "2", digits, acc=1.0)]})["accuracy"].item() == 1
    assert bridge.calibration({"t": [sample(values, "0", digits, acc=0.0)]})["accuracy"].item() == 0


def test_a_text_of_a_sample_may_hold_any_character(tmp_path):
    """lm_eval writes texts as they are, also those that some programs take for the end of a line."""
    text = "a\u2028b\x85c\x1cd\N{THUMBS UP SIGN}"
    samples = [
        {"target": 0, "filtered_resps": [[-1.0, True], [-3.0, False]], "arguments": [["is", text], ["is", " b"]]}
    ]
    lines = [json.dumps(sample, ensure_ascii=False) for sample in samples * 2]
    (tmp_path / "samples_letters_2026-01-01T00-00-00.000001.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = bridge.read_samples(tmp_path)
    assert found == {"letters": samples * 2}
    assert bridge.calibration(tmp_path)["num_rows"].tolist() == [2]


def test_samples_that_have_no_calibration():
    with pytest.raises(ValueError, match="not one of its choices"):
        bridge.calibration({"t": [sample([-1.0, -2.0], [0, 1])]})
    with pytest.raises(ValueError, match="No task has samples with choices"):
        bridge.calibration({"t": [{"target": "red", "filtered_resps": ["red"], "arguments": [("q", {})]}]})
    with pytest.raises(ValueError, match="log_samples=True"):
        bridge.calibration([sample([-1.0, -2.0], 0)])
    with pytest.raises(FileNotFoundError, match="--log_samples"):
        bridge.calibration(Path(__file__).parent)


def test_filters_are_rows_of_their_own():
    samples = [sample([-1.0, -2.0], 0, filter="first"), sample([-1.0, -2.0], 1, filter="second")]
    assert bridge.calibration({"t": samples})[["filter", "accuracy"]].values.tolist() == [["first", 1], ["second", 0]]
