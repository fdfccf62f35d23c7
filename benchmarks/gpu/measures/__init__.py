"""Measurements of stage `benchmark`: each function times one thing beside its baselines and returns a row's facts."""
