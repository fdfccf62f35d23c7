"""This process among the ranks of a run: what it owns, and how it agrees with the others."""

import datetime
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastsae import files
from fastsae.distributed import parts
from fastsae.distributed.layout import BY_FEATURE, Layout
from fastsae.ranks import Alone

T = TypeVar("T")

# Gradients of fewer entries are sent together: a message has a cost of its own.
_SMALL = 1 << 18
_AT_ONCE = 1 << 22
# Seconds in which a network's file system shows to all what one has written.
_SHOWN_WITHIN = 30.0
# How long ranks wait for one that is known to be busy. If it dies they know at once.
_FOR_HOURS = datetime.timedelta(days=365)
# What gloo's errors have in common: the place in its sources. RuntimeErrors they are like any other.
_OF_GLOO = re.compile(r"gloo/\S+\.(cc|h):\d+\]")


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def start(features: int = 1, *, timeout: float = 1800.0) -> "Ranks":
    """Join the run that torchrun started: `features` ranks share each SAE, the others train on other rows.

        torchrun --nproc-per-node 4 train.py

        ranks = fastsae.distributed.start(features=2)       # 4 ranks: 2 x 2
        sae = fastsae.distributed.shard(fastsae.TopKSAE(768, 32768, 32), ranks)
        fastsae.Trainer(sae, config).fit(activations)       # on every rank the same, whole batches

    Each process takes the GPU of its local rank (NCCL), or the CPU (gloo). A rank that answers nothing for `timeout`
    seconds is given up; one that dies is noticed at once. A process group that is already there is used.
    """
    patience = datetime.timedelta(seconds=timeout)
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise RuntimeError(
                "distributed.start: this process is no rank of a run. Start it with torchrun, such as "
                "`torchrun --nproc-per-node 2 train.py`"
            )
        backend = "gloo"
        if torch.cuda.is_available():
            local = int(os.environ.get("LOCAL_RANK", "0"))
            if local >= torch.cuda.device_count():
                raise RuntimeError(
                    f"distributed.start: local rank {local}, but {torch.cuda.device_count()} GPUs are here; start as "
                    "many processes as there are GPUs (--nproc-per-node)"
                )
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"  # flags are agreed on without the device
        dist.init_process_group(backend, timeout=patience)
    elif torch.cuda.is_available() and not torch.cuda.is_initialized():  # nor has whoever made the group taken a GPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", dist.get_rank() % torch.cuda.device_count())))
    if "cpu:" not in dist.get_backend_config():
        raise RuntimeError(
            f"distributed.start: the process group that is there ({dist.get_backend_config()}) has nothing for tensors "
            "on the CPU, by which ranks agree on whether to go on; make it with "
            "init_process_group('cpu:gloo,cuda:nccl'), or leave it to start()"
        )
    world = dist.get_world_size()
    if features < 1 or world % features:
        raise ValueError(f"distributed.start: {world} ranks cannot be split into groups of {features} feature ranks")
    layout = Layout(world // features, features)
    return Ranks(layout, _mesh(layout, dist.group.WORLD, patience))


@cache
def _mesh(layout: Layout, world: dist.ProcessGroup, patience: datetime.timedelta) -> DeviceMesh:
    """Made once for all processes of `world`: its groups hold connections, and memory of the GPU."""

    def own(lines: Tensor) -> Any:
        if len(lines) == 1:
            return world
        return dist.new_subgroups_by_enumeration(lines.tolist(), timeout=patience)[0]

    # init_device_mesh would give a rank of these groups as long as it likes.
    places = torch.arange(layout.ranks, device="cpu").view(layout.data, layout.features)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return DeviceMesh.from_group([own(places.T), own(places)], device, places, mesh_dim_names=("data", "features"))


class Ranks(Alone):
    """This process' place in a layout. Methods that talk to others must be called by all, in one order."""

    def __init__(self, layout: Layout, mesh: DeviceMesh) -> None:
        self.layout, self.mesh = layout, mesh
        self.rank, self.count = dist.get_rank(), layout.ranks
        self.first, self.adding = self.rank == 0, layout.data
        self.data_rank, self.feature_rank = mesh.get_local_rank("data"), mesh.get_local_rank("features")
        self.data_group, self.feature_group = mesh.get_group("data"), mesh.get_group("features")
        self.features_each = 0
        """Features of each rank; known once an SAE is sharded."""
        self._batch: tuple[int, int] = (0, 0)

    @property
    def device(self) -> torch.device:
        """Device that holds this rank's part of the SAE."""
        on_gpu = self.mesh.device_type == "cuda"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    # ---- whose rows, whose features ---------------------------------------------------------------------------------

    def own_rows(self, batch: Tensor) -> Tensor:
        data = self.layout.data
        if len(batch) < data:
            raise ValueError(
                f"distributed: a batch of {len(batch)} rows cannot be split over {data} data ranks; leave such batches "
                "out, or let more ranks be feature ranks"
            )
        own = batch.tensor_split(data)[self.data_rank]
        self._batch = (len(own), len(batch))
        return own

    def check_rows(self, batch: Tensor) -> None:
        found = int(_fingerprint(batch))
        if self.worst(found) != -self.worst(-found):
            raise ValueError(
                "distributed: the ranks were given different activations; give every rank the same whole batches, of "
                "which it takes its rows"
            )

    def batch_rows(self, own: int) -> int:
        return self._batch[1] if self._batch[0] == own else own * self.layout.data

    def rows_before(self, own: int) -> int:
        """The place of our first row in the batch."""
        whole = self.batch_rows(own)
        return self.data_rank * (whole // self.layout.data) + min(self.data_rank, whole % self.layout.data)

    def holding(self, d_sae: int) -> int:
        """Set, and return, how many features each rank holds of an SAE. Raises ValueError where it cannot be split."""
        each = self.layout.features_each(d_sae)
        if self.features_each not in (0, each):
            raise ValueError(
                f"Ranks: an SAE with {self.features_each} features a rank is held; start() again for another"
            )
        self.features_each = each
        return each

    @property
    def first_feature(self) -> int:
        return self.feature_rank * self.features_each

    def own_features(self, indices: Tensor, others: int) -> Tensor:
        own = indices - self.first_feature
        return own.where((own >= 0) & (own < self.features_each), others)

    # ---- numbers that all have in common ----------------------------------------------------------------------------

    def worst(self, state: int) -> int:
        t = torch.tensor(int(state), device="cpu")
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return int(t)

    def every(self, flags: Tensor) -> Tensor:
        agreed = flags.to("cpu", torch.uint8)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        return agreed.to(flags.device, torch.bool)

    def share(self, loss: Tensor) -> Tensor:
        if self.layout.data == 1:
            return loss
        own, whole = self._batch
        if not whole:
            raise RuntimeError("Ranks.share: of which batch? Take its rows by own_rows(batch) first")
        return loss * (own / whole)

    def mean(self, own: Tensor) -> Tensor:
        if self.layout.data == 1:
            return own
        shared = self.share(own).clone()
        dist.all_reduce(shared, group=self.data_group)
        return shared

    def count_rows(self, own: int) -> int:
        if self.layout.data == 1:
            return own
        total = torch.tensor(own, device=self.device)
        dist.all_reduce(total, group=self.data_group)
        return int(total)

    def count_features(self, own: int) -> int:
        return sum(self.counts(own))

    def counts(self, own: int) -> list[int]:
        """A number of each feature rank of our group."""
        every = torch.zeros(self.layout.features, dtype=torch.int64, device=self.device)
        every[self.feature_rank] = own
        if self.layout.features > 1:
            dist.all_reduce(every, group=self.feature_group)
        return every.tolist()

    def equalise(self, *tensors: Tensor) -> None:
        for t in tensors:
            dist.broadcast(t, 0)

    def equalise_parts(self, *tensors: Tensor) -> None:
        """Make parts by feature those of the first group: ranks that were seeded otherwise would never agree again."""
        for t in tensors if self.layout.data > 1 else ():
            dist.broadcast(t, self.feature_rank, group=self.data_group)  # that rank of the first group has its number

    def least(self, counters: Tensor) -> None:
        if self.layout.data > 1:
            dist.all_reduce(counters, dist.ReduceOp.MIN, group=self.data_group)

    def add_gradients(self, parameters: Mapping[str, Tensor]) -> None:
        if self.layout.data == 1:
            return
        grads = [p.grad for p in parameters.values() if p.grad is not None]
        large = [g for g in grads if g.numel() >= _SMALL and g.is_contiguous()]
        work = [dist.all_reduce(g, group=self.data_group, async_op=True) for g in large]
        kept = {id(g) for g in large}
        small = [g for g in grads if id(g) not in kept]
        if small:
            bucket = torch.cat([g.reshape(-1) for g in small])
            dist.all_reduce(bucket, group=self.data_group)
            for g, summed in zip(small, bucket.split([g.numel() for g in small]), strict=True):
                g.copy_(summed.view_as(g))
        for w in work:
            assert w is not None
            w.wait()

    def norm(self, gradients: dict[str, Tensor]) -> Tensor:
        def squared(grads: list[Tensor]) -> Tensor:
            norm = torch.nn.utils.get_total_norm(grads).to(self.device)  # of nothing: 0, on the CPU
            return norm.to(torch.promote_types(norm.dtype, torch.float32)).square()  # in fp16 it would overflow

        ours = squared([g for name, g in gradients.items() if name in BY_FEATURE])
        if self.layout.features > 1:
            dist.all_reduce(ours, group=self.feature_group)
        return (ours + squared([g for name, g in gradients.items() if name not in BY_FEATURE])).sqrt()

    def check_equal(self, tensors: dict[str, Tensor]) -> None:
        """Raise RuntimeError unless ranks that hold the same part of a tensor hold the same bits of it."""
        if self.layout.ranks == 1:
            return
        names = sorted(tensors)
        sums = torch.stack([_fingerprint(tensors[name]).cpu() for name in names])
        every = [torch.empty_like(sums) for _ in range(self.count)]
        dist.all_gather(every, sums)
        for rank, theirs in enumerate(every):
            for i, name in enumerate(names):
                same_part = every[rank % self.layout.features if parts.by_feature(name) else 0]
                if theirs[i] != same_part[i]:
                    raise RuntimeError(
                        f"distributed: {name} of rank {rank} is no longer that of the others. Ranks must see the same "
                        "batches, in the same order, on equal hardware; go on from the last checkpoint"
                    )

    # ---- files ------------------------------------------------------------------------------------------------------

    def together(self, what: Callable[[], T], group: Any = None) -> T:
        done, error = None, None
        try:
            done = what()
        except Exception as failed:  # of whatever kind: the others wait
            error = failed
        errors: list[Any] = [None] * self.count
        told = None if error is None else (type(error).__name__, str(error), _errno(error))
        dist.all_gather_object(errors, told, group)
        if error is not None:
            raise error
        for rank, told in enumerate(errors):
            if told is not None:
                raise _retold(rank, *told)
        return done  # type: ignore[return-value]

    def first_does(self, what: Callable[[], T], *, for_hours: bool = False) -> T | None:
        group: Any = dist.new_group(backend="gloo", timeout=_FOR_HOURS) if for_hours else None
        done = self.together(lambda: what() if self.first else None, group)
        if group is not None:
            dist.destroy_process_group(group)
        return done

    @contextmanager
    def locked(self, folder: Path, who: str) -> Iterator[None]:
        lock = files.locked(folder, who)
        token: list[Any] = [uuid.uuid4().hex]
        dist.broadcast_object_list(token)

        def look() -> None:
            # Or a rank's parts of checkpoints would lie where nobody looks for them.
            until = time.monotonic() + _SHOWN_WITHIN
            while not _holds(folder / files.LOCK, token[0]):
                if time.monotonic() > until:
                    raise ValueError(
                        f"{who}: {folder} must be one folder that all ranks see, on a file system that they share"
                    )
                time.sleep(0.1)

        self.first_does(lock.__enter__)
        try:
            self.first_does(lambda: (folder / files.LOCK).write_text(token[0]))
            self.together(look)
            yield
        finally:
            if self.first:
                lock.__exit__(None, None, None)

    @contextmanager
    def watched(self, run_dir: Path | None) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            if not _lost(error):
                raise
            go_on = f"go on from {run_dir} with resume" if run_dir else "there is no run_dir, so it starts anew"
            raise RuntimeError(
                f"rank {self.rank} of {self.count}: another rank does not answer. It has died, or hangs: look for the "
                f"first error above, in the log of the rank that ended first. Start the run again: {go_on}. ({error})"
            ) from error

    def write_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        parts.write_whole(path, tensors, self)

    def on_files(self, folder: Path, names: list[str], what: Callable[[Path], T]) -> dict[str, T]:
        seen = [names]
        dist.broadcast_object_list(seen)  # what another rank has just written, a network may not show to all yet
        ours = self.together(lambda: {name: what(folder / name) for name in seen[0][self.rank :: self.count]})
        every: list[Any] = [None] * self.count
        dist.all_gather_object(every, ours)
        return {name: value for part in every for name, value in part.items()}


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except FileNotFoundError:
        return False


def _fingerprint(t: Tensor) -> Tensor:
    """Hash all bits of a tensor and their places; some entries at a time, since each takes 8 bytes."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize]
    found = torch.zeros((), dtype=torch.int64, device=t.device)
    for part in t.detach().contiguous().view(-1).view(whole).split(_AT_ONCE):
        places = torch.arange(1, len(part) + 1, device=t.device)
        found = 31 * found + (part.long() * places).sum()
    return found


def _errno(error: BaseException) -> int | None:
    return getattr(error, "errno", None)


def _retold(rank: int, kind: str, text: str, number: int | None) -> Exception:
    """The error of another rank, as the same kind of error where a caller may wait for it."""
    said = f"rank {rank}: {text}"
    if number is not None:
        return OSError(number, said.replace(f"[Errno {number}] ", "", 1))
    known: dict[str, type[Exception]] = {"ValueError": ValueError, "FileExistsError": FileExistsError}
    return known.get(kind, RuntimeError)(said)


def _lost(error: BaseException) -> bool:
    """Whether an error is the transport's, not ours."""
    return isinstance(error, dist.DistError) or _OF_GLOO.search(str(error)) is not None
