"""Grids of runs: pages as a browser reads them, failing processes, real runs."""

import base64
import dataclasses
import html.parser
import io
import json
import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import rich.console
import scipy.stats
import tiny

from pats_jax.comparison import compare, comparison_page, seed_statistics
from pats_jax.comparison.arms import Arm
from pats_jax.comparison.seed_statistics import FinishedRun, Run
from pats_jax.errors import InputError, Preempted
from pats_jax.methods import SENSITIVITY_BATCHES
from pats_jax.programs import cli
from pats_jax.run import machine, run_folder, workers
from pats_jax.run.folder_lock import FolderLock
from pats_jax.run.settings import Settings

FINETUNE = {1: 0.80, 2: 0.82, 3: 0.81, 4: 0.83, 5: 0.84}
PATS = {1: 0.82, 2: 0.83, 3: 0.84, 4: 0.87, 5: 0.89}  # by 2, 1, 3, 4, 5 points better
BASE = Settings(
    model_name_or_path="model", task_name="mrpc", train_batch_size=32, sensitivity_batches=SENSITIVITY_BATCHES
)


def measured(rng):
    figures = {name: float(rng.uniform()) for name in seed_statistics.FIGURES}
    shares = (rng.dirichlet(np.ones(4)) * 0.9).tolist()  # a tenth is zero
    return {"all": figures, "layer.kernel": figures}, shares


def write_run(root, run, score, *, best=None, losses=(0.7, 0.5, 0.4), versions=None, seconds=2.0, **settings):
    """A finished run's folder as the GLUE program leaves it: lines every 10 steps, evaluations at 15 and at the end."""
    folder = run.folder(root)
    own = {"task_name": run.task, "method": run.arm.method, "seed": run.seed, "output_dir": str(folder)}
    chosen = dataclasses.replace(BASE, **(own | settings))
    run_folder.start(folder, chosen.to_dict())
    lines = [
        {"step": 10 * (i + 1), "loss": loss, "timing": {"seconds": seconds if i else 50.0}}
        for i, loss in enumerate(losses)
    ]
    evaluations = [{"step": 15, "eval": {"combined_score": best or score - 0.1}}]
    evaluations.append({"step": 10 * len(losses), "eval": {"combined_score": score}})
    run_folder.write_metrics(folder, sorted(lines + evaluations, key=lambda line: line["step"]))
    scores = [{"step": one["step"], "metrics": one["eval"]} for one in evaluations]
    top = max(scores, key=lambda one: one["metrics"]["combined_score"])
    rng = np.random.default_rng([run.seed, run.arm.method == "pats"])
    (before, shares_before), (after, shares_after) = measured(rng), measured(rng)
    results = {
        "data": f"{run.task} from <GLUE> & co",
        "method": run.arm.method,
        "main_metric": "combined_score",
        "versions": versions or {"python": "3.11.0", "jax": "0.10.2"},
        "steps": scores[-1]["step"],
        "model_step": top["step"] if chosen.loop.load_best_model_at_end else scores[-1]["step"],
        "train_examples": 3668,
        "eval_examples": 408,
        "majority_class": {"metrics": {"combined_score": 0.748}},
        "final": scores[-1],
        "best": top,
        "concentration": {
            "before": before,
            "after": after,
            "log10_histogram": {"edges": [-4, -3, -2, -1, 0], "before": shares_before, "after": shares_after},
        },
    }
    run_folder.write_results(folder, results)
    return FinishedRun.read(run, root)


def write_grid(root, scores, tasks=("mrpc",), **settings):
    runs = [Run(task, Arm(method), seed) for task in tasks for method, of in scores.items() for seed in of]
    for run in runs:
        write_run(root, run, scores[run.arm.method][run.seed], **settings)
    return runs


def bca(values, resamples=100_000):
    """Efron's interval from its definition: bias by the share of means below, acceleration by the jackknife."""
    rng = np.random.default_rng(1)
    means = rng.choice(values, (resamples, len(values))).mean(1)
    normal = scipy.stats.norm
    bias = normal.ppf((np.mean(means < values.mean()) + np.mean(means <= values.mean())) / 2)
    left_out = np.array([np.delete(values, i).mean() for i in range(len(values))])
    away = left_out.mean() - left_out
    acceleration = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    z = bias + normal.ppf([0.025, 0.975])
    return np.quantile(means, normal.cdf(bias + z / (1 - acceleration * z)))


# the report


ALLOWED = "lang charset name content alt src class tabindex scope style".split()


class Reader(html.parser.HTMLParser):
    """Text, tables and images of a page; holds it to closing what it opens and to loading nothing."""

    VOID = {"meta", "img"}

    def __init__(self):
        super().__init__()
        self.open, self.images, self.rows, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            assert name in ALLOWED, f"{tag} has {name}"
            assert "://" not in value, value
            if name == "src":
                self.images.append(value)
        assert tag not in ("script", "link", "iframe", "object")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        self.text += data
        assert "style" not in self.open or ("url(" not in data and "@import" not in data)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A folder with the report on a grid of three tasks' runs, of which one was never run."""
    root = tmp_path_factory.mktemp("reported")
    runs = write_grid(root, {"finetune": FINETUNE, "pats": PATS}, ("mrpc", "stsb"))
    recorded = {
        "runs": [run.record() for run in [*runs, Run("mrpc", Arm("pats|odd"), 6)]],
        "commands": ["pats-jax compare --output_dir 'a <b>'"],
        "machines": [{"cores": "2"}],
    }
    (root / "grid.json").write_text(json.dumps(recorded))
    compare.run(["--output_dir", str(root), "--report_only"], rich.console.Console(file=io.StringIO()))
    return root


EXPECTED_ROW = ["pats", "+3.00", "", "0.0625", "0.125", "5", "85.00", "2.92", "82.00", "89.00", "0.2"]


def assert_expected(row):
    interval = row.pop(2)
    assert row == [cell for cell in EXPECTED_ROW if cell]
    low, high = map(float, interval.split(" to "))
    assert [low / 100, high / 100] == pytest.approx(bca(np.array([0.02, 0.01, 0.03, 0.04, 0.05])), abs=0.002)


def test_the_page_is_whole_and_needs_no_network(reported):
    text = (reported / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [] and len(reader.images) == 7
    for image in reader.images:
        head, _, data = image.partition("base64,")
        assert head == "data:image/png;" and base64.b64decode(data, validate=True).startswith(b"\x89PNG\r\n")
    rows = [row for row in reader.rows if row[0] == "pats" and len(row) == len(EXPECTED_ROW)]
    assert len(rows) == 2
    assert_expected(rows[0])
    for words in ("pats-jax compare --output_dir 'a <b>'", "mrpc from <GLUE> & co", "2/2^5 = 0.0625", "jax 0.10.2"):
        assert words in reader.text
    assert "mrpc/pats|odd/seed6" in reader.text and "cores: 2" in reader.text


def test_the_markdown_has_the_same_numbers_and_its_pictures(reported):
    text = (reported / "report.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert_expected(next(row for row in rows if row[0] == "pats" and len(row) == len(EXPECTED_ROW)))
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(pictures) == 7 and all((reported / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def comparison_of(tmp_path, scores, tasks=("mrpc",)):
    return seed_statistics.summarise(tmp_path, write_grid(tmp_path, scores, tasks))


def test_holms_p_is_over_all_comparisons_of_the_page(tmp_path):
    """The smallest of p = 0.0625, 0.0625, 1, 1 becomes 0.25, and the rest is not below it."""
    mixed = {1: 0.79, 2: 0.83, 3: 0.80, 4: 0.84, 5: 0.84}  # by -1, +1, -1, +1, 0: as many ranks up as down
    summary = comparison_of(tmp_path, {"finetune": FINETUNE, "pats": PATS, "mixout": mixed}, ("mrpc", "stsb"))
    of_pats, of_mixout = (summary.tasks["stsb"].methods[name].difference for name in ("pats", "mixout"))
    assert (of_pats.p_value, of_pats.holm_p_value) == (pytest.approx(2 / 32), pytest.approx(4 * 2 / 32))
    assert of_mixout.p_value == of_mixout.holm_p_value == 1


def test_the_page_begins_with_its_answer(tmp_path, reported):
    said = comparison_page.answer(comparison_of(tmp_path / "one", {"finetune": FINETUNE, "pats": PATS}))
    low, high = bca(np.array([0.02, 0.01, 0.03, 0.04, 0.05]))
    found = re.fullmatch(
        r"pats is 3\.00 points above finetune on mrpc \(95 % interval (\S+) to (\S+)\): not shown to differ\.", said
    )
    assert [float(end) / 100 for end in found.groups()] == pytest.approx([low, high], abs=0.002)
    nine = range(1, 10)
    plain, better = {s: 0.8 + s / 1000 for s in nine}, {s: 0.79 + 1.1 * s / 1000 for s in nine}
    scores = {"finetune": plain, "pats": better, "mixout": plain}
    said = comparison_page.answer(comparison_of(tmp_path / "many", scores, ("mrpc", "stsb")))
    assert said.startswith("pats is 0.95 points below finetune on average over tasks (95 % interval -0.9")
    assert ": shown to differ (p = " in said and said.endswith("Not shown to differ: mixout.")
    said = comparison_page.answer(comparison_of(tmp_path / "none", {"finetune": FINETUNE, "pats": {7: 0.5}}))
    assert said == "Nothing is compared yet: no two methods share a finished seed."
    text = (reported / "report.md").read_text(encoding="utf-8")
    assert text.split("\n\n")[1].startswith("pats is 3.00 points above finetune on average over tasks (95 % interval")


@pytest.mark.parametrize(
    "by_task",
    [
        {"a": {1: 0.01, 2: 0.01, 3: 0.01}, "b": {1: 0.02, 2: 0.02}},  # equal pairs of each task
        {name: {1: value} for name, value in zip("abcdefgh", [0.1, 0.2, 0.1, 0.3, 0.1, 0.2, 0.1, 0.3], strict=True)},
        {"a": {1: 0.1, 2: 0.2, 3: 0.3}, "b": {1: 0.1}},  # its spread is that of one task alone
    ],
)
def test_pairs_without_spread_have_no_interval_over_tasks(by_task):
    found = seed_statistics.pooled_difference(by_task)
    assert found.interval is None and found.mean > 0


def test_no_spread_is_no_evidence(tmp_path):
    """Eight equal differences on each of two tasks have a tiny p, but may be copies of one."""
    eight = range(1, 9)
    plain, other = {s: 0.8 + s / 1000 for s in eight}, {s: 0.81 + s / 1000 for s in eight}
    for tasks in (("mrpc",), ("mrpc", "stsb")):
        summary = comparison_of(tmp_path / str(len(tasks)), {"finetune": plain, "pats": other}, tasks)
        assert summary.pooled["pats"].holm_p_value < 0.01 and summary.pooled["pats"].interval is None
        assert comparison_page.answer(summary).endswith(": not shown to differ.")


def test_the_numbers_are_there_for_programs(reported):
    found = json.loads((reported / "comparison.json").read_text())
    assert found["tasks"]["stsb"]["methods"]["pats"]["scores"] == {str(seed): score for seed, score in PATS.items()}
    assert found["settings"]["learning_rate"] == 5e-5 and "seed" not in found["settings"]
    assert found["versions"] == {"python": ["3.11.0"], "jax": ["0.10.2"]}


# the grid, by a stand-in for the GLUE program

STAND_IN = """
import json, os, pathlib, shutil, signal, sys, time
home, folder, seed = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
with (home / "started").open("a") as file:
    file.write(f"{folder.parent.name}-{seed}\\n")
if (home / "fail").exists() and folder.name == "seed2":
    print("a line before")
    sys.exit("pats-jax: error: no luck")
if (home / "interrupt").exists() and folder.name == "seed2":
    def ended(*_):
        (home / "ended").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, ended)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(30)
shutil.copytree(home / "model" / folder.relative_to(home / "grid"), folder)
"""


class Home:
    """A folder with runs that the stand-in copies into a grid, and notes of what was started."""

    def __init__(self, folder):
        self.folder, self.grid = folder, folder / "grid"
        write_grid(folder / "model", {"finetune": {1: 0.7, 2: 0.8}, "pats": {1: 0.8, 2: 0.7}})

    def compare(self, *flags, methods="finetune pats", seeds="1 2"):
        args = ["--methods", *methods.split(), "--tasks", "mrpc", "--seeds", *seeds.split(), "--output_dir", self.grid]
        args += ["--model_name_or_path", "model", "--lanes", "1", *flags]
        out = io.StringIO()
        compare.run(list(map(str, args)), rich.console.Console(file=out))
        return out.getvalue()

    def started(self):
        path = self.folder / "started"
        names = path.read_text().split() if path.exists() else []
        path.write_text("")
        return sorted(names)


@pytest.fixture
def home(tmp_path, monkeypatch):
    def command(run, root, flags):
        return ["-S", "-c", STAND_IN, str(tmp_path), str(run.folder(root)), str(run.seed)]

    monkeypatch.setattr(compare, "run_arguments", command)
    monkeypatch.setattr(workers, "describe_machine", lambda: {"cores": "2"})
    monkeypatch.setattr(machine, "find_devices", machine.Devices)
    return Home(tmp_path)


ALL = ["finetune-1", "finetune-2", "pats-1", "pats-2"]


@pytest.mark.parametrize("jobs", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_finished_runs_are_never_run_again(home, jobs):
    out = home.compare("--jobs", jobs)
    assert home.started() == ALL and "mrpc/pats/seed1: combined_score 0.8000" in out
    assert (home.grid / "report.html").exists() and str(home.grid / "report.html") in out
    assert "4 of 4 runs are already finished" in home.compare() and home.started() == []
    write_run(home.folder / "model", Run("mrpc", Arm("pats"), 3), 0.9)
    home.compare(methods="pats", seeds="3")
    assert home.started() == ["pats-3"]
    found = json.loads((home.grid / "comparison.json").read_text())
    assert found["tasks"]["mrpc"]["methods"]["pats"]["n"] == 3 and len(found["commands"]) == 3


def test_a_failure_costs_no_other_run(home, caplog):
    (home.folder / "fail").touch()
    with pytest.raises(InputError, match="2 of 4 runs failed"):
        home.compare()
    assert home.started() == ALL
    assert f"mrpc/pats/seed2 failed: no luck; see {home.grid}/runs/mrpc/pats/seed2.log" in caplog.text
    found = json.loads((home.grid / "comparison.json").read_text())
    assert found["missing"] == ["mrpc/finetune/seed2", "mrpc/pats/seed2"]
    (home.folder / "fail").unlink()
    home.compare()
    assert home.started() == ["finetune-2", "pats-2"]
    assert "a line before" in (home.grid / "runs/mrpc/pats/seed2.log").read_text()


def test_whoever_ends_the_grid_ends_its_runs_and_learns_how_to_go_on(home):
    (home.folder / "interrupt").touch()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as caught:
        home.compare("--learning_rate", "5e-5")
    assert caught.value.signal_number == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is handler
    assert (home.folder / "ended").exists() and home.started() == ["finetune-1", "finetune-2", "pats-1"]
    message, _, command = str(caught.value).partition("; to resume, run: pats-jax compare ")
    assert message == "interrupted; 2 of 4 runs are finished"
    (home.folder / "interrupt").unlink()
    compare.run(shlex.split(command), rich.console.Console(file=io.StringIO()))
    assert home.started() == ["finetune-2", "pats-2"]


def test_other_settings_than_before_are_refused_by_name(home):
    home.compare(seeds="1")
    home.started()
    with pytest.raises(InputError) as caught:
        home.compare("--learning_rate", "1e-3")
    assert str(caught.value).startswith("mrpc/finetune/seed1: --resume: ")
    assert str(caught.value).endswith("learning_rate was 5e-05 and is 0.001")
    with pytest.raises(InputError, match="per_device_train_batch_size was 32 and is 16; .* --train_batch_size 32"):
        home.compare("--per_device_train_batch_size", "16")
    assert home.started() == []
    home.compare("--per_device_train_batch_size", "16", "--train_batch_size", "32")
    assert home.started() == ["finetune-2", "pats-2"]


def test_one_grid_at_a_time(home):
    with FolderLock(home.grid), pytest.raises(InputError, match="another pats-jax, or a process that it started"):
        home.compare()


@pytest.mark.parametrize("name", ["report.md", "comparison.json", "plots"])
def test_a_report_that_no_grid_wrote_is_not_written_over(name, home):
    home.grid.mkdir()
    (home.grid / name).write_text("mine")
    with pytest.raises(InputError, match=f"contains {name}, which no grid wrote"):
        home.compare()
    assert [path.name for path in home.grid.iterdir()] == [name] and home.started() == []


@pytest.mark.parametrize("name", ["runs", "runs/mrpc", "runs/mrpc/pats", "runs/mrpc/pats/seed2", "plots"])
def test_a_planted_link_is_not_followed(name, home):
    elsewhere = home.folder / "elsewhere"
    elsewhere.mkdir()
    (home.grid / name).parent.mkdir(parents=True)
    (home.grid / "grid.json").write_text('{"runs": [], "commands": [], "machines": []}')
    (home.grid / name).symlink_to(elsewhere)
    with pytest.raises(InputError, match=f"a link leads out of {home.grid}"):
        home.compare()
    assert not list(elsewhere.iterdir()) and home.started() == []


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--seed 3", "--seed: use --seeds"),
        ("--method pats", "--method: use --methods"),
        ("--task-name=sst2", "--task_name: use --tasks"),
        ("--overwrite", "--overwrite: finished runs are kept"),
        ("--jobs 0", "--jobs 0: must be at least 1"),
        ("--scheduler tcp://here:8786", "--scheduler: needs --executor dask"),
        ("--num_processes 2", "use --jobs for parallel runs, or --executor dask for several machines"),
        ("--methods pats pats", "--methods pats pats: list each only once"),
        ("--methods pats none", "no such method"),
        ("--tasks news", "no such task"),
        ("--tasks ax", "--tasks ax: no training data"),
        ("--tasks SST2", "--tasks SST2: write sst2"),
        ("--seeds", "--seeds is missing"),
        ("--seeds 1 -2", "--seed -2: must be"),
        ("--learning_rate 0", "--learning_rate 0.0: must be"),
        ("--fp16", "--fp16 is not supported"),
        ("--do_eval", "a comparison needs both"),
        ("--report_only", "no grid was started there"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_run(flags, message, tmp_path):
    given = {"--methods": ["finetune"], "--tasks": ["sst2"], "--seeds": ["1"], "--output_dir": [str(tmp_path / "grid")]}
    name, *values = flags.split()
    args = [part for flag, parts in (given | {name: values}).items() for part in (flag, *parts)]
    with pytest.raises(InputError, match=re.escape(message)):
        compare.run(args, rich.console.Console(file=io.StringIO()))
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize(
    "content, flags, message",
    [
        (None, "", "own.csv"),
        ("question,label\nwhy?,a\nwho?,b\n", "", "no text column among 'question', 'label'"),
        ("sentence,label\nwhy?,a\nwho?,a\n", "", "every row has the label 'a'"),
        ("source,summary\nwhy?,so\n", "--program text2text --model_name_or_path t5", "target_column"),
    ],
)
def test_wrong_files_are_refused_before_anything_is_run(content, flags, message, tmp_path):
    path = tmp_path / "own.csv"
    if content is not None:
        path.write_text(content)
    own = f"--methods finetune --seeds 1 2 --train_file {path} --validation_file {path} --output_dir {tmp_path}/grid"
    with pytest.raises(InputError, match=message) as caught:
        compare.run([*own.split(), *flags.split()], rich.console.Console(file=io.StringIO()))
    assert "\n" not in str(caught.value) and not (tmp_path / "grid").exists()


# the process

GRID = """
import sys
from jax._src import xla_bridge
from pats_jax.programs import cli
from pats_jax.comparison import compare
from pats_jax.run import workers
workers.describe_machine = lambda: {}
compare.run_arguments = lambda run, root, flags: ["-S", "-c", "print('no luck'); raise SystemExit(1)"]
try:
    cli.main(["compare", *sys.argv[1:]])
finally:
    assert not xla_bridge._backends, "runs could not have the accelerator"
"""


def test_the_command_starts_no_backend_and_ends_with_code_2(tmp_path):
    flags = f"--methods finetune pats --tasks sst2 --seeds 1 --output_dir {tmp_path / 'grid'}"
    done = subprocess.run([sys.executable, "-c", GRID, *flags.split()], capture_output=True, text=True)
    first, second, last = done.stderr.splitlines()
    assert first.startswith("pats-jax: sst2/finetune/seed1 failed: no luck; see ") and "sst2/pats/seed1" in second
    assert last == "pats-jax: error: 2 of 2 runs failed; repeat the command to retry them" and done.returncode == 2
    assert not (tmp_path / "grid" / "report.md").exists()


# end to end


def real_grid(folder, seeds):
    """The flags of 2 methods x 1 task x 1 or 2 seeds with the tiny model."""
    return shlex.split(f"""
        --methods finetune pats --tasks sst2 --seeds {seeds} --jobs 2 --output_dir {folder / "grid"}
        --model_name_or_path {tiny.save_checkpoint(folder / "checkpoint")}
        --data_dir {tiny.write_sst2(folder / "data")} --max_seq_length 16 --per_device_train_batch_size 8
        --length_buckets 1 --num_devices 1 --save_steps 0 --max_steps 6 --logging_steps 2 --lanes 1
        --learning_rate 1e-2 --noise_scale 0.1""")


def assert_compared(root):
    found = json.loads((root / "comparison.json").read_text())
    assert found["missing"] == [] and found["settings"]["noise_scale"] == 0.1
    methods = found["tasks"]["sst2"]["methods"]
    for method, numbers in methods.items():
        for seed, score in numbers["scores"].items():
            results = run_folder.read_results(root / "runs" / "sst2" / method / f"seed{seed}")
            assert results["final"]["metrics"]["accuracy"] == score and results["seed"] == int(seed)
        assert numbers["curves"]["loss"]["step"] == [2, 4, 6] and numbers["seconds_per_step"] > 0
        assert sum(numbers["concentration"]["histogram"]["after"]) == pytest.approx(1, abs=0.05)
    first, second = (numbers["concentration"]["before"] for numbers in methods.values())
    assert first == second, "before training the seed alone decides"
    assert methods["finetune"]["curves"]["loss"] != methods["pats"]["curves"]["loss"]
    assert (root / "report.html").read_text().count("data:image/png") == 4


def test_a_grid_of_real_runs_by_their_commands(tmp_path):
    """As the grid would start them, but in this process; the grid then finds them finished."""
    flags = real_grid(tmp_path, "1")
    grid, others = compare.parse(flags)
    shared = compare.check(grid, others)
    for run in grid.runs(shared):
        module, program, *arguments = compare.run_arguments(run, tmp_path / "grid", shared)
        assert (module, program) == ("-m", "pats_jax")
        cli.main(arguments)
    out = io.StringIO()
    compare.run(flags, rich.console.Console(file=out))
    assert "2 of 2 runs are already finished" in out.getvalue()
    assert_compared(tmp_path / "grid")


@pytest.mark.slow
@pytest.mark.parametrize("seeds", ["1", "1 2"])
def test_a_grid_of_real_runs(seeds, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", tiny.flags_for_one_device())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    compare.run(real_grid(tmp_path, seeds), rich.console.Console(file=io.StringIO()))
    assert_compared(tmp_path / "grid")
    compiled = list((tmp_path / "home" / "pats_jax" / "compilation").glob("jit_step-*-cache"))
    assert len(compiled) == 2, "a training step each method, not each run"
