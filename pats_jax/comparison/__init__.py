"""A grid of methods, tasks and seeds: its runs, its statistics, its page."""
