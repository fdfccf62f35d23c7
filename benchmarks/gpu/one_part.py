"""The launches of one part of csrc_triton/cases.py, once, for a profiler: `python -m benchmarks.gpu.one_part TITLE`."""

import sys

import torch

from benchmarks.gpu.measures.launches import of
from benchmarks.place import place
from csrc_triton.cases import SHAPES, parts

if __name__ == "__main__":
    named = {part.title: part for part in parts(*SHAPES)}
    of(named[sys.argv[1]], place(smoke=False), lambda launch: {})
    torch.cuda.synchronize()
