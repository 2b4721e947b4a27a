"""The GLUE program end to end, on a random checkpoint and tables small enough for seconds."""

import contextlib
import dataclasses
import io
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import scipy.stats
import tiny
from safetensors.numpy import load_file

from pats_jax import glue, methods
from pats_jax.data import batches, load_task, tasks
from pats_jax.errors import InputError
from pats_jax.programs import cli
from pats_jax.run import replacing, run_folder, training_run
from pats_jax.run.flags import read_by
from pats_jax.run.settings import Settings
from pats_jax.training import concentration, evaluation, runners

TRAIN_ROWS, STEPS = 22, 12  # of SST-2: 4 epochs of 3 batches, the last one of 6 rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Settings of a quick run on a tiny SST-2; tests fill in the rest."""
    return tiny.quick_settings(tmp_path_factory.mktemp("glue"), num_train_epochs=4)


def run(base, folder, console=None, **changes):
    return glue.run(dataclasses.replace(base, output_dir=str(folder), **changes), console)


def flags(settings):
    """Settings as a user would type them."""
    given = {name: value for name, value in settings.to_dict().items() if value is not None and value is not False}
    return [
        part for name, value in given.items() for part in ([f"--{name}"] if value is True else [f"--{name}={value}"])
    ]


def metrics(folder):
    """The lines of metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in record.items() if k != "timing"} for record in run_folder.read_metrics(folder)]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def reference_logits(folder, split):
    return tiny.reference_logits(folder / "model", split.sentence1, split.sentence2, max_length=16)


def predictions(folder, file):
    header, *lines = (folder / "predictions" / file).read_text().splitlines()
    assert header == "index\tprediction"
    return [tuple(line.split("\t")) for line in lines]


# a run of PATS, as it is typed


@pytest.fixture(scope="module")
def noisy(base, tmp_path_factory):
    """The folder of a run of everything: PATS, evaluations and predictions."""
    folder = tmp_path_factory.mktemp("runs") / "a folder (of mine) with a name that is longer than a line of a terminal"
    settings = dataclasses.replace(
        base,
        output_dir=str(folder),
        method="pats",
        noise_scale=0.1,
        sensitivity_batches=2,
        logging_steps=5,
        eval_steps=4,
        do_train=True,
        do_eval=True,
        do_predict=True,
    )
    cli.main(["glue", *flags(settings)])
    return folder


def test_the_folder_holds_all_that_people_look_for(base, noisy):
    assert {path.name for path in noisy.iterdir()} == set(run_folder.ENTRIES) - {
        "adapter",
        "checkpoints",
        "tensorboard",
        "profile",
    }
    pictures = {path.stem for path in (noisy / "plots").iterdir()}
    assert pictures == {"loss", "score", "sensitivity", "confusion", "reliability"}
    assert {path.name for path in (noisy / "predictions").rglob("*.tsv")} == {"SST-2.tsv"}
    assert replacing.foreign(noisy) is None
    saved = json.loads((noisy / "config.json").read_text())
    known = {flag: entry.about for flag, entry in Settings.all_entries().items()}
    read = read_by(Settings, saved)
    assert saved.keys() == {flag for flag, about in known.items() if flag in read and not about.of_one_start}
    assert saved["output_dir"] == str(noisy)
    assert base.model.layers == "auto" and saved["layers"] == "separate"  # as is best on CPU
    tokenizer = json.loads((noisy / "model" / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == saved["max_seq_length"] == 16  # by which `predict` cuts


def test_metrics_are_logged_at_their_rhythm(noisy):
    records = run_folder.read_metrics(noisy)
    logged = {record["step"]: record for record in records if "loss" in record}
    assert list(logged) == [5, 10, 12]
    assert [record["step"] for record in records if "eval" in record] == [4, 8, 12]
    for step, record in logged.items():
        rate = step - 1  # updates made before: warmup takes 2 steps (0.1 of 12, rounded up), decay the other 10
        assert record["learning_rate"] == pytest.approx(1e-2 * (STEPS - rate) / (STEPS - 2), rel=1e-5)
        assert 0 < record["loss"] < 5 and record["grad_norm"] > 0
        assert record["timing"].keys() == {"seconds", "data_wait_seconds", "examples_per_second", "tokens_per_second"}


def test_results(noisy):
    results = json.loads((noisy / "results.json").read_text())
    evaluations = [record for record in run_folder.read_metrics(noisy) if "eval" in record]
    assert results["final"] == {"step": 12, "metrics": evaluations[-1]["eval"]}
    assert results["best"]["metrics"]["accuracy"] == max(record["eval"]["accuracy"] for record in evaluations)
    assert (results["steps"], results["train_examples"], results["eval_examples"]) == (STEPS, TRAIN_ROWS, 10)
    assert results["majority_class"] == {"metrics": {"accuracy": 0.5}}  # both classes are equally frequent
    assert results["num_parameters"] == sum(tensor.size for tensor in weights(noisy).values())
    assert results["timing"]["train_seconds"] > 0 and results["timing"]["seconds_to_first_step"] > 0
    layers = {f"bert.encoder.layer.0.{part}.kernel" for part in ("intermediate.dense", "output.dense")}
    layers |= {f"bert.encoder.layer.0.attention.{part}.kernel" for part in ("self.query", "self.key", "self.value")}
    layers.add("bert.encoder.layer.0.attention.output.dense.kernel")
    for when in ("before", "after"):
        assert results["concentration"][when].keys() == {"all"} | layers
        assert all(0 < figures["gini"] < 1 for figures in results["concentration"][when].values())
    assert results["concentration"]["before"] != results["concentration"]["after"]


PMAP = {"num_devices": 8, "parallel": "pmap"}


@pytest.mark.parametrize(
    "runner",
    [{}, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ({"num_devices": 8, "fsdp": 2}, PMAP))],
    ids=str,
)
def test_sensitivity_before_training_is_that_of_the_parameters_it_starts_from(base, tmp_path, monkeypatch, runner):
    """It is measured at the end, from a copy: here also at the start, exactly the same. Batches share a program."""
    real, measured = training_run.fit, []

    def fit(state, step, batches, rhythm, hooks, **options):
        training = hooks._training
        measured.append(concentration.by_tensor(training.measure(training.runner.view(state.all_params))))
        return real(state, step, batches, rhythm, hooks, **options)

    monkeypatch.setattr(training_run, "fit", fit)
    with _compilations("_add") as compiled:
        results = run(base, tmp_path / "run", method="pats+noisytune", sensitivity_batches=2, max_steps=3, **runner)
    assert len(compiled) == (2 if "fsdp" in runner else 1)  # where the copy is laid out otherwise than the state
    assert results["concentration"]["before"] == measured[0] != results["concentration"]["after"]


@pytest.mark.parametrize(
    "method, asked, measured",
    [("finetune", None, 0), ("finetune", 3, 3), ("pats", None, 8), ("noisytune+pats", None, 8), ("pats", 0, 0)],
)
def test_sensitivity_is_measured_with_pats_or_on_request(method, asked, measured):
    settings = Settings(task_name="sst2", method=method, sensitivity_batches=asked)
    assert methods.sensitivity_batches(settings.length.sensitivity_batches, settings.methods) == measured


def test_a_plain_run_compiles_no_more_than_it_needs_and_says_how_long_its_first_step_took(base, tmp_path, caplog):
    names = []

    def listen(event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            names.append(fun_name.removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with caplog.at_level("INFO"):
            run(base, tmp_path / "run", method="finetune", length_buckets=None, sensitivity_batches=None, max_steps=2)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert sorted(name for name in names if name in OF_A_RUN) == sorted(OF_A_RUN)
    assert set(names) <= {*OF_A_RUN, "_derive", "draw"}, "more only for a new head"
    assert "compiled and made the first step in" in caplog.text


OF_A_RUN = ("create_state", "step", "figures", "predict")


def test_score_and_predictions_are_those_of_the_saved_model(base, noisy):
    splits = load_task("sst2", base.data.data_dir, splits=("validation", "test"))
    answers = reference_logits(noisy, splits["validation"]).argmax(1)
    assert len(set(answers)) == 2, "a model that always says the same proves nothing"
    results = json.loads((noisy / "results.json").read_text())
    assert results["final"]["metrics"] == {"accuracy": pytest.approx(np.mean(answers == splits["validation"].labels))}
    answers = reference_logits(noisy, splits["test"]).argmax(1)
    assert predictions(noisy, "SST-2.tsv") == [(str(index), str(answer)) for index, answer in enumerate(answers)]


def test_the_model_card_has_the_scores_and_the_plots(noisy):
    card = (noisy / "README.md").read_text()
    score = json.loads((noisy / "results.json").read_text())["final"]["metrics"]["accuracy"]
    assert f"| final | {score:.4f} |" in card and "--method pats" in card and "(plots/sensitivity.png)" in card


def test_a_saved_config_repeats_the_run_exactly(noisy, tmp_path, capsys):
    again = tmp_path / "a folder with a name that is longer than a line of a terminal, which is not to be broken (1)"
    cli.main(["glue", "--config", str(noisy / "config.json"), "--output_dir", str(again)])
    assert metrics(again) == metrics(noisy)
    expected, found = weights(noisy), weights(again)
    assert expected.keys() == found.keys() and all(np.array_equal(expected[name], found[name]) for name in expected)
    assert predictions(again, "SST-2.tsv") == predictions(noisy, "SST-2.tsv")
    title, place = capsys.readouterr().out.splitlines()  # nothing else where the console is no terminal
    assert title.startswith("pats on sst2") and "accuracy" in title and place == f"results in {again}"


# plain fine-tuning


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(base, folder)
    return folder


def test_no_noise_is_plain_fine_tuning(base, plain, noisy, tmp_path):
    run(base, tmp_path / "still", method="pats", noise_scale=0.0)
    expected, still, with_noise = weights(plain), weights(tmp_path / "still"), weights(noisy)
    assert all(np.array_equal(expected[name], still[name]) for name in expected)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert not np.allclose(expected[name], with_noise[name], atol=1e-3)


def test_the_seed_decides_the_new_head_and_all_that_follows(base, plain, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(base, tmp_path / name, seed=seed, do_eval=True)
    a, b, c = (weights(tmp_path / name)["classifier.weight"] for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    run(base, tmp_path / "run", seed=7)
    assert metrics(tmp_path / "run") != metrics(plain)


def test_evaluation_alone_of_a_trained_model_into_a_run_that_is_replaced(base, plain, tmp_path):
    console = rich.console.Console(file=io.StringIO(), force_terminal=True)
    trained = {"model_name_or_path": str(plain / "model"), "do_eval": True}
    run(base, tmp_path / "run", console, **trained, max_eval_samples=4)
    with pytest.raises(InputError, match="not empty"):
        run(base, tmp_path / "run", **trained)
    results = run(base, tmp_path / "run", **trained, overwrite=True)
    (record,) = run_folder.read_metrics(tmp_path / "run")
    (*_, last) = run_folder.read_metrics(plain)
    assert record == {"step": 0, "eval": last["eval"]} and results["final"]["metrics"] == last["eval"]
    assert results["eval_examples"] == 10 and "steps" not in results
    assert {path.stem for path in (tmp_path / "run" / "plots").iterdir()} == {"confusion", "reliability"}
    assert not (tmp_path / "run" / "predictions").exists()


def test_progress_on_a_terminal(base, tmp_path):
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=120)
    run(base, tmp_path / "run", console, do_train=True)
    shown = console.file.getvalue()
    assert "12/12" in shown and "100%" in shown and "loss" in shown and "examples/s" in shown
    assert "compiling (about 5 s)" in shown or "compiling (about 10 s)" in shown
    assert not any("eval" in record for record in metrics(tmp_path / "run"))
    assert "Not evaluated." in (tmp_path / "run" / "README.md").read_text()


# other tasks


def write_pairs(path, rows, seed, label=None, values=()):
    """Writes a table of pairs of sentences numbered from 100, with a column of labels in turn if it has a name."""
    header = ["index", "sentence1", "sentence2"]
    columns = [range(100, 100 + rows), tiny.sentences(rows, seed)[0], tiny.sentences(rows, seed + 50)[0]]
    if label:
        header, columns = [*header, label], [*columns, [values[row % len(values)] for row in range(rows)]]
    tiny.write_table(path, header, *zip(*columns, strict=True))


def test_mnli_has_both_halves_and_answers_the_diagnostic_set(base, tmp_path):
    data, names = tmp_path / "data", ("entailment", "neutral", "contradiction")
    for seed, (file, rows) in enumerate({"train": 16, "dev_matched": 12, "dev_mismatched": 11}.items()):
        write_pairs(data / "MNLI" / f"{file}.tsv", rows, seed, "gold_label", names)
    for seed, (file, rows) in enumerate({"test_matched": 9, "test_mismatched": 10}.items(), start=3):
        write_pairs(data / "MNLI" / f"{file}.tsv", rows, seed)
    write_pairs(data / "diagnostic" / "diagnostic.tsv", 7, 5)
    phases = {"do_train": True, "do_eval": True, "do_predict": True, "max_steps": 2}
    model = str(tiny.save_checkpoint(tmp_path / "model", 3))
    results = run(base, tmp_path / "run", model_name_or_path=model, task_name="MNLI", data_dir=str(data), **phases)
    splits = load_task("mnli", data, splits=("validation", "test"))
    splits["ax"] = load_task("ax", data, splits=("test",))["test"]
    answers = {name: reference_logits(tmp_path / "run", split).argmax(1) for name, split in splits.items()}
    assert len(set(np.concatenate(list(answers.values())))) > 1, "a model that always says the same proves nothing"
    assert results["final"]["metrics"] == {
        "accuracy": pytest.approx(np.mean(answers["validation"] == np.arange(12) % 3)),
        "accuracy_mm": pytest.approx(np.mean(answers["validation_mismatched"] == np.arange(11) % 3)),
    }
    assert results["majority_class"]["metrics"].keys() == {"accuracy", "accuracy_mm"}
    for name, file in (("test", "MNLI-m.tsv"), ("test_mismatched", "MNLI-mm.tsv"), ("ax", "AX.tsv")):
        expected = [(str(100 + row), names[answer]) for row, answer in enumerate(answers[name])]
        assert predictions(tmp_path / "run", file) == expected


def test_regression(base, tmp_path):
    data, scores = tmp_path / "data", (0.2, 4.8, 2.5, 1.0, 3.3)
    write_pairs(data / "STS-B" / "train.tsv", 16, 0, "score", scores)
    write_pairs(data / "STS-B" / "dev.tsv", 13, 1, "score", scores)
    write_pairs(data / "STS-B" / "test.tsv", 9, 2)
    phases = {"do_train": True, "do_eval": True, "do_predict": True, "max_steps": 2}
    results = run(base, tmp_path / "run", task_name="stsb", data_dir=str(data), **phases)
    splits = load_task("stsb", data, splits=("validation", "test"))
    given, true = reference_logits(tmp_path / "run", splits["validation"])[:, 0], np.resize(scores, 13)
    pearson = np.corrcoef(given, true)[0, 1]
    spearman = np.corrcoef(*map(scipy.stats.rankdata, (given, true)))[0, 1]
    expected = {"pearson": pearson, "spearmanr": spearman, "combined_score": (pearson + spearman) / 2}
    assert results["final"]["metrics"] == pytest.approx(expected, abs=1e-4)
    assert results["main_metric"] == "combined_score" and results["num_labels"] == 1
    assert results["majority_class"]["metrics"]["combined_score"] == 0
    rows = predictions(tmp_path / "run", "STS-B.tsv")
    assert [index for index, _ in rows] == [str(100 + row) for row in range(9)]
    assert all(len(score.split(".")[1]) == 3 for _, score in rows)
    expected = np.clip(reference_logits(tmp_path / "run", splits["test"])[:, 0], 0, 5)
    np.testing.assert_allclose([float(score) for _, score in rows], expected, atol=1e-3)


@pytest.mark.parametrize("max_steps, shapes", [(1, 1), (12, 2)])
def test_a_run_compiles_the_shapes_that_its_steps_have_and_no_others(base, tmp_path, max_steps, shapes):
    changes = {"length_buckets": 2, "max_steps": max_steps, "do_train": True}
    with _compilations("step") as compiled:
        run(base, tmp_path / "run", **changes)
    assert len(compiled) == shapes


def test_runs_that_differ_in_numbers_share_their_programs(base, tmp_path, monkeypatch):
    """By what XLA gets to compile."""

    class Made(Exception):
        pass

    def stop(*_):
        raise Made

    def programs(**numbers):
        made = []
        monkeypatch.setattr(glue, "make_training", lambda *args: made.append(real(*args)) or stop())
        with pytest.raises(Made):
            run(base, tmp_path / "run", method="pats", do_train=True, **numbers)
        ((training, _),) = made
        batch = next(iter(training.one_of_each_shape(0)))
        step, figures = training.step, training.figures
        arguments = (training.shapes.opt_state, np.int32(0), training.numbers)
        lowered = step._compiled.lower(*step._deal(training.shapes, batch)), figures._compiled.lower(*arguments)
        return [one.as_text() for one in lowered]

    real = glue.make_training
    before = programs(max_steps=2)
    others = {"learning_rate": 1e-3, "weight_decay": 0.1, "noise_scale": 0.2, "decay": 0.5}
    assert programs(seed=7, max_steps=3, warmup_ratio=0.5, **others) == before
    assert programs(max_steps=2, adam_beta1=0.8)[0] != before[0]


@contextlib.contextmanager
def _compilations(part):
    """The names of the programs that are compiled, in whatever thread, and have this part."""
    names = []

    def listen(event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration") and part in fun_name:
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_fetched_from_the_devices_between_two_lines(base, tmp_path, monkeypatch):
    """Every fetch of a number stalls the device; it is to happen at logging steps (and to wait for the first step)."""
    array, real_step, real_fit = type(jnp.zeros(())), training_run.TrainingHooks.on_step, training_run.fit
    value, step, fetched, waited = array._value, [None], set(), set()

    def on_step(self, number, state):
        step[0] = number
        real_step(self, number, state)

    def fit(*arguments, **options):
        step[0] = 0
        result = real_fit(*arguments, **options)
        step[0] = None
        return result

    def fetch(self):
        if threading.current_thread() is threading.main_thread():
            fetched.add(step[0])
        return value.fget(self)

    monkeypatch.setattr(array, "_value", property(fetch))
    monkeypatch.setattr(training_run.TrainingHooks, "on_step", on_step)
    monkeypatch.setattr(training_run, "fit", fit)
    with monkeypatch.context() as patch:
        real_wait = jax.block_until_ready
        patch.setattr(jax, "block_until_ready", lambda x: waited.add(step[0]) or real_wait(x))
        run(base, tmp_path / "run", method="pats", max_steps=12, logging_steps=5, eval_steps=7, do_train=True)
    assert fetched - {None} == {5, 10, 12} and waited - {None} == {0, 1}  # in the first step and after it


def test_validation_rows_are_tokenised_while_the_step_compiles_and_test_rows_after_training(
    base, tmp_path, monkeypatch
):
    tokenised, real, real_fit = [], batches.tokenize, training_run.fit
    monkeypatch.setattr(batches, "tokenize", lambda split, *rest: tokenised.append(len(split)) or real(split, *rest))

    def fit(*arguments, **options):
        assert tokenised in ([TRAIN_ROWS], [TRAIN_ROWS, 10])
        return real_fit(*arguments, **options)

    monkeypatch.setattr(training_run, "fit", fit)
    run(base, tmp_path / "run", max_steps=4, eval_steps=2, do_train=True, do_eval=True, do_predict=True)
    assert tokenised == [TRAIN_ROWS, 10, 7]


def test_a_length_without_room_is_refused_before_anything_is_written(base, plain, tmp_path):
    with pytest.raises(InputError, match="max_seq_length 2: too short"):
        run(base, tmp_path / "run", model_name_or_path=str(plain / "model"), do_predict=True, max_seq_length=2)
    assert not (tmp_path / "run").exists()


def test_built_in_data_are_called_so(base):
    builtin = glue.describe_data(dataclasses.replace(base, data_dir="builtin"))
    assert "built-in" in builtin and "not GLUE" in builtin
    assert "not GLUE" not in glue.describe_data(base)


def test_own_data_keeps_its_labels(base, tmp_path):
    files = {}
    for seed, (name, rows) in enumerate({"train": 22, "validation": 10, "test": 7}.items()):
        texts, praises = tiny.sentences(rows, seed)
        header, columns = ("sentence1", "label"), (texts, np.where(praises, "good", "bad"))
        if name == "test":
            header, columns = ("id", "sentence1"), ([f"t{n}" for n in range(rows)], texts)
        table = tiny.write_table(tmp_path / f"{name}.csv", header, *zip(*columns, strict=True), separator=",")
        files[f"{name}_file"] = str(table)
    own = {"task_name": None, "data_dir": None}
    first = run(base, tmp_path / "run", **own, **files, do_train=True, do_eval=True, do_predict=True)
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert saved["id2label"] == {"0": "bad", "1": "good"} and saved["label2id"] == {"bad": 0, "good": 1}
    assert first["data"] == files["train_file"] and first["final"]["metrics"].keys() == {"accuracy"}

    texts, _ = tiny.sentences(7, 2)
    answers = tiny.reference_logits(tmp_path / "run" / "model", texts).argmax(1)
    expected = [(f"t{n}", ("bad", "good")[answer]) for n, answer in enumerate(answers)]
    assert predictions(tmp_path / "run", "test.tsv") == expected

    trained = {"model_name_or_path": str(tmp_path / "run" / "model"), "do_eval": True}
    again = run(base, tmp_path / "again", **own, **trained, validation_file=files["validation_file"])
    assert again["final"]["metrics"] == first["final"]["metrics"]


# other methods


def test_bitfit_leaves_all_but_biases_and_head_as_they_were(base, tmp_path):
    trained = run(base, tmp_path / "run", method="bitfit", load_best_model_at_end=True, save_steps=4)
    assert trained["num_parameters"] > 1000
    before = load_file(f"{base.model.model_name_or_path}/model.safetensors")
    for name, tensor in weights(tmp_path / "run").items():
        if not name.startswith("classifier"):
            assert np.array_equal(tensor, before[name]) == (not name.endswith("bias")), name


@pytest.mark.parametrize("method", ["child-d", pytest.param("dps-mix+pats", marks=pytest.mark.slow)])
def test_methods_that_need_the_data_or_the_forward_pass(base, tmp_path, method):
    changes = {"method": method, "num_train_epochs": 8, "train_batch_size": 8}
    changes |= {"update_ratio": 0.25, "num_devices": 8} if "dps" in method else {}
    results = run(base, tmp_path / "run", **changes)
    first, *_, last = (line["loss"] for line in run_folder.read_metrics(tmp_path / "run") if "loss" in line)
    assert last < first and results["method"] == method


WEIGHTS = {"r3f": 1.0, "r_drop": 2.0, "smart": 1.0, "lnsr": 0.5}


@pytest.mark.parametrize(
    "names",
    [pytest.param(names, marks=pytest.mark.slow) for names in (("r_drop", "lnsr"), tuple(WEIGHTS))],
    ids=" ".join,
)
def test_objectives_are_added_to_the_loss_and_logged(base, tmp_path, names):
    method = "+".join(["pats", *names]).replace("_", "-")
    run(base, tmp_path / "run", method=method, lnsr_layer=0, r_drop_alpha=2.0, lnsr_lambda=0.5)
    for line in (line for line in run_folder.read_metrics(tmp_path / "run") if "loss" in line):
        assert line.keys() & WEIGHTS.keys() == set(names) and line["r_drop"] > 0 and line["lnsr"] > 0
        added = sum(WEIGHTS[name] * line[name] for name in names)
        assert line["loss"] == pytest.approx(line["task_loss"] + added, rel=1e-5)
        assert all(line[name] >= 0 for name in names)


def test_dropout_is_off_where_the_methods_authors_do_without(base):
    splits = {"train": range(100)}
    off = glue.dropout_rates(dataclasses.replace(base, method="mixout").over(1), splits)
    assert off == {"hidden_dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0}
    typed = glue.dropout_rates(dataclasses.replace(base, method="mixout", hidden_dropout=0.2).over(1), splits)
    assert typed == {"hidden_dropout": 0.2, "attention_dropout": 0.0, "classifier_dropout": None}
    plain = glue.dropout_rates(base.over(1), splits)
    assert set(plain.values()) == {None}


# what goes wrong on the way


def test_a_length_above_the_models_is_lowered_with_a_warning(base, plain, tmp_path):
    with pytest.warns(UserWarning, match="max_seq_length 512 exceeds the model's 24 positions; using 24"):
        run(base, tmp_path / "run", model_name_or_path=str(plain / "model"), do_eval=True, max_seq_length=512)
    assert (tmp_path / "run" / "results.json").exists()


def test_a_training_that_diverges_stops_and_says_where(base, tmp_path):
    """The second step is the first with a learning rate above 0; all after it are skipped, two more than allowed."""
    with pytest.raises(InputError, match=r"training stopped at step 6: .* not finite in 4 steps, .* largest .*kernel"):
        run(base, tmp_path / "run", learning_rate=1e35, max_nonfinite_steps=2, logging_steps=2, do_train=True)
    (_, line) = run_folder.read_metrics(tmp_path / "run")
    assert line["step"] == 4 and line["skipped_steps"] == 2 and "loss" not in line
    assert "Infinity" not in (tmp_path / "run" / "metrics.jsonl").read_text(), "that would be no JSON"


def test_answers_that_are_not_finite_are_no_scores(base):
    split = load_task("sst2", base.data.data_dir, splits=("validation",))["validation"]
    tokens = batches.tokenize(split, tiny.tokenizer(), 16)
    lost = evaluation.Predictor(
        lambda params, batch: np.full((8, 2), np.nan),
        runners.make_runner(num_devices=1),
        tasks.get_task("sst2"),
        {"x": split},
        {"x": tokens}.__getitem__,
        batch_size=8,
    )
    with pytest.raises(InputError, match="not finite; the checkpoint is damaged"):
        lost.logits(None, "x")
    lost.splits["train"] = split
    with pytest.raises(InputError, match="not finite; lower learning_rate"):
        lost.logits(None, "x")


def test_mnli_without_the_diagnostic_set(caplog, tmp_path):
    assert glue.load_diagnostic(str(tmp_path)) == {}
    assert "no predictions for AX" in caplog.text and "diagnostic.tsv: no such file" in caplog.text
