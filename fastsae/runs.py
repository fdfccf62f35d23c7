"""What surrounds a training loop: position in the data, log, Ctrl-C, random state."""

import base64
import dataclasses
import itertools
import json
import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from fastsae import files, progress
from fastsae.config import TrainerConfig

_END: Any = object()
_NOTHING = "Trainer: activations gave no batch at all"


class Batches:
    """An iterator over activations that knows its position.

    A stream with state_dict / load_state_dict is set back by its own state; of any other iterable the batches already
    drawn are drawn again and dropped. Activations have torch's CPU generator to themselves, from a seed next to `seed`:
    what training draws between two batches is not drawn again with them. A stream's position holds its state.
    """

    def __init__(self, activations: Iterable[Tensor], seed: int, position: dict[str, Any] | None = None) -> None:
        self.drawn = 0
        self._random_state = torch.Generator().manual_seed((seed + 1) % 2**64).get_state()
        if not (hasattr(activations, "__iter__") or hasattr(activations, "__getitem__")):
            got = type(activations).__name__
            called = "; call it" if callable(activations) else ""
            raise TypeError(f"Trainer: activations must be an iterable of (B, d_in) tensors; got a {got}{called}")
        stateful = hasattr(activations, "state_dict") and hasattr(activations, "load_state_dict")
        self._stream: Any = activations if stateful else None
        if position is not None and (position["stream"] is not None) != stateful:
            raise ValueError(
                "Trainer: the checkpoint was made with another kind of activations (a stream that can be set back, or "
                "a plain iterable); resume with the same"
            )
        if position is not None and stateful:
            self._stream.load_state_dict(position["stream"])
        with self._drawing():
            self._iterator = iter(activations)
        if position is not None:
            self.drawn = position["drawn"]
            if stateful:
                self._random_state = _random_state(position["random"])  # what iter() drew was drawn before, too
            else:
                with self._drawing():
                    seen = sum(1 for _ in itertools.islice(self._iterator, self.drawn))
                if seen < self.drawn:
                    raise ValueError(f"Trainer: to resume, {self.drawn} batches must be drawn again; only {seen} came")
        self._before_last = self.position()

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        of_training = torch.get_rng_state()
        torch.set_rng_state(self._random_state)
        try:
            yield
        finally:
            self._random_state = torch.get_rng_state()
            torch.set_rng_state(of_training)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        self._before_last = self.position()
        with self._drawing():
            batch = next(self._iterator, _END)
        if batch is _END:
            if self.drawn == 0:
                raise ValueError(_NOTHING)
            raise StopIteration
        self.drawn += 1
        return batch

    def position(self, before_last: bool = False) -> dict[str, Any]:
        """JSON-able; `before_last` gives the position before the batch drawn last."""
        if before_last:
            return self._before_last
        return {
            "drawn": self.drawn,
            "stream": self._stream.state_dict() if self._stream is not None else None,
            "random": None if self._stream is None else base64.b64encode(self._random_state.numpy().tobytes()).decode(),
        }

    def check_position(self) -> None:
        """Raise TypeError if the position cannot be stored: now, and not when the first checkpoint is due."""
        try:
            json.dumps(self.position())
        except TypeError as error:
            raise TypeError(
                f"Trainer: state_dict() of the activations must hold what JSON can ({error}); turn tensors into lists"
            ) from error

    def peek(self, n_rows: int, check: Callable[[Tensor, int], object]) -> Tensor:
        """At least n_rows of the rows to come (fewer if there are not as many), without moving.

        `check` is called with each batch and its number, and raises if it is not what it should be.
        """
        state, random_state = self._stream.state_dict() if self._stream is not None else None, self._random_state
        seen: deque[Tensor] = deque()
        with self._drawing():
            while sum(len(batch) for batch in seen) < n_rows and (batch := next(self._iterator, _END)) is not _END:
                check(batch, self.drawn + len(seen) + 1)
                seen.append(batch)
        if not seen:
            raise ValueError(_NOTHING)
        rows = torch.cat(list(seen))
        if self._stream is not None:
            self._stream.load_state_dict(state)
            with self._drawing():
                self._iterator = iter(self._stream)
            self._random_state = random_state
        else:
            self._iterator = _first(seen, self._iterator)
        return rows


def _random_state(text: Any) -> Tensor:
    """A state of torch's CPU generator, from a position."""
    try:
        state = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"Trainer: the position in the activations is damaged: random: {error}") from error
    return state


def _first(seen: deque[Tensor], rest: Iterator[Tensor]) -> Iterator[Tensor]:
    while seen:
        yield seen.popleft()  # and no longer in memory
    yield from rest


class Log:
    """metrics.jsonl, a progress bar, and whichever loggers the config asks for."""

    def __init__(self, config: TrainerConfig, step: int, silent: bool = False) -> None:
        self.last: dict[str, float] = {}
        if silent:  # another rank writes
            config = dataclasses.replace(config, run_dir=None, resume=False, log_to=(), progress=False)
        self._path = config.run_dir / "metrics.jsonl" if config.run_dir else None
        self._sinks = [_SINKS[name](config) for name in config.log_to]
        if self._path is not None:
            self._drop_lines_after(step)
        self._bar = (
            progress.bar(total=config.steps, initial=step, desc="train", unit="step") if config.progress else None
        )

    def _drop_lines_after(self, step: int) -> None:
        """Forget what was logged between the checkpoint and the end of a killed run (a torn last line included)."""
        assert self._path is not None
        kept = []
        # What cannot be read is no reason not to go on with what was trained.
        for line in self._path.read_text(errors="replace").splitlines() if self._path.exists() else ():
            try:
                metrics = files.read_numbers(line, ("step", "rows"), ("fvu", "dead_share"))
            except ValueError:
                continue
            if metrics["step"] <= step:
                kept.append(line)
                self.last = metrics
        files.write_atomically(self._path, lambda p: p.write_text("".join(f"{line}\n" for line in kept)))

    def write(self, metrics: dict[str, float]) -> None:
        self.last = metrics
        if self._path is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            try:
                with self._path.open("a") as file:
                    file.write(json.dumps(finite) + "\n")
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"Trainer: could not write {self._path} at step {metrics['step']}: {error.strerror}. The "
                    "checkpoints are whole; make room and resume",
                ) from error
        for write, _ in self._sinks:
            write(metrics)
        shown = {
            "loss": f"{metrics['loss']:.4f}",
            "FVU": f"{metrics['fvu']:.3f}",
            "dead": f"{metrics['dead_share']:.1%}",
            "rows/s": f"{metrics['rows_per_second']:,.0f}",
        }
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        for _, close in self._sinks:
            close()


Sink = tuple[Callable[[dict[str, float]], None], Callable[[], object]]  # how to write metrics, and how to close


def _tensorboard(config: TrainerConfig) -> Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("log_to='tensorboard' needs that package: `pip install tensorboard`") from error

    writer = SummaryWriter(str(config.run_dir))

    def write(metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, int(metrics["step"]))
        writer.flush()

    return write, writer.close


def _wandb(config: TrainerConfig) -> Sink:
    try:
        import wandb  # type: ignore[import-not-found]  # optional: only who asks for it has it
    except ImportError as error:
        raise ImportError("log_to='wandb' needs that package: `pip install wandb`") from error

    run = wandb.init(project="fastsae", dir=str(config.run_dir), config=vars(config))
    return lambda metrics: run.log(metrics, step=int(metrics["step"])), run.finish


_SINKS = {"tensorboard": _tensorboard, "wandb": _wandb}


@contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT into a flag, so that a step is never cut in two; the second one interrupts at once."""
    received = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        signal.signal(signal.SIGINT, previous)

    # Only the main thread can handle signals; elsewhere Ctrl-C is not ours to catch.
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: received
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Leave torch's random generators as they were found."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
