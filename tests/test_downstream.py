"""`pats-jax gym` on a random checkpoint and a handful of tasks: what a tuning is, where it starts, what is kept."""

import dataclasses
import io
import itertools
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gym_runs import GRID, QUICK, RATES, arguments, quick_settings, records, refused, run
from safetensors.numpy import load_file, save_file

from pats_jax import models
from pats_jax.data import load_gym
from pats_jax.errors import InputError, Preempted
from pats_jax.models import peft
from pats_jax.priming import downstream, few_shot_tuning, option_scoring, upstream
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.programs import cli
from pats_jax.run import folder_lock, run_folder
from pats_jax.run.folder_lock import FolderLock
from pats_jax.training import metrics


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Model, gym and partition; and two folders of `pats-jax prime`: the model primed, and LoRA modules."""
    home = tiny.write_gym_home(tmp_path_factory.mktemp("home"))
    (home / "short.json").write_text(json.dumps(tiny.PARTITION | {"train": ["weather", "voice"], "dev": []}))
    quick = {
        name: value
        for name, value in QUICK.items()
        if name not in ("eval_steps", "per_device_train_batch_size", "lora_rank")
    }
    settings = PrimingSettings(
        model_name_or_path=str(home / "model"),
        data_dir=str(home / "gym"),
        partition=str(home / "short.json"),
        num_devices=1,
        learning_rate=1e-2,
        tasks_per_step=2,
        seed=1,
        **quick,
    )
    upstream.run(dataclasses.replace(settings, output_dir=str(home / "plm")))
    upstream.run(dataclasses.replace(settings, output_dir=str(home / "pe"), train="pe", peft="lora", lora_rank=2))
    return home


@pytest.fixture(scope="module")
def base(home):
    return quick_settings(home)


@pytest.fixture(scope="module")
def whole(base, home, tmp_path_factory):
    """All tunings of four starts."""
    folder = tmp_path_factory.mktemp("whole") / "gym"
    run(base, folder, kinds=("full", "lora"), primed=(str(home / "plm"), str(home / "pe")))
    return folder


# the records


def test_the_records_are_complete(whole, home):
    found = records(whole)
    names = {"direct-full", "direct-lora", "mtl-plm-seed1-lora", "mtl-pe-seed1-lora"}
    assert found.keys() == {
        (name, task, seed) for name in names for task in tiny.PARTITION["test"] for seed in tiny.SEEDS
    }
    for (name, task, _), record in found.items():
        stage = ("direct", None, None) if name.startswith("direct") else ("mtl", name.split("-")[1], 1)
        assert (record["algorithm"], record["trained"], record["upstream_seed"]) == stage
        assert record["peft"] == name.split("-")[-1] and record["metric"] == "accuracy"
        assert record["chance"] == {"manners": 1 / 2, "choice": 1 / 3}[task]
        assert record["curve"]["step"] == [0, 1, 2, 3] and len(record["curve"]["dev"]) == 4
        assert record["dev"] == max(record["curve"]["dev"])
        assert record["dev"] == record["curve"]["dev"][record["step"]]
        assert record["learning_rate"] == RATES[record["peft"]] and record["learning_rates"] == [RATES[record["peft"]]]
        assert record["test_rows"] == 12 and record["test"] * 12 == pytest.approx(round(record["test"] * 12))
    assert len({record["test"] for record in found.values()}) > 3


def test_the_report_has_the_average_relative_gain_of_the_records(whole):
    found = records(whole)
    report = json.loads((whole / "report" / "report.json").read_text())

    def mean(start, task):
        return np.mean([found[start, task, seed]["test"] for seed in tiny.SEEDS])

    for arm, start in (("mtl/plm/lora", "mtl-plm-seed1-lora"), ("mtl/pe/lora", "mtl-pe-seed1-lora")):
        gains = [
            100 * (mean(start, task) - mean(baseline, task)) / mean(baseline, task)
            for baseline in ("direct-lora",)
            for task in tiny.PARTITION["test"]
            if mean(baseline, task) > 0
        ]
        assert report["arms"][arm]["against_direct"]["arg"] == pytest.approx(np.mean(gains))
        assert report["arms"][arm]["against_full"] is not None
    assert report["tunings"] == len(found) == 16
    page = (whole / "report" / "report.html").read_text()
    assert "pats-jax gym --some flags" in page and (whole / "report" / "report.md").exists()


def test_a_report_can_be_made_again(base, whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "gym")
    shutil.rmtree(folder / "report")
    args = tiny.flags(output_dir=folder, report_only=True)
    cli.main(["gym", *args])
    assert (folder / "report" / "report.html").exists() and "report: " in capsys.readouterr().out
    assert "has no finished tunings" in tiny.refused(capsys, "gym", *tiny.flags(output_dir=tmp_path), *args[2:])


# a tuning


def plain_tuning(start_folder, kind, sample, steps=3, seed=42):
    """AdamW, clipping and the linear schedule from their formulas, on all rows at once; (dev, loss, params) by step."""
    model, params, _ = models.from_pretrained(start_folder, num_labels=1, key=seed)
    if kind == "lora":
        model, params = peft.add_peft(model, params, peft.LoraConfig(rank=2), key=seed)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    values = [np.asarray(leaf) for _, leaf in leaves]
    in_encoder = [name.startswith("bert") and "pooler" not in name for name in names]
    trained = [name.startswith("peft") if kind == "lora" else own for name, own in zip(names, in_encoder, strict=True)]

    def unflatten(values):
        return jax.tree.unflatten(tree, values)

    @jax.jit
    def compute(values):
        grads = jax.grad(lambda values: tiny.option_loss(model, unflatten(values), sample.train))(values)
        scores = tiny.option_logits(model, unflatten(values), sample.dev)
        return grads, scores, tiny.option_loss(model, unflatten(values), sample.dev)

    first, second = [[np.zeros_like(x) for x in values] for _ in range(2)]
    path = []
    for step in range(steps + 1):
        found, scores, loss = compute(values)
        dev = np.mean([np.argmax(one) == row.answer for one, row in zip(scores, sample.dev, strict=True)])
        path.append((dev, float(loss), model, unflatten(values)))
        grads = [np.asarray(g) * keep for g, keep in zip(found, trained, strict=True)]
        factor = min(1.0, 1.0 / math.sqrt(sum(float((g.astype(float) ** 2).sum()) for g in grads)))
        rate = RATES[kind] * (1 - step / steps)
        for i, g in enumerate(grads):
            if trained[i]:
                first[i] = 0.9 * first[i] + 0.1 * factor * g
                second[i] = 0.999 * second[i] + 0.001 * (factor * g) ** 2
                corrected = second[i] / (1 - 0.999 ** (step + 1))
                move = first[i] / (1 - 0.9 ** (step + 1)) / (np.sqrt(corrected) + 1e-8)
                values[i] = values[i] - rate * (move + 0.01 * values[i] * (values[i].ndim > 1))
    return path


@pytest.mark.parametrize(
    "task, kind",
    [
        *(("manners", "full"), ("choice", "lora")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("manners", "lora"), ("choice", "full"))),
    ],
)
def test_a_tuning_is_that_of_a_plain_loop(whole, home, kind, task):
    sample = load_gym(home / "gym")[task].sample(21)
    path = plain_tuning(home / "model", kind, sample)
    record = records(whole)[f"direct-{kind}", task, 21]
    assert record["curve"]["dev"] == pytest.approx([dev for dev, *_ in path])
    best = max(range(len(path)), key=lambda step: (path[step][0], -path[step][1]))
    assert record["step"] == best and record["dev"] == pytest.approx(path[best][0])
    _, _, model, params = path[best]
    right = np.array([row.answer for row in sample.test])
    assert record["test"] == pytest.approx(np.mean(tiny.chosen(model, params, sample.test) == right))


def test_of_equal_scores_that_of_the_lower_loss_is_kept(base, home, tmp_path, monkeypatch):
    monkeypatch.setitem(metrics.METRICS, "accuracy", lambda chosen, right: 0.5)
    best = set()
    for (_, task, seed), record in run(base, tmp_path / "gym", tasks=("choice",)).items():
        losses = [
            loss for _, loss, *_ in plain_tuning(home / "model", "lora", load_gym(home / "gym")[task].sample(seed))
        ]
        assert record["step"] == np.argmin(losses) and record["dev"] == 0.5
        best.add(record["step"])
    assert len(best) > 1


def keep_the_last(monkeypatch):
    """Lets the dev score rise with every step, so that the last parameters are kept."""
    counter = itertools.count()
    monkeypatch.setitem(metrics.METRICS, "accuracy", lambda chosen, right: float(next(counter)))


def keep_best_params(monkeypatch):
    """A list of the parameters that test rows are scored by, as they come."""
    kept, real = [], option_scoring.choose

    def choose(scores, head, params, *args, **options):
        kept.append(params)
        return real(scores, head, params, *args, **options)

    monkeypatch.setattr(option_scoring, "choose", choose)
    return kept


@pytest.fixture
def best_params(monkeypatch):
    return keep_best_params(monkeypatch)


@pytest.fixture(scope="module")
def last_params(base, tmp_path_factory):
    """What a full tuning and one of LoRA make of a sample."""
    with pytest.MonkeyPatch.context() as patch:
        keep_the_last(patch)
        kept = keep_best_params(patch)
        run(base, tmp_path_factory.mktemp("last") / "gym", kinds=("full", "lora"), **ONE)
    return dict(zip(("full", "lora"), kept, strict=True))


ONE = {"tasks": ("manners",), "samples": (13,)}


def test_full_tuning_trains_the_encoder_and_lora_its_modules(base, last_params):
    for kind, after in last_params.items():
        config = peft.LoraConfig(rank=2) if kind == "lora" else None
        _, before = option_scoring.load_scorer(base.model.model_name_or_path, "embedding", config, key=base.seed)
        before, after = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (before, after))
        names = {path: jax.tree_util.keystr(path, simple=True, separator=".") for path in before}
        moved = {name for path, name in names.items() if not np.array_equal(before[path], after[path])}
        if kind == "lora":
            assert moved == {name for name in names.values() if name.startswith("peft.")}
        else:
            encoder = {name for name in names.values() if name.startswith("bert.") and "pooler" not in name}
            assert moved | {name for name in encoder if name.endswith("key.bias")} == encoder


def test_the_head_of_classes_is_tuned_with_its_pooler(base, tmp_path, best_params, capsys):
    """One logit for each class, and no answer to questions with options of their own."""
    one = {"tasks": ("manners",), "samples": (13,), "head": "classes"}
    (record,) = run(base, tmp_path / "gym", **one).values()
    assert best_params[0]["classifier"]["kernel"].shape == (16, option_scoring.MOST_CLASSES)
    mask = option_scoring.trainable_mask(best_params[0], "pe", "classes")
    assert mask["classifier"]["kernel"] and mask["bert"]["pooler"]["dense"]["kernel"] and 0 <= record["test"] <= 1
    with pytest.raises(InputError, match="--head classes: choice is multiple choice"):
        run(base, tmp_path / "other", head="classes")


def test_the_grid_takes_what_does_better_on_dev(base, whole, tmp_path):
    """Against tunings with each rate alone."""
    other, one = f"lora={1e-9}", {"tasks": ("manners",)}
    alone = run(base, tmp_path / "alone", grid=(other,), **one)
    both = run(base, tmp_path / "both", grid=(f"lora={1e-9},{RATES['lora']}",), **one)
    told = 0
    for key, record in both.items():
        candidates = {1e-9: alone[key], RATES["lora"]: records(whole)[key]}
        assert record["learning_rates"] == [1e-9, RATES["lora"]]
        assert record["dev"] == max(one["dev"] for one in candidates.values())
        chosen = candidates[record["learning_rate"]]
        assert {k: record[k] for k in ("curve", "step", "test")} == {k: chosen[k] for k in ("curve", "step", "test")}
        told += len({one["dev"] for one in candidates.values()}) > 1
    assert told > 0


def test_the_rates_of_a_grid_share_a_program(base, tmp_path, monkeypatch):
    made = []

    class Kept(few_shot_tuning.Tuner):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(downstream, "Tuner", Kept)
    one = {"tasks": ("choice",), "samples": (13,)}
    (record,) = run(base, tmp_path / "gym", grid=("lora=0.01,0.02,0.03",), **one).values()
    (tuner,) = made
    assert record["learning_rates"] == [0.01, 0.02, 0.03] and tuner._step._cache_size() == 1


def test_fewer_test_rows(base, home, whole, tmp_path, monkeypatch):
    """They are the same for all samples, and not simply the first."""
    seen, real = [], option_scoring.choose

    def choose(scores, head, params, rows, *args, **options):
        seen.append(list(rows))
        return real(scores, head, params, rows, *args, **options)

    monkeypatch.setattr(option_scoring, "choose", choose)
    found = run(base, tmp_path / "gym", max_test_rows=4, tasks=("choice",))
    rows = load_gym(home / "gym")["choice"].sample(13).test
    assert seen[0] == seen[1] and len(seen[0]) == 4 and set(seen[0]) <= set(rows) and seen[0] != list(rows[:4])
    for key, record in found.items():
        assert record["curve"] == records(whole)[key]["curve"]
        assert record["test_rows"] == 4 and record["test"] in (0, 0.25, 0.5, 0.75, 1)


def test_pats_is_an_optimizer_here_too(base, tmp_path, monkeypatch, best_params, last_params):
    keep_the_last(monkeypatch)
    run(base, tmp_path / "gym", method="pats", noise_scale=0.5, kinds=("full",), **ONE)
    noisy, plain = (
        np.asarray(tree["bert"]["encoder"]["layer"]["0"]["output"]["dense"]["kernel"])
        for tree in (*best_params, last_params["full"])
    )
    assert not np.array_equal(noisy, plain)


def test_a_rate_that_diverges_loses(base, whole, tmp_path):
    """It ends where the loss is not finite, and the others' tuning is what it is without it."""
    rates, one = (1e30, RATES["lora"]), {"tasks": ("manners",)}
    both = run(base, tmp_path / "both", grid=(f"lora={rates[0]},{rates[1]}",), **one)
    for key, record in both.items():
        alone = records(whole)[key]
        assert record["diverged"] == [1e30] and alone["diverged"] == []
        if alone["step"] > 0:
            assert record["learning_rate"] == rates[1]
        assert {k: record[k] for k in ("dev", "test")} == {k: alone[k] for k in ("dev", "test")}
    (record,) = run(base, tmp_path / "alone", grid=("lora=1e30",), samples=(13,), **one).values()
    assert record["step"] == 0 and record["curve"]["step"] == [0]


# what is kept, and what goes on


def test_a_process_of_many_makes_its_tunings_only(base, whole, tmp_path, monkeypatch):
    """They come by standard input, and are those that one process makes; the report is left to the first process."""
    folder, names = tmp_path / "gym", ["direct-lora/manners-13", "direct-lora/choice-21"]
    with FolderLock(folder) as lock:
        for name, value in folder_lock.handed_on(lock).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(names)))
        made = run(base, folder)
    assert {f"{start}/{task}-{seed}" for start, task, seed in made} == set(names)
    assert all(record == records(whole)[key] for key, record in made.items())
    assert not (folder / "report").exists()


def test_a_finished_tuning_is_never_made_again(base, whole, tmp_path, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "gym")
    gone = folder / "tunings" / "direct-lora" / "manners-21.json"
    gone.unlink()
    before = {path: path.stat().st_mtime_ns for path in (folder / "tunings").rglob("*.json")}
    assert run(base, folder, kinds=("lora", "full"), samples=(21,), tasks=("manners", "manners")) == records(whole)
    after = {path: path.stat().st_mtime_ns for path in (folder / "tunings").rglob("*.json")}
    assert after.pop(gone) and after == before
    monkeypatch.setattr(downstream, "Tuner", None)
    run(base, folder)


def test_other_settings_are_refused_by_name(base, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "gym")
    with pytest.raises(InputError) as caught:
        run(base, folder, max_steps=4, seed=1, per_device_eval_batch_size=3)
    told = (
        f"--output_dir {folder}: contains tunings with different settings: "
        "max_steps was 3 and is 4, seed was 42 and is 1"
    )
    assert sorted(str(caught.value).split(": ")[-1].split(", ")) == sorted(told.split(": ")[-1].split(", "))
    assert str(caught.value).startswith(told.rpartition(": ")[0])
    with pytest.raises(InputError, match=r"--grid: .*direct-lora/.*json used 0.02, not 0.1, 0.02; use the same"):
        run(base, folder, grid=("lora=0.1,0.02",))
    run(base, folder, grid=(*GRID, "ia3=1"), jobs=1)


def test_a_record_does_not_depend_on_the_samples_asked_for(base, whole, home, tmp_path):
    """Nor does the chance of a task, by which the report knows that its records belong together."""
    path = shutil.copytree(home / "gym", tmp_path / "gym") / "choice" / "choice_16_13_train.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["options"].append("bob bob bob bob bob bob bob bob bob")
    tiny.write_lines(path, lines)
    changes = {"data_dir": str(tmp_path / "gym"), "tasks": ("choice",)}
    one = run(base, tmp_path / "one", samples=(21,), **changes)
    both = run(base, tmp_path / "both", **changes)
    assert len(one) == 1 and all(record == both[key] for key, record in one.items())
    assert both["direct-lora", "choice", 21]["chance"] == pytest.approx((5 / 3 + 1 / 4) / 6)


def test_ctrl_c_keeps_what_is_finished(base, whole, tmp_path, monkeypatch):
    real = few_shot_tuning.Tuner.tune

    def tune(self, task, sample, asked):
        record = real(self, task, sample, asked)
        signal.raise_signal(signal.SIGINT)
        return record

    with monkeypatch.context() as patch:
        patch.setattr(few_shot_tuning.Tuner, "tune", tune)
        with pytest.raises(Preempted, match="interrupted; repeat the command to resume"):
            run(base, tmp_path / "gym", tasks=("manners",))
    assert len(records(tmp_path / "gym")) == 1
    found = run(base, tmp_path / "gym", tasks=("manners",))
    assert found == {key: one for key, one in records(whole).items() if key[:2] == ("direct-lora", "manners")}


@pytest.mark.slow  # one of the processes is above, what starts them in test_workers.py
def test_many_processes(base, whole, home, tmp_path):
    """Two at once make what one makes, by the numbers up to rounding; one that fails is named with its reason."""
    environment = os.environ | {"XLA_FLAGS": tiny.flags_for_one_device()}
    root = str(pathlib.Path(__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    args = arguments(base, output_dir=tmp_path / "gym", jobs=2, tasks=("manners",))
    done = subprocess.run([sys.executable, "-m", "pats_jax", *args], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "report: " in done.stdout, done.stderr
    found = records(tmp_path / "gym")
    assert found.keys() == {("direct-lora", "manners", seed) for seed in tiny.SEEDS}
    assert {record["test"] for record in found.values()} <= {number / 12 for number in range(13)}
    assert all((tmp_path / "gym" / f"job{number}.log").exists() for number in (1, 2))


# the starts


def starts(base, home, **changes):
    return {start.name: start for start in downstream.find_starts(dataclasses.replace(base, **changes), ("manners",))}


def test_a_primed_model_goes_with_every_kind_and_modules_with_their_own(base, home):
    primed = (str(home / "plm"), str(home / "pe"))
    found = starts(base, home, kinds=("full", "lora", "bitfit"), primed=primed, direct=False)
    assert found.keys() == {"mtl-plm-seed1-lora", "mtl-plm-seed1-bitfit", "mtl-pe-seed1-lora"}
    plm, pe = found["mtl-plm-seed1-lora"], found["mtl-pe-seed1-lora"]
    assert (plm.model, plm.adapter) == (str(home / "plm" / "model"), None)
    assert (pe.model, pe.adapter) == (str(home / "model"), str(home / "pe" / "adapter"))
    assert starts(base, home, kinds=("full", "lora")).keys() == {"direct-full", "direct-lora"}
    settings = dataclasses.replace(base, primed=primed)
    _, params = few_shot_tuning.load_start(settings, pe)
    saved = load_file(home / "pe" / "adapter" / "adapter_model.safetensors")
    kernels = [x for x in jax.tree.leaves(params["peft"])]
    assert all(any(np.array_equal(x.T, y) for y in saved.values()) for x in kernels)
    _, params = few_shot_tuning.load_start(settings, plm)
    words = load_file(home / "plm" / "model" / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert np.array_equal(params["bert"]["embeddings"]["word_embeddings"]["embedding"], words)


def test_a_model_primed_by_nothing_gives_the_records_of_the_unprimed_one(base, whole, home, tmp_path):
    folder = shutil.copytree(home / "plm", tmp_path / "primed")
    shutil.rmtree(folder / "model")
    shutil.copytree(home / "model", folder / "model")
    found = run(base, tmp_path / "gym", primed=(str(folder),), direct=False, tasks=("choice",))
    for (_, task, seed), record in found.items():
        stage = {"algorithm": "direct", "trained": None, "upstream_seed": None, "upstream_digest": None}
        assert record | stage == records(whole)["direct-lora", task, seed]
    assert len(found) == 2


def test_modules_load_beside_a_masked_language_model_head(base, home, tmp_path):
    """The head is no part of what they are added to."""
    folder = shutil.copytree(home / "model", tmp_path / "mlm")
    save_file(load_file(folder / "model.safetensors") | tiny.mlm_tensors(), folder / "model.safetensors")
    settings = dataclasses.replace(base, model_name_or_path=str(folder), head="mlm", kinds=("bitfit",))
    direct = starts(settings, home)["direct-bitfit"]
    model, params = few_shot_tuning.load_start(settings, direct)
    params = {**params, "peft": jax.tree.map(lambda x: x + 0.5, params["peft"])}
    own = {name: tree for name, tree in params.items() if name != "mlm"}
    peft.save_peft(tmp_path / "adapter", model=model, params=own)
    _, again = few_shot_tuning.load_start(settings, dataclasses.replace(direct, adapter=str(tmp_path / "adapter")))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), params, again))


@pytest.fixture
def primed(home, tmp_path):
    """A copy of the folder of primed modules or of the primed model, with other results."""

    def copy(name="plm", **changes):
        folder = shutil.copytree(home / name, tmp_path / f"primed-{name}")
        results = run_folder.read_results(folder)
        run_folder.write_results(folder, results | changes)
        return folder

    return copy


# which primed folders are refused


def test_wrong_primed_folders(base, home, tmp_path, capsys, primed):
    def refuses(folder, message, **changes):
        error = refused(base, tmp_path, capsys, primed=(str(folder),), **changes)
        assert error.startswith(f"--primed {folder}: ") and message in error, error

    refuses(tmp_path / "none", "no results.json; use the folder of a finished `pats-jax prime` run")
    unfinished = primed()
    (unfinished / "results.json").unlink()
    refuses(unfinished, "no results.json;")
    run_folder.write_results(unfinished, {"data": "rte", "method": "pats", "peft": None})
    refuses(unfinished, "not a run of pats-jax prime")
    refuses(home / "plm", "was primed with --head embedding, not pair", head="pair")
    refuses(home / "pe", "contains a lora adapter; add lora to --kinds", kinds=("bitfit",))
    refuses(home / "plm", "add a PEFT method to --kinds", kinds=("full",))
    refuses(home / "pe", "was primed with a different lora adapter: --lora_rank was 2 and is 4", lora_rank=4)
    refuses(
        home / "plm", f"not from --model_name_or_path {home / 'plm' / 'model'}", model_name_or_path=home / "plm/model"
    )
    shutil.rmtree(unfinished)
    refuses(primed(upstream_tasks=["weather", "manners"]), "was trained on manners, which is a target task")
    shutil.rmtree(unfinished)
    both = (home / "plm", primed())
    error = refused(base, tmp_path, capsys, primed=tuple(map(str, both)))
    assert error == f"--primed {both[1]}: mtl-plm-seed1-lora is already {both[0]}; keep one"


def test_modules_of_another_base_model(base, home, tmp_path, primed):
    """What the file holds decides, whatever the results say."""
    folder = primed("pe")
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: x[..., :-1] if "lora_A" in name else x for name, x in load_file(path).items()}, path)
    with pytest.raises(InputError, match="adapter_model.safetensors: .* it is for another base model"):
        run(base, tmp_path / "gym", primed=(str(folder),), direct=False)


def test_another_run_of_a_stage_does_not_mix(base, home, tmp_path, primed):
    """Whether it has the same folder or not; the same run at another place may go on."""
    folder, one = primed("pe"), {"tasks": ("manners",), "samples": (13,), "direct": False}
    made = run(base, tmp_path / "gym", primed=(str(folder),), **one)
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert run(base, tmp_path / "gym", primed=(str(moved),), **one) == made
    results = json.loads((folder / "results.json").read_text())
    results["timing"] = {"train_seconds": 1e6}
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(InputError, match=r"--primed: .*manners-13.json started from another run of that stage; use"):
        run(base, tmp_path / "gym", primed=(str(folder),), **one)
