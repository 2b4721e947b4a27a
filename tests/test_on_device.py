"""Benchmarks on an accelerator: kernels of programs, profiles, workers, and what is stored of each device."""

import gzip
import io
import json
import re
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny

from benchmarks import against_torch, by_device, cases, device_worker, goals, names, on_device, programs, report, turns
from pats_jax.errors import InputError

PAGE = goals.ROOT / "docs" / "performance.md"

HLO = """
HloModule jit_step, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %m = f32[4]{0} multiply(%p, %p)
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[4]{0} get-tuple-element(%t), index=1
  %f = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  %g = (f32[4]{0}, s8[16]{0}) custom-call(%f, %f), custom_call_target="__cublas$lt$matmul"
  %y = f32[4]{0} get-tuple-element(%g), index=0
  ROOT %r = (s32[], f32[4]{0}) tuple(%i, %y)
}

%condition (t: (s32[], f32[4])) -> pred[] {
  %t = (s32[], f32[4]{0}) parameter(0)
  ROOT %lt = pred[] constant(true)
}

%small (p: f32[4]) -> f32[4] {
  ROOT %p = f32[4]{0} parameter(0)
}

%large (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %f = f32[4]{0} fusion(%p), kind=kInput, calls=%fused
  ROOT %s = f32[4]{0} sort(%f), dimensions={0}
}

%called (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %f = f32[4]{0} fusion(%p), kind=kLoop, calls=%fused
}

ENTRY %main (a: f32[4], k: s32[]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %k = s32[] parameter(1)
  %init = (s32[], f32[4]{0}) tuple(%k, %a)
  %w = (s32[], f32[4]{0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %x = f32[4]{0} get-tuple-element(%w), index=1
  %c = f32[4]{0} conditional(%k, %x, %x), branch_computations={%small, %large}
  %d = f32[4]{0} call(%c), to_apply=%called
  %begun = (f32[4]{0}, f32[4]{0}) copy-start(%d)
  ROOT %done = f32[4]{0} copy-done(%begun)
}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a tiny model."""
    return str(tiny.save_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", 2))


# programs


def test_kernels_of_a_program_counted_by_hand():
    assert programs.count_kernels(HLO) == {
        "fusion loop": 3 + 1,  # three turns of the loop, the call
        "custom-call __cublas$lt$matmul": 3,
        "fusion input": 1,  # the larger branch
        "sort": 1,
        "copy-start": 1,
    }
    assert not programs.count_kernels("HloModule empty")


def test_a_loop_counts_as_often_as_it_runs():
    def kernels(count):
        matrices = jnp.ones((count, 8, 8))
        compiled = jax.jit(lambda xs: jax.lax.scan(lambda c, x: (jnp.sin(c @ x), None), jnp.ones((8, 8)), xs)[0])
        return programs.describe_program(compiled.lower(matrices).compile())["kernels"]

    four, seven, ten = map(kernels, (4, 7, 10))
    assert four < seven and ten - seven == seven - four


def test_a_matrix_product_is_described():
    product = jax.jit(lambda a, b: a @ b)
    described = programs.compile_timed(product, (jnp.ones((8, 16)), jnp.ones((16, 32))))
    assert described["kernels"] >= 1 and described["flops"] == pytest.approx(2 * 8 * 16 * 32, rel=0.05)
    assert described["bytes_accessed"] == pytest.approx(4 * (8 * 16 + 16 * 32 + 8 * 32), rel=0.3)
    assert all(described[f"{part}_seconds"] > 0 for part in ("trace", "lower", "compile"))


def write_trace(folder, process, thread, events):
    where = folder / "plugins" / "profile" / "today"
    where.mkdir(parents=True)
    named = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": process}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": thread}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 8, "args": {"name": "XLA Modules"}},
    ]
    timed = [{"ph": "X", "pid": 1, "tid": tid, "name": n, "ts": ts, "dur": dur} for tid, n, ts, dur in events]
    (where / "host.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": named + timed}).encode()))


@pytest.mark.parametrize("process, thread", [("/device:GPU:0", "Stream #1(Compute)"), ("/host:CPU", "tf_XLAEigen/1")])
def test_profile_sums_kernels_and_counts_overlaps_once(tmp_path, process, thread):
    """Microseconds: two that overlap from 0 to 150, one from 300 to 400; the line of whole modules does not count."""
    events = [(7, "gemm", 0, 100), (7, "add", 50, 100), (7, "gemm", 300, 100), (8, "jit_step", 0, 1000)]
    write_trace(tmp_path, process, thread, events)
    found = programs.summarize_profile(tmp_path, steps=2, most=1)
    assert found["busy_ms"] == pytest.approx(0.250 / 2) and found["wall_ms"] == pytest.approx(0.400 / 2)
    assert found["kernel_runs"] == 1.5 and found["distinct_kernels"] == 2
    assert found["top"] == [{"name": "gemm", "runs": 1.0, "ms": pytest.approx(0.200 / 2)}]


def test_a_trace_without_kernels_is_told(tmp_path):
    write_trace(tmp_path, "/device:GPU:0", "Stream #1", [])
    assert programs.summarize_profile(tmp_path, 1) == {"error": "the trace holds no kernel"}


# turns and variants


def test_calls_are_timed_together_and_waited_for_once(monkeypatch):
    now, waited = [0.0], []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)

    def call():
        now[0] += 2.0
        return now[0]

    found = turns.take_turns({"a": call}, 3, warm_up=1, calls=5, clock=lambda: now[0])
    assert found.seconds == {"a": [2.0] * 3}
    assert waited == [10.0, 20.0, 30.0, 40.0]  # the last one of each five


def test_calls_timed_together_by_default(monkeypatch):
    assert turns.calls_together(None) == 1 and turns.calls_together(7) == 7
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert turns.calls_together(None) == turns.PIPELINED > 1
    with pytest.raises(InputError, match="--pipelined 0: must be at least 1"):
        turns.calls_together(0)


def test_variants_have_the_form_of_the_programs_unless_they_name_one(monkeypatch):
    assert cases.model_options("pats:all") == {"layers": "separate", "unroll": 1}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert cases.model_options("pats:all") == {"layers": "stacked", "unroll": 0}
    assert cases.model_options("pats:separate") == {"layers": "separate"}
    assert cases.model_options("pats:stacked:unroll4:all") == {"layers": "stacked", "unroll": 4}


def test_ways_of_torch():
    assert against_torch.way_named("compile:max-autotune") == against_torch.Way(compile_mode="max-autotune")
    assert set(against_torch.ON_CPU) | set(against_torch.ELSEWHERE) <= set(against_torch.WAYS)
    with pytest.raises(InputError, match="--torch_ways compile:fast: choose from eager, "):
        against_torch.way_named("compile:fast")


# workers


def test_worker_times_and_compares_bits(checkpoint, monkeypatch):
    asked = ["time finetune 2 3", "bits finetune 1", "bits finetune 2", "profile nothing 1", "time finetune one 1"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(asked)))
    said = []
    device_worker.serve("step", f"{checkpoint}:2x8", "float32", ["finetune", "no-such-method"], said.append)
    ready, timed, one_step, two_steps, unknown, no_number = said
    assert ready["device"] == "cpu" and ready["versions"]["jax"] == jax.__version__
    figures = ready["variants"]["finetune"]
    assert figures["kernels"] > 0 and figures["parameters"] > 0 and figures["loss"] > 0
    assert "no-such-method" in ready["variants"]["no-such-method"]["error"]
    assert len(timed["seconds"]) == 3 and min(timed["seconds"]) > 0
    assert one_step["equal_bits"] and len(set(one_step["digests"])) == 1
    assert two_steps["equal_bits"] and two_steps["digests"][0] != one_step["digests"][0]
    assert unknown["error"].startswith("KeyError") and no_number["error"].startswith("ValueError")


def test_worker_counts_the_bytes_of_an_update(checkpoint):
    plain, noisy = (
        device_worker.prepare_update(f"{checkpoint}:2x8", "float32", f"{method}:stacked").figures
        for method in ("finetune", "pats:all")
    )
    assert plain["bytes"] == 28 * plain["parameters"] and noisy["bytes"] == 44 * noisy["parameters"]
    assert noisy["parameters"] == plain["parameters"]


# rows


def session(tmp_path, **flags):
    return on_device.Session(on_device.Flags(tmp_path / "out", tmp_path / "carried", **flags))


def test_unknown_rows_are_told(monkeypatch, capsys, tmp_path):
    words = ["on_device", "--out", str(tmp_path), "--carried", str(tmp_path), "--rows", "step", "steps"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        on_device.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: --rows steps: no such row; choose from step, update")


def test_other_rows_take_the_fastest_form_of_the_step(tmp_path):
    measured = session(tmp_path, forms=("separate", "stacked"))
    assert measured.best_form() == "separate"  # nothing is known yet
    variants = {"finetune:separate": {"ms": 3.0}, "finetune:stacked": {"ms": 2.0}, "pats:separate": {"ms": 1.0}}
    measured.found["rows"]["step"] = {"variants": variants | {"torch compile": {"ms": 0.5}}}
    assert measured.best_form() == "stacked"
    assert session(tmp_path, best="stacked:unroll2").best_form() == "stacked:unroll2"


def test_ratios_to_torch_stay_within_a_size():
    row = {
        "variants": {
            "torch compile": {"ms": 20.0},
            "finetune:stacked": {"ms": 10.0},
            "torch minilm compile": {"ms": 4.0},
            "minilm finetune:stacked": {"ms": 3.0},
            "pats:stacked": {"error": "too late"},
        }
    }
    on_device._ratios(on_device._of_size(row, "minilm"), "torch minilm compile")
    on_device._ratios(on_device._without_sizes(row, ("minilm",)), "torch compile")
    found = {name: figures.get("to_torch_compile") for name, figures in row["variants"].items()}
    assert found == dict(zip(row["variants"], (1.0, 0.5, 1.0, 0.75, None), strict=True))
    shown = "\n".join(on_device.lines({"rows": {"step": row}}))
    assert "0.750 of torch" in shown and "too late" in shown


@pytest.mark.slow  # starts three processes
def test_a_rehearsal_writes_rows_without_folders_of_the_machine(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.on_device", "--out", str(out), "--carried", str(tmp_path)]
    command += ["--rehearse", "--rows", "attention", "update", "--forms", "stacked", "--methods", "finetune"]
    subprocess.run(command, check=True, cwd=goals.ROOT, capture_output=True, timeout=200)
    text = (out / "on_device.json").read_text()
    found = json.loads(text)
    assert str(tmp_path) not in text and found["command"].startswith("python -m benchmarks.on_device --out out")
    assert found["device"] == "cpu" and {"jax", "jaxlib"} <= set(found["versions"])
    assert found["rows"]["attention"]["variants"]["2x8x2x8 xla"]["ms"] > 0
    assert found["rows"]["update"]["variants"]["finetune:stacked"]["to_memory"] > 0
    assert found["rows"]["update"]["copy_bytes_per_second"] > 1e8


# what is stored


@pytest.mark.parametrize(
    "kind, folder",
    [
        ("cpu", "cpu"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("TPU v4", "v4"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v5 lite", "v5e"),
        ("TPU v6 lite", "v6e"),
        ("../..", "unknown"),
    ],
)
def test_folder_of_a_device(kind, folder):
    assert names.device_folder(kind) == folder


def test_results_go_to_the_folder_of_the_device(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.results_folder() == tmp_path / "cpu"


@pytest.mark.parametrize(
    "path", sorted(report.RESULTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_stored_results_name_no_folder_of_a_machine(path):
    found = re.findall(r"(?<![\w.])/(?:work|root|home|tmp|opt|usr)\b[^\"]*", path.read_text())
    assert not found, found


def test_rows_that_are_stored_follow_from_their_raw_seconds():
    read = by_device.read_calls(report.RESULTS)
    variants = read[by_device.THIRD]["rows"]["step"]["variants"]
    ms = {name: 1e3 * statistics.median(sum(one["step_seconds"], [])) for name, one in variants.items()}
    ours = ms["finetune:stacked:unroll0"]
    values = {
        "AdamW's step here / torch.compile's, BERT-base, 32 x 128": ours / ms["torch compile"],
        "what PATS adds to BERT-base's step, default layers, ms": ms["pats:stacked:unroll0"] - ours,
        "the same with noise on all leaves, ms": ms["pats:all:stacked:unroll0"] - ours,
    }
    by_text = {goal.text: goal for goal in by_device.GOALS}
    for text, value in values.items():
        assert by_text[text].value(read[by_text[text].subject]) == pytest.approx(value)
    lanes = read[by_device.H200]["rows"]["lanes"]["variants"]
    one = lanes["one finetune:stacked:unroll0"]["ms"]
    eight = lanes["lanes 8:finetune:stacked:unroll0"]
    assert eight["lanes"] == 8 and eight["to_steps_of_one"] == pytest.approx(eight["ms"] / (8 * one))
    update = read[by_device.FIRST]["rows"]["update"]["variants"]
    rate = update["copy"]["bytes"] / statistics.median(sum(update["copy"]["step_seconds"], []))
    for method in ("finetune", "pats:all"):
        one = update[f"{method}:stacked"]
        seconds = statistics.median(sum(one["step_seconds"], []))
        assert one["to_memory"] == pytest.approx(seconds * rate / one["bytes"])


def test_what_was_not_measured_is_a_dash():
    held = {"rows": {"cold": {"pats empty cache": {"seconds": 37.0, "exit": None}}}}
    goal = goals.Goal("first loss", "call", 25.0, by_device._seconds("cold", "pats empty cache"))
    assert goals.goal_lines({"call": held}, [goal], "{}")[-1] == "| first loss | 25 | - |  | `call` |"


def test_the_page_has_the_tables_of_the_results_files():
    text = PAGE.read_text()
    between = text.partition(by_device.BEGIN)[2].partition(by_device.END)[0]
    assert between.strip() == "\n".join(by_device.lines(report.RESULTS))
    cpu = {path.stem: report.read(path) for path in (report.RESULTS / "cpu").glob("*.json") if goals._is_subject(path)}
    assert "\n".join(goals.goal_lines(cpu, goals.GOALS, "python -m benchmarks {}")) in text
