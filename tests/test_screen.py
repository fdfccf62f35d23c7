"""Encoding by bf16 bounds: they are bounds, what they prove is true, and real rows need little else."""

import pytest
import torch
from torch import Tensor

from fastsae import ops
from fastsae.backends.cpu import screen
from fastsae.backends.cpu.blocks import Encoder
from fastsae.backends.cpu.select import group_size

# Sizes of x, of W_enc and of b_enc, alone and mixed within one matrix.
SCALES = [(1, 1, 1), (1e-3, 1, 0), (1e15, 1e-15, 1), (1, 1, 1e4), (1e-30, 1e-3, 1e-33), (1e-20, 1e-19, 0)]


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_saves_time", lambda *_: True)


def heavy(*shape: int) -> Tensor:
    """Entries and rows of very different sizes."""
    entries = torch.randn(*shape) * torch.randn(*shape).mul(2).exp()
    return torch.einsum("i...,i->i...", entries, torch.randn(shape[0]).exp())


def exact_and_ceilings(x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Every pre-activation in fp64, and what its bound allows it to be at most; the maxima of groups are checked."""
    group = group_size(len(W), 4, torch.bfloat16)
    blocks, maxima, largest_norm = screen._upper_bounds(x, Encoder(W, b, None), group)
    by_row = blocks.transpose(0, 1).reshape(len(x), -1)
    assert torch.equal(maxima, by_row.view(len(x), -1, group).amax(2))
    bounds = by_row[:, : len(W)].view(torch.bfloat16).relu()
    ceilings = torch.stack([screen._ceiling(of_feature, x, largest_norm) for of_feature in bounds.T], dim=1)
    return x.double() @ W.double().T + b.double(), ceilings.double()


@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("make", [torch.randn, heavy], ids=["normal", "heavy"])
@pytest.mark.parametrize(("D", "M"), [(16, 4000), (64, 1000), (48, 5000), (1024, 2048)])
def test_the_bounds_are_bounds(D: int, M: int, make, scales: tuple[float, float, float]):
    x, W, b = (make(*shape) * scale for shape, scale in zip(((9, D), (M, D), (M,)), scales, strict=True))
    exact, ceilings = exact_and_ceilings(x, W, b)
    assert ceilings.isfinite().all()
    too_low = exact > ceilings
    assert not too_low.any(), f"{int(too_low.sum())} of {exact.numel()} pre-activations exceed their bounds"


@pytest.mark.parametrize("D", [16, 48, 1024])
@pytest.mark.parametrize("make", [torch.ones, torch.rand], ids=["constant", "positive"])
def test_the_bounds_hold_where_they_are_tight(D: int, make):
    """W along x, and all that rounding loses of one sign: the inequality of Cauchy-Schwarz is nearly an equality."""
    x = make(9, D) * torch.linspace(1, 2, 9).unsqueeze(1)
    W = x[:1] * torch.linspace(0.5, 3, 2000).unsqueeze(1)
    exact, ceilings = exact_and_ceilings(x, W, torch.linspace(-1, 1, 2000))
    assert (exact <= ceilings).all()
    assert (ceilings / exact)[exact > 0.5].max() < 1.05, "not tight: this test would not see an error"


@pytest.mark.parametrize("kind", ["near ties", "normal", "equal features", "one large bias"])
def test_certain_rows_are_exact_and_others_are_encoded_in_full(kind: str):
    B, D, M, k = 64, 32, 4096, 8
    x, W, b = torch.randn(B, D), torch.randn(M, D), torch.randn(M)
    if kind == "near ties":  # closer together than bf16 can tell
        W, b = W[:1] + 1e-4 * W, torch.zeros(M)
    if kind == "equal features":
        W, b = W[:1].expand(M, D).contiguous(), torch.zeros(M)
    if kind == "one large bias":
        b[77] = 1e30
    values, kept, uncertain = screen.screened_topk(x, Encoder(W, b, None), k)
    certain = torch.ones(B, dtype=torch.bool).index_fill(0, uncertain, False)
    # What the fp32 scores say, each computed as the screen computes it.
    scores = torch.stack([(x * w).double().sum(1) for w in W], dim=1) + b.double()
    exact = scores.relu().topk(k).values
    torch.testing.assert_close(values[certain].double(), exact[certain], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.gather(1, kept)[certain].relu(), exact[certain], rtol=1e-5, atol=1e-5)
    assert (kind in ("normal", "one large bias")) == bool(certain.any())
    values, _ = ops.topk_encode(x, W, b, k, backend="cpu")
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-5)


def test_sums_that_overflow_on_the_way():
    """Half the features end as infinity minus infinity; that must be seen, as on the plain path."""
    x, W = 1e19 * torch.randn(6, 32).sign(), torch.randn(3000, 32)
    W[::2] = 1e20 * W[::2].sign()
    _, _, uncertain = screen.screened_topk(x, Encoder(W, torch.zeros(3000), None), 4)
    assert len(uncertain) == 6


@pytest.mark.parametrize("D", [48, 100, 256, 1023, 1024])
def test_equal_features_come_in_their_order(D: int):
    """Wherever their rows lie in memory. (Below 48, MKL itself rounds equal columns of a product differently.)"""
    W = torch.randn(3000, D)
    twins = torch.randperm(3000)[:6].sort().values
    W[twins] = W[twins[0]].clone()
    x = W[twins[0]] + 0.1 * torch.randn(20, D)
    for k in (1, 3):
        _, indices = ops.topk_encode(x, W, torch.zeros(3000), k, backend="cpu")
        assert torch.equal(indices, twins[:k].expand(20, k))


def test_a_crowd_at_the_threshold_is_settled_by_more_candidates(monkeypatch: pytest.MonkeyPatch):
    D, M, k = 64, 8192, 8
    W = 0.05 * torch.randn(M, D)
    W[:40] = torch.ones(D) + 1e-3 * torch.randn(40, D)
    x = torch.ones(16, D) + 0.1 * torch.randn(16, D)
    values, _, uncertain = screen.screened_topk(x, Encoder(W, torch.zeros(M), None), k)
    assert len(uncertain) == 0
    torch.testing.assert_close(values, (x @ W.T).topk(k).values)
    monkeypatch.setattr(screen, "_CANDIDATES", (2,))
    _, _, uncertain = screen.screened_topk(x, Encoder(W, torch.zeros(M), None), k)
    assert len(uncertain) == 16


def test_real_rows_are_nearly_all_certain():
    """Otherwise screening would be lost time: rows that are not certain are encoded twice."""
    x, W = torch.randn(256, 128), torch.randn(16384, 128)
    _, _, uncertain = screen.screened_topk(x, Encoder(W, torch.zeros(16384), None), 32)
    assert len(uncertain) < 0.05 * len(x)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf, 3.4e38, 1e25])
@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc"])
def test_numbers_that_are_none_or_overflow_leave_it_to_the_plain_path(where: str, bad: float, monkeypatch):
    p = {"x": torch.randn(6, 16), "W_enc": torch.randn(3000, 16), "b_enc": torch.randn(3000)}
    p[where][..., 3] = bad
    screened = ops.topk_encode(**p, k=8, backend="cpu")
    monkeypatch.setattr(screen, "_saves_time", lambda *_: False)
    plain = ops.topk_encode(**p, k=8, backend="cpu")
    assert torch.equal(screened[1], plain[1])
    torch.testing.assert_close(screened[0], plain[0], equal_nan=True, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("instructions", "amd", "faster"),
    [
        ({}, True, False),
        ({"avx512_bf16": True, "amx_bf16": False}, True, True),
        ({"avx512_bf16": True, "amx_bf16": False}, False, False),  # twice as slow, by measurement
        ({"avx512_bf16": True, "amx_bf16": True}, False, True),
    ],
)
def test_what_a_processor_is_decides(instructions: dict, amd: bool, faster: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    monkeypatch.setattr(screen, "_is_amd", lambda: amd)
    assert screen.bf16_is_faster.__wrapped__() is faster


def test_when_it_pays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    bench = (2048, 1024, 65536, 64, torch.float32)
    for native in (True, False):
        monkeypatch.setattr(screen, "bf16_is_faster", lambda native=native: native)
        assert screen.screening_pays(*bench) == native
        assert not screen.screening_pays(*bench[:-1], torch.float64)
        assert not screen.screening_pays(*bench[:-1], torch.bfloat16)
        # Converting W_enc for one row, narrow rows, more candidates than groups: slower, by measurement.
        assert not screen.screening_pays(1, 1024, 65536, 64, torch.float32)
        assert not screen.screening_pays(1024, 64, 8192, 32, torch.float32)
        assert not screen.screening_pays(2048, 1024, 1024, 64, torch.float32)
