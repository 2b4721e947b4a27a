"""The programs of lanes, compiled ahead in threads, and how many lanes fit into memory by them."""

import concurrent.futures
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pats_jax.training.lane_program import Arrays, LaneProgram, LaneState


class CompiledLanes:
    """The programs of lanes, compiled in threads, one per batch shape.

    The programs can be used for every set of lanes of the same number, with the same sizes of model and rate table.
    `close` ends the threads.

    Attributes:
      program: the programs to compile.
      lanes: the number of lanes.
      state: the shapes of a `LaneState`.
    """

    def __init__(self, program: LaneProgram, params: Any, own: Any, lanes: Arrays, rates: np.ndarray):
        """Starts to compile the initialisation.

        Args:
          program: the programs to compile.
          params: the shared parameters, or their shapes.
          own: the lanes' own parameters, as for `LaneProgram.init`.
          lanes: from `lane_arrays`.
          rates: from `rate_table`.
        """
        self.program, self.lanes = program, len(lanes["words"])
        self._pool = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="compile")
        self._params, self._own = program.shapes(params), program.shapes(own, 0)
        self._arguments = program.shapes(lanes, 0), program.shapes(rates)
        state = jax.eval_shape(program.init, self._params, self._own, *self._arguments)
        self.state: LaneState = program.shapes(state, 0)
        self._frozen = program.shapes(program.split(self._params)[1])
        self._programs: dict[tuple, concurrent.futures.Future] = {}
        self.begin(("init",), program.init, self._params, self._own, *self._arguments)

    def expect_step(self, batch: Arrays) -> None:
        """Starts to compile the step for batches of that shape, (lanes, rows, length), unless already done."""
        lanes, rates = self._arguments
        key = ("step", *batch["input_ids"].shape)
        self.begin(key, self.program.step, self.state, lanes, self._frozen, rates, self.program.shapes(batch, 0))

    def expect_predict(self, batch: Arrays) -> None:
        """Starts to compile the prediction for batches of that shape, (rows, length), unless already done."""
        key = ("predict", *batch["input_ids"].shape)
        self.begin(key, self.program.predict, self.state.params, self._frozen, self.program.shapes(batch))

    def init(self, *arguments: Any) -> LaneState:
        """`LaneProgram.init`."""
        return self.call(("init",), *arguments)

    def step(self, state: LaneState, lanes: Arrays, frozen: Any, rates: Any, batch: Arrays) -> tuple[LaneState, Any]:
        """`LaneProgram.step`; waits for its program."""
        self.expect_step(batch)
        return self.call(("step", *batch["input_ids"].shape), state, lanes, frozen, rates, batch)

    def predict(self, params: Any, frozen: Any, batch: Arrays) -> jax.Array:
        """`LaneProgram.predict`; waits for its program."""
        self.expect_predict(batch)
        return self.call(("predict", *batch["input_ids"].shape), params, frozen, batch)

    def expect_figures(self) -> None:
        """Begins to compile `figures`, unless it has been."""
        self.begin(("figures",), self.program.figures, self.state, *self._arguments)

    def figures(self, state: LaneState, lanes: Arrays, rates: Any) -> dict[str, jax.Array]:
        """`LaneProgram.figures`; waits for its program."""
        self.expect_figures()
        return self.call(("figures",), state, lanes, rates)

    def bytes_of_step(self, batch: Arrays) -> int:
        """The memory of one device that the step for a batch takes, by XLA's figures; not for lanes in turns."""
        self.expect_step(batch)
        found = self._programs[("step", *batch["input_ids"].shape)].result().memory_analysis()
        parts = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
        return sum(parts) - found.alias_size_in_bytes

    def close(self) -> None:
        """Ends the threads; waits for what they are compiling, and leaves out what they have not begun."""
        self._pool.shutdown(cancel_futures=True)

    def compile_other(self, compile_it: Callable[[], None]) -> None:
        """Calls a function that compiles another program in a thread of these."""
        self._pool.submit(compile_it)

    def call(self, key: tuple, *arguments: Any) -> Any:
        """Calls the program of a key; waits until it is compiled."""
        return self._programs[key].result()(*arguments)

    def begin(self, key: tuple, function: Any, *arguments: Any) -> None:
        """Starts to compile a jitted function under a key, for arguments or their shapes, unless already done."""
        if key not in self._programs:
            self._programs[key] = self._pool.submit(lambda: function.lower(*arguments).compile())


def fitting_lanes(most: int, needed: Callable[[int], int], limit: float) -> int:
    """The largest number of lanes, at least 1, that is found to fit into memory.

    Args:
      most: of interest.
      needed: the bytes that so many lanes take; each call may compile a program.
      limit: bytes that there are.
    """
    number = most
    while number > 1 and (bytes_needed := needed(number)) > limit:
        number = max(1, min(number - 1, int(number * limit / bytes_needed)))
    return number
