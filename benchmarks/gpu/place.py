"""Where a stage computes: on the GPU by the CUDA backend, or for a smoke run on the CPU by what serves there."""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Place:
    """A device and the backend that is to be shown."""

    device: torch.device
    backend: str

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def bf16(self) -> AbstractContextManager[Any]:
        """fp32 weights, bf16 products."""
        return torch.autocast(self.device.type, torch.bfloat16)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0] if self.on_gpu else 2**30


def place(smoke: bool) -> Place:
    """With full fp32 products, so that fp32 is compared with fp32."""
    torch.set_float32_matmul_precision("highest")
    if not smoke:
        return Place(torch.device("cuda"), "cuda")
    torch.set_num_threads(1)
    return Place(torch.device("cpu"), "cuda" if os.environ.get("TRITON_INTERPRET") == "1" else "cpu")
