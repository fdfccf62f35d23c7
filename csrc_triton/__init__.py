"""Triton kernels and their launchers. Knows torch and triton, nothing of fastsae; importable without a GPU.

A file holds the kernels of one operation and the functions that launch them; `plan` decides, from shapes alone, which
of them run and how; `launch` starts a kernel, or hands it to who asked for it; `cases` are the launches of training
steps, `offline` compiles them without a GPU.
"""
