"""One small step of both architectures, for compute-sanitizer: `python -m benchmarks.gpu.small_step [smoke]`."""

import sys

import torch

import fastsae
from benchmarks.place import Place, place


def main(where: Place) -> None:
    """Sizes that are no multiple of a block, so that every mask is at work."""
    to = {"backend": where.backend, "device": where.device}
    x = torch.randn(37, 72, generator=where.generator(0), device=where.device)
    saes = [fastsae.TopKSAE(72, 1000, 8, **to), fastsae.JointSAE(72, 1000, 8, d_embedding=20, dropout=0.0, **to)]
    for sae in saes:
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
        loss = sae(x).loss
        loss.backward()
        optimizer.step()
        print(f"{type(sae).__name__} loss {loss.item():.4f}")  # noqa: T201  # the command's answer


if __name__ == "__main__":
    main(place(smoke="smoke" in sys.argv[1:]))
