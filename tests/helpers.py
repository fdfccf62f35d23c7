"""The one comparison, the table of awkward shapes, and what every backend is put through over it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae import ops


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

# The same awkwardness at sizes that Triton's interpreter can bear: it runs every program of a grid as a Python loop.
KERNEL_CASES = [
    Case("plain", 5, 24, 70, 4, 2, 6),
    Case("one row", 1, 24, 66, 4, 2, 6),
    Case("k = n = 1", 4, 24, 40, 1, 1, 6),
    Case("k = n", 3, 20, 82, 5, 5, 3),
    Case("k = d_sae", 3, 17, 13, 13, 13, 5),
    Case("primes", 5, 31, 83, 5, 3, 11),
    Case("empty batch", 0, 8, 20, 2, 1, 3),
    Case("ties", 3, 16, 100, 6, 3, 4, "ties"),
    Case("constant rows", 2, 16, 66, 4, 2, 4, "constant"),
    Case("few positive", 2, 32, 100, 6, 3, 4, "few positive"),
    Case("all negative", 2, 32, 50, 3, 2, 4, "all negative"),
    Case("one cluster", 2, 16, 90, 5, 2, 4, "one cluster"),
]

NAMES = ("x", "W_enc", "b_enc", "W_dec", "W_lin", "V")


def assert_selection(case: Case, inputs: dict[str, Tensor], values: Tensor, indices: Tensor) -> None:
    """`values` and `indices` are the k largest of relu(pre), but for the rounding of pre in the dtype of x."""
    dtype = inputs["x"].dtype
    assert indices.dtype == torch.int64
    assert values.dtype == dtype
    x, W_enc, b_enc = (inputs[name].double() for name in ("x", "W_enc", "b_enc"))
    activations = torch.relu(x @ W_enc.T + b_enc)
    exact = case.kind in ("ties", "constant") or case.B == 0
    rounding = 0.0 if exact else 8 * torch.finfo(dtype).eps * (1 + activations.abs().max().item())
    torch.testing.assert_close(values.double(), activations.gather(1, indices), rtol=0, atol=rounding)
    assert all(len(set(row)) == case.K for row in indices.tolist()), "indices repeat within a row"
    assert (values[:, :-1] >= values[:, 1:]).all(), "not strongest first"
    left_out = activations.scatter(1, indices, -1.0).amax(dim=1)
    assert (left_out <= values[:, -1].double() + rounding).all(), "a feature left out beats one that was kept"
    equal = values[:, :-1] == values[:, 1:]
    assert (indices[:, :-1] < indices[:, 1:])[equal].all(), "ties are not in the order of their indices"


def leaves(inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {n: inputs[n].to(dtype or inputs[n].dtype).detach().clone().requires_grad_() for n in NAMES}


def joint(p: dict[str, Tensor], case: Case, backend: str, indices: Tensor | None = None) -> dict[str, Tensor]:
    """Encode, decode and all gradients. `indices` fixes the selection, so that dtypes can be compared."""
    if indices is None:
        values, indices = ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], case.K, backend=backend)
    else:
        values = torch.relu(p["x"] @ p["W_enc"].T + p["b_enc"]).gather(1, indices)
    out, z = ops.joint_decode(values, indices, p["W_dec"], p["W_lin"], p["V"], case.N, backend=backend)
    return {"values": values, "indices": indices, "out": out, "z": z}


def assert_every_gradient(case: Case, inputs: dict[str, Tensor], backend: str, slack: float = 2.0) -> None:
    """Code, sums and the gradients of all inputs by `backend`, against the specification."""
    results = {}
    ours = leaves(inputs)
    results["ours"] = joint(ours, case, backend)
    kept = results["ours"]["indices"]
    assert_selection(case, inputs, results["ours"]["values"].detach(), kept)
    exact, eager = leaves(inputs, torch.float64), leaves(inputs)
    results["exact"], results["eager"] = joint(exact, case, "reference", kept), joint(eager, case, "reference", kept)
    for r in results.values():
        ((r["out"] * inputs["g_out"].to(r["out"])).sum() + (r["z"] * inputs["g_z"].to(r["z"])).sum()).backward()
    s = (results["exact"]["values"][:, : case.N, None] * exact["V"][kept[:, : case.N]]).sum(1)
    scales = {"z": s.square().max().item() if s.numel() else 0.0}
    for name in ("values", "out", "z"):
        parts = (results[who][name].detach() for who in ("ours", "exact", "eager"))
        assert_matches(name, *parts, slack=slack, scale=scales.get(name))
    for name in NAMES:
        grads = (p[name].grad for p in (ours, exact, eager))
        assert_matches(f"d_{name}", *grads, slack=slack, scale=gradient_scale(name, exact, s))


def gradient_scale(name: str, exact: dict[str, Tensor], s: Tensor) -> float | None:
    """d_V and what hangs on d_values are differences (s - a v): their rounding is that of the larger terms."""
    grad = exact[name].grad
    assert grad is not None
    if name in ("V", "x", "W_enc", "b_enc") and grad.numel() and s.numel():
        return max(grad.abs().max().item(), 4 * s.square().max().item())
    return None


def assert_scaled(case: Case, inputs: dict[str, Tensor], backend: str, slack: float = 2.0) -> None:
    """Features are ranked by scale * relu(pre); values and every gradient are those of relu(pre)."""
    device = inputs["x"].device
    scale = ((0.1 + torch.rand(case.M)) * (torch.rand(case.M) > 0.1)).to(device)
    results, kept, by = [], None, scale.to(inputs["x"].dtype).requires_grad_()
    for who, dtype in ((backend, inputs["x"].dtype), ("reference", torch.float64), ("reference", inputs["x"].dtype)):
        p = leaves(inputs, dtype)
        if kept is None:
            values, kept = ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], case.K, who, scale=by)
        else:
            values = torch.relu(p["x"] @ p["W_enc"].T + p["b_enc"]) * (scale.to(dtype) > 0)
            values = values.gather(1, kept)
        (values * torch.linspace(0.5, 2, case.K, dtype=dtype, device=device)).sum().backward()
        assert by.grad is None
        results.append([values.detach(), *(p[name].grad for name in ("x", "W_enc", "b_enc"))])
    for number, (got, exact, eager) in enumerate(zip(*results, strict=True)):
        # A value is ranked, and divided again: two roundings more.
        floor = 3 * exact.abs().max().item() if exact.numel() else None
        assert_matches(f"result {number}", got, exact, eager, slack, scale=floor)
    x, W_enc, b_enc = (inputs[name].double() for name in ("x", "W_enc", "b_enc"))
    ranked = torch.relu(x @ W_enc.T + b_enc) * scale.double()
    rounding = 8 * torch.finfo(inputs["x"].dtype).eps * (1 + ranked.max().item() if ranked.numel() else 1)
    chosen = ranked.gather(1, kept)
    assert (chosen[:, :-1] >= chosen[:, 1:] - rounding).all(), "not strongest first"
    left_out = ranked.scatter(1, kept, -1.0).amax(dim=1)
    assert (left_out <= chosen[:, -1] + rounding).all(), "a feature left out beats one that was kept"


def assert_b_dec(dtype: torch.dtype, need_x: bool, backend: str, device: str, slack: float = 2.0) -> None:
    """b_dec is taken off x, and every gradient is that of the specification."""
    made = {"x": (5, 6), "W_enc": (70, 6), "b_enc": (70,), "b_dec": (6,)}
    numbers = {name: torch.randn(*shape).to(dtype) for name, shape in made.items()}
    weight, results, kept = torch.rand(5, 3), [], None
    for who, kind in ((backend, dtype), ("reference", torch.float64), ("reference", dtype)):
        p = {name: t.to(device, kind, copy=True) for name, t in numbers.items()}
        for name, t in p.items():
            t.requires_grad_(name != "x" or need_x)
        if kept is None:
            values, kept = ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], 3, who, b_dec=p["b_dec"])
        else:
            values = torch.relu((p["x"] - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]).gather(1, kept)
        (values * weight.to(device, kind)).sum().backward()
        results.append([values.detach(), *(t.grad for t in p.values() if t.grad is not None)])
    assert len(results[0]) == 4 + need_x
    for number, (got, exact, eager) in enumerate(zip(*results, strict=True)):
        # d_b_dec comes by another way than eager's: its terms are this large.
        assert_matches(f"result {number}", got, exact, eager, slack, scale=4 * exact.abs().max().item())
