"""Progress: a bar in a terminal, lines of a log elsewhere, nothing when it is not wanted."""

import io
import logging
import os
import pty
import sys

import pytest
import torch

import fastsae
from fastsae import activations, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def count(total: int) -> None:
    with progress.bar("counting", total, "row", delay=0) as bar:
        for _ in range(total):
            bar.update(1)
            bar.set_postfix({"loss": "0.5"})


def test_a_bar_in_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    count(3)
    assert "counting: 100%" in sys.stderr.getvalue()


def test_lines_of_a_log_elsewhere(monkeypatch, caplog, capsys):
    monkeypatch.setattr(progress, "_BETWEEN_LINES", 0)
    caplog.set_level(logging.INFO, "fastsae")
    count(3)
    assert capsys.readouterr() == ("", "")
    assert len(caplog.messages) >= 3
    assert caplog.messages[-1].startswith("counting: 3.00/3.00 row in 00:00, 00:00 left")
    assert "loss=0.5" in caplog.messages[-1]


def test_what_takes_no_time_shows_nothing(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fastsae")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.bar("quick", 3, "row") as bar:
        bar.update(3)
    assert sys.stderr.getvalue() == ""
    assert caplog.messages == []


def test_no_progress_needs_no_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress.shown(False), progress.shown(True):
        count(3)
    with pytest.warns(UserWarning, match="no progress is shown: tqdm is not installed"):
        count(3)


class Rows:
    d_in, block_rows = 4, [50, 50]

    def block(self, i: int) -> torch.Tensor:
        return torch.randn(50, 4, generator=torch.Generator().manual_seed(i))


@pytest.mark.parametrize("wanted", [True, False])
def test_a_training_shows_what_it_waits_for(wanted, monkeypatch):
    monkeypatch.setattr(progress.bar, "__kwdefaults__", {"leave": True, "delay": 0})
    monkeypatch.setattr(sys, "stderr", Terminal())
    config = fastsae.TrainerConfig(steps=4, normalize="none", progress=wanted)
    fastsae.Trainer(fastsae.TopKSAE(4, 20, 2), config).fit(activations.ActivationStream(Rows(), 40))
    said = sys.stderr.getvalue()
    for name in ("train", "activations", "activations, pass 2"):
        assert (f"{name}: " in said) == wanted, name


@pytest.mark.parametrize(("epochs", "expected"), [(None, 1), (2, 1), (1, 0)])
def test_a_stream_says_when_it_begins_again(epochs, expected, caplog):
    caplog.set_level(logging.INFO, "fastsae")
    stream = activations.ActivationStream(Rows(), 40, epochs=epochs)
    for _ in range(2):
        next(stream)
    assert caplog.messages == []
    next(stream, None)
    assert len(caplog.messages) == expected
    for message in caplog.messages:
        assert "all 100 rows have been given once" in message


@pytest.mark.parametrize("arguments", [["--help"], ["eval", "--nonsense", "1"]])
def test_no_colours_in_a_terminal_where_they_are_not_wanted(arguments):
    """In a process of its own: whether there is a terminal is asked at many places."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"NO_COLOR": "1", "TERM": "xterm"}
        command = f"import sys; sys.argv = ['fastsae', *{arguments}]; from fastsae import cli; cli.main()"
        os.execv(sys.executable, [sys.executable, "-c", command])
    said = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # how a terminal on Linux says that nobody writes to it any more
            break
        if not part:
            break
        said += part
    os.waitpid(child, 0)
    assert b"eval" in said
    assert b"\x1b[" not in said


def test_bars_say_which_of_several_things_they_are_of():
    with progress.of("runs/a"):
        assert progress.named("KL") == "runs/a: KL"
    assert progress.named("KL") == "KL"
