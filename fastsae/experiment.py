"""From configs to results: the model, its text, the SAE trained on it, and what is measured of it."""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastsae import distributed, evaluate, progress, provenance
from fastsae.activations import (
    ActivationStore,
    ActivationStream,
    ArrayActivations,
    ModelActivations,
    TokenWindows,
    harvest,
    open_activations,
    prepends_bos,
    read_documents,
    tokenize,
)
from fastsae.config import DataConfig, SecondaryRunConfig, SequentialRunConfig, TopKSAEConfig, TrainerConfig, to_dict
from fastsae.distributed import Ranks
from fastsae.evaluate import Behavior, Geometry, Reconstruction
from fastsae.evaluate.behavior import of_sums as behavior_of
from fastsae.evaluate.parts import NOTHING_KEPT, Parts
from fastsae.evaluate.reconstruction import of_sums as reconstruction_of
from fastsae.modules import HiddenActivations, JointSAE, SecondarySAE, SequentialSAE, SparseAutoencoder, load, new
from fastsae.train import Trainer

# Of each held-out document at most so many windows are measured on: intervals count documents, not tokens.
_WINDOWS_PER_DOCUMENT = 8


AnyRunConfig = TopKSAEConfig | SequentialRunConfig | SecondaryRunConfig


class Trained(NamedTuple):
    """The SAE of a finished run."""

    sae: SparseAutoencoder
    data: DataConfig
    """Data that it was trained on."""
    base: JointSAE | None = None
    """The SAE whose hidden layer a SecondarySAE reads; None for others."""

    @property
    def spliced(self) -> SparseAutoencoder:
        """The SAE that reads the model's activations: this one, or the base of a secondary one."""
        return self.sae if self.base is None else self.base

    @property
    def secondary(self) -> SecondarySAE | None:
        """This SAE if it is a secondary one."""
        return self.sae if isinstance(self.sae, SecondarySAE) else None


@dataclass(frozen=True)
class Measured:
    """One SAE on held-out documents."""

    reconstruction: Reconstruction
    bos_out: Behavior
    """BOS keeps its activation, as in training."""
    bos_in: Behavior | None
    """BOS is replaced too, and what it predicts counts. None for a model without BOS."""


def device(asked: str | None = None) -> str:
    """Device for models and SAEs: as asked, or the GPU if there is one. Raises ValueError if it cannot be used."""
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=asked).item()
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        why = str(error).splitlines()[0]
        raise ValueError(f"--device: {asked!r} cannot be used here ({why}); leave it out for {device()!r}") from error
    return asked


def language_model(data: DataConfig, on: str | None = None) -> Any:
    """on: a device; None is the GPU if there is one."""
    from fastsae import lm

    if data.activations is not None:
        raise ValueError(
            f"this is of activations in {data.activations}, and not of a language model, which is needed here"
        )
    model = lm.load(data.model, device(on))
    if data.prepend_bos is not None:
        model.cfg.default_prepend_bos = data.prepend_bos
    return model


def as_read(model: Any, data: DataConfig) -> DataConfig:
    """Fill in the model's own convention on BOS where none is asked for: that is recorded with a run."""
    return data if data.prepend_bos is not None else dataclasses.replace(data, prepend_bos=prepends_bos(model))


def training_windows(model: Any, data: DataConfig) -> TokenWindows:
    _check_context(model, data)
    documents = read_documents(data.text)
    return tokenize(documents, model, data.context, data.tokens, held_out=False, prepend_bos=data.prepend_bos)


def _check_context(model: Any, data: DataConfig) -> None:
    """Before windows are padded to that length."""
    if data.context > model.cfg.n_ctx:
        raise ValueError(
            f"DataConfig.context: expected at most {model.cfg.n_ctx}, what the model reads at once; got {data.context}"
        )


def held_out_windows(
    model: Any,
    data: DataConfig,
    tokens: int,
    per_document: int = _WINDOWS_PER_DOCUMENT,
    all_of_it: bool = False,
) -> TokenWindows:
    """Windows spread over the held-out documents, `tokens` tokens at most.

    all_of_it: over all documents, of a text that nothing was trained on.
    """
    _check_context(model, data)
    documents = read_documents(data.text)
    which = None if all_of_it else True
    return tokenize(documents, model, data.context, tokens, which, per_document, data.prepend_bos)


def train(
    model: Any,
    data: DataConfig,
    config: AnyRunConfig,
    trainer: TrainerConfig,
    ranks: Ranks | None = None,
    dtype: torch.dtype = torch.float32,
) -> SparseAutoencoder:
    """A new SAE, trained on the activations of `data` into trainer.run_dir; with ranks, by all of them together.

    model: None where data.activations are read.
    """
    data = as_read(model, data) if data.activations is None else data
    make = _maker(config, data, trainer.seed, ranks, dtype)
    base = None if isinstance(config, TopKSAEConfig) else config.base
    source = _training_source(model, data)
    try:
        held_out_windows(model, data, 1) if data.activations is None else open_activations(data.activations, True)
    except ValueError as error:
        warnings.warn(f"`fastsae eval` will have nothing to measure on: {error}", stacklevel=2)
    sae = make(source.d_in)
    read = provenance.reads(data)
    sae.reads = {"hidden_layer_of": read} if isinstance(sae, SecondarySAE) else read
    run = Trainer(sae, trainer)
    stream = ActivationStream(source, data.batch_size, data.buffer_rows, trainer.seed)
    assert trainer.run_dir is not None
    run_dir = trainer.run_dir
    sae.ranks.first_does(lambda: provenance.record(data, run_dir, base))
    read = source
    if data.store and isinstance(source, ModelActivations):
        store = data.store
        sae.ranks.first_does(lambda: harvest(source, store), for_hours=True)
        read = ActivationStore(store)
        # Another process may have begun there meanwhile.
        sae.ranks.first_does(lambda: provenance.record(data, run_dir, base))
    stream.source = HiddenActivations(read, _joint(base)) if isinstance(sae, SecondarySAE) and base else read
    run.fit(stream)
    return sae


def _training_source(model: Any, data: DataConfig) -> ModelActivations | ArrayActivations | ActivationStore:
    if data.activations is not None:
        return open_activations(data.activations, held_out=False)
    return ModelActivations(model, data.hook, training_windows(model, data))


def _maker(
    config: AnyRunConfig, data: DataConfig, seed: int, ranks: Ranks | None, dtype: torch.dtype
) -> Callable[[int], SparseAutoencoder]:
    """A function that makes the SAE once d_in is known. A base that does not fit is refused before the text is read."""
    if not isinstance(config, TopKSAEConfig):
        if dtype != torch.float32:
            raise ValueError(f"train: the SAE has the dtype of that in {config.base}; leave --dtype out")
        on_base = _on_base(config, data, seed)
        return lambda _: on_base if ranks is None else distributed.shard(on_base, ranks)

    def make(d_in: int) -> SparseAutoencoder:
        torch.manual_seed(seed)
        whole = dataclasses.replace(config, d_in=d_in)
        return new(whole, device=device(), dtype=dtype) if ranks is None else distributed.new(whole, ranks, dtype)

    return make


def _on_base(config: SequentialRunConfig | SecondaryRunConfig, data: DataConfig, seed: int) -> SparseAutoencoder:
    """A new SAE on that of the run config.base, which must know the activations of `data`."""
    base, seen, _ = trained(config.base)
    ours = provenance.resolved(data)
    if seen.activations != ours.activations:
        raise ValueError(
            f"{config.base} was trained on activations in {seen.activations}, this run is on those in "
            f"{ours.activations} (None: a model's); they must be the same"
        )
    if (seen.model, seen.hook, seen.text) != (ours.model, ours.hook, ours.text):
        raise ValueError(
            f"{config.base} was trained on {seen.hook} of model {seen.model!r} on {seen.text!r}, this run is on "
            f"{ours.hook} of model {ours.model!r} on {ours.text!r}; --model, --hook and --text must be those of the "
            "base, or documents it was trained on would be held out"
        )
    if None not in (seen.prepend_bos, ours.prepend_bos) and seen.prepend_bos != ours.prepend_bos:
        raise ValueError(
            f"{config.base} was trained with prepend_bos = {seen.prepend_bos}, this run has {ours.prepend_bos}; "
            f"--prepend-bos {seen.prepend_bos} is as the base reads"
        )
    options = to_dict(config)
    del options["base"]
    torch.manual_seed(seed)
    kind = SequentialSAE if isinstance(config, SequentialRunConfig) else SecondarySAE
    return kind.on(base, **options)  # type: ignore[arg-type]  # it refuses other architectures itself


def held_out_activations(model: Any, run: Trained, windows: TokenWindows) -> ModelActivations | HiddenActivations:
    """Activations that the SAE of `run` reads, over windows."""
    source = ModelActivations(model, run.data.hook, windows)
    return source if run.base is None else HiddenActivations(source, run.base)


def held_out_reconstruction(model: Any, run: Trained, windows: TokenWindows) -> Reconstruction:
    source = held_out_activations(model, run, windows)
    rows = (source.rows(i) for i in progress.over(RECONSTRUCTION, range(len(source.block_rows)), "block"))
    return evaluate.reconstruction(run.sae, rows, windows.names)


RECONSTRUCTION, BOS_OUT, BOS_IN = "reconstruction", "KL", "KL with BOS"


def stages(windows: TokenWindows) -> tuple[str, ...]:
    """Stages of `measure`, in their order."""
    return (RECONSTRUCTION, BOS_OUT, *((BOS_IN,) if windows.has_bos else ()))


def measure(model: Any, run: Trained, windows: TokenWindows, parts: Parts = NOTHING_KEPT) -> Measured:
    """Measure the SAE of `run` on held-out windows. A secondary SAE is spliced in through its base.

    parts: where finished stages are kept, and taken from.
    """

    def behavior(stage: str) -> Behavior:
        def measured() -> Behavior:
            bos = stage == BOS_IN
            return evaluate.behavior(run.spliced, model, run.data.hook, windows, bos=bos, secondary=run.secondary)

        return parts.stage(stage, measured, lambda b: (b.sums, {}), lambda sums, _: behavior_of(sums))

    return Measured(
        reconstruction=parts.stage(
            RECONSTRUCTION,
            lambda: held_out_reconstruction(model, run, windows),
            lambda r: (r.sums, {"dead_share": r.dead_share}),
            lambda sums, numbers: reconstruction_of(sums, numbers["dead_share"]),
        ),
        bos_out=behavior(BOS_OUT),
        bos_in=behavior(BOS_IN) if windows.has_bos else None,
    )


def held_out_geometry(model: Any, run: Trained, windows: TokenWindows) -> Geometry:
    """Rows in an order in which documents are mixed: what costs much is measured on the first ones only."""
    source = held_out_activations(model, run, windows)
    order = torch.randperm(len(source.block_rows), generator=torch.Generator().manual_seed(0), device="cpu").tolist()
    return evaluate.geometry(run.sae, (source.block(i) for i in progress.over("geometry", order, "block")))


def trained(run: Path, on: str | None = None, read_text: bool = True) -> Trained:
    """The SAE of a finished run, and what it was trained on. Raises FileNotFoundError saying what is missing.

    on: a device; None is the GPU if there is one. read_text: whether its text is going to be read.
    """
    data = provenance.recorded(run, read_text)
    check_finished(run)
    sae = load(run / "sae", device=device(on))
    base = _joint(provenance.recorded_base(run), on) if isinstance(sae, SecondarySAE) else None
    return Trained(sae, data, base)


def check_finished(run: Path) -> None:
    """Raise FileNotFoundError unless there is a trained SAE in `run`."""
    if not (run / "sae" / "config.json").is_file():
        raise FileNotFoundError(f"the training in {run} did not finish; run the same `fastsae train` with --resume")


def _joint(run: Path, on: str | None = None) -> JointSAE:
    sae = load(run / "sae", device=device(on))
    assert isinstance(sae, JointSAE), f"{run} was the base of a secondary SAE"
    return sae
