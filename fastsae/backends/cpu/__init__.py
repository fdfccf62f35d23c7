"""The fast CPU backend: fp32, fp64 and bf16.

Its rule is to allocate nothing large: pre-activations live in one reused buffer, and weight gradients can be written
into buffers that the caller owns. docs/decisions.md says what was measured.
"""

import torch

from fastsae.backends.cpu.blocks import set_pre_activation_bytes
from fastsae.backends.cpu.decode import joint_decode, joint_decode_backward
from fastsae.backends.cpu.encode import plan, topk_encode, topk_encode_backward

DTYPES = (torch.float32, torch.float64, torch.bfloat16)

__all__ = [
    "DTYPES",
    "joint_decode",
    "joint_decode_backward",
    "plan",
    "set_pre_activation_bytes",
    "topk_encode",
    "topk_encode_backward",
]
