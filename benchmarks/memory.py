"""Subject `memory`: what XLA says that the update and the step of each method take; nothing is run."""

import dataclasses
from typing import Any

import jax

from benchmarks import cases, report
from benchmarks.cases import Case

BASE = "finetune"


@dataclasses.dataclass(frozen=True)
class Memory(report.Subject):
    """XLA's own figures of the update alone and of the whole step: arguments, results, temporaries, all together.

    Also the bytes of optimizer state for each parameter by method. All on one device.
    """

    cases: tuple[str, ...] = ("minilm:32x64",)  # MODEL:ROWSxLENGTH
    update_methods: tuple[str, ...] = ("finetune", "pats", "pats:all", "pats:bfloat16", "pats:all:bfloat16")  # update
    step_methods: tuple[str, ...] = ("finetune", "pats", "pats:all", "dps-dense", "mixout", "sift", "bitfit", "r-drop")
    state_methods: tuple[str, ...] = (  # optimizer state; nothing is compiled for it
        *("finetune", "pats", "pats:all", "pats:bfloat16", "pats:all:bfloat16", "dps-dense", "dps-mix", "child-d"),
        *("child-f", "mixout", "l2-sp", "sage", "sift", "bitfit"),
    )

    def run(self) -> report.Results:
        results = report.Results()
        for case in map(Case.parse, self.cases):
            model, params, config = cases.load_model(case.model)
            batch = cases.random_batch(config.vocab_size, case.rows, case.length)

            def training(method, model=model, params=params, batch=batch):
                return cases.Training(model, params, cases.settings_of(method), 1000, batch)

            self._state(case, params, training, results)
            self._programs(case, params, training, batch, results)
        return results

    def _state(self, case: Case, params: Any, training: Any, results: report.Results) -> None:
        table = report.table(
            f"Optimizer state of {case.model}", "method", "bytes", "bytes/parameter", "beyond AdamW, bytes/parameter"
        )
        size = cases.size(params)
        base = cases.num_bytes(training(BASE).shapes.opt_state)
        for method in self.state_methods:
            state = cases.num_bytes(training(method).shapes.opt_state)
            key = f"{case.model} {method} state"
            results.sizes[key] = state
            results.measured[key] = {
                "bytes": state,
                "bytes_per_parameter": state / size,
                "beyond_adamw_per_parameter": (state - base) / size,
                "noisy_share": cases.noisy_share(params, method),
            }
            table.add_row(method, str(state), f"{state / size:.3f}", f"{(state - base) / size:+.3f}")
        results.tables.append(table)

    def _programs(self, case: Case, params: Any, training: Any, batch: Any, results: report.Results) -> None:
        table = report.table(
            f"XLA's figures, {case}, MB",
            *("program", "arguments", "of them given away", "results", "temporaries", "in all"),
            "temporaries beyond AdamW, share of parameters",
        )
        chosen = {"update": self.update_methods, "step": self.step_methods}
        programs = [(name, method) for name, methods in chosen.items() for method in dict.fromkeys((BASE, *methods))]
        for program, method in programs:
            compile_program = {"update": compile_update, "step": compile_step}[program]
            figures = figures_of(compile_program(training(method), batch))
            key = f"{case} {method} {program}" if program == "step" else f"{case.model} {method} update"
            base = results.measured.get(key.replace(f" {method} ", f" {BASE} "), figures)
            added = figures["temporaries"] - base["temporaries"]
            figures["temporaries_beyond_adamw_share"] = added / cases.num_bytes(params)
            results.measured[key] = figures
            results.sizes[f"{key} temporaries"] = figures["temporaries"]
            columns = (figures[name] for name in ("arguments", "aliased", "results", "temporaries", "total"))
            share = f"{figures['temporaries_beyond_adamw_share']:+.2%}"
            table.add_row(f"{program} {method}", *(f"{column / 1e6:.2f}" for column in columns), share)
        results.tables.append(table)


def compile_update(training: cases.Training, batch: Any) -> jax.stages.Compiled:
    """The optimizer's update, parameters and state donated."""
    update = jax.jit(cases.update_step(training.tx), donate_argnums=(0, 1))
    params = training.shapes.params
    return update.lower(params, training.shapes.opt_state, params).compile()


def compile_step(training: cases.Training, batch: Any) -> jax.stages.Compiled:
    """The whole step, the state donated."""
    return jax.jit(training.step, donate_argnums=0).lower(training.shapes, batch).compile()


def figures_of(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Bytes as XLA counts them, on one device; its own ``peak`` leaves temporaries out on some platforms."""
    stats: Any = compiled.memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return {
        "arguments": stats.argument_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "results": stats.output_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "total": held + stats.temp_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
        "generated_code": stats.generated_code_size_in_bytes,
    }
