"""tl.dot as every kernel here uses it."""

import os

import torch
import triton
import triton.language as tl

# Triton's interpreter multiplies the bits of bf16 numbers as if they were integers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, summed in fp32. PRECISION matters for fp32 operands only."""
    if INTERPRETED:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


def precision() -> str:
    """Choose the precision of fp32 products: "ieee", or "tf32" if the user allowed TF32 in torch."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
