"""What all programs do: settings, flags, the run folder and its records, journal, start, model card."""
