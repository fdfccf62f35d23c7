"""The encode kernels: exactly the k largest of the pre-activations as they are stored, in every way a plan can take."""

import dataclasses

import pytest
import torch
from helpers import KERNEL_CASES, Case, assert_b_dec, assert_scaled, assert_selection
from torch import Tensor

from csrc_triton import plan
from csrc_triton import topk_encode as module
from csrc_triton.encode_gemm import encode_gemm
from csrc_triton.plan import EncodePlan
from fastsae import ops
from fastsae.backends import cuda

# ---- select, on pre-activations as they are --------------------------------------------------------------------------


def plan_for(M: int, k: int, group: int, blocks: int, dtype: torch.dtype) -> EncodePlan:
    """Groups of this size, or the way without groups: 0 streams, -1 is torch.topk. In so many blocks of columns."""
    select = {0: "stream", -1: "topk"}.get(group, "groups")
    unit = max(64, group)
    columns = -(-M // (unit * blocks)) * unit
    made = plan.encode(1, 16, M, k, dtype.itemsize, 2**28)
    widths = {"width": blocks * columns, "columns": columns}
    return dataclasses.replace(made, select=select, group=max(group, 0), gemm="cublas", **widths)


def selected(rows: Tensor, k: int, group: int, blocks: int = 1) -> tuple[Tensor, Tensor]:
    M = rows.shape[1]
    made = plan_for(M, k, group, blocks, rows.dtype)
    y = torch.nn.functional.pad(rows, (0, made.width - M)).view(len(rows), blocks, -1).transpose(0, 1).contiguous()
    values, indices = rows.new_full((len(rows), k), -7), torch.full((len(rows), k), -7, device=rows.device)
    module._select(y, None, M, k, made, values, indices)
    return values, indices


def adversarial(kind: str, M: int, k: int) -> Tensor:
    """Two rows that some way of ranking could get wrong."""
    y = torch.randn(2, M)
    if kind == "equal":
        y = torch.ones(2, M)
    elif kind == "few values":
        y = torch.randint(-1, 3, (2, M)).float()
    elif kind == "one cluster":  # many more than k, in few groups
        y[:, M // 3 : M // 3 + 3 * k] += 50
    elif kind == "one group each":  # the k largest lie one to a group
        y[:, :: M // k] += 50
    elif kind == "few positive":
        y = torch.where(torch.rand(2, M) < 0.5 * k / M, 1.0, -1.0) * torch.rand(2, M)
    elif kind == "none positive":
        y = -torch.rand(2, M)
        y[0, ::3] = -0.0
    elif kind == "nan and infinity":
        y[0, torch.randperm(M)[:3]] = torch.tensor([torch.nan, -torch.nan, torch.inf])
        y[1, torch.randperm(M)[: 2 * k]] = torch.nan
    elif kind == "denormal":
        y = torch.full((2, M), 1e-39)
        y[:, 3] = -1e-39
        y[0, k:] = 0
    return y


KINDS = [
    "normal",
    "equal",
    "few values",
    "one cluster",
    "one group each",
    "few positive",
    "none positive",
    "nan and infinity",
    "denormal",
]


@pytest.mark.parametrize("group", [8, 32, 0, -1], ids=["groups of 8", "groups of 32", "stream", "topk"])
@pytest.mark.parametrize("kind", KINDS)
def test_select(kind: str, group: int, dtype: torch.dtype, device: str):
    M, k = 331, 5
    y = adversarial(kind, M, k).to(dtype)
    values, indices = selected(y.to(device), k, group)
    # NaN first, then by value, then by index.
    rank = torch.where(y.isnan(), torch.inf, 2 * torch.relu(y.double()).clamp(max=1e300))
    rank = torch.where(y.isnan(), torch.inf, torch.where(rank > 1e299, 1e299, rank))
    expected = rank.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(indices.cpu(), expected)
    torch.testing.assert_close(values.cpu(), torch.relu(y).gather(1, expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("group", [8, 0, -1], ids=["groups", "stream", "topk"])
@pytest.mark.parametrize("kind", ["normal", "few values", "few positive"])
def test_select_over_blocks_of_columns(kind: str, group: int, dtype: torch.dtype, device: str):
    y = adversarial(kind, 331, 5).to(dtype)
    ours, whole = (selected(y.to(device), 5, group, blocks) for blocks in (3, 1))
    assert torch.equal(ours[0], whole[0])
    assert torch.equal(ours[1], whole[1])


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("group", [8, 0], ids=["groups", "stream"])
@pytest.mark.parametrize("kind", ["normal", "few values"])
def test_select_over_several_reads(kind: str, group: int, blocks: int, device: str):
    """More groups and members than one read takes, and rows longer than one."""
    y = adversarial(kind, 5000, 140).half()[:1]
    values, indices = selected(y.to(device), 140, group, blocks)
    expected = torch.relu(y.double()).sort(dim=1, descending=True, stable=True).indices[:, :140]
    assert torch.equal(indices.cpu(), expected)
    assert torch.equal(values.cpu(), torch.relu(y).gather(1, expected))


def test_the_limits_of_select_are_reached(device: str, monkeypatch: pytest.MonkeyPatch):
    """Rows that overflow the lists must be finished by select_slow: without it they stay as they were."""
    y = adversarial("equal", 331, 5).to(device)
    monkeypatch.setattr(module, "select_slow_kernel", _Nothing())
    assert (selected(y, 5, 8)[1] == -7).all()


class _Nothing:
    def __getitem__(self, grid: tuple[int, ...]):
        return lambda **arguments: None


# ---- encode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [16, 64])
def test_encode_gemm(group: int, device: str):
    """Small whole numbers: exact in any order of summing. Sizes beyond a tile in every direction."""
    x, W, b = (torch.randint(-1, 2, s, device=device).half() for s in ((131, 70), (150, 70), (150,)))
    y = torch.full((131, 192), 7.0, dtype=torch.float16, device=device)
    maxima = encode_gemm(x, W, b, y, group)
    expected = x.float() @ W.float().T + b.float()
    assert torch.equal(y[:, :150].float(), expected)
    assert (y[:, 150:] == 7).all()
    padded = torch.nn.functional.pad(expected.relu(), (0, 42)).view(131, -1, group).amax(2)
    assert torch.equal(maxima.view(torch.float16).float(), padded)


@pytest.mark.parametrize("gemm", ["cublas", "triton"])
def test_either_product_gives_the_selection(gemm: str, device: str, monkeypatch: pytest.MonkeyPatch):
    case = Case("gemm", 5, 20, 300, 4, 2, 3)
    p = {name: t.to(device) for name, t in case.inputs(torch.float16).items()}
    chosen = plan.encode
    forced = {"gemm": gemm, "group": 16, "width": 320, "columns": 320}
    monkeypatch.setattr(plan, "encode", lambda *a: dataclasses.replace(chosen(*a), **forced))
    assert_selection(case, p, *ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], 4, backend="cuda"))


@pytest.mark.parametrize("need_x", [False, True])
def test_b_dec_is_subtracted_and_gets_its_gradient(need_x: bool, dtype: torch.dtype, device: str, slack: float):
    assert_b_dec(dtype, need_x, "cuda", device, slack)


@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda c: c.name)
def test_scale_ranks_features_and_changes_nothing_else(case: Case, dtype: torch.dtype, device: str, slack: float):
    inputs = {name: t.to(device) for name, t in case.inputs(dtype).items()}
    assert_scaled(case, inputs, "cuda", slack)


def test_scale_is_not_lost_in_our_own_product(device: str, monkeypatch: pytest.MonkeyPatch):
    """Whole numbers, and scales that are powers of 2: everything is exact."""
    chosen = plan.encode
    forced = {"gemm": "triton", "group": 16, "width": 256, "columns": 256}
    monkeypatch.setattr(plan, "encode", lambda *a: dataclasses.replace(chosen(*a), **forced))
    x, W, b = (torch.randint(-2, 3, s, device=device).half() for s in ((4, 12), (200, 12), (200,)))
    scale = 2.0 ** torch.randint(-2, 3, (200,), device=device).half()
    ours, theirs = (ops.topk_encode(x, W, b, 5, backend, scale=scale) for backend in ("cuda", "reference"))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_narrow_products_of_wide_weights(device: str, monkeypatch: pytest.MonkeyPatch):
    """Under autocast: blocks of W_enc are multiplied as fp16; whole numbers, so that it shows."""
    monkeypatch.setattr(plan, "_MOST_COPIED", 70)
    x, W, b = (torch.randint(-2, 3, s, device=device).float() for s in ((3, 12), (200, 12), (200,)))
    made = plan.encode(3, 12, 200, 4, 2, 2**28, copied=True)
    assert (made.gemm, made.width // made.columns) == ("cublas", 3)
    values, indices = module.topk_encode(x.half(), W, b, 4, None, made)
    expected = ops.topk_encode(x, W, b, 4, "reference")
    assert torch.equal(values.float(), expected[0])
    assert torch.equal(indices, expected[1])


def test_chunks_of_rows_change_nothing(device: str):
    case = Case("chunks", 7, 16, 200, 4, 2, 3, "ties")
    p = {name: t.to(device) for name, t in case.inputs(torch.float32).items()}
    whole = ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], 4, backend="cuda")
    cuda.set_pre_activation_bytes(3 * 4 * 256)  # three rows
    chunked = ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], 4, backend="cuda")
    assert torch.equal(whole[0], chunked[0])
    assert torch.equal(whole[1], chunked[1])


def test_features_restricts_who_competes(device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "_MOST_COPIED", 30)
    x, W, b = (torch.randint(-2, 3, s, device=device).float() for s in ((4, 12), (200, 12), (200,)))
    features = torch.randperm(200)[:100].sort().values.to(device)
    ours = ops.topk_encode(x, W, b, 5, "cuda", features)
    theirs = ops.topk_encode(x, W, b, 5, "reference", features)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_the_memory_of_pre_activations_can_be_set(device: str):
    cuda.set_pre_activation_bytes(1000)
    assert cuda.budget(torch.device(device)) == 1000
    with pytest.raises(ValueError, match="set_pre_activation_bytes: expected None or at least 1; got 0"):
        cuda.set_pre_activation_bytes(0)
