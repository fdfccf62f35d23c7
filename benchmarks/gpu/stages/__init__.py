"""One file a stage, each with run(stage): what is shown, in cases of which each may fail alone."""
