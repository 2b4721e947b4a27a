"""Pages, plots and console output."""
