"""Configs of SAEs, data and training: frozen dataclasses. One documented field is one flag of the command line."""

import dataclasses
import difflib
import importlib
import math
import numbers
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastsae import packages
from fastsae.habits import named

T = TypeVar("T")

# No flag: the command line takes d_in from the hook. tyro reads the mark, and nothing else here needs tyro.
_NO_FLAG = importlib.import_module("tyro.conf").Fixed if packages.is_there("tyro") else None

Init = Literal["paper", "unit"]


def _require(condition: bool, where: str, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"{where}: expected {expected}; got {got!r}")


def _check_types(config: Any) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        _require(_fits(value, hint), f"{type(config).__name__}.{name}", _said(hint), value)
        object.__setattr__(config, name, _plain(value))


def _plain(value: Any) -> Any:
    """Without numbers of numpy, which JSON and torch do not know."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if not isinstance(value, numbers.Real) or isinstance(value, (int, float)):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _said(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        return f"a tuple of {_said(arguments[0])}"
    return " or ".join(map(_said, arguments)) if arguments else "None" if hint is types.NoneType else hint.__name__


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        every = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return len(value) == len(every) and all(map(_fits, value, every))
    accepted = {int: numbers.Integral, float: numbers.Real, Path: (str, Path)}.get(hint, hint)
    return isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))


@named
@dataclass(frozen=True)
class TopKSAEConfig:
    """A TopK sparse autoencoder."""

    d_in: Annotated[int, _NO_FLAG]
    """Width of the activations."""
    d_sae: int
    """Number of features."""
    k: int
    """Active features per token."""
    pre_bias: bool = True
    """Learn b_dec: subtracted before encoding, added after decoding."""
    init: Init = "paper"
    """Decoder at the start: U(+-1/sqrt(d_sae)) as in the paper, or unit-norm rows. The encoder starts as its copy."""

    def __post_init__(self) -> None:
        _check_types(self)
        where = type(self).__name__
        _require(self.d_in >= 1, f"{where}.d_in", "at least 1", self.d_in)
        _require(1 <= self.k <= self.d_sae, f"{where}.k", f"between 1 and d_sae = {self.d_sae}", self.k)


@named
@dataclass(frozen=True)
class IntegrationConfig:
    """Feature integration: a linear pathway and a factorization machine over the strongest features."""

    k_integration: int | None = None
    """Number of strongest features that the integration sees; None means half of k."""
    d_embedding: int = 128
    """Width of the factorization machine's feature embeddings V."""
    dropout: float = 0.15
    """Share of the pairwise interactions z dropped in training."""
    linear: bool = True
    """Have the linear pathway W_lin. With k_integration equal to k it is a second decoder over the same code."""
    interaction: bool = True
    """Have the pairwise pathway: V and the two-layer network over z."""

    def __post_init__(self) -> None:
        _check_types(self)
        where = type(self).__name__
        _require(self.d_embedding >= 1, f"{where}.d_embedding", "at least 1", self.d_embedding)
        _require(0 <= self.dropout < 1, f"{where}.dropout", "in [0, 1)", self.dropout)


@named
@dataclass(frozen=True)
class JointSAEConfig(IntegrationConfig, TopKSAEConfig):
    """A TopK SAE trained together with feature integration: a linear pathway and a factorization machine."""

    pre_bias: bool = False
    """Learn b_dec: subtracted before encoding, added after decoding. The paper has none."""

    def __post_init__(self) -> None:
        TopKSAEConfig.__post_init__(self)
        IntegrationConfig.__post_init__(self)
        n = self.k_integration
        fits = n is None or 1 <= n <= self.k
        _require(fits, f"{type(self).__name__}.k_integration", f"None, or between 1 and k = {self.k}", n)

    @property
    def n(self) -> int:
        """k_integration, resolved."""
        return max(1, self.k // 2) if self.k_integration is None else self.k_integration


@named
@dataclass(frozen=True)
class SequentialSAEConfig(JointSAEConfig):
    """A frozen TopK SAE, and feature integration trained on its residual."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.linear or self.interaction):
            raise ValueError(f"{type(self).__name__}: linear and interaction are both off; there is nothing to train")


@named
@dataclass(frozen=True)
class SecondarySAEConfig(TopKSAEConfig):
    """A TopK SAE on the hidden layer of an integration network; d_in is that network's d_embedding."""

    pre_bias: bool = False
    """Learn b_dec: subtracted before encoding, added after decoding. The paper has none."""


@named
@dataclass(frozen=True)
class SequentialRunConfig(IntegrationConfig):
    """Feature integration, trained on the residual of the frozen TopK SAE of a finished run."""

    base: Path = dataclasses.field(kw_only=True)
    """The run_dir of a finished `fastsae train topk` on the same model and hook."""


@named
@dataclass(frozen=True)
class SecondaryRunConfig:
    """A TopK SAE on the hidden layer of a trained integration network: the integration features of the paper."""

    base: Path
    """The run_dir of a finished `fastsae train joint` or `sequential` on the same model, hook and text."""
    d_sae: int | None = None
    """Number of features; None means 25 times the base's d_embedding, as in the paper."""
    k: int | None = None
    """Active features per token; None means one in fifty, as in the paper."""

    def __post_init__(self) -> None:
        _check_types(self)


# What says something of activations in files.
_OF_FILES = ("activations", "batch_size", "buffer_rows")


@named
@dataclass(frozen=True)
class DataConfig:
    """Activations: of a hook of a model on a text, or in files."""

    model: str = "embedded"
    """Language model: "embedded", a folder, or a name on the Hugging Face hub such as gpt2."""
    hook: str = "blocks.2.hook_resid_post"
    """TransformerLens name of the activation."""
    text: str = "stdlib"
    """Text: "stdlib", a file of text or of rows with a "text", a folder, or a dataset as name or name:configuration."""
    tokens: int = 1_000_000
    """Tokens of training text; fewer if the text ends. Seen again and again, shuffled anew, if training takes more."""
    context: int = 256
    """Tokens per window, BOS included."""
    prepend_bos: bool | None = None
    """Begin windows with BOS; None is as the model was trained: GPT-2 and Llama with, Qwen and Pythia without."""
    batch_size: int = 1024
    """Activations per training step."""
    buffer_rows: int = 131_072
    """Activations that are held in memory and shuffled together."""
    store: Path | None = None
    """Folder to harvest the activations into, once; None computes them while training and stores nothing."""
    activations: Path | None = None
    """Activations of your own in place of a model's: a .npy, .pt or .safetensors file, or a folder of them. Of these
    options only batch_size and buffer_rows then apply."""

    def __post_init__(self) -> None:
        _check_types(self)
        if self.activations is not None:
            object.__setattr__(self, "activations", Path(self.activations))  # in a file it is a string
            defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name not in _OF_FILES}
            given = [name for name, default in defaults.items() if getattr(self, name) != default]
            expected = "no options of a model or text beside it"
            _require(not given, "DataConfig.activations", expected, ", ".join(given))
        for name in ("tokens", "batch_size", "buffer_rows"):
            _require(getattr(self, name) >= 1, f"DataConfig.{name}", "at least 1", getattr(self, name))
        _require(self.context >= 2, "DataConfig.context", "at least 2", self.context)


@named
@dataclass(frozen=True)
class TrainerConfig:
    """Options of a training."""

    steps: int
    """Optimizer steps."""
    lr: float = 1e-3
    """Adam's learning rate after warm-up."""
    run_dir: Path | None = None
    """Folder for checkpoints and metrics.jsonl; None writes nothing."""
    resume: bool = False
    """Continue the run in run_dir from its last checkpoint, bit for bit on the CPU; start it if there is none."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay_steps: int = 0
    """Steps at the end over which the learning rate falls linearly to lr_end; 0 keeps it constant."""
    lr_end: float = 0.0
    """Learning rate after the last step of the decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad_norm: float | None = None
    """Scale gradients down to this global norm; None does not."""
    normalize: Literal["none", "zscore", "scale"] = "zscore"
    """Statistics measured on the first rows and stored with the weights: per-dimension z-score, or one scale."""
    normalize_rows: int = 16384
    """Rows the normalisation is measured on; they are trained on as well."""
    auxk: int = 0
    """AuxK: dead features that reconstruct the residual per token; 0 is off."""
    auxk_coefficient: float = 1 / 32
    """Weight of the AuxK loss."""
    dead_after_tokens: int = 1_000_000
    """A feature is dead when it was active on none of this many last tokens."""
    unit_norm_decoder: bool = False
    """Keep the rows of W_dec at norm 1, and remove the parallel part of their gradient."""
    adam_in_backward: bool = False
    """CUDA: large weights make Adam's step inside the backward, and no gradient is ever held. Not with clip_grad_norm
    or auxk. bf16 weights are then trained through fp32 copies."""
    optimizer_state: Literal["fp32", "8bit"] = "fp32"
    """Adam's moments: fp32, or 8 bits for matrices (needs torchao; slow on a CPU)."""
    k_anneal_from: int | None = None
    """Start with this k and come down linearly to the SAE's own; None does not anneal."""
    k_anneal_steps: int = 0
    """Steps over which k comes down."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """Rows that hold NaN or infinity: stop the training, or leave them out and count them."""
    outliers: Literal["train", "skip"] = "train"
    """Rows more than ten times as large as 85 % of their batch, such as attention sinks: train on them, or leave them
    out and count them. The normalisation is measured without them."""
    seed: int = 0
    """Seeds dropout, and what activations draw from torch's generator, such as the order of a DataLoader; on the
    command line also the SAE's initialisation."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last two are kept."""
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log there (needs that package installed)."""
    wandb_project: str = "fastsae"
    """W&B's project."""
    wandb_name: str | None = None
    """W&B's name of the run; None is that of run_dir."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        _check_types(self)
        where = "TrainerConfig"
        _require(self.steps >= 1, f"{where}.steps", "at least 1", self.steps)
        _require(0 < self.lr < math.inf, f"{where}.lr", "above 0 and finite", self.lr)
        _require(0 <= self.lr_end < math.inf, f"{where}.lr_end", "0 or more, and finite", self.lr_end)
        coefficient = self.auxk_coefficient
        _require(0 <= coefficient < math.inf, f"{where}.auxk_coefficient", "0 or more, and finite", coefficient)
        schedule = self.warmup_steps >= 0 and self.decay_steps >= 0
        fits = schedule and self.warmup_steps + self.decay_steps <= self.steps
        got = f"{self.warmup_steps} and {self.decay_steps} of {self.steps} steps"
        _require(fits, f"{where}.warmup_steps and decay_steps", "0 or more each, together at most steps", got)
        _require(self.auxk >= 0, f"{where}.auxk", "0 or more", self.auxk)
        _require(self.dead_after_tokens >= 1, f"{where}.dead_after_tokens", "at least 1", self.dead_after_tokens)
        _require(self.normalize_rows >= 2, f"{where}.normalize_rows", "at least 2", self.normalize_rows)
        _require(self.k_anneal_steps >= 0, f"{where}.k_anneal_steps", "0 or more", self.k_anneal_steps)
        annealed = self.k_anneal_from is None or self.k_anneal_steps >= 1
        _require(annealed, f"{where}.k_anneal_steps", "at least 1 with k_anneal_from", self.k_anneal_steps)
        _require(self.log_every >= 1, f"{where}.log_every", "at least 1", self.log_every)
        _require(self.checkpoint_every >= 1, f"{where}.checkpoint_every", "at least 1", self.checkpoint_every)
        clip = self.clip_grad_norm
        _require(clip is None or clip > 0, f"{where}.clip_grad_norm", "None or above 0", clip)
        held = "clip_grad_norm" if clip is not None else "auxk" if self.auxk else None
        if self.adam_in_backward and held:
            raise ValueError(f"{where}: adam_in_backward holds no gradients, {held} needs them; leave one of them out")
        if self.adam_in_backward and self.optimizer_state == "8bit":
            raise ValueError(
                f"{where}: adam_in_backward keeps its moments in fp32, optimizer_state='8bit' would not be used; leave "
                "one of them out (`fastsae plan` says what each takes)"
            )
        if isinstance(self.run_dir, str):
            object.__setattr__(self, "run_dir", Path(self.run_dir))
        if self.run_dir is None and (self.resume or self.log_to):
            raise ValueError(f"{where}: resume and log_to need a run_dir; got None")


@named
@dataclass(frozen=True)
class FactorialConfig:
    """A 2x2 experiment: which features respond to two factors together, and what clamping them does."""

    pool: Literal["mean", "max"] = "mean"
    """A text's response: the mean, or the largest, of a feature's activations over its tokens."""
    permutations: int = 2000
    """Permutations for every feature; those with a small p get more."""
    clamped: int = 2
    """Pairs and secondary features to clamp, of each kind those with the least p; beside them the whole interaction."""
    clamp: tuple[str, ...] = ()
    """More to clamp: secondary:12, pair:3,45, identity:12, linear:12, interaction:12, or a whole pathway."""
    amounts: tuple[float, ...] = (-4.0, 0.0, 4.0)
    """Factors that activations are multiplied with, or values they are set to."""
    operation: Literal["multiply", "set"] = "multiply"
    """Multiplying leaves what is inactive as it is."""
    splice: bool = False
    """Replace activations by the reconstruction, as in the paper; without, the SAE's error stays in."""
    directions: int = 40
    """Random directions of equal length to compare with."""
    others: int = 10
    """Features that were not selected to compare with."""
    new_tokens: int = 30
    """Tokens to write under each clamp; 0 writes none."""
    seed: int = 0
    """Seed of permutations, directions, and the choice of other features."""

    def __post_init__(self) -> None:
        _check_types(self)
        limits = {"permutations": (99, 10**6), "clamped": (0, 12), "directions": (0, 10**4), "others": (0, 10**4)}
        for name, (least, most) in {**limits, "new_tokens": (0, 10**6), "seed": (0, 2**63 - 1)}.items():
            value = getattr(self, name)
            _require(least <= value <= most, f"FactorialConfig.{name}", f"from {least} to {most}", value)
        finite = all(map(math.isfinite, self.amounts)) and len(set(self.amounts)) == len(self.amounts)
        _require(finite and self.amounts != (), "FactorialConfig.amounts", "different finite numbers", self.amounts)
        if self.operation == "multiply":
            _require(any(a != 1 for a in self.amounts), "FactorialConfig.amounts", "one that is not 1", self.amounts)
        else:  # what an amount takes the place of differs by token: only differences between amounts are an effect
            _require(len(self.amounts) >= 2, "FactorialConfig.amounts", "at least 2 to set", self.amounts)


@named
@dataclass(frozen=True)
class StudyConfig:
    """A fair comparison: every arm on the same activations in the same order, with the same steps and seeds."""

    folder: Path = Path("runs/study")
    """Folder for runs, results and the page; run again, the study goes on where it stopped."""
    d_sae: int = 4096
    """Features of every arm but the wide TopK."""
    k: int = 32
    """Active features per token, in every arm."""
    k_integration: int | None = None
    """Number of strongest features that the integration sees; None means half of k."""
    d_embedding: int = 64
    """Width of the factorization machine's feature embeddings V."""
    dropout: float = 0.15
    """Share of the pairwise interactions z dropped in training."""
    steps: int = 1500
    """Optimizer steps of every arm; the sequential one and its control take as many again."""
    lrs: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    """Learning rates: each arm trains its first seed with all, and keeps the one that fits training documents best."""
    seeds: int = 4
    """Repetitions with other initial weights and another order of the activations."""
    held_out_tokens: int = 200_000
    """Tokens of held-out text to measure on, at most."""
    windows_per_document: int = 6
    """Windows measured of each held-out document, at most."""

    def __post_init__(self) -> None:
        _check_types(self)
        where = "StudyConfig.lrs"
        for name in ("steps", "seeds", "held_out_tokens", "windows_per_document"):
            _require(getattr(self, name) >= 1, f"StudyConfig.{name}", "at least 1", getattr(self, name))
        rates = len(self.lrs) >= 1 and all(0 < lr < math.inf for lr in self.lrs)
        _require(
            rates and len({f"{lr:g}" for lr in self.lrs}) == len(self.lrs), where, "different rates above 0", self.lrs
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-able values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """A config from such values. An unknown key raises ValueError and names the nearest known one."""
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__}: expected options by name; got {values!r}")
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."
            raise ValueError(f"{cls.__name__}: unknown option {key!r}.{hint}")
    for name, field in known.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"{cls.__name__}: option {name!r} is missing")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
