"""The studies of priming: the commands that they give, and what they decide from what is finished."""

import json

import numpy as np
import pytest
import tiny
import tiny_t5

from benchmarks import primed_encoder, primed_seq2seq, priming_study
from pats_jax.data import load_gym
from pats_jax.errors import InputError
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.run import flags

SEQ2SEQ = primed_seq2seq.PrimedSeq2Seq("t5", "gym", "out")


@pytest.fixture
def study(tmp_path):
    with priming_study.open_study(str(tmp_path / "out"), ["--max_seq_length", "16"], 1) as study:
        yield study


@pytest.mark.parametrize(
    ("name", "stage", "common"),
    [
        *(
            (name, stage, primed_encoder.PrimedEncoder("gym", "out").common)
            for name, stage in primed_encoder.STAGES.items()
        ),
        *((name, stage, SEQ2SEQ.common) for name, stage in SEQ2SEQ.stages().items()),
    ],
)
def test_a_stage_is_a_command_of_prime(name, stage, common):
    given = [*common, "--output_dir", "x", *stage.command(stage.rates[0])]
    settings = flags.parse(given, "pats-jax prime", PrimingSettings)
    settings.check()
    assert f"{settings.upstream.algorithm}-{settings.upstream.train}" == name
    assert settings.optimizer.learning_rate == float(stage.rates[0])
    assert settings.loop.eval_steps == stage.check_steps and settings.upstream.max_steps == stage.max_steps


def test_the_rate_with_the_best_dev_score_is_chosen(study, monkeypatch):
    """Of finished runs, which are not repeated; what is missing is asked for with the steps of the search."""
    stage = priming_study.Stage(("--algorithm", "mtl"), ("1e-4", "1e-3"), 5, 100)
    for rate, best, last in (("1e-4", 0.5, 0.2), ("1e-3", 0.4, 0.4)):
        results = {"model_name_or_path": "m", "algorithm": "mtl", "train": "plm", "peft": None, "head": "embedding"}
        results |= {"seed": 1, "upstream_tasks": [], "final": {"step": 5, "metrics": {"accuracy": last}}}
        folder = study.root / "rates" / f"one-{rate}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results | {"best": {"step": 5, "metrics": {"accuracy": best}}}))
    asked = []
    monkeypatch.setattr(priming_study.Study, "_run", lambda self, commands, count: asked.append(commands))
    assert study.best_rates({"one": stage}, 2, []) == {"one": "1e-4"} and asked == [{}]
    study.prime({"two": stage.command("1e-4")})
    assert list(asked[-1]) == ["two"] and asked[-1]["two"][0] == "prime"


def test_a_command_that_fails_is_named_with_its_last_line(study):
    with pytest.raises(InputError, match=r"one\.log: --train pe: needs an adapter"):
        study.prime({"one": ("--train", "pe")})


def test_a_constant_answer(tmp_path):
    """The most frequent training answer, or a guess where all answers differ."""
    gym = load_gym(str(tiny_t5.write_gym(tmp_path / "gym")), tasks=["manners", "riddle", "names"])
    sample = gym["manners"].sample(13)
    answers = [row.output for row in sample.train]
    frequent = max(dict.fromkeys(answers), key=answers.count)
    right = [row.output for row in sample.test]
    assert gym["manners"].answer_metric == "accuracy"
    assert primed_seq2seq.constant_score(gym["manners"], 13, 100) == np.mean([answer == frequent for answer in right])
    assert primed_seq2seq.constant_score(gym["riddle"], 13, 100) == pytest.approx(0.2)
    sample = gym["names"].sample(13)
    answers = [row.output for row in sample.train]
    frequent = max(dict.fromkeys(answers), key=answers.count)
    share = np.mean([frequent in row.right_answers for row in sample.test])
    assert 0 < share < 1 and gym["names"].answer_metric == "exact_match"
    assert primed_seq2seq.constant_score(gym["names"], 13, 100) == share


def test_answers_are_written_as_the_tokenizer_writes_them(tmp_path):
    model = tiny.save_checkpoint(tmp_path / "model")
    row = {"task": "one", "input": "Ann is Warm.", "output": "Warm", "options": ["Warm", "Cold"], "more": 1}
    tiny.write_lines(tmp_path / "gym" / "one" / "one_16_13_train.jsonl", [row])
    settings = primed_seq2seq.PrimedSeq2Seq(str(model), str(tmp_path / "gym"), str(tmp_path / "out"))
    primed_seq2seq.write_tasks(settings, ["one"])
    written = json.loads((tmp_path / "out" / "tasks" / "one" / "one_16_13_train.jsonl").read_text())
    assert written == row | {"output": "warm", "options": ["warm", "cold"]}
    with pytest.raises(InputError, match="no files of the task two"):
        primed_seq2seq.write_tasks(settings, ["two"])


def test_targets_are_those_with_the_largest_gains_of_direct_tuning(tmp_path, study):
    """With so many text-to-text tasks at least; a task without a gain is none."""
    tiny_t5.write_gym(study.root / "tasks")
    names = ["manners", "choice", "riddle", "who"]
    gym = load_gym(str(study.root / "tasks"), tasks=names)
    gains = {"manners": 0.2, "choice": 0.3, "riddle": -0.1, "who": 0.25}
    for name, gain in gains.items():
        constant = primed_seq2seq.constant_score(gym[name], 13, 100)
        record = {"algorithm": "direct", "task": name, "sample": 13, "test": constant + gain}
        primed = record | {"algorithm": "mtl", "test": 9.0}
        for arm, line in (("direct-lora", record), ("mtl-plm-1-lora", primed)):
            path = study.root / "gym" / "tunings" / arm / f"{name}-13.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(line))

    def chosen(targets, text_targets):
        settings = primed_seq2seq.PrimedSeq2Seq("t5", "gym", "out", targets=targets, text_targets=text_targets)
        return primed_seq2seq.choose_targets(settings, gym, primed_seq2seq.direct_gains(settings, study, gym))

    assert chosen(1, 0) == ["choice"] and chosen(1, 1) == ["who"] and chosen(3, 1) == ["choice", "manners", "who"]
    with pytest.raises(InputError, match="on 3 tasks; 4 are needed"):
        chosen(4, 1)
    with pytest.raises(InputError, match="on 1 text-to-text tasks; 2 are needed"):
        chosen(4, 2)


@pytest.mark.slow
def test_a_study_from_its_data_to_its_report(tmp_path, monkeypatch, capsys):
    """All commands for a tiny T5; the second time, nothing is left to run."""
    home = tiny_t5.write_home(tmp_path)
    monkeypatch.setattr(primed_seq2seq, "UPSTREAM", ["weather", "voice"])
    monkeypatch.setattr(primed_seq2seq, "DEV", ["who"])
    monkeypatch.setattr(primed_seq2seq, "CANDIDATES", ["manners", "names"])
    monkeypatch.setattr(primed_seq2seq, "constant_score", lambda *_: -1.0)
    for name in ("TUNING_RATES", "MODEL_RATES", "LORA_RATES"):
        monkeypatch.setattr(primed_seq2seq, name, ("1e-3",))
    out = tmp_path / "out"
    args = ["--model", str(home / "model"), "--data_dir", str(home / "gym"), "--output_dir", str(out), "--jobs", "1"]
    args += "--steps 2 --meta_steps 2 --checks 2 --tuning_steps 2 --targets 2 --text_targets 1 --samples 13".split()
    args += "--max_seq_length 16 --max_target_length 6".split()
    primed_seq2seq.main(args)
    arms = {path.name for path in (out / "gym" / "tunings").iterdir()}
    assert len(arms) == 5 and (out / "gym" / "report" / "report.html").exists()
    assert all(len(list((out / "gym" / "tunings" / arm).iterdir())) == 2 for arm in arms)
    capsys.readouterr()
    primed_seq2seq.main(args)
    assert "rates/mtl" not in capsys.readouterr().out
