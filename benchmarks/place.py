"""Place of a provider's computation: a device, the backend of fastsae to be shown, the dtype of products."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Place:
    """Weights are fp32; `products` is what matrix products take under autocast, None for fp32."""

    device: torch.device
    backend: str
    products: torch.dtype | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def precision(self) -> AbstractContextManager[Any]:
        """Make the context that forwards run in: autocast to the dtype of products, if there is one."""
        return torch.autocast(self.device.type, self.products) if self.products else nullcontext()

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def normal(self, generator: torch.Generator, *size: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=self.device).mul_(std)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0] if self.on_gpu else 2**30

    def with_backend(self, backend: str) -> "Place":
        return replace(self, backend=backend)


CPU = Place(torch.device("cpu"), "cpu")


def place(smoke: bool) -> Place:
    """Choose the place of `make gpu`: the GPU in bf16, or for a smoke run the CPU with a backend that serves there.

    fp32 products stay fp32.
    """
    torch.set_float32_matmul_precision("highest")
    if not smoke:
        return Place(torch.device("cuda"), "cuda", torch.bfloat16)
    torch.set_num_threads(1)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return Place(torch.device("cpu"), "cuda" if interpreted else "cpu", torch.bfloat16)
