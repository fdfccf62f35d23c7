"""Surroundings of a training loop: position in the data, log, Ctrl-C, random state."""

import base64
import copy
import dataclasses
import inspect
import itertools
import json
import math
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from fastsae import files, progress
from fastsae.config import TrainerConfig
from fastsae.fp64 import in_fp64

_END: Any = object()
_DAMAGED = "Trainer: the position in the activations is damaged"
_NOTHING = "Trainer: activations gave no batch at all"


@dataclasses.dataclass(frozen=True)
class _Place:
    """A place in the activations, between two batches."""

    drawn: int
    rows: int
    """Rows drawn; counted of a plain iterable only."""
    stream: Any
    """The stream's own state; None of a plain iterable."""
    random: Tensor
    seen: "_Seen | None"
    """The batch before this place."""
    before: "_Place | None"
    """The place before that batch, which has none before it again."""

    def to_json(self) -> dict[str, Any]:
        random, rows = (None, self.rows) if self.stream is None else (_text(self.random), None)
        return {"drawn": self.drawn, "rows": rows, "stream": self.stream, "random": random, "last": self._last()}

    def _last(self) -> dict[str, Any] | None:
        if self.seen is None:
            return None
        before = {} if self.before is None else {"stream": self.before.stream, "random": _text(self.before.random)}
        return {**self.seen.to_json(), **before}


@dataclasses.dataclass(frozen=True)
class _Seen:
    """Fingerprint of a batch: its shape, and up to 16 x 64 entries from all over it."""

    shape: tuple[int, ...]
    entries: Tensor

    @classmethod
    def of(cls, batch: Any) -> "_Seen | None":
        """None of what is no batch. Entries are copied where they lie: nothing waits for a GPU, and the stream may fill
        the same memory again."""
        if not isinstance(batch, Tensor) or batch.dim() != 2 or len(batch) == 0:
            return None
        entries = batch.detach()[tuple(_spread(batch.shape))]
        return cls(tuple(batch.shape), entries.clone())

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "entries": _text(in_fp64(self.entries).cpu().contiguous())}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "_Seen":
        try:
            rows, columns = found["shape"]
            looked_at = [len(range(n)[part]) for n, part in zip((rows, columns), _spread((rows, columns)), strict=True)]
            entries = torch.frombuffer(_bytes(found["entries"]), dtype=torch.float64)
            return cls((rows, columns), entries.view(looked_at))
        except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{_DAMAGED}: last: {error}") from error

    def differences(self, again: "_Seen | None", number: int) -> str | None:
        """Say what is different about batch `number` that was drawn again; warn where it is rounding."""
        if again is None or self.shape != again.shape:
            return f"batch {number} was {self.shape}, drawn again it is {again.shape if again else 'none'}"
        then, now = self.entries.cpu(), in_fp64(again.entries).cpu()
        off = ~((then == now) | (then.isnan() & now.isnan()))
        if not off.any():
            return None
        # A model on other hardware gives the same rows in other bits: by far less than rows differ from one another.
        spread = (then - then.median(dim=0).values).abs().median(dim=0).values  # of ordinary rows, not of the largest
        spread = torch.where(spread > 0, spread, 0.01 * then.abs())
        if not ((now - then).abs() <= 0.05 * spread)[off].double().mean() > 0.5:
            return f"batch {number} drawn again holds other numbers: other data, or in another order"
        warnings.warn(
            f"Trainer: batch {number} drawn again differs by rounding from the one that was trained on; the run goes "
            "on, but not to the same bits",
            stacklevel=2,
        )
        return None


def _spread(shape: Sequence[int]) -> list[slice]:
    """The rows and columns of a batch that are looked at, all over it, the last row among them."""
    rows, columns = (max(1, math.ceil(n / most)) for n, most in zip(shape, (16, 64), strict=True))
    return [slice((shape[0] - 1) % rows, None, rows), slice(None, None, columns)]


class Batches:
    """An iterator over activations that knows its position.

    A stream with state_dict / load_state_dict is set back by its own state; of any other iterable the batches already
    drawn are drawn again and dropped. Raises ValueError where the batch drawn last, which is drawn again of either, is
    another one, or the batches have other numbers of rows. Activations have torch's CPU generator to themselves, from a
    seed next to `seed`: what training draws between two batches is not drawn again with them. A stream's position holds
    its state.
    """

    def __init__(self, activations: Iterable[Tensor], seed: int, position: dict[str, Any] | None = None) -> None:
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
        before = self._drawn_again(position) if position is not None and stateful else None
        if position is not None and stateful:
            self._load_state(position["stream"])
        with self._drawing():
            self._iterator = iter(activations)
        self._now = self._before_last = _Place(0, 0, self._state(), self._random_state, None, None)
        if position is not None and stateful:
            # What iter() drew was drawn before, too.
            self._random_state = _random_state(position["random"])
            seen = _Seen.from_json(position["last"]) if before else None
            self._now = _Place(position["drawn"], 0, self._state(), self._random_state, seen, before)
        elif position is not None:
            self._draw_all_again(position)
        self._before_last = self._now

    @property
    def drawn(self) -> int:
        return self._now.drawn

    def _drawn_again(self, position: dict[str, Any]) -> _Place | None:
        """The place before the batch drawn last, which is drawn again from there and must be the one it was."""
        last = position.get("last")
        if last is None:  # none was drawn, or the checkpoint is older than this check
            return None
        if not isinstance(last.get("stream"), dict):
            raise ValueError(f"{_DAMAGED}: last: stream: {last.get('stream')!r}")
        seen, of_new = _Seen.from_json(last), self._random_state
        before = _Place(position["drawn"] - 1, 0, last.get("stream"), _random_state(last.get("random")), None, None)
        self._load_state(before.stream)
        with self._drawing():
            iterator = iter(self._stream)
        self._random_state = before.random
        with self._drawing():
            batch = next(iterator, None)
        self._random_state = of_new
        self._refuse(seen.differences(_Seen.of(batch), position["drawn"]))
        return before

    def _draw_all_again(self, position: dict[str, Any]) -> None:
        drawn, rows, batch = 0, 0, None
        with self._drawing():
            for batch in itertools.islice(self._iterator, position["drawn"]):
                drawn, rows = drawn + 1, rows + _rows(batch)
        if drawn < position["drawn"]:
            raise ValueError(f"Trainer: to resume, {position['drawn']} batches must be drawn again; only {drawn} came")
        seen = _Seen.of(batch)
        if position.get("last") is not None:  # it is not in checkpoints older than this check
            if rows != (before := position.get("rows")):
                self._refuse(f"{drawn} batches were {before} rows, drawn again they are {rows}")
            self._refuse(_Seen.from_json(position["last"]).differences(seen, drawn))
        self._now = _Place(drawn, rows, None, self._random_state, seen, None)

    def _refuse(self, difference: str | None) -> None:
        if difference is not None:
            raise ValueError(
                f"Trainer: cannot resume with other activations: {difference}. Give the same batches in the same order "
                "(what is drawn by NumPy, random or a GPU needs a seed of its own), or start a new run on the SAE of "
                "the checkpoint (fastsae.load)"
            )

    def _state(self) -> Any:
        """A copy: a stream may give out what it goes on to change."""
        return None if self._stream is None else copy.deepcopy(self._stream.state_dict())

    def _load_state(self, state: Any) -> None:
        self._stream.load_state_dict(copy.deepcopy(state))

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
        now = self._before_last = self._now
        with self._drawing():
            batch = next(self._iterator, _END)
        if batch is _END:
            if self.drawn == 0:
                raise ValueError(_NOTHING)
            self._now = dataclasses.replace(now, stream=self._state(), random=self._random_state)
            raise StopIteration
        before = None if self._stream is None else dataclasses.replace(now, seen=None, before=None)
        rows = now.rows + _rows(batch)
        self._now = _Place(now.drawn + 1, rows, self._state(), self._random_state, _Seen.of(batch), before)
        return batch

    def position(self, before_last: bool = False) -> dict[str, Any]:
        """JSON-able; `before_last` gives the position before the batch drawn last."""
        return (self._before_last if before_last else self._now).to_json()

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
        state, random_state = self._state(), self._random_state
        seen: deque[Tensor] = deque()
        missing = n_rows
        with self._drawing():
            while missing > 0 and (batch := next(self._iterator, _END)) is not _END:
                check(batch, self.drawn + len(seen) + 1)
                seen.append(batch.detach().clone())  # the stream may fill the same memory again
                missing -= len(batch)
        if not seen:
            raise ValueError(_NOTHING)
        rows = torch.cat(list(seen))
        if self._stream is not None:
            self._load_state(state)
            with self._drawing():
                self._iterator = iter(self._stream)
            self._random_state = random_state
        else:
            self._iterator = _first(seen, self._iterator)
        return rows


def _rows(batch: Any) -> int:
    return len(batch) if isinstance(batch, Tensor) and batch.dim() else 0


def _text(t: Tensor) -> str:
    return base64.b64encode(t.numpy().tobytes()).decode()


def _bytes(text: Any) -> bytearray:
    return bytearray(base64.b64decode(text, validate=True))


def _random_state(text: Any) -> Tensor:
    """A state of torch's CPU generator, from a position."""
    try:
        state = torch.frombuffer(_bytes(text), dtype=torch.uint8)
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{_DAMAGED}: random: {error}") from error
    return state


def _first(seen: deque[Tensor], rest: Iterator[Tensor]) -> Iterator[Tensor]:
    while seen:
        yield seen.popleft()  # and no longer in memory
    yield from rest


class Log:
    """metrics.jsonl, a progress bar, and whichever loggers the config asks for."""

    def __init__(
        self, config: TrainerConfig, step: int, description: dict[str, Any] | None = None, silent: bool = False
    ) -> None:
        """description: configs by name, for the loggers. silent: another rank writes."""
        self.last: dict[str, float] = {}
        if silent:
            config = dataclasses.replace(config, run_dir=None, resume=False, log_to=())
        self._path = config.run_dir / "metrics.jsonl" if config.run_dir else None
        self._sinks = [_SINKS[name](config, _with_data(config, description or {})) for name in config.log_to]
        if self._path is not None:
            self._drop_lines_after(step)
        with progress.shown(not silent):
            self._bar = progress.bar("train", config.steps, "step", step, delay=0)

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
        if "fvu_ordinary" in metrics:
            shown["FVU of ordinary rows"] = f"{metrics['fvu_ordinary']:.3f}"
        self._bar.set_postfix(shown, refresh=False)

    def advance(self) -> None:
        self._bar.update()

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        for _, close in self._sinks:
            close()


Sink = tuple[Callable[[dict[str, float]], None], Callable[[], object]]  # how to write metrics, and how to close


def _with_data(config: TrainerConfig, description: dict[str, Any]) -> dict[str, Any]:
    """With what `fastsae train` noted of the model and its text, if it began this run."""
    path = config.run_dir / "data.json" if config.run_dir else None
    if path is None or not path.is_file():
        return description
    data = files.read_object(path)
    return {**description, "data": data, "model": data.get("model")}


def _tensorboard(config: TrainerConfig, description: dict[str, Any]) -> Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("log_to='tensorboard' needs that package: `pip install tensorboard`") from error

    writer = SummaryWriter(str(config.run_dir))
    for name, part in description.items():
        writer.add_text(name, "\n".join(f"    {line}" for line in json.dumps(part, indent=2).splitlines()))

    def write(metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, int(metrics["step"]))
        writer.flush()

    return write, writer.close


def _wandb(config: TrainerConfig, description: dict[str, Any]) -> Sink:
    try:
        import wandb  # type: ignore[import-not-found]  # optional: only who asks for it has it
    except ImportError as error:
        raise ImportError("log_to='wandb' needs that package: `pip install wandb`") from error

    assert config.run_dir is not None
    try:
        _check_login(wandb)
        run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_name or config.run_dir.name,
            dir=str(config.run_dir),
            config=description,
        )
    except Exception as error:  # its own kinds, which differ by version
        raise RuntimeError(f"log_to='wandb': W&B did not start: {error}. {_WITHOUT_WANDB}") from error
    return lambda metrics: run.log(metrics, step=int(metrics["step"])), run.finish


_WITHOUT_WANDB = (
    "Run `wandb login` or set WANDB_API_KEY; WANDB_MODE=offline keeps the run in run_dir, for `wandb sync` later; "
    "without --log-to wandb nothing is sent"
)


_SENDS_NOTHING = ("offline", "disabled", "dryrun")


def _check_login(wandb: Any) -> None:
    """Raise where W&B has no key: in a terminal it would ask for one, and wait."""
    login = getattr(wandb, "login", None)
    if login is None or os.environ.get("WANDB_MODE") in _SENDS_NOTHING:
        return
    asks = inspect.signature(login).parameters
    # An older one waits for an answer, but not for long.
    known = login(**({"prompt": False, "verify": False} if "prompt" in asks else {"timeout": 1}))
    if not known and wandb.setup().settings.mode not in _SENDS_NOTHING:  # as `wandb offline` leaves it
        raise ValueError("there is no API key")


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
