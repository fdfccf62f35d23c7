"""Peak memory of a training step beyond parameters, gradients and optimizer state, and how it grows with the batch."""

import json
import subprocess
import sys

import pytest

# ru_maxrss never falls, so each batch size has a process of its own. Parameters, gradients and optimizer state are the
# same in both: what the peak grows by is what a step needs beside them.
SCRIPT = """
import json, resource, sys, torch, fastsae
architecture, B, D, M, K = sys.argv[1], *map(int, sys.argv[2:])
make = {"topk": fastsae.TopKSAE, "joint": fastsae.JointSAE}[architecture]
sae = make(D, M, K)
trainer = fastsae.Trainer(sae, fastsae.TrainerConfig(steps=9, normalize="none", progress=False))
for _ in range(2):
    trainer._train_step(torch.randn(B, D))
held = sum(p.numel() * 4 for p in sae.parameters()) * 4
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak_bytes": peak, "held_bytes": held}))
"""


@pytest.mark.parametrize("architecture", ["topk", "joint"])
def test_memory_of_a_step(architecture: str, benchmark, shape, rows):
    sizes = [shape.B // 4, shape.B * 4]

    def measure() -> list[dict[str, int]]:
        found = []
        for B in sizes:
            arguments = [architecture, *map(str, (B, shape.D, shape.M, shape.K))]
            done = subprocess.run(
                [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True
            )
            found.append(json.loads(done.stdout))
        return found

    small, large = benchmark.pedantic(measure, rounds=1)
    rows.append(
        {
            "benchmark": "memory",
            "shape": shape.name,
            "provider": f"fastsae {architecture}, Trainer",
            "batch_sizes": sizes,
            "peak_bytes": [small["peak_bytes"], large["peak_bytes"]],
            "held_bytes": large["held_bytes"],
            "growth_bytes": large["peak_bytes"] - small["peak_bytes"],
        }
    )
