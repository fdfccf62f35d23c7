"""The one comparison, and the table of awkward shapes."""

from dataclasses import dataclass

import torch
from torch import Tensor


def assert_matches(
    name: str, got: Tensor, exact: Tensor, eager: Tensor, slack: float = 2.0, scale: float | None = None
) -> None:
    """Max and RMS error of `got` stay within `slack` times eager's, both against the fp64 answer `exact`.

    The floor is one rounding of the largest entry in the dtype of `got`, or of `scale` where the answer is a difference
    of larger numbers.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(exact.shape)}"
    assert got.isfinite().all(), f"{name}: {int((~got.isfinite()).sum())} non-finite values"
    if got.numel() == 0:
        return
    ours, theirs = (got.double() - exact).abs(), (eager.double() - exact).abs()
    # In fp64 the answer is rounded itself, as often as ours.
    roundings = 32 if got.dtype == torch.float64 else 1
    floor = roundings * torch.finfo(got.dtype).eps * (exact.abs().max().item() if scale is None else scale)
    for kind, size in (("max", torch.max), ("rms", lambda e: e.square().mean().sqrt())):
        allowed = slack * size(theirs).item() + floor
        assert size(ours).item() <= allowed, f"{name}: {kind} error {size(ours):.2e}, allowed {allowed:.2e}"


@dataclass(frozen=True)
class Case:
    """A shape (B, D, M, K, N, E) and how its pre-activations are made."""

    name: str
    B: int
    D: int
    M: int
    K: int
    N: int
    E: int
    kind: str = "normal"

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """x W_enc b_enc W_dec W_lin V in `dtype`, and gradients g_out g_z for the two outputs."""
        x, W_enc = torch.randn(self.B, self.D), torch.randn(self.M, self.D) / self.D**0.5
        b_enc = torch.randn(self.M) / 4
        if self.kind == "ties":  # small integers: pre-activations are exact in every dtype, and mostly equal
            x, W_enc, b_enc = (torch.randint(-1, 2, t.shape).float() for t in (x, W_enc, b_enc))
        if self.kind == "constant":
            x, W_enc, b_enc = torch.zeros_like(x), W_enc, torch.ones_like(b_enc)
        if self.kind == "few positive":
            b_enc = b_enc - 2
        if self.kind == "all negative":
            x, b_enc = torch.zeros_like(x), -b_enc.abs() - 1
        if self.kind == "one cluster":  # the strongest features lie side by side, in one group
            b_enc[self.M // 2 : self.M // 2 + self.K] += 50
        made = {
            "x": x,
            "W_enc": W_enc,
            "b_enc": b_enc,
            "W_dec": torch.randn(self.M, self.D),
            "W_lin": torch.randn(self.M, self.D),
            "V": torch.randn(self.M, self.E),
            "g_out": torch.randn(self.B, self.D),
            "g_z": torch.randn(self.B, self.E),
        }
        return {name: t.to(dtype) for name, t in made.items()}


CASES = [
    Case("plain", 16, 24, 200, 8, 4, 6),
    Case("one row", 1, 24, 200, 8, 4, 6),
    Case("k = n = 1", 9, 24, 200, 1, 1, 6),
    Case("k = d_sae", 5, 17, 97, 97, 97, 5),
    Case("a width of whole cache lines", 20, 48, 3000, 8, 4, 6),
    Case("primes", 13, 31, 1009, 7, 3, 11),
    Case("two ranking levels", 11, 16, 2000, 8, 8, 4),
    Case("three ranking levels", 7, 16, 20011, 4, 2, 4),
    Case("one feature past a block", 3, 8, 1025, 2, 1, 3),
    Case("empty batch", 0, 8, 300, 4, 2, 3),
    Case("ties", 12, 16, 3001, 16, 8, 4, "ties"),
    Case("ties in a small dictionary", 12, 6, 100, 16, 8, 4, "ties"),
    Case("constant rows", 4, 16, 5000, 12, 6, 4, "constant"),
    Case("few positive", 12, 32, 3000, 64, 32, 4, "few positive"),
    Case("all negative", 6, 32, 3000, 16, 8, 4, "all negative"),
    Case("one cluster", 6, 32, 20000, 16, 8, 4, "one cluster"),
]
