"""The base of all SAEs here: encode, decode, loss, saving and loading."""

import dataclasses
import json
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from fastsae import files, ops
from fastsae.backends import choose
from fastsae.code import SparseCode, check_tensors
from fastsae.config import TopKSAEConfig, from_dict, to_dict
from fastsae.habits import named
from fastsae.modules.plain import check_plain
from fastsae.modules.saved import CONFIG, FORMAT, NEW_CONFIG, WEIGHTS, read_description, saved_in
from fastsae.normalize import Normalizer
from fastsae.ranks import ALONE, Alone

S = TypeVar("S", bound="SparseAutoencoder")

ARCHITECTURES: dict[str, type["SparseAutoencoder"]] = {}
"""The class that `fastsae.load` makes of each architecture; filled where all are there."""


class SAEOutput(NamedTuple):
    """Result of forward. A tuple: backward hooks of modules find tensors in nothing else."""

    reconstruction: Tensor
    """(..., d_in), in the space forward was given."""
    loss: Tensor
    """Scalar: mean squared error over all entries."""
    code: SparseCode
    """The active features of every token."""


@dataclass(frozen=True)
class Components:
    """The summands of a reconstruction, each (..., d_in)."""

    identity: Tensor
    """sum_j a_j W_dec[i_j] (+ b_dec)"""
    linear: Tensor
    """sum_{j<n} a_j W_lin[i_j] + b_lin; zeros if the SAE has no linear pathway"""
    interaction: Tensor
    """W2 relu(W1 z + b1) + b2; zeros if the SAE has no pairwise pathway"""


# It was a dataclass once: dataclasses.replace and its like go on taking it for one.
SAEOutput.__dataclass_fields__ = dataclasses.make_dataclass(  # type: ignore[attr-defined]
    SAEOutput.__name__, SAEOutput.__annotations__.items()
).__dataclass_fields__
# By these names torch.export writes them into files.
_pytree._register_namedtuple(SAEOutput, serialized_type_name="fastsae.SAEOutput")
_pytree.register_dataclass(Components, serialized_type_name="fastsae.Components")


def is_a(thing: Any, kind: type) -> bool:
    """Whether `thing` is of a class, known by name: after a reload, what was made before is of another class of it."""
    return any(base.__name__ == kind.__name__ for base in type(thing).__mro__)


def uncompiled(sae: Any) -> Any:
    """The SAE inside of what torch.compile(sae) returned, with names of its own; all else as it is."""
    return getattr(sae, "_orig_mod", sae)


@contextmanager
def evaluating(sae: "SparseAutoencoder") -> Iterator[None]:
    """The SAE in eval mode and without gradients; afterwards in the mode it was in."""
    was_training = sae.training
    sae.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        sae.train(was_training)


def _give_normalizer_the_dtype(sae: "SparseAutoencoder", _: object) -> None:
    """load_state_dict(assign=True) may have brought another one."""
    sae.normalizer.dtype = sae.W_enc.dtype


def _draw_unit_rows(W: Tensor) -> None:
    F.normalize(W.normal_(), dim=1, out=W)


class SparseAutoencoder(nn.Module):
    """Encoder, identity decoder and everything around them. Use TopKSAE or JointSAE."""

    architecture: ClassVar[str]
    config_class: ClassVar[type[TopKSAEConfig]]
    b_dec: Tensor | None
    # What fastsae.distributed replaces in an SAE whose features it spreads over ranks.
    ops: Any = ops
    ranks: Alone = ALONE
    __call__: Callable[..., SAEOutput]
    reads: dict[str, Any] | None = None
    """Activations that it was trained on, as far as known: model, hook, text, versions of packages; or a file of
    activations. JSON-able, saved and loaded with it. `fastsae train` fills it in."""
    _only_read = False
    """Whether it was loaded and not put into train mode since: then no graph leads to its weights."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        named(cls)

    def __init__(
        self,
        config: TopKSAEConfig,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.normalizer = Normalizer(config.d_in, device, dtype)
        self.register_load_state_dict_post_hook(_give_normalizer_the_dtype)
        choose(backend, self.normalizer.mean.device, dtype)  # a backend that cannot serve says so now
        new = {"device": device, "dtype": dtype}
        self.W_enc = nn.Parameter(torch.empty(config.d_sae, config.d_in, **new))
        self.b_enc = nn.Parameter(torch.empty(config.d_sae, **new))
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, config.d_in, **new))
        self.b_dec = nn.Parameter(torch.empty(config.d_in, **new)) if config.pre_bias else None

    def laws(self) -> dict[str, Callable[[Tensor], object]]:
        """Initial laws of the parameters: each draws any rows of one, in place, in this order.

        W_enc starts as a copy of W_dec, what is not here at 0.
        """
        bound = 1 / math.sqrt(self.d_sae)
        paper = self.config.init == "paper"
        return {"W_dec": partial(Tensor.uniform_, **{"from": -bound, "to": bound}) if paper else _draw_unit_rows}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters, in place, as a new SAE has them, and forget the normalisation: after to_empty(), say.

        Each class calls it at the end of its __init__, when all parameters are there.
        """
        if self.ranks is not type(self).ranks:
            raise RuntimeError("reset_parameters: this SAE is a rank's part; draw it anew with fastsae.distributed.new")
        for name, law in self.laws().items():
            law(getattr(self, name))
        self.W_enc.copy_(self.W_dec)
        for bias in (self.b_enc, self.b_dec):
            if bias is not None:
                bias.zero_()
        self.normalizer.mean.zero_()
        self.normalizer.scale.fill_(1)

    @property
    def d_in(self) -> int:
        return self.config.d_in

    @property
    def d_sae(self) -> int:
        return self.config.d_sae

    @property
    def k(self) -> int:
        return self.config.k

    def forward(self, x: Tensor, k: int | None = None) -> SAEOutput:
        """Reconstruct normalised activations x (..., d_in). `k` overrides the number of active features (annealing)."""
        code = self.encode(x, k)
        with self._graph_of(x):
            reconstruction, loss = self._reconstruct(code.flatten(), x.reshape(-1, self.d_in))
        return SAEOutput(reconstruction.view(x.shape), loss, code)

    def train(self: S, mode: bool = True) -> S:
        """As in torch; besides, in train mode a loaded SAE builds graphs to its weights as any other does."""
        if mode:
            self._only_read = False
        return super().train(mode)

    def _graph_of(self, *given: Tensor) -> AbstractContextManager[object]:
        """Inside, no graph is built by an SAE that is only read, unless what it is given asks for one."""
        return torch.no_grad() if self._only_read and not any(t.requires_grad for t in given) else nullcontext()

    def encode(self, x: Tensor, k: int | None = None) -> SparseCode:
        """The k strongest features of each of the normalised activations x (..., d_in)."""
        check_tensors(type(self).__name__, x=x)
        if x.dim() == 0 or x.shape[-1] != self.d_in:
            raise ValueError(
                f"{type(self).__name__}: x must end in d_in = {self.d_in}; got shape {tuple(x.shape)}. "
                "Is this the activation the SAE was made for?"
            )
        if not x.is_floating_point() or x.is_meta:  # b_dec would turn whole numbers into floats, without a word
            raise TypeError(
                f"{type(self).__name__}: x must be a float tensor that holds numbers; got {x.dtype} on {x.device}"
            )
        k = self.k if k is None else k
        if x.dtype != self.W_enc.dtype:
            if not torch.is_autocast_enabled(x.device.type):
                raise TypeError(
                    f"{type(self).__name__}: x is {x.dtype} but the weights are {self.W_enc.dtype}; convert one of them"
                )
            x = x.to(self.W_enc.dtype)  # what a layer before gives under autocast
        rows = x.reshape(-1, self.d_in)
        with self._graph_of(x):
            values, indices = self.ops.topk_encode(rows, self.W_enc, self.b_enc, k, self.backend, b_dec=self.b_dec)
        return SparseCode(values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k), self.d_sae)

    def encode_raw(self, raw: Tensor) -> SparseCode:
        """The code of raw activations (..., d_in), as a model gives them, on any device: normalised, then encoded."""
        check_tensors(type(self).__name__, x=raw)
        return self.encode(self.normalizer(raw.to(self.W_enc.device)))

    def decode(self, code: SparseCode) -> Tensor:
        """The reconstruction (..., d_in) of a code, all pathways summed."""
        if not isinstance(code, SparseCode):
            raise TypeError(
                f"{type(self).__name__}.decode: expected a SparseCode, as encode returns; got {type(code).__name__}. "
                "For NumPy arrays use fastsae.SparseCode(torch.from_numpy(values), torch.from_numpy(indices), d_sae)"
            )
        if code.d_sae != self.d_sae:
            raise ValueError(f"{type(self).__name__}: the code is of {code.d_sae} features, this SAE has {self.d_sae}")
        with self._graph_of(code.values):
            return self._reconstruct(code.flatten(), None)[0].view(*code.values.shape[:-1], self.d_in)

    def _reconstruct(self, code: SparseCode, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """The reconstruction (B, d_in) of a flat code, and its mean squared error against target (B, d_in)."""
        raise NotImplementedError

    def components(self, x: Tensor) -> Components:
        """The summands of the reconstruction of x (..., d_in)."""
        code = self.encode(x)
        with self._graph_of(code.values):
            return self.summands(code)

    def summands(self, code: SparseCode) -> Components:
        """The summands of the reconstruction of a code, each (..., d_in)."""
        raise NotImplementedError

    def reconstruct(self, raw: Tensor) -> Tensor:
        """Raw activations (..., d_in) in, raw activations out: normalised, reconstructed, and scaled back."""
        return self.normalizer.invert(self.decode(self.encode(self.normalizer(raw)))).to(raw.dtype)

    def identity(self, code: SparseCode) -> Tensor:
        """sum_j a_j W_dec[i_j] (+ b_dec), for a flat code: (B, d_in)."""
        out = self.ops.sparse_decode(code.values, code.indices, self.W_dec, self.backend)
        return out if self.b_dec is None else out + self.b_dec

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json and weights.safetensors (normalisation included) into `folder`.

        Raises ValueError, before anything is written, if the weights are not those that load would look for.
        """
        folder = Path(folder)
        self.check_weights(f"{type(self).__name__}.save_pretrained")
        if (saved_as := self._saved_as()).__name__ != type(self).__name__:
            warnings.warn(
                f"{type(self).__name__}.save_pretrained: fastsae.load({str(folder)!r}) will make a {saved_as.__name__} "
                f"of it. Load it by {type(self).__name__}.from_pretrained, or give the class an `architecture` of its "
                "own",
                stacklevel=2,
            )
        self.ranks.together(lambda: folder.mkdir(parents=True, exist_ok=True))
        weights, new_weights = folder / WEIGHTS, folder / f".{WEIGHTS}.new"
        self.ranks.write_tensors(new_weights, self.state_dict())

        def put_in_place() -> None:
            description = {
                "format": FORMAT,
                "architecture": self.architecture,
                "config": to_dict(self.config),
                "config_crc32": _checksum(to_dict(self.config)),
                "weights_crc32": files.crc32(new_weights),
            }
            if self.reads is not None:
                description["reads"] = self.reads
            # Killed between the two, a save over another SAE leaves new weights, and what belongs to them by this name.
            files.write_json(folder / NEW_CONFIG, description)
            os.replace(new_weights, weights)
            os.replace(folder / NEW_CONFIG, folder / CONFIG)
            files.sync(folder)

        self.ranks.first_does(put_in_place)
        return folder

    @classmethod
    def from_pretrained(
        cls: type[S], folder: str | Path, *, backend: str = "auto", device: torch.device | str | None = None
    ) -> S:
        """Load what save_pretrained wrote, in the dtype it was saved in and in eval mode.

        Until .train() is called, as a Trainer does, results have no graph to the weights: x.numpy() works, and nothing
        is kept for a backward. A graph to activations that require gradients is built.

        Raises FileNotFoundError, or ValueError naming the file when it is damaged or of another architecture.
        """
        folder = saved_in(folder)
        description = read_description(folder)
        if description["architecture"] != cls.architecture:
            raise ValueError(
                f"{cls.__name__}.from_pretrained: {folder} holds architecture {description['architecture']!r}, "
                f"expected {cls.architecture!r}. fastsae.load(folder) picks the class by itself."
            )
        file = folder / WEIGHTS
        weights = {name: t.to(device or "cpu", copy=True) for name, t in files.read_tensors(file).items()}
        if files.crc32(file) != description["weights_crc32"]:
            raise ValueError(
                f"{file} is not the file that {folder / CONFIG} was written with: it is damaged, or a save was "
                "cut off. Restore it or use another copy."
            )
        try:
            config = from_dict(cls.config_class, description["config"])
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from error
        if "W_enc" not in weights:
            raise ValueError(f"{file} holds no W_enc: these are not the weights of an SAE")
        try:
            # On no device: the weights take the place of an initialisation, which would cost time and random numbers,
            # and memory for whatever the config claims.
            sae = cls(**to_dict(config), device="meta", dtype=weights["W_enc"].dtype)
            sae.load_state_dict(weights, assign=True)
        except (RuntimeError, TypeError, OverflowError) as error:
            raise ValueError(f"{file} does not fit {folder / CONFIG}: {error}") from error
        if description.get("config_crc32", expected := _checksum(description["config"])) != expected:
            raise ValueError(
                f"{folder / CONFIG} is damaged: its config is not the one that was saved. If you changed it on "
                "purpose, take config_crc32 out of it."
            )
        choose(backend, sae.W_enc.device, sae.W_enc.dtype)
        sae.backend = backend
        sae._only_read, sae.reads = True, description.get("reads")
        return sae.eval()

    @classmethod
    def _saved_as(cls) -> type["SparseAutoencoder"]:
        """The class that is made of a folder with our architecture in it."""
        return ARCHITECTURES.get(cls.architecture, next(c for c in cls.__mro__ if "architecture" in vars(c)))

    def check_weights(self, who: str) -> None:
        """Raise ValueError, naming the weight, unless a new SAE of this config has the same weights, each with memory
        of its own: others could be trained and saved, and never be loaded."""
        saved_as = self._saved_as()
        if not is_a(self, saved_as):
            raise ValueError(
                f"{who}: architecture {self.architecture!r} is that of {saved_as.__name__}, which a "
                f"{type(self).__name__} is not; give the class an `architecture` of its own"
            )
        try:
            new = saved_as(**to_dict(self.config), device="meta").state_dict()
        except TypeError as error:
            raise ValueError(
                f"{who}: {saved_as.__name__} cannot be made from its config, so it could not be loaded ({error}); put "
                "what it needs into a config_class of its own, and give that everything by name"
            ) from error
        check_plain(who, saved_as.__name__, self.state_dict(), new, whole=self.ranks is ALONE)

    def extra_repr(self) -> str:
        c, parameters = self.config, sum(p.numel() for p in self.parameters())
        frozen = [name for name, p in self.named_parameters() if not p.requires_grad]
        return (
            f"d_in={c.d_in}, d_sae={c.d_sae}, k={c.k}, {self._pathways}\n"
            f"{str(self.W_enc.dtype)[6:]} on {self.W_enc.device}, backend={self.backend!r}, {parameters:,} parameters"
            f"{', frozen: ' + ', '.join(frozen) if frozen else ''}{self._of}"
        )

    @property
    def _of(self) -> str:
        read = self.reads or {}
        if "hidden_layer_of" in read:
            return "\nof the hidden layer of another SAE"
        if "activations" in read:
            return f"\nof activations in {read['activations']}"
        return f"\nof {read['hook']} of model {read['model']} on {read.get('text')}" if "hook" in read else ""

    @property
    def _pathways(self) -> str:
        return "pathways: identity"


def _checksum(config: dict[str, Any]) -> int:
    """Checksum of the config, which holds what the shapes of the weights do not show, k above all."""
    return zlib.crc32(json.dumps(config, sort_keys=True).encode())
