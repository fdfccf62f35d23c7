"""Results for people: plain-text tables and plots."""

from fastsae.report.text import table
from fastsae.report.training import plot_training, read_metrics

__all__ = ["plot_training", "read_metrics", "table"]
