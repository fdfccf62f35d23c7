"""`python -m benchmarks.gpu`: run the stages on this machine's NVIDIA GPU, and say what was reached."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import bars
from benchmarks.gpu.machine import hardware, name, versions
from benchmarks.gpu.results import RESULTS, Results
from benchmarks.gpu.runner import ROOT, STAGES, Run, StageSpec, run_stages, say, summary


def main(arguments: Sequence[str], stages: Sequence[StageSpec] = STAGES) -> int:
    """Returns the exit code: 0 unless something was shown to be wrong."""
    listed = "\n".join(f"  {s.name:<10} {s.about}{' (only if named)' if s.asked else ''}" for s in stages)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=f"{__doc__}\n\nstages:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stages", default=",".join(s.name for s in stages if not s.asked), help="which, by commas")
    parser.add_argument("--seconds", type=float, default=540, help="for all stages together; default: 540")
    parser.add_argument("--smoke", action="store_true", help="try the stages themselves, tiny and on the CPU")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gpu", help="folder of logs")
    options = parser.parse_args(arguments)
    by_name = {s.name: s for s in stages}
    asked = [n.strip() for n in options.stages.split(",") if n.strip()]
    if unknown := [n for n in asked if n not in by_name]:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(by_name)}")
    if not options.smoke and not torch.cuda.is_available():
        say("no NVIDIA GPU here: nothing to run (--smoke tries the runner itself on the CPU)")
        return 0
    file = options.runs / "smoke.json" if options.smoke else RESULTS / f"{name()}.json"
    # A folder that is kept where this one is not.
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    results = Results(file, [out / file.name] if out else [])
    results.describe(hardware(options.smoke), versions())
    chosen = [s for s in stages if s.name in asked]
    outcomes = run_stages(chosen, options.seconds, Run(results, options.runs, options.smoke, out))
    say(f"\n{summary(outcomes)}")
    if "benchmark" in asked and not options.smoke:
        say(f"\n{bars.table(results.rows('benchmark'))}")
    say(f"\nrows: {file}\nlogs: {options.runs}")
    return int(any(outcome.bad for outcome in outcomes))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running stage is ended too
    sys.exit(main(sys.argv[1:]))
