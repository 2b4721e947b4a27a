"""The loop: what is logged, evaluated and saved when; early stop; resuming at any step; being asked to end."""

import copy
import itertools
import types

import jax.numpy as jnp
import numpy as np
import pytest

from pats_jax.errors import InputError, Preempted
from pats_jax.training import loop
from pats_jax.training.loop import Hooks, Rhythm, fit, predict_logits

COUNTS = {"examples": 2.0, "tokens": 6.0, "computed_tokens": 8.0}


class Recorder(Hooks):
    """Keeps all that the loop does; the score of an evaluation is given by a function of the step."""

    metric, evaluates = "score", True

    def __init__(self, score=lambda step: step):
        self.score, self.steps, self.records, self.evaluated, self.timings, self.saved = score, [], [], [], [], {}

    def on_step(self, step, state):
        self.steps.append(step)

    def describe(self, progress, state):
        return {"described": float(state.params["w"])}

    def on_record(self, record):
        self.records.append({name: value for name, value in record.items() if name != "timing"})
        self.timings += [record["timing"]] if "timing" in record else []

    def evaluate(self, state):
        self.evaluated.append(int(state.params["w"]))
        return {"score": self.score(int(state.params["w"]))}

    def save(self, state, progress):
        self.saved[progress.step] = (state, copy.deepcopy(progress))


def make_state(count=0):
    return types.SimpleNamespace(params={"w": jnp.float32(count)})


def count(state, batch):
    """A step whose state counts the batches, and whose loss is the number of the batch squared."""
    assert batch == int(state.params["w"]) + 1, "a batch was left out or seen twice"
    return make_state(batch), {"loss": jnp.float32(batch**2)}


def run(rhythm, hooks, step=count, state=None, progress=None, preemption=None):
    first = 1 + (progress.step if progress else 0)
    batches = ((number, COUNTS) for number in itertools.count(first))
    return fit(state or make_state(), step, batches, rhythm, hooks, progress=progress, preemption=preemption)


# rhythm


def test_logging_and_evaluation_at_their_own_rhythm_and_after_the_last_step():
    hooks = Recorder()
    state, progress = run(Rhythm(total_steps=11, logging_steps=4, eval_steps=5), hooks)
    assert int(state.params["w"]) == progress.step == 11
    assert hooks.steps == list(range(1, 12))
    logged = [record for record in hooks.records if "loss" in record]
    assert [(record["step"], record["loss"]) for record in logged] == [
        (4, pytest.approx(np.mean([1, 4, 9, 16]))),
        (8, pytest.approx(np.mean([25, 36, 49, 64]))),
        (11, pytest.approx(np.mean([81, 100, 121]))),
    ]
    assert all(r["padding_share"] == 0.25 and r["described"] == r["step"] for r in logged)
    assert hooks.evaluated == [5, 10, 11]
    assert [record["eval"] for record in progress.evaluations] == [{"score": 5}, {"score": 10}, {"score": 11}]
    assert hooks.saved == {}


def test_the_last_step_is_not_logged_twice():
    hooks = Recorder()
    run(Rhythm(total_steps=4, logging_steps=2, eval_steps=2), hooks)
    assert [record["step"] for record in hooks.records] == [2, 2, 4, 4]


@pytest.mark.parametrize("save_steps, saved", [(0, []), (3, [3, 6, 7]), (7, [7]), (500, [])])
def test_checkpoints_come_at_their_rhythm_and_at_the_end_of_a_longer_run(save_steps, saved):
    hooks = Recorder()
    run(Rhythm(total_steps=7, logging_steps=2, eval_steps=7, save_steps=save_steps), hooks)
    assert list(hooks.saved) == saved


def test_the_best_so_far_is_saved_when_asked():
    hooks = Recorder(score={2: 0.5, 4: 0.7, 6: 0.7, 8: 0.6, 10: 0.9}.get)
    _, progress = run(Rhythm(total_steps=10, logging_steps=5, eval_steps=2, save_best=True), hooks)
    assert list(hooks.saved) == [2, 4, 10] and progress.best("score")["step"] == 10
    assert hooks.saved[4][1].best("score")["step"] == 4


def test_training_ends_when_the_score_stays_where_it_is():
    hooks = Recorder(score={2: 0.5, 4: 0.7, 6: 0.7, 8: 0.6, 10: 0.9}.get)
    state, progress = run(Rhythm(total_steps=100, logging_steps=5, eval_steps=2, save_steps=5, patience=2), hooks)
    assert progress.step == int(state.params["w"]) == 8 and list(hooks.saved) == [5, 8]
    assert [record["step"] for record in hooks.records if "loss" in record] == [5, 8]


def test_timing_counts_real_examples_waiting_for_data_and_no_evaluation(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))

    def slow(seconds, function):
        def wrapped(*args):
            clock.now += seconds
            return function(*args)

        return wrapped

    hooks = Recorder()
    hooks.evaluate = slow(100.0, hooks.evaluate)
    slow_batch = slow(0.25, lambda number: (number, COUNTS))
    batches = (slow_batch(number) for number in itertools.count(1))
    fit(make_state(), slow(0.75, count), batches, Rhythm(total_steps=4, logging_steps=2, eval_steps=3), hooks)
    rates = {"examples_per_second": 2.0, "tokens_per_second": 6.0}
    assert hooks.timings == [{"seconds": 2.0, "data_wait_seconds": 0.5, **rates}] * 2


class OnDevice:
    """A number that takes note of the step at which it is brought to the host."""

    def __init__(self, value, fetched, step):
        self.value, self.fetched, self.step = value, fetched, step

    def __array__(self, *_, **__):
        self.fetched.append(self.step())
        return np.asarray(self.value, np.float32)

    __float__ = __bool__ = __int__ = lambda self: self.__array__().item()


def test_metrics_stay_on_the_device_until_a_line_or_a_checkpoint():
    fetched, hooks = [], Recorder()

    def step(state, batch):
        state, metrics = count(state, batch)
        lazy = {name: OnDevice(value, fetched, lambda: hooks.steps[-1]) for name, value in metrics.items()}
        return state, lazy

    run(Rhythm(total_steps=11, logging_steps=4, eval_steps=20, save_steps=6), hooks, step=step)
    assert fetched == [4] * 4 + [6] * 2 + [8] * 2 + [11] * 3


# going on


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_training_resumed_at_any_step_is_the_same(stop):
    """Lines, evaluations and early stop are those of the run in one piece, also between two lines."""
    rhythm = Rhythm(total_steps=11, logging_steps=4, eval_steps=3, save_steps=1, patience=3)
    score = {3: 0.5, 6: 0.4, 9: 0.7, 11: 0.1}.get
    whole = Recorder(score)
    run(rhythm, whole)
    state, progress = copy.deepcopy(whole.saved[stop])
    resumed = Recorder(score)
    _, progress = run(rhythm, resumed, state=state, progress=progress)
    records = [{name: value for name, value in record.items() if name != "timing"} for record in progress.records]
    assert records == whole.records
    assert list(resumed.saved) == list(range(stop + 1, 12))


class Asked:
    """Asks the run to end once it is at a step."""

    def __init__(self, step):
        self.step, self.signal_number = step, 15

    def arrived(self, step):
        return step >= self.step


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_run_that_is_asked_to_end_saves_and_goes_on_as_if_nothing_had_been(stop):
    rhythm = Rhythm(total_steps=9, logging_steps=4, eval_steps=3)
    run(rhythm, whole := Recorder())
    with pytest.raises(Preempted) as caught:
        run(rhythm, stopped := Recorder(), preemption=Asked(stop))
    assert caught.value.signal_number == 15 and list(stopped.saved) == [stop]
    state, progress = stopped.saved[stop]
    run(rhythm, resumed := Recorder(), state=state, progress=progress)
    assert stopped.records + resumed.records == whole.records


def test_an_evaluation_that_is_cut_short_is_made_up_for():
    class Interrupted(Recorder):
        def evaluate(self, state):
            if int(state.params["w"]) == 6:
                raise Preempted("asked to end", 2)
            return super().evaluate(state)

    rhythm = Rhythm(total_steps=9, logging_steps=4, eval_steps=3)
    run(rhythm, whole := Recorder())
    with pytest.raises(Preempted):
        run(rhythm, stopped := Interrupted())
    assert list(stopped.saved) == [6]
    state, progress = stopped.saved[6]
    run(rhythm, resumed := Recorder(), state=state, progress=progress)
    assert resumed.evaluated == [6, 9] and stopped.records + resumed.records == whole.records


# steps that are not finite


def diverging(*bad):
    def step(state, batch):
        new_state, metrics = count(state, batch)
        return new_state, metrics | ({"skipped": 1.0, "loss": np.nan} if batch in bad else {"skipped": 0.0})

    return step


def test_skipped_steps_are_counted_and_in_no_mean():
    rhythm = Rhythm(total_steps=6, logging_steps=3, eval_steps=9, max_nonfinite_steps=4)
    run(rhythm, hooks := Recorder(), step=diverging(2, 4, 5, 6))
    first, second = (record for record in hooks.records if "eval" not in record)
    assert first["loss"] == 5.0 and first["skipped_steps"] == 1
    assert "loss" not in second and second["skipped_steps"] == 4


def test_more_skipped_steps_than_allowed_are_an_error_that_names_the_largest_tensor():
    rhythm = Rhythm(total_steps=6, logging_steps=3, eval_steps=9, max_nonfinite_steps=1)
    with pytest.raises(InputError, match=r"stopped at step 6: .* in 3 steps, .* largest parameter is in w \(6\)"):
        run(rhythm, Recorder(), step=diverging(2, 4, 5))


# predictions


def test_predictions_come_back_in_the_order_of_the_rows():
    rows = np.random.default_rng(0).permutation(7)
    parts = [(rows[:3], np.append(rows[:3], 99)), (rows[3:6], np.append(rows[3:6], 99)), (rows[6:], rows[[6] * 4])]
    batches = ((index, {"x": values}) for index, values in parts)
    logits = predict_logits(lambda scale, batch: batch["x"][:, None] * np.float32([scale, 1]), 10, batches, 7)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, np.arange(7)[:, None] * [10, 1])
