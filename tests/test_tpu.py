"""`python -m benchmarks tpu` without libtpu: what fails, what is counted, and the steps it compiles, on CPU devices."""

import json

import jax
import pytest
import rich.console

from benchmarks import goals, report, tpu
from benchmarks.cases import Case
from pats_jax.errors import InputError


def figures(total, chip_memory=16e9, cpu=50.0):
    memory = {"arguments": total // 2, "temporaries": total - total // 2, "total": total, "generated_code": 1000}
    seconds = {"lower": 1.0, "compile": 30.0}
    return {"seconds": seconds, "cpu_seconds": {"lower": 1.0, "compile": cpu}, "memory": memory} | {
        "chip_memory": chip_memory
    }


COUNTED = figures(7_000_000_000) | {"operations": 2e12, "bytes_accessed": 30e9, "hbm_bytes": 11e9}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command with figures in place of a compiler: its exit code, what it prints, and the JSON file."""

    def call(by_cell, **flags):
        def compile_in_new_process(cell, rows, length, unroll):
            return dict(by_cell[cell.name, unroll])

        monkeypatch.setattr(tpu, "compile_in_new_process", compile_in_new_process)
        monkeypatch.setattr("sys.argv", ["benchmarks", "tpu"])
        path = tmp_path / "compiled.json"
        console = rich.console.Console(width=250, record=True)
        code = tpu.Tpu(output_file=path, **flags).run(console)
        return code, console.export_text(), json.loads(path.read_text())

    return call


def test_a_step_that_fits_passes_and_one_that_does_not_fails(run):
    fits, not_quite = figures(15_999_999_000), figures(15_999_999_001)
    code, text, written = run({("adamw", None): fits, ("pats", None): fits}, cells=("adamw", "pats"), unrolled=())
    assert code == 0 and "FAILED" not in text
    assert written["measured"]["pats"]["memory"]["total"] == 15_999_999_000
    code, text, _ = run({("adamw", None): fits, ("pats", None): not_quite}, cells=("adamw", "pats"), unrolled=())
    assert code == 1 and "FAILED pats: needs 16.00 GB of a chip's 16 GB" in text and "FAILED adamw" not in text


def test_a_step_that_does_not_compile_fails_and_the_others_are_written(run):
    cells = {("adamw", None): figures(10), ("pats", None): {"error": "exit code 1: no"}, ("adamw", 0): COUNTED}
    code, text, written = run(cells, cells=("adamw", "pats"), unrolled=("adamw", "pats"))
    assert code == 1 and "FAILED pats: exit code 1: no" in text
    assert written["measured"]["adamw"]["unrolled"]["hbm_bytes"] == 11e9
    assert written["ratios"] == {"adamw compile": 1.0}


def test_a_step_that_does_not_compile_without_its_loop_fails(run):
    code, text, _ = run({("adamw", None): figures(10), ("adamw", 0): {"error": "too long"}}, cells=("adamw",))
    assert code == 1 and "FAILED adamw: too long" in text


def test_the_ratios_are_those_of_cpu_time_and_the_table_and_the_page_have_every_figure(run, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tpu.BEGIN}\nold\n{tpu.END}\nafter\n")
    cells = {("adamw", None): figures(10, cpu=40), ("pats", None): figures(3_000_000_000, cpu=60), ("pats", 0): COUNTED}
    code, text, written = run(cells, cells=("adamw", "pats"), unrolled=("pats",), page=page)
    assert code == 0 and written["ratios"] == {"adamw compile": 1.0, "pats compile": 1.5}
    row = tpu.rows_of(written["measured"])[1]
    assert row == ["pats", "1", "30", "60", "1.50", "1.50", "3.00", "19%", "3.50", "30.00", "11.00", "2.00"]
    lines = page.read_text().splitlines()
    assert f"| {' | '.join(row)} |" in lines and "old" not in lines
    assert lines[0] == "before" and lines[-1] == "after" and sum(line.startswith("| adamw |") for line in lines) == 1


def test_the_docs_have_the_stored_figures_and_every_step_fits():
    held = report.read(tpu.Tpu().output_file)["measured"]
    assert list(held) == [cell.name for cell in tpu.CELLS] and tpu.failures(held) == []
    page = (goals.ROOT / "docs" / "scaling.md").read_text()
    assert "\n".join(tpu.markdown(held)) in page


def test_unknown_cells_are_refused():
    for flags in ({"cells": ("pats", "v6e")}, {"unrolled": ("v6e",)}):
        with pytest.raises(InputError, match="v6e: none of adamw, pats"):
            tpu.Tpu(**({"cells": ("adamw",)} | flags)).run(rich.console.Console(quiet=True))


def test_a_process_that_dies_is_an_error(monkeypatch):
    (cell,) = tpu.choose_cells("--cells", ["pats"])
    monkeypatch.setattr(tpu, "WORKER", ("sh", "-c", "echo no such chip >&2; kill -9 $$"))
    assert tpu.compile_in_new_process(cell, 8, 8, None) == {"error": "killed by signal 9: no such chip"}
    monkeypatch.setattr(tpu, "WORKER", ("sh", "-c", "exit 3"))
    assert tpu.compile_in_new_process(cell, 8, 8, None) == {"error": "exit code 3: no output"}


PROGRAM = """HloModule jit_step

%fused (a: f32[100]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  ROOT %big = f32[1000]{0} negate(%a)
}

ENTRY %main (p: f32[10,10], q: bf16[10]) -> f32[10,10] {
  %p = f32[10,10]{1,0:T(8,128)} parameter(0)
  %q = bf16[10]{0} parameter(1)
  %copy-start = (f32[10,10]{1,0:T(8,128)S(1)}, f32[10,10]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %copy-done = f32[10,10]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[10,10]{1,0}), f32[3,10]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:3], [0:10]}
  %slice-done = f32[3,10]{1,0:S(1)} slice-done(%slice-start)
  %near = (f32[10,10]{1,0:S(1)}, pred[7]{0}) fusion(%copy-done, %slice-done, %q), kind=kLoop, calls=%fused
  %first = f32[10,10]{1,0:S(1)} get-tuple-element(%near), index=0
  ROOT %far = f32[10,10]{1,0} add(%first, %p)
}
"""


def test_hbm_bytes_leave_out_what_stays_on_the_chip():
    copied, sliced = 400, 120
    near = 7 + 20  # a bool for each of seven, and q
    far = 400 + 400  # the result, and p
    assert tpu.hbm_bytes(PROGRAM) == copied + sliced + near + far


@pytest.mark.devices(8)
@pytest.mark.parametrize("name", [pytest.param("pmap", marks=pytest.mark.slow), "fsdp"])
def test_steps_are_lowered_from_shapes_for_devices_that_are_given(name):
    (cell,) = tpu.choose_cells("--cells", [name])
    found = tpu.figures_of_step(cell, Case("bert-tiny", 16, 8), jax.devices()[:4], "stacked", 0)
    assert found["chips"] == 4 and found["seconds"]["compile"] > 0
    assert found["operations"] > 0 and found["hbm_bytes"] > 0
    whole = 4.4e6 * 16  # bert-tiny's parameters, two moments, sensitivity of some
    assert 0.7 * whole < found["memory"]["arguments"] * cell.fsdp < 1.1 * whole
