"""A stage's process, as the runner starts it: `python -m benchmarks.gpu.process SETTINGS` with Settings as JSON."""

import importlib
import json
import sys

from benchmarks.gpu.stage import Settings, Stage

if __name__ == "__main__":
    settings = Settings(**json.loads(sys.argv[1]))
    stage = Stage(settings)  # its clock runs while the module is imported
    importlib.import_module(settings.module).run(stage)
