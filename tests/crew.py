"""Processes that are the ranks of a run, kept between tests: to start one takes longer than what it is started for."""

import datetime
import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PATIENCE = datetime.timedelta(seconds=60)  # one rank that fails alone must not leave the others waiting


class Crew:
    """`size` gloo processes. `crew(function, *arguments)` calls a function of a test module on all, in rank order."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._members = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            member = context.Process(target=_serve, args=(theirs, rank, size, folder / "rendezvous"), daemon=True)
            member.start()
            self._pipes.append(ours)
            self._members.append(member)

    def __call__(self, function: Any, *arguments: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() for pipe in self._pipes]
        for rank, (done, value) in enumerate(answers):
            assert done, f"rank {rank}: {value}"
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for member in self._members:
            member.join(10)


def _serve(pipe: Connection, rank: int, size: int, rendezvous: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=_PATIENCE)
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            torch.manual_seed(0)
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()
