"""`pats-jax prime` on a random checkpoint and a handful of tasks: what it trains, draws, watches and leaves."""

import dataclasses
import itertools
import json
import shutil
import signal

import jax
import numpy as np
import pytest
import sklearn.metrics
import tiny
from safetensors.numpy import load_file, save_file

from pats_jax import models
from pats_jax.data import load_gym
from pats_jax.data.few_shot import FewShotTask, Row, Sample
from pats_jax.errors import InputError, Preempted
from pats_jax.models import peft
from pats_jax.priming import option_scoring, upstream
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.programs import cli
from pats_jax.run import run_folder, training_run
from pats_jax.training import preemption, runners

META = ("maml", "fomaml", "reptile")
LORA = {"lora_rank": 2}
QUICK = {
    "max_seq_length": 16,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "warmup_ratio": 0.0,
    "per_device_eval_batch_size": 16,
    "tasks_per_step": 2,
    "inner_learning_rate": 0.1,
    "inner_batch_size": 4,
    "task_batch_size": 4,
    "logging_steps": 2,
    "eval_steps": 2,
    "save_steps": 0,
    "num_devices": 1,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny.write_gym_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def base(home):
    return PrimingSettings(
        model_name_or_path=str(home / "model"),
        data_dir=str(home / "gym"),
        partition=str(home / "partition.json"),
        **QUICK,
    )


@pytest.fixture(scope="module")
def watched(base, home):
    """With batches of one shape: less to compile."""
    path = home / "watched.json"
    path.write_text(json.dumps(tiny.PARTITION | {"train": ["weather", "voice"]}))
    return dataclasses.replace(base, partition=str(path))


@pytest.fixture(scope="module")
def one_shape(base, home):
    """The same with nothing to watch."""
    path = home / "one_shape.json"
    path.write_text(json.dumps(tiny.PARTITION | {"train": ["weather", "voice"], "dev": []}))
    return dataclasses.replace(base, partition=str(path))


def run(base, folder, **changes):
    return upstream.run(dataclasses.replace(base, output_dir=str(folder), **changes))


def lines(folder):
    return [{k: v for k, v in line.items() if k != "timing"} for line in run_folder.read_metrics(folder)]


def results(folder):
    return {k: v for k, v in run_folder.read_results(folder).items() if k != "timing"}


def tensors(folder, part="model"):
    return load_file(folder / part / {"model": "model.safetensors", "adapter": "adapter_model.safetensors"}[part])


def moved(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not np.array_equal(before[name], after[name])}


# what is trained, and what is left


@pytest.mark.parametrize(
    "algorithm, train",
    [
        *(("mtl", "plm"), ("maml", "pe")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("reptile", "plm+pe"), ("mtl", "pe"), ("maml", "plm"), ("fomaml", "pe"))
        ),
    ],
)
def test_exactly_what_is_asked_for_is_trained(one_shape, tmp_path, algorithm, train):
    """All of the encoder, or all modules; never the pooler and the classifier, which are no part of this head.

    Without dev tasks nothing is watched.
    """
    kind = "lora" if "pe" in train else None
    found = run(one_shape, tmp_path, algorithm=algorithm, train=train, peft=kind, **LORA if kind else {})
    config = dataclasses.replace(one_shape, peft=kind, **LORA if kind else {}).adapter
    model, start = option_scoring.load_scorer(
        one_shape.model.model_name_or_path, "embedding", config, key=one_shape.seed
    )
    sizes = {"plm": 0, "pe": 2 * 2 * 2 * 16 if kind else 0}
    assert (tmp_path / "model").exists() == ("plm" in train) and (tmp_path / "adapter").exists() == ("pe" in train)
    if "plm" in train:
        plain = {name: tree for name, tree in start.items() if name != "peft"}
        models.save_pretrained(tmp_path / "start", params=plain, config=model.config)
        before, after = tensors_of(tmp_path / "start"), tensors(tmp_path)
        encoder = {name for name in before if name.startswith("bert.") and "pooler" not in name}
        no_gradient = {name for name in encoder if name.endswith("key.bias")}  # softmax does not see it
        assert moved(before, after) | no_gradient == encoder
        sizes["plm"] = sum(before[name].size for name in encoder)
        loaded, params, _ = models.from_pretrained(tmp_path / "model", num_labels=1)
    else:
        loaded, params, _ = models.from_pretrained(one_shape.model.model_name_or_path, num_labels=1, key=one_shape.seed)
    if kind:
        _, params = peft.load_peft(tmp_path / "adapter", loaded, params)
        assert jax.tree.structure(params) == jax.tree.structure(start)
        before, after = (dict(jax.tree_util.tree_leaves_with_path(tree["peft"])) for tree in (start, params))
        assert moved(before, after) == before.keys()
        again, _, _ = peft.load_peft_model(tmp_path / "adapter")
        assert again.peft.rank == 2
    assert found["trained_parameters"] == sum(sizes[part] for part in train.split("+"))
    assert "final" not in found and not any("eval" in line for line in lines(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert f"--algorithm {algorithm} --train {train} --head embedding" in card and "Not evaluated" in card


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_a_pair_head_is_trained_with_its_pooler_and_saved(one_shape, tmp_path):
    base = one_shape
    run(base, tmp_path / "plm", head="pair", max_steps=2)
    _, start = option_scoring.load_scorer(base.model.model_name_or_path, "pair", None, key=base.seed)
    after = tensors(tmp_path / "plm")
    tokenizer = json.loads((tmp_path / "plm" / "model" / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == base.model.max_seq_length
    assert not np.array_equal(after["classifier.weight"].T, start["classifier"]["kernel"])
    assert not np.array_equal(after["bert.pooler.dense.weight"].T, start["bert"]["pooler"]["dense"]["kernel"])
    run(base, tmp_path / "pe", head="pair", train="pe", peft="bitfit", max_steps=2)
    names = tensors(tmp_path / "pe", "adapter").keys()
    assert any("classifier.weight" in name for name in names) and any("pooler.dense.weight" in name for name in names)


def test_the_folder_is_that_of_a_run(watched, tmp_path, capsys):
    args = tiny.flags(**{name: value for name, value in watched.flat().items() if name in QUICK})
    args += ["--model_name_or_path", watched.model.model_name_or_path, "--data_dir", watched.data.data_dir]
    cli.main(["prime", *args, "--partition", watched.data.partition, "--output_dir", str(tmp_path / "run")])
    assert f"results in {tmp_path / 'run'}" in capsys.readouterr().out
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (
        saved == dataclasses.replace(watched, output_dir=str(tmp_path / "run"), layers="separate", unroll=1).to_dict()
    )
    found, records = results(tmp_path / "run"), lines(tmp_path / "run")
    assert [(line["step"], "eval" in line) for line in records] == [(2, False), (2, True), (4, False), (4, True)]
    assert records[0].keys() >= {"loss", "accuracy", "learning_rate", "padding_share", "grad_norm"}
    evaluations = [{"step": line["step"], "metrics": line["eval"]} for line in records if "eval" in line]
    assert found["final"] == evaluations[-1] and found["best"] in evaluations
    assert (found["algorithm"], found["train"], found["peft"], found["head"]) == ("mtl", "plm", None, "embedding")
    assert found["upstream_tasks"] == ["weather", "voice"]
    assert found["train_examples"] == 2 * 2 * (6 + 5) and found["steps"] == found["model_step"] == 4
    assert (tmp_path / "run" / "plots" / "loss.png").exists()
    error = tiny.refused(
        capsys, "prime", *args, "--partition", watched.data.partition, "--output_dir", tmp_path / "run"
    )
    assert "not empty" in error
    cli.main(["prime", "--config", str(tmp_path / "run" / "config.json"), "--resume"])
    assert "already finished: mtl of plm on 2 tasks" in capsys.readouterr().out


def test_the_primed_model_has_the_dropout_of_its_checkpoint(base, home, tmp_path):
    off = {"hidden_dropout": 0.3, "attention_dropout": 0.2}
    model, params = option_scoring.load_scorer(base.model.model_name_or_path, "embedding", None, key=1, **off)
    assert model.config.hidden_dropout_prob == 0.3
    upstream.save(tmp_path, dataclasses.replace(base, **off), model, params, tiny.tokenizer())
    start, primed = map(models.read_encoder_config, (home / "model", tmp_path / "model"))
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        assert getattr(primed, name) == getattr(start, name)


# going on


@pytest.fixture(scope="module")
def eventful(watched):
    """PATS as outer optimizer on model and modules, with evaluations, the best model and checkpoints."""
    return dataclasses.replace(
        watched,
        train="plm+pe",
        peft="lora",
        lora_rank=2,
        method="pats",
        noise_scale=0.1,
        max_steps=6,
        save_steps=2,
        save_total_limit=None,
        load_best_model_at_end=True,
    )


@pytest.fixture(scope="module")
def whole(eventful, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(eventful, folder)
    return folder


def assert_same_run(folder, whole):
    assert lines(folder) == lines(whole) and results(folder) == results(whole)
    for part in ("model", "adapter"):
        ours, theirs = tensors(folder, part), tensors(whole, part)
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow  # as below, from another step
def test_a_resumed_run_is_bitwise_the_whole_one(eventful, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for part in ("model", "adapter"):
        shutil.rmtree(folder / part)
    (folder / "results.json").unlink()
    assert {"2", "4", "6"} <= {path.name for path in (folder / "checkpoints").iterdir()}
    for step in (4, 6):
        shutil.rmtree(folder / "checkpoints" / str(step))
    run(eventful, folder, resume=True)
    assert_same_run(folder, whole)


def test_an_interrupted_run_says_how_to_go_on_and_does(eventful, whole, tmp_path, monkeypatch, capsys):
    real, folder = training_run.TrainingHooks.on_step, tmp_path / "run"

    def on_step(self, number, state):
        real(self, number, state)
        if number == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(training_run.TrainingHooks, "on_step", on_step)
        with pytest.raises(
            Preempted, match="interrupted and saved; to resume, run: pats-jax prime --config "
        ) as caught:
            run(eventful, folder)
    assert not (folder / "results.json").exists() and (folder / "checkpoints" / "3").exists()
    cli.main(str(caught.value).partition("to resume, run: pats-jax ")[2].split())
    assert_same_run(folder, whole)


def test_pats_is_the_outer_optimizer(eventful, whole, tmp_path):
    assert all(0 < line["noise_share"] < 1 for line in lines(whole) if "loss" in line)
    run(eventful, tmp_path, method="finetune", max_steps=2, load_best_model_at_end=False)
    assert "noise_share" not in lines(tmp_path)[0] and lines(tmp_path)[0]["loss"] != lines(whole)[0]["loss"]


def test_early_stop_and_the_best_model(watched, tmp_path, monkeypatch):
    scores = iter([0.2, 0.9, 0.9, 0.3, 0.1])  # after steps 1, 2, ...
    monkeypatch.setattr(upstream.UpstreamScore, "evaluate", lambda self, params: {"score": next(scores)})
    stops = {"max_steps": 9, "eval_steps": 1, "early_stopping_patience": 2, "load_best_model_at_end": True}
    found = run(watched, tmp_path / "run", save_steps=1, save_total_limit=None, **stops)
    assert found["steps"] == 4 and found["model_step"] == 2
    assert found["best"] == {"step": 2, "metrics": {"score": 0.9}}
    assert found["final"] == {"step": 4, "metrics": {"score": 0.3}}
    assert not moved(tensors(tmp_path / "run"), tensors_at(tmp_path / "run", 2))
    assert moved(tensors(tmp_path / "run"), tensors_at(tmp_path / "run", 4))


def tensors_at(folder, step):
    """The encoder of a checkpoint, by the names of a saved model."""
    import orbax.checkpoint as ocp

    state = ocp.StandardCheckpointer().restore(folder / "checkpoints" / str(step) / "state")
    saved = tensors(folder)
    for name, value in saved.items():
        *path, leaf = name.split(".")
        for own in {"weight": ("kernel", "embedding", "scale"), "bias": ("bias",)}[leaf]:
            for kind in ("params", "frozen"):
                found = state.get(".".join([kind, *path, own]))
                if found is not None:
                    saved[name] = found.T if own == "kernel" else found
        assert saved[name].shape == value.shape
    return saved


# the batches


def make_training(settings, tasks=None):
    gym = load_gym(settings.data.data_dir)
    tasks = [gym[name] for name in tiny.PARTITION["train"]] if tasks is None else tasks
    runner = runners.make_runner(num_devices=1)
    answering, params = upstream.load_model(settings.with_layers("separate", 1, settings.adapter))
    source = upstream.UpstreamSource(settings.over(1), runner, tasks, answering)
    return source, upstream.make_training(settings, source, runner, params, evaluates=False)


def drawn(source, first, count):
    found = itertools.islice(source.batches(first), count)
    return [{name: np.asarray(x) for name, x in batch.items()} for batch, _ in found]


@pytest.mark.parametrize("algorithm", ("mtl", "maml"))
def test_a_batch_is_a_function_of_seed_and_step(base, algorithm):
    settings = dataclasses.replace(base, algorithm=algorithm)
    source, _ = make_training(settings)
    first = drawn(source, 0, 5)
    for ours, again in zip(drawn(source, 3, 2), first[3:], strict=True):
        assert ours.keys() == again.keys() and all(np.array_equal(ours[name], again[name]) for name in ours)
    inputs = "query_input_ids" if algorithm == "mtl" else "support_input_ids"
    assert not np.array_equal(first[0][inputs], first[1][inputs])
    other = drawn(make_training(dataclasses.replace(settings, seed=1))[0], 0, 5)
    assert any(
        a[inputs].shape != b[inputs].shape or not np.array_equal(a[inputs], b[inputs])
        for a, b in zip(first, other, strict=True)
    )


@pytest.mark.parametrize("algorithm", ("mtl", *META))
def test_only_rows_of_upstream_tasks_are_learnt(base, algorithm):
    """The words of the batches are rows of the upstream tasks, all of them in time, and of no other task."""
    gym = load_gym(base.data.data_dir)
    settings = dataclasses.replace(base, algorithm=algorithm, inner_steps=2)
    source, _ = make_training(settings)
    parts = ("train",) if algorithm == "reptile" else ("train", "dev")
    upstream_inputs = {
        row.input
        for name in tiny.PARTITION["train"]
        for sample in gym[name].samples
        for part in parts
        for row in getattr(sample, part)
    }
    ids = {tuple(own) for own in tiny.tokenizer()(sorted(upstream_inputs))["input_ids"]}
    met = set()
    for batch in drawn(source, 0, 150):
        assert ("query_input_ids" in batch) == (algorithm != "reptile")
        for name in [name for name in batch if name.endswith("input_ids") and "option" not in name]:
            met |= {tuple(int(x) for x in row if x) for row in batch[name].reshape(-1, batch[name].shape[-1])}
        if "support_input_ids" in batch:
            assert batch["support_input_ids"].shape[:3] == (2, 2, 4)
    assert met == ids


def test_options_too_many_are_cut_and_the_right_one_kept(base):
    source, _ = make_training(dataclasses.replace(base, max_options=2))
    gym = load_gym(base.data.data_dir)
    pairs = {
        (row.input, row.output)
        for name in tiny.PARTITION["train"]
        for sample in gym[name].samples
        for row in (*sample.train, *sample.dev)
    }
    inputs, outputs = (tiny.tokenizer()([pair[side] for pair in sorted(pairs)])["input_ids"] for side in (0, 1))
    right = {(tuple(a), tuple(b)) for a, b in zip(inputs, outputs, strict=True)}
    met = set()
    for batch in drawn(source, 0, 60):
        assert set(batch["query_option_mask"].sum(-1).ravel()) == {2}
        for task, row in np.ndindex(batch["query_answers"].shape):
            options, answer = batch["query_option_input_ids"][task], batch["query_answers"][task, row]
            assert answer < 2
            right_one = options[row if len(options) > 1 else 0, answer]  # options of all rows may stand there once
            met.add((tuple(x for x in batch["query_input_ids"][task, row] if x), tuple(x for x in right_one if x)))
    assert met == right


def test_an_option_longer_than_those_that_others_were_cut_to(base):
    """Any option may be drawn, so the longest one decides the shape."""
    long = " ".join(tiny.GOOD + tiny.BAD)
    rows = tuple(Row("ann is warm .", (*tiny.GOOD, *tiny.BAD, long), number) for number in range(2))
    task = FewShotTask("many", None, (Sample(13, rows, rows),))
    source, _ = make_training(dataclasses.replace(base, max_options=2), [task])
    (shape,) = {batch["query_option_input_ids"].shape for batch in drawn(source, 0, 40)}
    assert shape[-1] >= 10


# how it is watched


@pytest.mark.parametrize("algorithm, names", [("mtl", ("watched", "choice")), ("reptile", ("watched",))])
def test_the_score_is_the_mean_over_dev_tasks(base, algorithm, names):
    """Against the formulas: the parameters as they are, or after the inner steps on the training rows."""
    settings = dataclasses.replace(base, algorithm=algorithm, inner_steps=2, inner_learning_rate=0.02)
    source, training = make_training(settings)
    gym = load_gym(base.data.data_dir)
    tasks = [gym[name] for name in names]
    score = upstream.UpstreamScore(source, tasks, preemption.Preemption(), training)
    params = jax.tree.map(np.asarray, training.state.all_params)
    expected = []
    for task in tasks:
        sample, adapted = task.samples[0], params
        if algorithm != "mtl":
            grad = jax.jit(jax.grad(lambda params, rows=sample.train: tiny.option_loss(source.model, params, rows)))
            for _ in range(2):
                adapted = jax.tree.map(lambda p, g: p - 0.02 * g, adapted, grad(adapted))
        right = np.array([row.answer for row in sample.test])
        expected.append(np.mean(tiny.chosen(source.model, adapted, sample.test) == right))
    assert score.evaluate(training.state.all_params) == {"score": pytest.approx(np.mean(expected), abs=1e-6)}
    assert 0 < np.mean(expected) < 1


def test_a_dev_task_is_scored_by_its_own_metric(base):
    """Macro F1 for one, accuracy for the other."""
    source, training = make_training(base)
    gym = load_gym(base.data.data_dir)
    by_f1 = dataclasses.replace(gym["watched"], name="ag_news")
    assert by_f1.metric == "macro_f1" and gym["choice"].metric == "accuracy"
    score = upstream.UpstreamScore(source, [by_f1, gym["choice"]], preemption.Preemption(), training)
    params = jax.tree.map(np.asarray, training.state.all_params)
    chosen, right = (
        {name: values(gym[name].samples[0].test) for name in ("watched", "choice")}
        for values in (
            lambda rows: tiny.chosen(source.model, params, rows),
            lambda rows: np.array([row.answer for row in rows]),
        )
    )
    expected = [
        sklearn.metrics.f1_score(right["watched"], chosen["watched"], average="macro"),
        np.mean(chosen["choice"] == right["choice"]),
    ]
    assert expected[0] != np.mean(chosen["watched"] == right["watched"])
    assert score.evaluate(training.state.all_params) == {"score": pytest.approx(np.mean(expected), abs=1e-6)}


@pytest.mark.slow  # test_priming.py has the losses on several devices
def test_two_devices_compute_what_one_does(watched, tmp_path):
    run(watched, tmp_path / "one", max_steps=2)
    run(watched, tmp_path / "two", max_steps=2, num_devices=2)
    ours, theirs = lines(tmp_path / "two"), lines(tmp_path / "one")
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-4)
    assert ours[0]["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=1e-3)
    assert ours[1] == theirs[1]
    first, second = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for name in first:
        if not name.endswith("key.bias"):
            np.testing.assert_allclose(first[name], second[name], atol=2e-3)


# methods


def test_noisytune_is_for_the_pretrained_weights_alone(base):
    settings = dataclasses.replace(base, train="plm+pe", peft="lora", lora_rank=2, method="noisytune")
    (_, training), (_, plain) = map(make_training, (settings, dataclasses.replace(settings, method="finetune")))
    before, after = (dict(jax.tree_util.tree_leaves_with_path(t.state.all_params)) for t in (plain, training))
    names = {jax.tree_util.keystr(path) for path in before if not np.array_equal(before[path], after[path])}
    assert names and not any("peft" in name for name in names)


# what is refused


def refused(home, tmp_path, capsys, **changes):
    given = {"model_name_or_path": home / "model", "data_dir": home / "gym", "partition": home / "partition.json"}
    error = tiny.refused(capsys, "prime", *tiny.flags(**(given | QUICK | {"output_dir": tmp_path / "run"} | changes)))
    assert not (tmp_path / "run").exists()
    return error


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train": "pe"}, "--train pe: needs an adapter; set --peft"),
        ({"train": "plm+pe"}, "--train plm+pe: needs an adapter; set --peft"),
        ({"peft": "lora"}, "--train plm: trains no adapter"),
        ({"max_steps": 0}, "--max_steps 0: must be at least 1"),
        ({"max_steps": -1}, "--max_steps -1: must be at least 1"),
        ({"max_options": 1}, "--max_options 1: must be at least 2"),
        ({"method": "r-drop"}, "--method r-drop: not available for priming"),
        ({"method": "asam"}, "--method asam: not available for priming"),
        ({"method": "pats+bitfit"}, "--method bitfit: not available for priming"),
        ({"method": "child-d"}, "method child-d: needs training data"),
        ({"train": "pe", "peft": "lora", "method": "noisytune"}, "it changes the base model's weights"),
        ({"train": "pe", "peft": "bitfit", "method": "pats"}, "no adapter parameter matches"),
        ({"gradient_accumulation_steps": 3}, "--tasks_per_step 2: cannot be split evenly across 1 device"),
        ({"num_devices": 8}, "--tasks_per_step 2: cannot be split evenly across 8 devices"),
        ({"train_batch_size": 8}, "--train_batch_size: use --tasks_per_step, --task_batch_size"),
        ({"train": "pe", "peft": "prompt"}, "--max_seq_length, --prompt_length, --prefix_length: they leave 4 of 24"),
        ({"max_seq_length": 5}, "they leave 5 of 24 tokens for a text, which needs 8"),
        ({"head": "mlm"}, "the checkpoint has no masked-language-model head"),
        ({"shots": 3}, "no few-shot task"),
    ],
)
def test_wrong_settings(home, tmp_path, capsys, changes, message):
    assert message in refused(home, tmp_path, capsys, **changes)


def test_a_task_on_two_lists(home, tmp_path, capsys):
    path = tmp_path / "partition.json"
    path.write_text(json.dumps(tiny.PARTITION | {"dev": ["voice"]}, indent=1))
    error = refused(home, tmp_path, capsys, partition=path)
    assert error.startswith(f"{path}:") and "the task voice is listed in 'train' and in 'dev'" in error


@pytest.mark.parametrize("changes", ({"early_stopping_patience": 2}, {"load_best_model_at_end": True}))
def test_early_stop_needs_dev_tasks(home, tmp_path, capsys, changes):
    path = tmp_path / "partition.json"
    path.write_text(json.dumps(tiny.PARTITION | {"dev": []}))
    assert "the partition has no dev tasks" in refused(home, tmp_path, capsys, partition=path, **changes)


def test_a_run_of_other_settings_is_not_resumed(base, tmp_path):
    run_folder.start(tmp_path / "run", dataclasses.replace(base, output_dir=str(tmp_path / "run")).to_dict())
    with pytest.raises(InputError, match="different settings: algorithm was 'mtl' and is 'reptile'"):
        run(base, tmp_path / "run", resume=True, algorithm="reptile")


def test_a_masked_language_model_head_stays_as_it_is(one_shape, home, tmp_path):
    """It scores options, is not trained and not saved with the primed model."""
    folder = shutil.copytree(home / "model", tmp_path / "mlm")
    save_file(tensors_of(folder) | tiny.mlm_tensors(), folder / "model.safetensors")
    found = run(one_shape, tmp_path / "run", model_name_or_path=str(folder), head="mlm", max_steps=2)
    assert found["num_parameters"] - found["trained_parameters"] > 16 * 16
    assert not any(name.startswith("cls.") for name in tensors(tmp_path / "run"))
