"""How fast and how large: ``python -m benchmarks SUBJECT``; beside it, programs that measure quality."""
