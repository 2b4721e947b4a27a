"""Pages, plots and lines on a console."""
