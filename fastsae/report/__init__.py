"""Results for people: plain-text tables, plots, and a run's HTML page."""

from fastsae.report.page import write_html
from fastsae.report.text import interval, table
from fastsae.report.training import plot_training, read_metrics

__all__ = ["interval", "plot_training", "read_metrics", "table", "write_html"]
