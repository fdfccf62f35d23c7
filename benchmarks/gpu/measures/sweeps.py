"""Sweeps to which the constants of csrc_triton/plan.py are fitted: each of two ways, forced, over a range of shapes."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.cases import Shape
from benchmarks.gpu.measures.kernels import decode, encode, ratio
from benchmarks.outcomes import Missing
from benchmarks.place import Place


@contextmanager
def forced(function: str, **changes: str) -> Iterator[None]:
    """Let csrc_triton.plan.<function> answer with `changes`. Raises Missing if the backend never asks it."""
    try:
        from csrc_triton import plan
    except ImportError as error:
        raise Missing(f"csrc_triton.plan cannot be imported: {error}") from error
    original, asked = getattr(plan, function), []

    def answer(*arguments: Any, **named: Any) -> Any:
        asked.append(arguments)
        return dataclasses.replace(original(*arguments, **named), **changes)

    setattr(plan, function, answer)
    try:
        yield
    finally:
        setattr(plan, function, original)
    if not asked:
        raise Missing(f"the backend did not ask csrc_triton.plan.{function}: its way cannot be forced")


def encode_gemm(shape: Shape, place: Place) -> dict[str, Any]:
    """Encoding by cuBLAS and a pass for the group maxima, and by our GEMM that takes them on the way."""
    facts: dict[str, Any] = {"D": shape.D, "B": shape.B, "M": shape.M, "K": shape.K}
    for gemm in ("cublas", "triton"):
        with forced("encode", gemm=gemm):
            found = encode(shape, place)
        facts[gemm] = {"ms": found["ms"], "encode / GEMM": found["encode / GEMM"]}
    times = {gemm: facts[gemm]["ms"]["encode"] for gemm in ("cublas", "triton")}
    return facts | {"triton / cublas": ratio(times, "triton", "cublas")}


def decode_ways(shape: Shape, place: Place) -> dict[str, Any]:
    """Decoding and both backwards by gathering rows, and by dense products."""
    facts: dict[str, Any] = {"D": shape.D, "B": shape.B, "M": shape.M, "K": shape.K, "share": shape.K / shape.M}
    for way in ("gather", "dense"):
        with forced("decode", forward=way, backward=way, encoder_backward=way):
            facts[way] = decode(shape, joint=False, place=place)["ms"]
        if place.on_gpu:
            torch.cuda.empty_cache()
    return facts | {
        f"dense / gather, {part}": ratio({w: facts[w][part] for w in ("gather", "dense")}, "dense", "gather")
        for part in facts["gather"]
    }
