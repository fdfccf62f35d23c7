"""What stage `benchmark` measures: each function times one thing beside its baselines and returns a row's facts."""
