import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: tests never touch the network
# One thread, here and in processes that tests start, unless it is asked for more (tests/machines.py): threads only wait
# for one another over tensors this small, on a busy machine for seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # what was compiled from an older version would be taken

import torch

# Kernels run on a GPU, or in Triton's interpreter, which is chosen when they are defined: `make test` starts it apart.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["kernels"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="ten times the kills and damages, 10,000 cases of the operations"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> None:
    """Seed each module before it is imported: some draw their cases then, which must be the same in every run."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def times(request: pytest.FixtureRequest) -> int:
    """Factor on the usual number of random cases."""
    return 10 if request.config.getoption("--long") else 1


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
