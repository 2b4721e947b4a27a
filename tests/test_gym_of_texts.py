"""`pats-jax prime` and `gym` with a T5: what is trained and written, what is refused, CrossFit's recipe."""

import io
import json

import jax
import numpy as np
import pytest
import rich.console
import tiny
import tiny_t5
from safetensors.numpy import load_file

from pats_jax import models
from pats_jax.data import load_gym
from pats_jax.data.few_shot import Row, Sample, build_task
from pats_jax.data.partitions import Partition
from pats_jax.priming import answerers, downstream, upstream
from pats_jax.priming.gym_settings import GymSettings
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.run import flags, run_folder

QUICK = {"max_seq_length": 16, "max_target_length": 6, "head": "generate"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tiny_t5.write_home(tmp_path_factory.mktemp("home"))
    lists = tiny_t5.PARTITION | {"train": ["weather", "voice"], "dev": ["who"]}
    (home / "short.json").write_text(json.dumps(lists))
    return home


def names_of(home):
    paths = {"model_name_or_path": "model", "data_dir": "gym", "partition": "partition.json"}
    return {name: str(home / path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def primed(home, tmp_path_factory):
    """A T5 primed on two tasks with options, watched on one without."""
    folder, out = tmp_path_factory.mktemp("primed") / "run", io.StringIO()
    settings = PrimingSettings(
        **names_of(home) | {"partition": str(home / "short.json")},
        **QUICK,
        max_steps=2,
        eval_steps=2,
        learning_rate=1e-2,
        task_batch_size=4,
        tasks_per_step=2,
        save_steps=0,
        num_devices=1,
        seed=1,
        output_dir=str(folder),
    )
    upstream.run(settings, rich.console.Console(file=out, width=200))
    return folder, out.getvalue()


def test_a_primed_t5_is_a_whole_checkpoint(home, primed):
    """Every tensor has moved; the config, with its own dropout, and the settings of generation are the checkpoint's."""
    folder, out = primed
    results = run_folder.read_results(folder)
    assert (results["head"], results["upstream_tasks"]) == ("generate", ["weather", "voice"])
    (score,) = results["final"]["metrics"].values()
    assert 0 <= score <= 1 and f"dev score {score:.4f}" in out and results["final"]["step"] == 2
    before, after = (models.from_pretrained_seq2seq(path) for path in (home / "model", folder / "model"))
    assert before[2] == after[2]
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before[1], after[1])
    assert all(jax.tree.leaves(moved))
    ours, theirs = (models.GenerationConfig.from_pretrained(path) for path in (home / "model", folder / "model"))
    assert ours == theirs
    assert "| dev tasks | step | score |" in (folder / "README.md").read_text()


def tune(home, folder, **changes):
    """Start, task and sample -> record."""
    quick = QUICK | {"kinds": ("full",), "grid": ("full=1e-2",), "samples": (13,), "warmup_ratio": 0.0}
    settings = GymSettings(**names_of(home), **quick | changes, output_dir=str(folder), per_device_eval_batch_size=6)
    out = io.StringIO()
    downstream.run(settings, ["--some", "flags"], rich.console.Console(file=out, width=200))
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("tunings/direct-full/*.json"))}


def test_every_target_is_learnt_and_scored_by_its_own_metric(home, tmp_path):
    """Untuned, the model generates no right answer; after a few steps it gives some."""
    records = tune(home, tmp_path / "gym", max_steps=60, eval_steps=30, grid=("full=3e-2",))
    assert {name: (one["metric"], one["chance"]) for name, one in records.items()} == {
        "choice-13": ("accuracy", pytest.approx(1 / 3)),
        "manners-13": ("accuracy", 0.5),
        "names-13": ("exact_match", 0.0),
    }
    for name in ("manners-13", "names-13"):
        assert records[name]["curve"]["dev"][0] == 0 and records[name]["test"] > 0.2, records[name]
    assert all(one["test_rows"] == 12 and one["crossfits_sampling"] is None for one in records.values())


def test_options_are_chosen_by_likelihood(home, tmp_path):
    """Before the first step the dev score is that of an option-by-option computation; both batch sizes are tried."""
    changes = {"head": "likelihood", "tasks": ("manners",), "max_steps": 1, "batch_grid": (6, 99), "ties": "first"}
    (record,) = tune(home, tmp_path / "gym", **changes).values()
    model, params, _ = models.from_pretrained_seq2seq(home / "model")
    sample = load_gym(home / "gym")["manners"].samples[0]

    @jax.jit
    def log_p(ids, read, right):
        found = jax.nn.log_softmax(model.apply({"params": params}, ids, decoder_input_ids=read))
        return found[0, np.arange(2), right].mean()

    right = 0
    for row in sample.dev:
        words = [tiny_t5.VOCABULARY.index(word) for word in ["[manners]", *row.input.split()]]
        options = [tiny_t5.VOCABULARY.index(option) for option in row.options]
        scores = [log_p(np.array([[*words, 1]]), np.array([[0, own]]), np.array([own, 1])) for own in options]
        right += int(np.argmax(scores)) == row.answer
    assert record["curve"]["dev"][0] == pytest.approx(right / len(sample.dev)) and 0 < right
    assert record["batch_sizes"] == [6, 99] and record["metric"] == "accuracy"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "train"), [("mtl", "pe"), ("maml", "pe"), ("reptile", "plm+pe"), ("fomaml", "plm")]
)
def test_every_part_is_primed_by_every_algorithm_and_tuned_by_lora(home, tmp_path, algorithm, train):
    """What is trained is saved and has moved; LoRA is then tuned from the stage and from the unprimed model."""
    kind = "lora" if "pe" in train else None
    quick = {"max_steps": 2, "learning_rate": 1e-2, "inner_learning_rate": 1e-2, "tasks_per_step": 2, "seed": 1}
    upstream.run(
        PrimingSettings(
            **names_of(home) | {"partition": str(home / "short.json")},
            **QUICK,
            **quick | ({"lora_rank": 2} if kind else {}),
            algorithm=algorithm,
            train=train,
            peft=kind,
            eval_steps=2,
            save_steps=0,
            num_devices=1,
            output_dir=str(tmp_path / "primed"),
        )
    )
    assert (tmp_path / "primed" / "model").exists() == ("plm" in train)
    assert (tmp_path / "primed" / "adapter").exists() == ("pe" in train)
    if kind:
        adapter = load_file(tmp_path / "primed" / "adapter" / "adapter_model.safetensors")
        assert all(np.any(x) for name, x in adapter.items() if "lora_B" in name) and adapter
    changes = {"kinds": ("lora",), "grid": ("lora=1e-2",), "lora_rank": 2, "tasks": ("names",), "max_steps": 1}
    tune(home, tmp_path / "gym", **changes, primed=(str(tmp_path / "primed"),))
    starts = {path.parent.name for path in tmp_path.glob("gym/tunings/*/names-13.json")}
    assert starts == {"direct-lora", f"{algorithm}-{train}-seed1-lora"}


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "embedding"}, "model is an encoder-decoder; use --head generate or likelihood"),
        ({"head": "likelihood"}, "names is text to text, without options for --head likelihood; take it off"),
        ({"attention_dropout": 0.1}, "--attention_dropout: T5 and BART have one rate here; use --hidden_dropout"),
        ({"batch_grid": (4, 0)}, "--batch_grid 4 0: each must be at least 1"),
        ({"head": "embedding", "num_beams": 2}, "--num_beams: is read with --head generate and likelihood only"),
    ],
)
def test_wrong_settings_of_a_gym(home, tmp_path, capsys, changes, message):
    given = names_of(home) | {"head": "generate", "kinds": ("full",), "output_dir": str(tmp_path / "gym")} | changes
    assert message in tiny.refused(capsys, "gym", *tiny.flags(**given))


def test_an_encoder_generates_nothing_and_answers_no_texts(tmp_path, capsys):
    tiny.write_gym_home(tmp_path)
    tiny_t5.write_gym(tmp_path / "gym")
    (tmp_path / "partition.json").write_text(json.dumps({"train": ["weather", "who"], "dev": [], "test": ["manners"]}))
    given = names_of(tmp_path) | {"output_dir": str(tmp_path / "run"), "num_devices": 1}
    found = tiny.refused(capsys, "prime", *tiny.flags(**given, head="generate"))
    assert found.endswith("model is an encoder; use --head embedding")
    found = tiny.refused(capsys, "prime", *tiny.flags(**given))
    assert found.startswith(
        f"--partition {tmp_path / 'partition.json'}: who is text to text, without options for --head e"
    )


# CrossFit's recipe


def parsed(kind, *args):
    return flags.parse(["--output_dir", "x", *args], "pats-jax", kind)


def test_the_preset_of_tuning():
    """CrossFit's scripts; a flag that is given counts."""
    found = parsed(GymSettings, "--preset", "crossfit")
    assert (found.tuning.head, found.tuning.max_steps, found.tuning.eval_steps) == ("generate", 1000, 100)
    assert found.tuning.learning_rates("full") == (1e-5, 2e-5, 5e-5) and found.tuning.batch_sizes == (2, 4, 8)
    assert (found.model.max_seq_length, found.text.max_target_length, found.text.num_beams) == (512, 64, 4)
    text = found.text
    assert (text.loss_reduction, text.label_smoothing_factor, text.start_with_bos) == ("sum", 0.1, True)
    assert (found.optimizer.max_grad_norm, found.optimizer.weight_decay, found.tuning.ties) == (0.1, 0.01, "first")
    own = parsed(GymSettings, "--preset", "crossfit", "--num_beams", "1", "--max_steps=9", "--batch_grid", "3")
    assert (own.text.num_beams, own.tuning.max_steps, own.tuning.batch_sizes) == (1, 9, (3,))
    assert "preset" not in own.to_dict() and own.text.label_smoothing_factor == 0.1


@pytest.mark.parametrize(
    ("algorithm", "steps", "rate", "warmup", "rows"), [("mtl", 16_980, 3e-5, 1018, 32), ("maml", 6000, 1e-5, 360, 64)]
)
def test_the_presets_of_the_upstream_stage(algorithm, steps, rate, warmup, rows):
    found = parsed(PrimingSettings, "--preset", "crossfit", "--algorithm", algorithm)
    settings = found.upstream
    assert (settings.algorithm, settings.max_steps, found.optimizer.learning_rate) == (algorithm, steps, rate)
    assert found.optimizer.warmup_ratio * steps == pytest.approx(warmup) and found.optimizer.max_grad_norm == 0.1
    assert settings.tasks_per_step * settings.task_batch_size == rows and settings.head == "generate"
    if algorithm == "maml":
        assert (settings.inner_learning_rate, settings.inner_batch_size, settings.inner_steps) == (3e-5, 16, 1)


def test_what_a_preset_does_not_have(capsys, tmp_path):
    found = tiny.refused(capsys, "prime", "--preset", "crossfit", "--algorithm", "reptile")
    assert found == "--preset crossfit: CrossFit has no code for reptile, only for mtl and maml"
    (tmp_path / "config.json").write_text("{}")
    found = tiny.refused(capsys, "gym", "--preset", "crossfit", "--config", str(tmp_path / "config.json"))
    assert found.startswith("--preset: cannot be used with --config")


def test_what_is_odd_about_the_data_is_said():
    """A leak that a partition names, and samples of CrossFit's tasks that are not drawn as CrossFit draws them."""
    rows = tuple(Row(f"text {number}", ("no", "yes"), number % 2) for number in range(16))
    gym = {name: build_task(name, [Sample(13, rows, rows, rows)]) for name in ("sick", "anli", "mine")}
    out = io.StringIO()
    partition = Partition(("anli",), (), ("sick", "mine"), leaks=("sick",))
    answerers.tell_about_data(rich.console.Console(file=out, width=300), gym, partition, "of_nli")
    leak, sampling = out.getvalue().splitlines()
    assert leak == "of_nli: sick is upstream and a target in CrossFit's file, a leak; here it is a target only"
    assert sampling.startswith("not CrossFit's sampling: 2 of 2 tasks have 16 rows in all in train")
