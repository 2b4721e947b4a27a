"""The training of one run: loop, runners, evaluation, checkpoints, preemption, metrics."""
