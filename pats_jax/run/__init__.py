"""Shared by all programs: settings, flags, the run folder and its records, journal, start, model card."""
