"""A head that numbers its classes in an order of its own: the same scores, predictions and training by name."""

import contextlib
import copy
import dataclasses
import json

import numpy as np
import pytest
import sklearn.metrics
import tiny
from safetensors.numpy import load_file, save_file

from pats_jax import glue, models
from pats_jax.data import batches, load_task, tasks
from pats_jax.data.readers import Split
from pats_jax.errors import InputError
from pats_jax.models import labels, peft
from pats_jax.programs import cli
from pats_jax.training import evaluation, runners

ORDER = (2, 1, 0)  # of the head below: its class i is the task's class ORDER[i]
NAMES = ("CONTRADICTION", "Neutral", "entail-ment")
BIAS = np.array([2.4, 2.0, -2.4], np.float32)  # so that not all answers are the same


def save_head(folder, names, order=None, **changes):
    """A checkpoint with a head whose classes have these names; class i is class order[i] of the head without order."""
    config = dataclasses.replace(tiny.CONFIG, id2label=dict(enumerate(names)), **changes)
    params = tiny.random_params(config)
    params["classifier"]["bias"] += BIAS[: len(names)]
    if order:
        params["classifier"] = {name: x[..., list(order)] for name, x in params["classifier"].items()}
    models.save_pretrained(folder, params=params, config=config, tokenizer=tiny.tokenizer())
    return folder


def write_pairs(path, rows, seed, label=None, values=()):
    header = ["index", "sentence1", "sentence2", *([label] if label else [])]
    columns = [range(rows), tiny.sentences(rows, seed)[0], tiny.sentences(rows, seed + 50)[0]]
    columns += [[values[row % len(values)] for row in range(rows)]] if label else []
    tiny.write_table(path, header, *zip(*columns, strict=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, names = tmp_path_factory.mktemp("data"), tasks.get_task("mnli").labels
    for seed, (file, rows) in enumerate({"train": 16, "dev_matched": 15, "dev_mismatched": 11}.items()):
        write_pairs(folder / "MNLI" / f"{file}.tsv", rows, seed, "gold_label", names)
    write_pairs(folder / "MNLI" / "test_matched.tsv", 9, 4)
    write_pairs(folder / "diagnostic" / "diagnostic.tsv", 7, 5)
    write_pairs(folder / "RTE" / "dev.tsv", 8, 6, "label", ("not_entailment", "entailment"))
    return folder


def run(base, model, output, **changes):
    settings = dataclasses.replace(base, model_name_or_path=str(model), output_dir=str(output), **changes)
    with contextlib.ExitStack() as stack:
        if "ordered" not in str(model):
            stack.enter_context(pytest.warns(UserWarning, match="the order is kept, and labels are matched by name"))
        return glue.run(settings)


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    settings = tiny.quick_settings(
        tmp_path_factory.mktemp("base"), max_steps=3, out_of_domain=["rte"], adam_epsilon=1e-3
    )
    return dataclasses.replace(settings, task_name="mnli", data_dir=str(data), warmup_ratio=0.0, learning_rate=1e-3)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Runs from the same head in the task's order and in its own: trained, evaluated, predicting."""
    home = tmp_path_factory.mktemp("runs")
    save_head(home / "ordered", tasks.get_task("mnli").labels)
    save_head(home / "own", NAMES, ORDER)
    phases = {"do_train": True, "do_eval": True, "do_predict": True}
    for name in ("ordered", "own"):
        run(base, home / name, home / f"{name}-run", **phases)
    return home


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_training_from_it_is_that_of_the_head_in_the_tasks_order(folders):
    start = load_file(folders / "own" / "model.safetensors")
    ordered, own = (load_file(folders / f"{name}-run" / "model" / "model.safetensors") for name in ("ordered", "own"))
    assert ordered.keys() == own.keys()
    for name, tensor in ordered.items():
        permuted = tensor[list(ORDER)] if name.startswith("classifier") else tensor
        np.testing.assert_allclose(own[name], permuted, atol=1e-4, err_msg=name)
    assert np.abs(own["classifier.weight"] - start["classifier.weight"]).max() > 1e-3, "it has learnt nothing"


def test_its_scores_and_predictions_are_those_of_the_head_in_the_tasks_order(data, folders):
    ordered, own = results(folders / "ordered-run"), results(folders / "own-run")
    for part in ("final", "best", "majority_class", "out_of_domain"):
        assert own[part] == ordered[part], part
    split = load_task("mnli", data, splits=("validation",))["validation"]
    expected = tiny.reference_logits(folders / "own-run" / "model", split.sentence1, split.sentence2, max_length=16)
    answers = np.array(ORDER)[expected.argmax(1)]
    assert own["final"]["metrics"]["accuracy"] == pytest.approx(np.mean(answers == split.labels))
    assert len(set(answers)) > 1
    for file in ("MNLI-m.tsv", "AX.tsv"):
        text = (folders / "own-run" / "predictions" / file).read_text()
        assert text == (folders / "ordered-run" / "predictions" / file).read_text()
        assert len({line.split("\t")[1] for line in text.splitlines()[1:]}) > 1
        assert not set(NAMES) & set(text.split())


def test_it_is_saved_with_its_own_order_and_names_and_evaluated_the_same_again(base, folders, tmp_path, capsys):
    saved = json.loads((folders / "own-run" / "model" / "config.json").read_text())
    assert saved["id2label"] == {str(index): name for index, name in enumerate(NAMES)}
    again = run(base, folders / "own-run" / "model", tmp_path / "again", do_eval=True)
    assert again["final"]["metrics"] == results(folders / "own-run")["final"]["metrics"]
    assert again["out_of_domain"] == results(folders / "own-run")["out_of_domain"]
    table = tiny.write_table(tmp_path / "texts.csv", ("sentence",), *zip(tiny.sentences(3, 1)[0]), separator=",")
    capsys.readouterr()
    cli.main(["predict", str(folders / "own-run" / "model"), "--file", str(table)])
    assert capsys.readouterr().out.splitlines()[0] == "\t".join(("index", "prediction", *NAMES, "sentence1"))


def test_modules_for_it_are_saved_with_its_order_too(tmp_path):
    model, params, _ = models.from_pretrained(save_head(tmp_path / "own", NAMES, ORDER), num_labels=3)
    model, params = peft.add_peft(model, params, peft.LoraConfig(rank=1), key=0)
    peft.save_peft(tmp_path / "adapter", model=model, params=params, base_model_name_or_path=str(tmp_path / "own"))
    assert peft.load_peft_model(tmp_path / "adapter")[2].id2label == dict(enumerate(NAMES))
    (tmp_path / "adapter" / "config.json").unlink()  # PEFT's own folder has none
    assert peft.load_peft_model(tmp_path / "adapter")[2].id2label == dict(enumerate(NAMES))


def test_modules_on_a_head_with_several_scores_to_a_text_are_refused(tmp_path):
    model, params, _ = models.from_pretrained(save_head(tmp_path / "base", NAMES), num_labels=3)
    model, params = peft.add_peft(model, params, peft.LoraConfig(rank=1), key=0)
    several = dataclasses.replace(model.config, problem_type="regression")
    model = model.clone(config=several)
    peft.save_peft(tmp_path / "adapter", model=model, params=params, base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(InputError, match="problem_type is regression"):
        peft.load_peft_model(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["mrpc", "cola", "rte"])
def test_metrics_are_those_of_the_tasks_classes(name):
    """F1 and Matthews' correlation know which class is which."""
    task, rng = tasks.get_task(name), np.random.default_rng(0)
    truth, logits = rng.integers(0, 2, 40).astype(np.int32), rng.normal(size=(40, 2)).astype(np.float32)
    split = Split([f"{'ann ' * (row % 3 + 1)}" for row in range(40)], None, truth, [str(row) for row in range(40)])
    tokens = batches.tokenize(split, tiny.tokenizer(), 16)
    rows = iter(np.array_split(np.argsort(tokens.lengths, kind="stable"), 5))
    predictor = evaluation.Predictor(
        lambda params, batch: logits[next(rows)][:, ::-1],  # by a head in the other order
        runners.make_runner(num_devices=1),
        task,
        {"validation": split},
        {"validation": tokens}.__getitem__,
        batch_size=8,
        order=labels.match_labels(task.labels, tuple(label.upper() for label in reversed(task.labels))),
    )
    answers, scores = logits.argmax(1), predictor.evaluate(None)
    assert scores.keys() >= set(task.metrics)
    for metric, expected in (
        ("accuracy", np.mean(answers == truth)),
        ("f1", sklearn.metrics.f1_score(truth, answers)),
        ("matthews_correlation", sklearn.metrics.matthews_corrcoef(truth, answers)),
    ):
        assert metric not in scores or scores[metric] == pytest.approx(expected)


# what is matched


@pytest.mark.parametrize(
    "ours, theirs, found",
    [
        (("a", "b"), ("b", "a"), [1, 0]),
        (("not_entailment", "entailment"), ("Entailment", "NOT-ENTAILMENT"), [1, 0]),
        (("so so", "good"), ("good", "so_so"), [1, 0]),
        (("a", "A"), ("A", "a"), [1, 0]),  # as they are written, where that is enough
        (("a", "A"), ("A", "A"), None),
        (("a", "A"), ("a", "_a"), None),
        (("a", "b"), ("a", "c"), None),
        (("a", "b"), ("a", "b", "c"), None),
        ((), ("a",), None),
    ],
)
def test_names_that_are_matched(ours, theirs, found):
    places = labels.match_labels(ours, theirs)
    assert (None if places is None else list(places)) == found


# labels of other kinds


def load(base, model, **changes):
    """The task, its splits and the model's config, as the program loads them."""
    settings = dataclasses.replace(base, model_name_or_path=str(model), out_of_domain=None, **changes).over(1)
    task, splits = glue.load_data(settings)
    return task, splits, glue.load_model(settings, task, splits)[2]


def test_a_head_without_names_has_the_tasks_order_and_that_is_said(base, tmp_path, caplog):
    model = save_head(tmp_path / "model", ("LABEL_0", "LABEL_1", "LABEL_2"))
    _, _, config = load(base, model, do_eval=True)
    assert tuple(config.id2label.values()) == tasks.get_task("mnli").labels
    (line,) = [line for line in caplog.messages if "no names" in line]
    assert "0 entailment, 1 neutral, 2 contradiction" in line


def test_a_head_with_other_names_is_trained_with_a_warning_and_not_evaluated(base, tmp_path):
    model = save_head(tmp_path / "model", ("yes", "no", "perhaps"))
    for phases in ({"do_eval": True}, {"do_predict": True}):
        settings = dataclasses.replace(base, model_name_or_path=str(model), output_dir=str(tmp_path / "run"), **phases)
        settings = dataclasses.replace(settings, out_of_domain=None)
        with pytest.raises(InputError, match="labels are 0 yes, 1 no, 2 perhaps, but the data's"):
            glue.run(settings)
        assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="labels are 0 yes, 1 no, 2 perhaps, but the data's"):
        _, _, config = load(base, model, do_train=True)
    assert tuple(config.id2label.values()) == tasks.get_task("mnli").labels


def test_a_new_head_by_the_flag(base, tmp_path, capsys, caplog):
    model = save_head(tmp_path / "model", ("yes", "no"))
    flags = tiny.flags(
        model_name_or_path=model, task_name="mnli", data_dir=base.data.data_dir, output_dir=tmp_path / "run"
    )
    assert "has 2 labels, but 3 are needed; set ignore_mismatched_sizes" in tiny.refused(capsys, "glue", *flags)
    _, _, config = load(base, model, do_train=True, ignore_mismatched_sizes=True)
    assert tuple(config.id2label.values()) == tasks.get_task("mnli").labels
    assert "newly initialized: classifier" in caplog.text


@pytest.mark.parametrize(
    "names, written, expected",
    [
        (("NEGATIVE", "POSITIVE"), ("positive", "negative"), ("negative", "positive")),
        (("POSITIVE", "NEGATIVE"), ("positive", "negative"), ("positive", "negative")),
        (("LABEL_0", "LABEL_1"), ("spam", "ham"), ("ham", "spam")),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("2", "0"), ("0", "1", "2")),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("10", "9", "-1"), ("-1", "9", "10")),
        (("good", "bad", "so so"), ("Good", "bad"), ("Good", "bad", "so so")),
    ],
)
def test_own_data_to_evaluate_on_are_matched_with_the_heads_names(base, names, written, expected, tmp_path):
    model = save_head(tmp_path / "model", names)
    rows = list(zip(tiny.sentences(4, 0)[0], [written[row % 2] for row in range(4)], strict=True))
    rows += [(rows[0][0], label) for label in written[2:]]
    file = tiny.write_table(tmp_path / "dev.csv", ("sentence", "label"), *rows, separator=",")
    own = {"task_name": None, "data_dir": None, "validation_file": str(file), "do_eval": True}
    task, splits, config = load(base, model, **own)
    assert task.labels == expected
    assert [expected[label] for label in splits["validation"].labels] == [label for _, label in rows]
    assert labels.match_labels(task.labels, list(config.id2label.values())).tolist() == list(range(len(names)))


def test_own_data_with_other_labels_than_the_heads_are_an_error_that_says_both(base, tmp_path):
    model = save_head(tmp_path / "model", ("NEGATIVE", "POSITIVE"))
    file = tiny.write_table(tmp_path / "dev.csv", ("sentence", "label"), ("ann", "spam"), ("bob", "ham"), separator=",")
    own = {"task_name": None, "data_dir": None, "validation_file": str(file), "do_eval": True}
    with pytest.raises(InputError, match="unknown label 'spam'; the labels are 'NEGATIVE', 'POSITIVE'"):
        load(base, model, **own)


def test_modules_on_a_new_pooler_need_it_trained_and_saved(base, tmp_path):
    model = save_head(tmp_path / "model", NAMES)
    weights = model / "model.safetensors"
    save_file({name: x for name, x in load_file(weights).items() if "pooler" not in name}, weights)
    with pytest.raises(InputError, match="no pooler, so a new one must be trained and saved; set --peft_pooler"):
        load(base, model, do_train=True, peft="lora")
    load(base, model, do_train=True, peft="lora", peft_pooler=True)


# ids beyond the table


def test_training_data_with_ids_beyond_the_table_are_refused_before_anything_is_written(base, folders, tmp_path):
    """In any split: the test set would be read after a training that is lost then."""
    longer = copy.deepcopy(tiny.tokenizer())
    longer.add_tokens(["zoe"])
    model = save_head(tmp_path / "model", tasks.get_task("mnli").labels)
    longer.save_pretrained(model)
    file = tiny.write_table(tmp_path / "train.csv", ("sentence", "label"), ("ann", "a"), ("bob", "b"), separator=",")
    test = tiny.write_table(tmp_path / "test.csv", ("sentence",), ("ann",), ("zoe",), separator=",")
    tiny.save_checkpoint(tmp_path / "two", 2)
    longer.save_pretrained(tmp_path / "two")
    settings = dataclasses.replace(
        base,
        model_name_or_path=str(tmp_path / "two"),
        output_dir=str(tmp_path / "run"),
        out_of_domain=None,
        task_name=None,
        data_dir=None,
        train_file=str(file),
        test_file=str(test),
        do_train=True,
        do_predict=True,
    )
    size = len(tiny.VOCABULARY)
    with pytest.raises(InputError, match=f"ids up to {size}, but the model's embedding table has {size} rows"):
        glue.run(settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["prime", "gym"])
def test_tasks_of_a_gym_with_ids_beyond_the_table_are_refused_before_anything_is_written(command, tmp_path, capsys):
    tiny.write_gym_home(tmp_path)
    longer = copy.deepcopy(tiny.tokenizer())
    longer.add_tokens(["w1"])
    tiny.write_lines(
        tmp_path / "gym" / "manners" / "manners_16_13_test.jsonl",
        [{"task": "manners", "input": "fay is w1", "output": "kind", "options": ["kind", "rude"]}] * 3,
    )
    tiny.write_lines(
        tmp_path / "gym" / "weather" / "weather_16_13_dev.jsonl",
        [{"task": "weather", "input": "ann is w1", "output": "warm", "options": ["warm", "cold"]}] * 5,
    )
    longer.save_pretrained(tmp_path / "model")
    flags = tiny.flags(
        model_name_or_path=tmp_path / "model",
        data_dir=tmp_path / "gym",
        partition=tmp_path / "partition.json",
        output_dir=tmp_path / "run",
        shots=16,
        **({} if command == "gym" else {"num_devices": 1}),
    )
    size = len(tiny.VOCABULARY)
    line = tiny.refused(capsys, command, *flags)
    assert f"the model's embedding table has {size} rows" in line and not (tmp_path / "run").exists()
