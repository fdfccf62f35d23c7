"""The Trainer: an iterator of (B, d_in) activations in, a trained SAE out. It knows no language model."""

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae import checkpoint, files, progress
from fastsae.config import TrainerConfig, to_dict
from fastsae.gradients import GradientBuffers
from fastsae.modules import SAEOutput, SparseAutoencoder, is_a, uncompiled
from fastsae.narrow import NarrowAdam, kinds
from fastsae.normalize import far_rows, warn_of_far_rows
from fastsae.optim import AdamInBackward, clip_by_scaling, normalize_rows_, remove_parallel_
from fastsae.report.text import table
from fastsae.runs import Batches, Log, interrupt_flag, own_random_state

# What may change between a run and its continuation without changing the result.
_FREE_ON_RESUME = {"run_dir", "resume", "log_every", "checkpoint_every", "log_to", "progress", "nonfinite"}
_FREE_ON_RESUME |= {"wandb_project", "wandb_name"}

# How drawing a batch went, the worst last.
_DRAWN, _ENDED, _FAILED = range(3)

# What is left out of training: rows that are not finite, rows far larger than others, batches with too few others.
_SKIPPED = ("rows_skipped", "outliers_skipped", "batches_skipped")

# So many batches with NaN in a row are no accident any more.
_SKIPPED_IN_A_ROW = 1000


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))


def _batch(number: int) -> str:
    return f"Trainer: batch {number} of the activations"


def _expect_sae(given: Any) -> SparseAutoencoder:
    """`given`, or a TypeError that says what to pass in its place."""
    if is_a(given, SparseAutoencoder):
        return given
    advice = ""
    if isinstance(given, type) and issubclass(given, SparseAutoencoder):
        advice = f". Make one: {given.__name__}(d_in, d_sae, k)"
    elif isinstance(given, (str, Path)):
        advice = f". Load it: fastsae.load({str(given)!r})"
    elif isinstance(uncompiled(getattr(given, "module", None)), SparseAutoencoder):
        advice = (
            ", a wrapper around one. Pass what it wraps, its .module; several processes train one SAE by "
            "fastsae.distributed (docs/distributed.md)"
        )
    got = given.__name__ if isinstance(given, type) else type(given).__name__
    raise TypeError(f"Trainer: expected an SAE of fastsae; got {got}{advice}")


def auxk_loss(sae: SparseAutoencoder, x: Tensor, reconstruction: Tensor, dead: Tensor, k: int) -> Tensor:
    """Mean squared error () of the residual x - reconstruction as the k strongest dead features reconstruct it, without
    a bias (AuxK: Gao et al. 2024, A.2).

    x, reconstruction (B, d_in), normalised; the reconstruction detached, or it gets this gradient too. dead: features
    that have been inactive for long, a mask (d_sae,) or their numbers (n,) int64 ascending; of fewer than k all are
    taken, and of none the loss is 0.
    """
    if dead.dtype == torch.bool:
        dead = dead.nonzero().squeeze(1)
    k = min(k, sae.ranks.count_features(len(dead)))
    if k == 0:
        return x.new_zeros(())
    values, indices = sae.ops.topk_encode(x, sae.W_enc, sae.b_enc, k, sae.backend, dead, sae.b_dec)
    return F.mse_loss(sae.ops.sparse_decode(values, indices, sae.W_dec, sae.backend), x - reconstruction)


@dataclass(frozen=True)
class TrainResult:
    """Result of fit; prints as a table."""

    steps: int
    """Optimizer steps done in all, those of the resumed run included."""
    metrics: dict[str, float]
    """The last logged line."""
    run_dir: Path | None
    """Folder of the run: metrics.jsonl, checkpoints/ and the finished SAE in sae/."""

    def __str__(self) -> str:
        """A table, for reading."""
        run = f", in {self.run_dir}" if self.run_dir else ""
        rows = [{"metric": name, "last value": f"{value:.6g}"} for name, value in self.metrics.items()]
        return "\n".join([f"Trained {self.steps:,} steps{run}", *([table(rows)] if rows else [])])


class _Made(NamedTuple):
    """A step that was made."""

    output: SAEOutput
    losses: dict[str, Tensor]
    grad_norm: Tensor | None
    """The norm that was clipped."""


OnStep = Callable[["Trainer", Mapping[str, Tensor]], object]


class Trainer:
    """Trains an SAE on a stream of activations.

        trainer = fastsae.Trainer(sae, fastsae.TrainerConfig(steps=1000, lr=1e-3, run_dir="runs/first"))
        trainer.fit(activations)            # any iterable of (B, d_in) tensors, raw, consumed lazily

    for x in batches:                   # or a loop of one's own, without files
            losses = trainer.step(x)        # {"mse": ..., "auxk": ...}

    Activations are normalised by statistics measured on the first rows and stored in the SAE (`sae.reconstruct` takes
    and returns raw ones). With a run_dir, metrics.jsonl and checkpoints are written, Ctrl-C saves before it stops, and
    `resume=True` continues, on the CPU bit for bit, and with more steps than before where the learning rate does not
    decay. A stream with state_dict / load_state_dict is set back to its position; from any other iterable the batches
    already seen are drawn again and dropped. Other batches are refused, known by the number of their rows and by the
    one drawn last. A batch is read before the next one is drawn, and never written to. An SAE of several ranks
    (fastsae.distributed) is trained by all of them, each given the same activations, to the same result.
    """

    def __init__(self, sae: SparseAutoencoder, config: TrainerConfig) -> None:
        self._compute = sae  # compiled, it may be; all else is asked of the SAE inside
        self.sae = sae = _expect_sae(uncompiled(sae))
        self.config = config
        if config.k_anneal_from is not None and not sae.k <= config.k_anneal_from <= sae.d_sae:
            raise ValueError(
                f"TrainerConfig.k_anneal_from: expected between k = {sae.k} and d_sae = {sae.d_sae}; "
                f"got {config.k_anneal_from}"
            )
        self._ranks = sae.ranks
        self.steps = 0
        """Steps made."""
        self.rows_seen = 0
        self.batches_skipped = self.rows_skipped = self.outliers_skipped = self._skipped_in_a_row = 0
        self._told_of_outliers = False
        # One counter more than features: inactive entries of a code are counted there.
        with torch.inference_mode(False):  # fit could not write to it
            self._rows_since_fired = torch.zeros(len(sae.W_enc) + 1, dtype=torch.int64, device=sae.W_enc.device)
        sae.check_weights("Trainer")
        self._trained = {name: p for name, p in sae.named_parameters() if p.requires_grad}
        self._check_weights()
        options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
        unit_norm = [sae.W_dec] if config.unit_norm_decoder else []
        if config.adam_in_backward:
            self._optimizer = AdamInBackward(self._trained.values(), unit_norm=unit_norm, **options)
        else:
            if self._is_narrow:
                options |= {"optimizer_state": config.optimizer_state, "unit_norm": unit_norm}
                self._optimizer = NarrowAdam(self._trained.values(), **options)
            else:
                self._optimizer = torch.optim.Adam(self._trained.values(), fused=True, **options)
            self._buffers = GradientBuffers(self._trained.values())

    @property
    def _is_narrow(self) -> bool:
        """Whether a step in the dtype of the weights would lose small updates, or moments are in 8 bits."""
        return self.config.optimizer_state == "8bit" or self.sae.W_enc.dtype is torch.bfloat16

    def _check_weights(self) -> None:
        sae = self.sae
        if not self._trained:
            raise ValueError("Trainer: no parameter of this SAE has requires_grad; there is nothing to train")
        if torch.tensor(self.config.eps, dtype=sae.W_enc.dtype, device="cpu") == 0:
            raise ValueError(
                f"TrainerConfig.eps: {self.config.eps} is 0 in the {sae.W_enc.dtype} of this SAE, and Adam divides by "
                "it; use float32 or bfloat16 weights, or a larger eps such as 1e-4"
            )
        if self.config.adam_in_backward and self._ranks.adding > 1:
            raise ValueError(
                f"TrainerConfig: adam_in_backward holds no gradients, and {self._ranks.adding} data ranks must add "
                "theirs; leave it out, or let all ranks be feature ranks"
            )
        if self.config.optimizer_state == "8bit" and sae.W_enc.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"TrainerConfig.optimizer_state: '8bit' is for float32 and bfloat16 weights; got {sae.W_enc.dtype}"
            )
        if self.config.unit_norm_decoder and not sae.W_dec.requires_grad:
            raise ValueError("TrainerConfig.unit_norm_decoder: W_dec is frozen (requires_grad is False)")
        if self.config.auxk and not sae.W_enc.requires_grad:
            raise ValueError(
                "TrainerConfig.auxk: W_enc is frozen, so no dead feature could be revived; leave auxk at 0"
            )

    def step(self, x: Tensor) -> dict[str, Tensor]:
        """Make one step on raw activations x (B, d_in), in a loop of one's own; nothing is written or drawn.

        Returns the terms of the loss by name, on the device: "mse", and with TrainerConfig.auxk also "auxk", times its
        coefficient. Empty where too few rows of x are left to train on (nonfinite or outliers = "skip"). Normalisation
        that the SAE does not have yet is measured on the first x; sae.normalizer.measure(sample, kind) does it before.
        Raises ValueError after config.steps steps, where the schedule ends, FloatingPointError for NaN or infinity.
        """
        if self.config.run_dir is not None or self.config.log_to:
            raise ValueError(
                "Trainer.step writes no files: run_dir, resume and log_to are for fit. Leave them out, and save with "
                "sae.save_pretrained(folder)"
            )
        if self.steps >= self.config.steps:
            raise ValueError(
                f"Trainer.step: all {self.config.steps} steps of TrainerConfig.steps were made; ask for more there"
            )
        self._check_form(x, self.steps + 1)
        self._check_made()
        with torch.inference_mode(False), torch.enable_grad():
            if self.steps == 0:
                self._prepare(lambda rows: x.detach())
            if not self.sae.training:
                self.sae.train()
            rows = self._checked(x, None)
            return {} if rows is None else self._train_step(rows).losses

    def fit(self, activations: Iterable[Tensor], on_step: OnStep | None = None) -> TrainResult:
        """Train until config.steps. Raises before anything is written if run_dir holds another run.

        on_step: called after each step with this Trainer and the terms of the loss by name, tensors () on the device.
        Raises FloatingPointError when activations or the loss are not finite (config.nonfinite = "skip" drops such
        rows), KeyboardInterrupt after SIGINT; both leave a checkpoint to resume from.
        """
        if self.steps >= self.config.steps:
            warnings.warn(
                f"Trainer.fit: all {self.config.steps} steps were made before, so nothing is trained; to train on, "
                "take a run_dir, and resume with more steps",
                stacklevel=2,
            )
        self.sae.check_weights("Trainer")
        self._check_made()
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(progress.shown(self.config.progress))
            stack.enter_context(own_random_state(self.sae.W_enc.device))
            stack.enter_context(self._ranks.watched(self.config.run_dir))
            torch.manual_seed(self.config.seed)
            resumed = None
            if self.config.run_dir is not None:
                stack.enter_context(self._ranks.locked(self.config.run_dir, "Trainer"))
                resumed = self._open_run(self.config.run_dir)
            batches = self._ranks.together(lambda: self._batches(activations, resumed))
            if resumed is not None:
                self._restore_random_state(resumed)
            elif self.steps == 0:
                self._prepare(lambda rows: batches.peek(rows, self._check_form))
            resumed = None  # its tensors lie in files that later checkpoints replace
            interrupted = stack.enter_context(interrupt_flag())
            silent, told = not self._ranks.first, self._description()
            log = self._ranks.together(lambda: Log(self.config, self.steps, told, silent))
            stack.enter_context(log)
            stack.callback(self.sae.eval)
            stack.callback(self._optimizer.zero_grad)
            self.sae.train()
            metrics = self._loop(batches, log, interrupted, on_step)
            if self.config.run_dir is not None:
                self.sae.save_pretrained(self.config.run_dir / "sae")
        return TrainResult(self.steps, metrics, self.config.run_dir)

    def _check_made(self) -> None:
        """Raise ValueError where the weights are not those that the Trainer was made for."""
        here = dict(self.sae.named_parameters())
        if replaced := [name for name, p in self._trained.items() if here.get(name) is not p]:
            raise ValueError(
                f"Trainer: {', '.join(replaced)} was put in place of what this Trainer was made for, and would not be "
                "trained; make the Trainer afterwards"
            )
        if self._is_narrow and type(self._optimizer) is torch.optim.Adam:
            raise ValueError("Trainer: the SAE was cast to bfloat16 after its Trainer was made; cast it first")

    def _batches(self, activations: Iterable[Tensor], resumed: checkpoint.Checkpoint | None) -> Batches:
        try:
            batches = Batches(activations, self.config.seed, resumed.state["data"] if resumed else None)
        except ValueError as error:
            if resumed is None:
                raise
            raise ValueError(f"{error}. The checkpoint is {resumed.folder}") from error
        if self.config.run_dir is not None:
            batches.check_position()
        return batches

    def _loop(
        self, batches: Batches, log: Log, interrupted: Callable[[], bool], on_step: OnStep | None
    ) -> dict[str, float]:
        config, metrics, loss = self.config, log.last, None
        last: tuple[Tensor, _Made] | None = None
        rows_before, since = self.rows_seen, time.perf_counter()

        def rate() -> float:
            return (self.rows_seen - rows_before) / max(time.perf_counter() - since, 1e-9)

        while self.steps < config.steps:
            raw = self._draw(batches, loss)
            if raw is None:
                warnings.warn(
                    f"Trainer: activations ended after {self.steps} of {config.steps} steps. Give more of them, ask "
                    "for fewer steps, or let them come again and again: fastsae.batches(x, batch_size) does",
                    stacklevel=3,
                )
                if last is not None and metrics.get("step") != self.steps:
                    metrics = self._write(log, *last, rate())
                break
            x = self._checked(raw, batches)
            due = False
            if x is not None:
                last = x, self._train_step(x)
                loss = last[1].output.loss
                if on_step is not None:
                    on_step(self, last[1].losses)
                if self.steps % config.log_every == 0 or self.steps == config.steps:
                    metrics = self._write(log, *last, rate())
                    rows_before, since = self.rows_seen, time.perf_counter()
                log.advance()
                due = self.steps % config.checkpoint_every == 0 or self.steps == config.steps
            stop = bool(self._ranks.worst(interrupted()))
            if stop or due:
                self._save(batches.position(), loss)
                rows_before, since = self.rows_seen, time.perf_counter()
            if stop:  # SIGINT may have come to one rank only
                where = f"; saved, continue with resume (in {config.run_dir})" if config.run_dir else ""
                raise KeyboardInterrupt(f"training stopped at step {self.steps}{where}")
        return metrics

    def _draw(self, batches: Batches, loss: Tensor | None) -> Tensor | None:
        """The next batch, None at the end. What was trained is saved then, or when the activations fail or are not what
        they should be."""
        raw, failed = None, None
        try:
            raw = next(batches)
            self._check_form(raw, batches.drawn)
            self._ranks.own_rows(raw)  # raises where there are not enough of them
        except StopIteration:
            raw = None
        except Exception as error:
            failed = error
        worst = self._ranks.worst(_FAILED if failed else _ENDED if raw is None else _DRAWN)
        if worst == _DRAWN:
            if raw is not None and loss is None:  # the first one of this process
                self._ranks.check_rows(raw)
            return raw
        if worst == _ENDED:  # on one rank earlier, it may be: what others have drawn nobody trains on
            self._save(batches.position(before_last=raw is not None), loss)
            return None
        error = failed or RuntimeError(f"{_batch(batches.drawn)}: another rank could not draw it; see its own error")
        if loss is not None and torch.isfinite(self._ranks.mean(loss)):
            try:
                self._save(batches.position(before_last=True), loss)
            except OSError as also:
                raise OSError(also.errno, f"{error}; and what was trained could not be saved: {also}") from error
        raise error

    def _train_step(self, x: Tensor) -> _Made:
        config, k = self.config, self._k()
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(self.steps)
        norm, losses = None, {}
        if config.adam_in_backward:
            with self._optimizer.in_backward():  # type: ignore[union-attr]
                output = self._compute(x, k)
                output.loss.backward()
            self._optimizer.step()
        else:
            with self._buffers:
                output = self._compute(x, k)
                loss = output.loss
                if config.auxk:
                    losses["auxk"] = config.auxk_coefficient * self._auxk_loss(x, output.reconstruction.detach())
                    loss = loss + losses["auxk"]
                self._ranks.share(loss).backward()
            norm = self._apply_gradients()
        self._count_fired(output)
        self.steps += 1
        self.rows_seen += self._ranks.batch_rows(len(x))
        output = SAEOutput(output.reconstruction.detach(), output.loss.detach(), output.code.detach())
        return _Made(output, {"mse": output.loss} | {name: t.detach() for name, t in losses.items()}, norm)

    def _apply_gradients(self) -> Tensor | None:
        """The optimizer's step, and what the config asks for around it; returns the norm that was clipped."""
        config, sae = self.config, self.sae
        self._ranks.add_gradients(self._trained)
        if config.unit_norm_decoder and sae.W_dec.grad is not None:
            remove_parallel_(sae.W_dec.grad, sae.W_dec)
        norm = None
        if config.clip_grad_norm:
            norm = self._ranks.norm({name: p.grad for name, p in self._trained.items() if p.grad is not None})
            clip_by_scaling(self._optimizer, config.clip_grad_norm, norm)
        self._optimizer.step()
        if config.unit_norm_decoder and type(self._optimizer) is torch.optim.Adam:  # NarrowAdam does it in fp32
            normalize_rows_(sae.W_dec)
        return norm

    def learning_rate(self, step: int) -> float:
        """Adam's learning rate at optimizer step `step`, counted from 0."""
        c = self.config
        if step < c.warmup_steps:
            return c.lr * (step + 1) / c.warmup_steps
        left = c.steps - step
        if left < c.decay_steps:
            return c.lr_end + (c.lr - c.lr_end) * left / c.decay_steps
        return c.lr

    def _k(self) -> int:
        c, k = self.config, self.sae.k
        if c.k_anneal_from is None or self.steps >= c.k_anneal_steps:
            return k
        return round(c.k_anneal_from + (k - c.k_anneal_from) * self.steps / c.k_anneal_steps)

    def _auxk_loss(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        self._ranks.least(self._rows_since_fired)
        dead = (self._rows_since_fired[:-1] >= self.config.dead_after_tokens).nonzero().squeeze(1)
        return auxk_loss(self.sae, x, reconstruction, dead, self.config.auxk)

    def _count_fired(self, output: SAEOutput) -> None:
        values, indices = output.code.values.detach(), output.code.indices
        self._rows_since_fired += self._ranks.batch_rows(len(values))
        nobody = len(self._rows_since_fired) - 1
        fired = torch.where(values > 0, self._ranks.own_features(indices, nobody), nobody)
        self._rows_since_fired.index_fill_(0, fired.reshape(-1), 0)

    def _write(self, log: Log, x: Tensor, made: _Made, rate: float) -> dict[str, float]:
        """Log the step that was made on x."""
        metrics = self._metrics(x, made.output, made.grad_norm, rate)
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(self._diverged(metrics["loss"]))
        self._ranks.together(partial(log.write, metrics))
        return metrics

    def _metrics(self, x: Tensor, output: SAEOutput, grad_norm: Tensor | None, rate: float) -> dict[str, float]:
        ranks = self._ranks
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        variance = ranks.mean((x - ranks.mean(x.mean(dim=0))).square().mean())
        loss = ranks.mean(output.loss)
        alive_within = min(self.config.dead_after_tokens, self.rows_seen)
        ranks.least(self._rows_since_fired)
        # Counts are added up, and divided once: a mean of whole numbers that are all alike is that number.
        dead = ranks.count_features(int((self._rows_since_fired[:-1] >= alive_within).sum()))
        active = ranks.count_rows(int((output.code.values > 0).sum()))
        metrics: dict[str, float] = {
            "step": self.steps,
            "rows": self.rows_seen,
            "loss": loss.item(),
            "fvu": (loss / variance).item(),
            "l0": active / ranks.batch_rows(len(x)),
            "dead_share": dead / self.sae.d_sae,
            "lr": self.learning_rate(self.steps - 1),
            "rows_per_second": rate,
        }
        if grad_norm is not None:
            metrics["grad_norm"] = grad_norm.item()
        if self.config.k_anneal_from is not None:
            metrics["k"] = output.code.k
        return metrics | self._without_outliers(x, output) | {name: n for name, n in self._skipped().items() if n}

    def _without_outliers(self, x: Tensor, output: SAEOutput) -> dict[str, float]:
        """FVU of ordinary rows, where others are far larger and decide that of all."""
        ranks, norms = self._ranks, _norms(x)
        far = far_rows(norms)
        if not ranks.worst(bool(far.any())):
            return {}
        if far.any() and not self._told_of_outliers:
            warn_of_far_rows(f"Trainer: step {self.steps}", norms, far)
            self._told_of_outliers = True
        weight = (~far).to(x.dtype).unsqueeze(1)
        mean = ranks.mean((weight * x).mean(dim=0)) / ranks.mean(weight.mean())
        error, variance = (ranks.mean((weight * (x - y).square()).mean()) for y in (output.reconstruction, mean))
        return {"fvu_ordinary": (error / variance).item()}

    def _skipped(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _SKIPPED}

    def _checked(self, raw: Tensor, batches: Batches | None) -> Tensor | None:
        """Our rows of a batch, normalised, without those that are to be left out; None if too few are left."""
        x = self._normalised(self._ranks.own_rows(raw))
        bad = bool(self._ranks.worst(not x.isfinite().all()))
        if bad and self.config.nonfinite == "stop":
            self._stop_at(raw, batches)
        if bad or self.config.outliers == "skip":
            return self._kept(raw, x, batches, bad)
        self._skipped_in_a_row = 0
        return x

    def _normalised(self, raw: Tensor) -> Tensor:
        # Detached: it may come with a model's graph.
        return self.sae.normalizer(raw.detach().to(self.sae.W_enc.device))

    def _kept(self, raw: Tensor, own: Tensor, batches: Batches | None, bad: bool) -> Tensor | None:
        """Our share of the rows of a batch that are trained on; all ranks leave out the same rows."""
        ranks = self._ranks
        x = own if ranks.count == 1 else self._normalised(raw)
        finite = x.isfinite().all(dim=1)
        kept = finite.clone()
        if self.config.outliers == "skip" and bad:
            kept[finite] = ~far_rows(_norms(x[finite]))
        elif self.config.outliers == "skip":  # nothing to choose from, which the host would wait for
            kept = ~far_rows(_norms(x))
        finite, kept = ranks.every(torch.stack([finite, kept]))
        n_finite, n = torch.stack([finite, kept]).sum(dim=1).tolist()
        too_few = n < ranks.adding  # each data rank needs one
        if too_few and self._skipped_in_a_row >= _SKIPPED_IN_A_ROW:
            self._stop_at(raw, batches)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if too_few else 0
        self.rows_skipped += len(x) - n_finite
        self.outliers_skipped += n_finite - n
        self.batches_skipped += too_few
        if too_few:
            return None
        return own if n == len(x) else ranks.own_rows(x[kept])

    def _stop_at(self, raw: Tensor, batches: Batches | None) -> NoReturn:
        """Save what was trained, and raise FloatingPointError that says where this batch is not finite."""
        finite = self._normalised(raw).isfinite()  # the rows of all ranks
        if batches is not None:
            self._save(batches.position(before_last=True), None)
        where = _batch(self.steps + 1 if batches is None else batches.drawn)
        if finite.all():
            raise FloatingPointError(
                f"{where} holds NaN or infinite values on another rank, and none on this one. Give all "
                f"ranks the same activations{', in batches of more rows' if self.config.outliers == 'skip' else ''}"
            )
        row, column = (~finite).nonzero()[0].tolist()
        many = f" So did the {_SKIPPED_IN_A_ROW} before it." if self._skipped_in_a_row >= _SKIPPED_IN_A_ROW else ""
        raise FloatingPointError(
            f"{where} holds {int((~finite).sum())} values that are NaN or infinite, the first at row "
            f"{row}, dimension {column}.{many} Nothing was trained on it. Look at where these activations come from, "
            "or leave such rows out (nonfinite)."
        )

    def _check_form(self, raw: Tensor, number: int) -> None:
        """Raise unless batch `number` is a float (B, d_in) tensor."""
        where = _batch(number)
        if not isinstance(raw, Tensor) or raw.dim() != 2 or raw.shape[1] != self.sae.d_in or len(raw) == 0:
            got = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
            expected = f"expected a (B, {self.sae.d_in}) tensor with B at least 1; got {got}"
            raise ValueError(f"{where}: {expected}{self._advice(raw)}")
        if not raw.is_floating_point() or raw.is_meta:
            raise TypeError(f"{where}: expected a float tensor that holds numbers; got {raw.dtype} on {raw.device}")

    def _advice(self, raw: Any) -> str:
        """Say what to do about something that is no batch."""
        if isinstance(raw, (tuple, list)) and raw and isinstance(raw[0], Tensor):
            return ". Of a DataLoader over a TensorDataset: (rows for (rows,) in loader)"
        if isinstance(raw, Tensor):
            return ". Of one tensor of activations: x.split(2048)" if raw.shape == (self.sae.d_in,) else ""
        return ". Of NumPy arrays: torch.from_numpy" if hasattr(raw, "__array__") else ""

    def _diverged(self, loss: float) -> str:
        last = next(iter(checkpoint.folders(self.config.run_dir)), None) if self.config.run_dir else None
        go_on = f"The last good checkpoint is {last}." if last else "There is no checkpoint."
        advice = f"Try a lower lr than {self.config.lr}."
        return f"Trainer: the loss is {loss} at step {self.steps}: training diverged. {go_on} {advice}"

    def _prepare(self, sample: Callable[[int], Tensor]) -> None:
        """Make a new SAE ready for the first step: measure the normalisation, bring W_dec to norm 1.

        sample: gives at least so many raw rows, or all there are.
        """
        normalizer, config = self.sae.normalizer, self.config
        if normalizer.measured and config.normalize != "zscore":
            raise ValueError(
                f"TrainerConfig.normalize: {config.normalize!r}, but this SAE has stored statistics; leave the default "
                "to go on with them, whatever their kind"
            )
        if not normalizer.measured and config.normalize != "none":
            self._ranks.together(lambda: self._measure(sample(self.config.normalize_rows)))
            self._ranks.equalise(normalizer.mean, normalizer.scale)
        if config.unit_norm_decoder:
            normalize_rows_(self.sae.W_dec)

    def _measure(self, sample: Tensor) -> None:
        if self.config.nonfinite == "skip":
            sample = sample[sample.isfinite().all(dim=1)]
        self._told_of_outliers = self.sae.normalizer.measure(sample, self.config.normalize) > 0

    # ---- runs on disk -----------------------------------------------------------------------------------------------

    def _open_run(self, run_dir: Path) -> checkpoint.Checkpoint | None:
        """Write the run's config, or load the run that is there and return its checkpoint."""
        found = checkpoint.load(run_dir, self._ranks) if self.config.resume else None
        if found is not None:
            self._restore(found)
            self._ranks.first_does(lambda: checkpoint.tidy(run_dir))  # a kill may have come before it was done
            self._ranks.first_does(lambda: files.write_json(run_dir / "run.json", self._description()))
            return found

        def begin() -> None:
            if not self.config.resume and checkpoint.begun(run_dir):
                raise FileExistsError(
                    f"Trainer: {run_dir} already holds a run. Continue it with resume=True, or choose another run_dir."
                )
            files.write_json(run_dir / "run.json", self._description())

        self._ranks.first_does(begin)
        return None

    def _description(self) -> dict[str, dict[str, Any]]:
        """Everything that a run and its continuation must have in common."""
        sae = {
            "architecture": self.sae.architecture,
            "dtype": str(self.sae.W_enc.dtype)[6:],
            "trained": sorted(self._trained),
        }
        return {"trainer": to_dict(self.config), "sae": sae | to_dict(self.sae.config)}

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        state, ours = found.state, self._description()
        with files.expected_in(found.folder / "state.json", f"delete {found.folder}"):
            state["sae"]["trained"] = [checkpoint.plain_name(name) for name in state["sae"]["trained"]]
            skipped = {name: state.get(name, 0) for name in _SKIPPED}  # older checkpoints count batches alone
            counts = [state["step"], state["rows_seen"], state["data"]["drawn"], *skipped.values()]
            if not all(type(n) is int and n >= 0 for n in counts):
                raise TypeError(repr(counts))
            data = {"rows": None, "last": None} | state["data"]  # older checkpoints know nothing of either
            for name, kind in (("stream", dict), ("random", str), ("rows", int), ("last", dict)):
                if not isinstance(data[name], kind | None):
                    raise TypeError(repr(data[name]))
            # Without a decay at its end, the beginning of a longer run is the same.
            free = _FREE_ON_RESUME if self.config.decay_steps else _FREE_ON_RESUME | {"steps"}
            differing = [
                f"{name} was {then!r}, is {ours[part].get(name)!r}"
                for part in ours
                for name, then in state[part].items()
                if name not in free and json.dumps(ours[part].get(name)) != json.dumps(then)
            ]
        if differing:
            decays = ". The rate decays over the last steps" if differing[0].startswith("steps was") else ""
            raise ValueError(
                f"Trainer: cannot resume {found.folder} with another configuration: {'; '.join(differing)}{decays}"
            )
        if state["step"] > self.config.steps:
            raise ValueError(f"Trainer: {found.folder} is beyond the {self.config.steps} steps asked for; ask for more")
        kept = {name: kinds(p.shape, self.config.optimizer_state) for name, p in self._trained.items()}
        checkpoint.check_state(found.folder, found.tensors, kept, self._rows_since_fired[:-1])
        try:
            self.sae.load_state_dict(found.weights)
        except RuntimeError as error:
            raise ValueError(f"Trainer: checkpoint {found.folder} is of another SAE: {error}") from error
        self.steps, self.rows_seen = state["step"], state["rows_seen"]
        for name, n in skipped.items():
            setattr(self, name, n)
        self._rows_since_fired[:-1] = found.tensors["rows_since_fired"]
        for key, t in found.tensors.items():
            moment, _, name = key.partition("/")
            if name:  # a run that was stopped before its first step has no moments
                t = t.to(self.sae.W_enc.device, copy=True)
                self._optimizer.state[self._trained[name]][moment] = t.reshape(()) if moment == "step" else t

    def _restore_random_state(self, found: checkpoint.Checkpoint) -> None:
        try:
            torch.set_rng_state(found.tensors["rng_cpu"])
        except RuntimeError as error:
            raise ValueError(f"checkpoint {found.folder} is damaged: rng_cpu: {error}") from error
        if self.sae.W_enc.is_cuda:
            torch.cuda.set_rng_state(found.tensors["rng_cuda"], self.sae.W_enc.device)

    def _save(self, data: dict[str, Any], loss: Tensor | None) -> None:
        if self.config.run_dir is None:
            return
        loss = None if loss is None else self._ranks.mean(loss)
        if loss is not None and not torch.isfinite(loss):
            raise FloatingPointError(self._diverged(loss.item()))
        self._ranks.least(self._rows_since_fired)
        tensors = {"rows_since_fired": self._rows_since_fired[:-1], "rng_cpu": torch.get_rng_state()}
        if self.sae.W_enc.is_cuda:
            tensors["rng_cuda"] = torch.cuda.get_rng_state(self.sae.W_enc.device)
        for name, p in self._trained.items():
            tensors |= {f"{key}/{name}": t for key, t in self._optimizer.state[p].items()}
        state = {"rows_seen": self.rows_seen, **self._skipped(), "data": data, **self._description()}
        checkpoint.save(self.config.run_dir, self.steps, self.sae, tensors, state)
