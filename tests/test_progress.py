"""What is shown of a training on its way: on a terminal, in a pipe, in a notebook."""

import io
import time
import types

import jax
import numpy as np
import pytest
import rich.console

from pats_jax.reporting import progress
from pats_jax.reporting.progress import CountProgress, StepProgress, about, duration
from pats_jax.run import training_run, workers
from pats_jax.training import shape_costs


def shown(console, **options):
    """The text that a training of 40 steps, the first 10 of an earlier start, leaves on a console."""
    with StepProgress(console, 40, 10, 20.0, **options) as showing:
        showing.show(completed=11)
        showing.show(completed=20, status="loss 0.5000, 3 examples/s")
        time.sleep(0.3)
    return console.file.getvalue()


def test_a_terminal_has_a_bar():
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=120)
    text = shown(console)
    assert "20/40" in text and "50%" in text and "loss 0.5000, 3 examples/s" in text
    first = io.StringIO()
    with StepProgress(rich.console.Console(file=first, force_terminal=True, width=120), 40, 0, 20.0):
        pass
    assert "0/40" in first.getvalue() and "compiling (about 20 s)" in first.getvalue()


def test_scoring_is_shown_while_it_lasts_and_then_its_score():
    statuses: list[str] = []
    runner = types.SimpleNamespace(view=lambda params: params)
    training = types.SimpleNamespace(metric="accuracy", evaluates=True, runner=runner)
    evaluator = types.SimpleNamespace(evaluate=lambda params: {"accuracy": len(statuses) - 0.25, "f1": 0.5})
    hooks = training_run.TrainingHooks(training, evaluator, None, lambda status: statuses.append(status), None, None)
    assert hooks.evaluate(types.SimpleNamespace(all_params=None)) == {"accuracy": 0.75, "f1": 0.5}
    assert statuses == ["scoring the validation data", "validation accuracy 0.7500"]


@pytest.mark.parametrize("notebook", [False, True])
def test_a_pipe_and_a_notebook_get_lines(notebook, monkeypatch):
    console = rich.console.Console(file=io.StringIO(), force_terminal=notebook, force_jupyter=False)
    console.is_jupyter = notebook
    said: list[str] = []
    monkeypatch.setattr(progress, "say", lambda console, line: said.append(line))  # a notebook has its own display
    text, lines = shown(console, seconds_between_lines=0.05), said
    assert len(lines) >= 2 and text == ""
    assert all(line.startswith("step 20 of 40 (50%), loss 0.5000, 3 examples/s, ") for line in lines), lines
    monkeypatch.undo()
    quick = rich.console.Console(file=io.StringIO())
    assert shown(quick) == "", "shorter than half a minute"
    assert shown(rich.console.Console(file=io.StringIO(), quiet=True), seconds_between_lines=0.05) == ""


def test_the_time_left_is_that_of_the_steps_without_compilation():
    now = [0.0]
    console = rich.console.Console(file=io.StringIO(), quiet=True)
    showing = StepProgress(console, 1010, 10, 20.0, clock=lambda: now[0])
    assert showing.line() == "step 10 of 1010 (1%), compiling (about 20 s)"
    now[0] = 100.0  # of compilation
    showing.show(completed=11, status="")
    assert showing.line() == "step 11 of 1010 (1%)"
    now[0] = 104.0
    showing.show(completed=21, status="loss 0.1")
    assert showing.line() == "step 21 of 1010 (2%), loss 0.1, 6 min 36 s left"  # 989 steps of 0.4 s


def test_rough_numbers():
    assert [about(seconds) for seconds in (0.1, 5, 12, 84)] == ["5 s", "5 s", "15 s", "85 s"]
    assert [duration(seconds) for seconds in (0.2, 59.6, 3600)] == ["0 s", "1 min 0 s", "1 h 0 min"]


def test_compilation_is_estimated_by_platform_and_tensors():
    params = {str(n): jax.ShapeDtypeStruct((2,), np.float32) for n in range(100)}
    assert shape_costs.compile_seconds(params, "cpu") == pytest.approx(4 + 6)
    assert shape_costs.compile_seconds(params, "cuda") == pytest.approx(14 + 35)


def test_of_runs_it_says_how_many_what_runs_and_the_time_left():
    now = [0.0]
    console = rich.console.Console(file=io.StringIO())
    with CountProgress(console, 5, "runs", clock=lambda: now[0]) as showing:
        showing.show("sst2/pats/seed1")
        assert showing.line() == "0 of 5 runs; now sst2/pats/seed1" and console.file.getvalue() == ""
        now[0] = 40.0
        showing.show("sst2/pats/seed1 step 3 of 9 (33%)")
        now[0] = 100.0
        showing.show(ended=2)
    assert console.file.getvalue().splitlines() == [
        "0 of 5 runs; now sst2/pats/seed1 step 3 of 9 (33%)",
        "2 of 5 runs, 2 min 30 s left",
    ]
    terminal = rich.console.Console(file=io.StringIO(), force_terminal=True, width=120)
    with CountProgress(console, 5, "runs", clock=lambda: now[0]) as showing:
        now[0] = 130.0
        showing.show("a, b", under_way=0.4)
        assert showing.line() == "0 of 5 runs; now a, b", "a compilation is not the speed of a run"
        showing.show("a, b", under_way=0.5)  # half a run in 30 s
        assert showing.line() == "0 of 5 runs, 4 min 30 s left; now a, b"
        now[0] = 220.0
        showing.show("b", ended=1, under_way=1.0)
        assert showing.line() == "1 of 5 runs, 3 min 0 s left; now b"
    with CountProgress(terminal, 5, "runs") as showing:
        showing.show("[bold] of mine", 2)
    assert "2/5" in terminal.file.getvalue() and "[bold] of mine" in terminal.file.getvalue()


def test_the_step_of_a_child_is_that_of_the_last_line_in_its_log(tmp_path):
    log = tmp_path / "seed1.log"
    job = workers.Job("sst2/pats/seed1", (), str(log))
    assert workers.how_far(job) == "sst2/pats/seed1"
    log.write_text("pats-jax: 32 rows per step\nstep 2 of 90 (2%), compiling (about 10 s)\n" + "x" * 5000)
    assert workers.how_far(job) == "sst2/pats/seed1"
    log.write_text(log.read_text() + "\nstep 40 of 90 (44%), loss 0.4, 3 s left\nsomething else\n")
    assert workers.how_far(job) == "sst2/pats/seed1 step 40 of 90 (44%)" and workers.share_done(job) == 0.44
