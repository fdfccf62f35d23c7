import pytest
import torch
from helpers import KERNEL_CASES, Case
from torch import Tensor

from fastsae.backends import cuda


@pytest.fixture
def device() -> str:
    """Device that kernels run on: a GPU if there is one, else the CPU, in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)


@pytest.fixture(params=KERNEL_CASES, ids=lambda c: c.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    return {name: t.to(device) for name, t in case.inputs(dtype).items()}


@pytest.fixture
def slack(dtype: torch.dtype, device: str) -> float:
    """Against eager's error. Triton's interpreter cuts bf16 off where a GPU rounds it."""
    return 4.0 if dtype == torch.bfloat16 and device == "cpu" else 2.0


@pytest.fixture(autouse=True)
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a test sets, and leave no feature order from the test before."""
    monkeypatch.setattr(cuda, "PRE_ACTIVATION_BYTES", None)
    monkeypatch.setattr(cuda, "_kept", None)
