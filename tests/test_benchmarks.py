"""The benchmarks: measuring in turns, the guard, the table of goals, and every subject once on a tiny model."""

import dataclasses
import functools
import gc
import json
import math
import re
import statistics
import subprocess
import sys
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import tiny

import pats_jax
from benchmarks import (
    against_torch,
    cases,
    check,
    compilation,
    goals,
    long_texts,
    memory,
    optimizer,
    pipeline,
    priming,
    report,
    step,
    text_to_text,
)
from benchmarks.__main__ import SUBJECTS, main
from benchmarks.cases import Case
from benchmarks.checkpointing import Checkpoint
from benchmarks.devices import Devices
from benchmarks.turns import Turns, take_turns, take_turns_in_set_ups
from pats_jax.errors import InputError
from pats_jax.training import runners

MACHINE = {"platform": "cpu", "device_kind": "cpu", "devices": 1, "cores": 2, "processor": "x", "system": "y"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a tiny model."""
    return str(tiny.save_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", 2))


@pytest.fixture
def one_device(monkeypatch):
    """Runners take one of the eight virtual devices, for which programs compile in half the time."""
    make_runner = functools.partial(runners.make_runner, num_devices=1)
    monkeypatch.setattr(runners, "make_runner", make_runner)


def silent_console():
    """A console that shows nothing."""
    return rich.console.Console(quiet=True)


# turns


class Clock:
    """Seconds that pass only in calls of variants: so many for each, times a factor that drifts from round to round."""

    def __init__(self, **costs):
        self.now, self.calls, self._costs, self.drift = 0.0, [], costs, lambda number: 1.0

    def __call__(self):
        return self.now

    def variants(self):
        return {name: lambda name=name: self._run(name) for name in self._costs}

    def _run(self, name):
        round_number = len(self.calls) // len(self._costs)
        self.now += self._costs[name] * self.drift(round_number)
        self.calls.append(name)


def test_turns_call_each_variant_once_a_round():
    clock = Clock(a=1.0, b=3.0, c=2.0)
    turns = take_turns(clock.variants(), 5, warm_up=2, clock=clock)
    assert turns.seconds == {"a": [1.0] * 5, "b": [3.0] * 5, "c": [2.0] * 5}
    rounds = [clock.calls[begin : begin + 3] for begin in range(0, len(clock.calls), 3)]
    assert len(rounds) == 7 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1  # not always one after the same other one


def test_untimed_calls_come_right_before_the_timed_one():
    clock = Clock(a=1.0, b=3.0)
    turns = take_turns(clock.variants(), 2, untimed=2, clock=clock)
    assert turns.seconds == {"a": [1.0] * 2, "b": [3.0] * 2}
    assert all(len(set(clock.calls[begin : begin + 3])) == 1 for begin in range(0, len(clock.calls), 3))
    assert len(clock.calls) == 3 * 2 * 3  # rounds, variants, calls


def test_set_ups_allocate_anew_in_another_order_with_the_last_ones_freed():
    clock, allocated, alive = Clock(a=1.0, b=3.0, c=2.0), [], weakref.WeakSet()
    runs = clock.variants()

    class Held:
        pass

    def start(name):
        assert len(alive) == len(allocated) % 3
        held = Held()
        alive.add(held)
        allocated.append(name)
        return lambda: (held, runs[name]())

    turns = take_turns_in_set_ups({name: functools.partial(start, name) for name in runs}, 4, 2, clock=clock)
    assert turns.seconds == {"a": [1.0] * 8, "b": [3.0] * 8, "c": [2.0] * 8}
    orders = [tuple(allocated[begin : begin + 3]) for begin in range(0, 12, 3)]
    assert len(allocated) == 12 and all(sorted(one) == ["a", "b", "c"] for one in orders) and len(set(orders)) > 1


def test_ratio_is_not_changed_by_a_machine_that_becomes_slower():
    clock = Clock(base=1.0, other=1.25)
    clock.drift = lambda number: 1.5**number
    turns = take_turns(clock.variants(), 9, clock=clock)
    assert turns.ratio("other", "base") == pytest.approx(1.25)
    assert turns.ratio("base", "base") == 1


def test_medians_ratios_and_differences_of_chosen_rounds():
    turns = Turns({"base": [1.0, 2.0, 4.0, 1.0], "other": [3.0, 4.0, 6.0, 100.0]})
    assert turns.median("other") == 5.0 and turns.median("base", [0, 3]) == 1.0
    assert turns.ratio("other", "base", [0, 1, 2]) == 2.0  # of 3, 2, 1.5
    assert turns.ratio("other", "base", iter([0])) == 3.0
    assert turns.difference("other", "base") == 2.0  # of 2, 2, 2, 99


def test_turns_wait_for_the_device(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    take_turns({"a": lambda: "result"}, 2, warm_up=0)
    assert waited == ["result"] * 2


# cases


@pytest.mark.parametrize("text", ["minilm", "minilm:32", "minilm:0x8", ":8x8", "minilm:8x"])
def test_bad_cases_are_told(text):
    with pytest.raises(InputError, match="MODEL:ROWSxLENGTH"):
        Case.parse(text)


def test_variants_change_the_settings():
    assert Case.parse("a/b:c:8x16") == Case("a/b:c", 8, 16)
    settings = cases.settings_of("r-drop+pats:all:normal:bfloat16")
    assert (settings.method, settings.flat()["noise_layers"]) == ("r-drop+pats", ".")
    assert tuple(settings.flat()[name] for name in ("distribution", "sensitivity_dtype")) == ("normal", "bfloat16")
    assert str(jax.random.key_impl(cases.settings_of("pats:rbg").seed)) == "rbg"
    with pytest.raises(InputError, match="no such change: none"):
        cases.settings_of("pats:none")


@pytest.mark.parametrize("name, parameters", [("bert-tiny", 4_386_178), ("bert-base", 109_483_778)])
def test_sizes_are_those_of_googles_models(name, parameters):
    """The counts that Transformers' BertForSequenceClassification has for two labels."""
    layers, width = cases.SIZES[name]
    vectors = width * (30522 + 512 + 2 + 2)  # embeddings and their LayerNorm
    layer = 4 * (width * width + width) + 8 * width * width + 5 * width + 4 * width
    assert vectors + layers * layer + width * width + width + 2 * width + 2 == parameters
    if name == "bert-tiny":
        assert cases.size(cases.load_model(name)[1]) == parameters


def test_bytes_of_trees():
    tree = {"a": jnp.zeros((3, 5)), "b": jnp.zeros(2, jnp.bfloat16), "key": pats_jax.random.fast_key(0), "n": None}
    assert cases.num_bytes(tree) == 60 + 4 + 8


# subjects


@pytest.mark.slow  # a subject of the benchmarks as a whole
def test_step_tells_methods_and_stages_apart(checkpoint, one_device):
    subject = step.Step(cases=(f"{checkpoint}:8x8",), methods=("finetune", "dps-dense", "pats"), rounds=4,
                        together=2)  # fmt: skip
    results = subject.run()
    key = f"{checkpoint} 8x8"
    assert set(results.ratios) == {f"{key} {name}" for name in ("dps-dense", "dps-dense stage start", "pats")}
    for name in subject.methods:
        figures = results.measured[f"{key} {name}"]
        assert figures["compilations"] == 1 and len(figures["seconds"]) == 4
        assert figures["program"]["kernels"] > 0 and figures["program"]["flops"] > 0
        assert figures["examples_per_second"] == pytest.approx(8 / figures["median_seconds"])
    state = {name: results.measured[f"{key} {name}"]["state_bytes"] for name in subject.methods}
    assert state["finetune"] < state["pats"]


@pytest.mark.slow  # a subject of the benchmarks as a whole
def test_step_in_bfloat16_times_several_together(checkpoint, one_device):
    methods = ("finetune", "dps-dense:stacked")
    results = step.Step(cases=(f"{checkpoint}:8x8",), methods=methods, rounds=2, dtype="bfloat16", pipelined=3).run()
    figures = results.measured[f"{checkpoint} 8x8 dps-dense:stacked"]
    assert len(figures["seconds"]) == 2 and (figures["dtype"], figures["pipelined"]) == ("bfloat16", 3)
    assert figures["stage_start_ratio"] is None and figures["compilations"] == 1


@pytest.mark.slow  # a subject of the benchmarks as a whole
def test_priming_measures_algorithms_and_what_tasks_in_turn_save(checkpoint, one_device):
    subject = priming.Priming(case=f"{checkpoint}:4x8", tasks=2, variants=("maml:lora",), rounds=2,
                              memory_case=f"{checkpoint}:64x16")  # fmt: skip
    results = subject.run()
    assert set(results.ratios) == {f"{checkpoint} 4x8 {name}" for name in ("fomaml", "maml:lora")}
    assert results.ratios[f"{checkpoint} 4x8 fomaml"] == 1.0
    together, in_turn = (results.sizes[f"{checkpoint} 64x16 maml {name}"] for name in ("together", "in turn"))
    assert 0 < in_turn < together


def test_steps_in_which_dps_chooses():
    """Those are the ones in which its thresholds leave 0."""
    subject = step.Step(stage_steps=3, rounds=20)
    settings = cases.settings_of("dps-dense", update_ratio=subject._update_ratio)
    assert int(subject._total_steps * settings.flat()["update_ratio"]) == 3
    tx = pats_jax.dps_dense(0.5, stage_steps=3)
    params = {"w": jnp.arange(1.0, 5.0)}
    state, chooses = tx.init(params), []
    for count in range(20):
        before = float(state.threshold["w"])
        _, state = tx.update(params, state, params)
        if before == 0 and float(state.threshold["w"]) > 0:
            chooses.append(count)
    assert chooses == [count for count in range(20) if subject._starts_subnetwork(count)] == [3, 9, 15]


def test_compilations_inside_a_function_only():
    function = jax.jit(lambda x: x * 3.5 - 1)
    counted = step.Counted(lambda: function(jnp.ones(counted_shape)))
    for counted_shape in ((3,), (3,), (4,)):
        jnp.ones(counted_shape)
        counted()
        jax.jit(lambda x: x * 4.5 - 1)(jnp.ones(counted_shape))
    assert counted.compilations == 2
    freed = weakref.ref(counted)
    del counted
    gc.collect()
    assert freed() is None  # nor the training state that it holds


def test_groups():
    assert list(step.groups("abcde", 2)) == ["ab", "cd", "e"]
    assert list(step.groups("", 2)) == [""]


@pytest.mark.slow
def test_optimizer_measures_against_the_bytes(checkpoint, monkeypatch):
    monkeypatch.setattr(optimizer, "COPY_ENTRIES", 1000)
    subject = optimizer.Optimizer(
        models=(checkpoint,),
        variants=("pats:all",),
        more_variants=("pats:all:bfloat16",),
        growth=(checkpoint,),
        set_ups=2,
        rounds=2,
        pipelined=3,
    )
    results = subject.run()
    assert set(results.ratios) == {f"{checkpoint} pats:all", f"{checkpoint} pats:all:bfloat16"}
    figures = results.measured[f"{checkpoint} pats:all"]
    assert figures["ratio_by_bytes"] == 1.5  # 12 words to 8
    assert len(figures["seconds"]) == len(figures["base_seconds"]) == 4
    assert figures["bytes"] == 48 * figures["parameters"] and figures["noisy_parameters"] == figures["parameters"]
    assert figures["least_bytes"] == 44 * figures["parameters"] and figures["pipelined"] == 3
    least_seconds = figures["least_bytes"] / figures["copy_bytes_per_second"]
    assert figures["to_memory"] == pytest.approx(figures["median_seconds"] / least_seconds)
    assert figures["program"]["kernels"] > results.measured[f"{checkpoint} finetune"]["program"]["kernels"] > 0
    assert results.measured[f"{checkpoint} pats:all:bfloat16"]["least_bytes"] == 40 * figures["parameters"]
    assert results.measured[f"{checkpoint} pats:all:bfloat16"]["bytes"] == 42 * figures["parameters"]
    assert results.measured[f"{checkpoint} finetune"]["bytes"] == 32 * figures["parameters"]
    growth = results.measured[f"growth {checkpoint}"]
    extra = [seconds - base for seconds, base in zip(growth["seconds"], growth["base_seconds"], strict=True)]
    assert growth["parameters"] == figures["parameters"] and growth["extra_seconds"] == statistics.median(extra)
    assert goals.growth({"measured": results.measured}) == [growth]


@pytest.mark.slow
def test_memory_counts_state_and_temporaries(checkpoint):
    subject = memory.Memory(
        cases=(f"{checkpoint}:8x8",),
        update_methods=("finetune", "pats:all"),
        step_methods=("finetune",),
        state_methods=("finetune", "pats:all", "pats:all:bfloat16", "bitfit"),
    )
    results = subject.run()
    beyond = {
        name: results.measured[f"{checkpoint} {name} state"]["beyond_adamw_per_parameter"]
        for name in subject.state_methods
    }
    assert beyond["finetune"] == 0 and beyond["bitfit"] < -7
    assert 4 <= beyond["pats:all"] < 4.2 and 2 <= beyond["pats:all:bfloat16"] < 2.2  # and some scalars
    update = results.measured[f"{checkpoint} pats:all update"]
    size = cases.size(cases.load_model(checkpoint)[1])
    assert 20 * size <= update["arguments"] < 20.5 * size  # parameter, gradient, two moments, sensitivity
    assert update["total"] == update["arguments"] + update["results"] - update["aliased"] + update["temporaries"]
    assert results.sizes[f"{checkpoint} 8x8 finetune step temporaries"] > 0


@pytest.mark.slow  # a subject of the benchmarks as a whole
def test_pipeline_reads_tiny_data(checkpoint, one_device, tmp_path):
    subject = pipeline.Pipeline(
        data_dir=str(tiny.write_sst2(tmp_path)),
        model=checkpoint,
        epoch_task="sst2",
        waiting_steps=3,
        batch_size=8,
        max_seq_length=16,
        rounds=1,
    )
    results = subject.run()
    bucketed, padded = (results.measured[f"sst2 {side}"] for side in ("bucketed", "padded"))
    assert padded["steps_by_length"] == {16: 3}  # 22 rows
    assert sum(bucketed["steps_by_length"].values()) == 3 and bucketed["padding_share"] < padded["padding_share"] < 1
    assert results.ratios["sst2 epoch bucketed / padded"] > 0
    assert 0 <= results.measured["sst2 waiting"]["waiting_share"] < 1


def test_time_between_steps_counts_as_waiting():
    watched = pipeline.Watched(lambda state, batch: (state, {"loss": 0.0}))
    for _ in range(3):
        watched(None, None)
        time.sleep(0.03)
    # the pause after the last step is none; a virtual machine's clock may lose some of a sleep
    assert 0.045 <= watched.waiting_seconds() < 0.5


@pytest.mark.slow  # a subject of the benchmarks as a whole
def test_devices_and_checkpoint_run(checkpoint):
    results = Devices(case=f"{checkpoint}:8x8", method="finetune", counts=(2,), rounds=1).run()
    assert set(results.ratios) == {"jit, 2 devices", "pmap, 2 devices"}
    with pytest.raises(InputError, match="JAX has 8 devices"):
        Devices(case=f"{checkpoint}:8x8", counts=(16,)).run()
    results = Checkpoint(case=f"{checkpoint}:8x8", save_steps=2, rounds=1).run()
    assert results.measured["checkpoint"]["bytes_per_parameter"] > 4


@pytest.mark.slow
def test_first_step_in_a_new_process(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    figures = compilation.first_step_in_new_process(Case(checkpoint, 4, 8), "pats", 6, str(tmp_path))
    assert figures["total"] == pytest.approx(sum(figures[part] for part in ("trace", "lower", "compile")))
    assert figures["second_shape"] > 0 and figures["instructions"] > 100
    assert any(tmp_path.iterdir())  # compiled programs are kept
    assert compilation.summary([figures] * 2, [dict(figures, total=figures["total"] / 2)] * 2)["ratio"] == 2


@pytest.mark.parity
def test_torch_makes_the_same_steps(checkpoint, tmp_path):
    """Losses before each of four steps, without dropout, at a learning rate that moves them."""
    config = dataclasses.replace(tiny.CONFIG, classifier_dropout=0.0)
    params = tiny.random_params(config)
    pats_jax.models.save_pretrained(tmp_path, params=params, config=config)
    batch = cases.random_batch(config.vocab_size, 8, 8)
    settings = cases.settings_of("finetune", learning_rate=1e-2, max_steps=4)
    model = pats_jax.models.SequenceClassifier(config)
    ours = cases.Training(model, params, settings, 4, batch).start(runners.make_runner(num_devices=1))
    expected = [float(ours()[1]["loss"]) for _ in range(4)]
    assert abs(expected[0] - expected[-1]) > 0.01
    for way in (against_torch.Way(), against_torch.Way(attention="eager", fused=False)):
        theirs = against_torch.torch_step(
            against_torch.load_torch_model(str(tmp_path), way.attention), way, settings, batch
        )
        np.testing.assert_allclose([float(theirs()) for _ in range(4)], expected, atol=1e-4)


@pytest.mark.parity
def test_torch_subject_runs(checkpoint):
    results = against_torch.AgainstTorch(cases=(f"{checkpoint}:8x8",), methods=("finetune",), rounds=1, rounds_alone=1,
                                         torch_ways=("eager", "eager:adamw"), dtype="bfloat16",
                                         pipelined=2).run()  # fmt: skip
    theirs = results.measured[f"{checkpoint} 8x8 torch"]
    assert theirs["fastest"] in theirs["median_seconds_alone_by_way"].keys() == {"eager", "eager:adamw"}
    assert results.measured[f"{checkpoint} 8x8 finetune"]["program"]["kernels"] > 0
    assert set(results.ratios) == {f"{checkpoint} 8x8 finetune"} and "torch" in results.versions


@pytest.mark.slow
@pytest.mark.parity
def test_text_to_text_against_torch():
    """Both sides train and generate; what is generated has the length that is asked for."""
    sizes = {"rows": 2, "source_length": 12, "target_length": 6, "layers": 1, "width": 64, "vocab_size": 90}
    results = text_to_text.TextToText(**sizes, beams=(1, 2), rounds=1).run()
    names = {"step 2x(12+6)", "generate 2x12, 1 beams, 6 tokens", "generate 2x12, 2 beams, 6 tokens"}
    assert set(results.ratios) == names and all(ratio > 0 for ratio in results.ratios.values())
    assert results.measured["compile step stacked"]["seconds"] > 0


@pytest.mark.slow
@pytest.mark.parity
def test_long_texts_against_torch(tmp_path):
    """The losses that are timed are the same."""
    subject = long_texts.Long(cases=("2x12",), layers=2, width=64, rounds=1)
    results = subject.run()
    assert set(results.ratios) == {"modernbert 2x12", "modernbert 2x12 local / global"}
    assert set(results.measured) == {f"modernbert 2x12 {name}" for name in ("torch", "here", "local", "global")}
    model = pats_jax.models.SequenceClassifier(subject.config())
    params, batch = cases.random_params(model, model.config), cases.random_batch(1000, 2, 12)
    pats_jax.models.save_pretrained(tmp_path, params=params, config=model.config)
    theirs = long_texts.torch_gradients(against_torch.load_torch_model(str(tmp_path), "sdpa"), batch, "float32")
    ours, _ = subject._gradients(model.config, params, batch)()
    np.testing.assert_allclose(ours, float(theirs()), rtol=0, atol=1e-5)


# reports and the command line


def test_a_stored_command_has_no_folders_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main", "pipeline", "--data_dir", "/some/where/glue", "--rounds", "2"])
    report.finish("pipeline", report.Results(), tmp_path / "results.json", False, silent_console())
    assert (
        report.read(tmp_path / "results.json")["command"] == "python -m benchmarks pipeline --data_dir glue --rounds 2"
    )


def test_all_runs_every_subject_and_says_which_failed(monkeypatch, capsys):
    codes, ran = {"step": -9, "memory": 2}, []

    def run(command):
        ran.append(command[3])
        return subprocess.CompletedProcess(command, codes.get(command[3], 0))

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit) as stopped:
        main(["all"])
    assert stopped.value.code == 1 and ran == list(SUBJECTS)
    assert capsys.readouterr().out.splitlines() == ["FAILED step: killed by signal 9", "FAILED memory: exit code 2"]


def test_command_line_writes_and_adds(tmp_path, capsys):
    path = tmp_path / "deep" / "random.json"
    flags = ["random", "--entries", "1000", "--rounds", "2", "--draws", "uniform", "--output_file", str(path)]
    main([*flags, "--kinds", "fast"])
    assert "fast uniform" in capsys.readouterr().out
    main([*flags, "--kinds", "threefry2x32", "--add"])
    written = json.loads(path.read_text())
    assert list(written["ratios"]) == ["fast uniform", "threefry2x32 uniform"]
    assert written["machine"]["devices"] == 8 and written["versions"]["jax"] == jax.__version__
    assert len(written["measured"]["fast uniform"]["seconds"]) == 2
    path.write_text(json.dumps(written | {"machine": MACHINE}))
    with pytest.raises(SystemExit) as stopped:
        main([*flags, "--kinds", "fast", "--add"])
    assert stopped.value.code == 2 and "other machine" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["step", "--cases", "minilm"])
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: minilm: not a case")


# the guard


@dataclasses.dataclass(frozen=True)
class Fake(report.Subject):
    """A subject whose results are known."""

    ratio: float = 1.0
    size: int = 100

    def run(self):
        return report.Results({"pats": self.ratio, "new": 3.0}, {"state": self.size})


def stored_results(folder, **changes):
    held = {"machine": MACHINE, "versions": {"jax": "0"}, "ratios": {"pats": 1.0, "gone": 2.0}, "sizes": {"state": 100}}
    (folder / "fake.json").write_text(json.dumps(held | {"measured": {}, "command": "before"} | changes))


@pytest.mark.parametrize(
    "ratio, size, code", [(1.09, 100, 0), (1.11, 100, 1), (0.5, 90, 0), (1.0, 101, 1), (1.11, 101, 1)]
)
def test_guard_fails_on_a_loss_of_more_than_a_tenth_or_a_byte(ratio, size, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "QUICK", {"fake": Fake(ratio=ratio, size=size)})
    stored_results(tmp_path)
    assert check.Check(results_dir=tmp_path).run(rich.console.Console(width=120)) == code
    shown = capsys.readouterr().out
    losses = [line for line in shown.splitlines() if line.startswith("LOSS")]
    assert len(losses) == (ratio > 1.1) + (size > 100)
    assert "not measured again: fake: gone" in shown and "not stored" in shown
    assert "stored on another machine: fake" in shown
    assert check.Check(results_dir=tmp_path, tolerance=0.2).run(silent_console()) == int(size > 100)


def test_guard_needs_stored_results(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "QUICK", {"fake": Fake()})
    with pytest.raises(InputError, match="python -m benchmarks fake"):
        check.Check(results_dir=tmp_path).run(silent_console())


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", '{"ratios": {"pats": "fast"}}', "[" * 100_000, '{"ratios": {"pats": 1' + "0" * 5000 + "}}"],
    ids=["empty", "null", "list", "string", "deep", "long"],
)
def test_stored_results_that_are_damaged_are_named(text, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "QUICK", {"fake": Fake()})
    (tmp_path / "fake.json").write_text(text)
    with pytest.raises(InputError) as caught:
        check.Check(results_dir=tmp_path).run(silent_console())
    assert str(caught.value).startswith(f"{tmp_path / 'fake.json'}: ") and "\n" not in str(caught.value)


def test_guard_measures_what_the_stored_results_have():
    """Its methods and models are among those that the subjects measure by default."""
    full = {"step": step.Step(), "optimizer": optimizer.Optimizer(), "memory": memory.Memory()}
    for name, quick in check.QUICK.items():
        for field in dataclasses.fields(quick):
            chosen, default = getattr(quick, field.name), getattr(full[name], field.name)
            if isinstance(chosen, tuple):
                assert set(chosen) <= set(default)


def test_makefile_names_every_subject_once():
    """`make bench` and `make bench-check` run them in two processes with other settings of the C library."""
    makefile = (goals.ROOT / "Makefile").read_text()
    named = [re.search(rf"^{name} := (.*)$", makefile, re.MULTILINE)[1].split() for name in ("WHOLE_STEPS", "REST")]
    assert sorted(named[0] + named[1]) == sorted(SUBJECTS)
    guarded = re.findall(r"benchmarks check --subjects (.*)$", makefile, re.MULTILINE)
    assert sorted(" ".join(guarded).split()) == sorted(check.QUICK)
    # what is measured again is measured with the settings that it was stored with
    assert set(guarded[0].split()) <= set(named[0]) and set(guarded[1].split()) <= set(named[1])


def test_subjects_are_chosen(tmp_path, monkeypatch):
    assert report.choose((), {"a": 1, "b": 2}) == ["a", "b"] and report.choose(("b",), {"a": 1, "b": 2}) == ["b"]
    with pytest.raises(InputError, match="--subjects c: none of a, b"):
        report.choose(("b", "c"), {"a": 1, "b": 2})
    monkeypatch.setattr(check, "QUICK", {"fake": Fake(), "other": None})  # whose run would fail
    stored_results(tmp_path)
    assert check.Check(results_dir=tmp_path, subjects=("fake",)).run(silent_console()) == 0


# goals and pictures


def test_goals_are_drawn_and_written(tmp_path):
    results, images, page = tmp_path / "results", tmp_path / "images", tmp_path / "page.md"
    (results / "cpu").mkdir(parents=True)
    measured = {
        f"growth {name}": {
            "parameters": n,
            "extra_seconds": n * 1e-9 * slow,
            "median_seconds": n * 3e-9,
            "base_median_seconds": n * 2e-9,
        }
        for name, n, slow in (("minilm", 20_000_000, 1.1), ("bert-tiny", 4_000_000, 1.0))
    }
    write = {
        "optimizer": {"ratios": {"minilm pats": 1.29, "minilm pats:all": 1.66}, "measured": measured},
        "torch": {"ratios": {"minilm 32x64 finetune": 0.9}, "measured": {}},
    }
    for name, held in write.items():
        held |= {"machine": MACHINE, "versions": {"jax": "0.10.2"}, "sizes": {}, "command": "before"}
        (results / "cpu" / f"{name}.json").write_text(json.dumps(held))
    (results / "cpu" / "torch_curves.json").write_text("{}")  # of another program
    page.write_text(f"before\n{goals.BEGIN}\nof yesterday\n{goals.END}\nafter\n")
    for _ in range(2):  # the second time nothing changes
        assert goals.Plot(results, images, page).run(silent_console()) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "yesterday" not in text
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:4] for row in text.splitlines() if row.startswith("| ")}
    assert rows["PATS's update alone / AdamW's, MiniLM, default layers"] == ["1.3", "1.290", "reached"]
    assert rows["the same with noise on all leaves"] != ["1.05", "1.660", "missed"]
    assert ["1.65", "1.660", "missed"] in [row.split(" | ")[1:4] for row in text.splitlines()]
    assert rows["PATS's extra time for each parameter, most / least of all sizes"] == ["1.2", "1.10", "reached"]
    assert rows["first step, cold cache, PATS / AdamW, MiniLM"] == ["1.25", "-", ""]
    assert sorted(path.name for path in images.iterdir()) == ["performance_optimizer.png", "performance_torch.png"]
    page.write_text("no comments")
    with pytest.raises(InputError, match="has not both lines"):
        goals.Plot(results, images, page).run(silent_console())


@pytest.mark.parametrize("subject", sorted({goal.subject for goal in goals.GOALS}))
def test_stored_results_have_the_figure_of_every_goal(subject):
    path = report.RESULTS / "cpu" / f"{subject}.json"
    if not path.exists():
        pytest.skip(f"no stored results of {subject}")
    found = report.read(path)
    assert all(math.isfinite(goal.value(found)) for goal in goals.GOALS if goal.subject == subject)
