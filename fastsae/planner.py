"""Cost of a shape before anything is allocated: parameters, memory, floating-point operations, steps."""

import dataclasses
import math
import time
from dataclasses import dataclass

import torch

from csrc_triton.plan import PRE_ACTIVATIONS
from fastsae import narrow
from fastsae.backends import cpu
from fastsae.config import JointSAEConfig, SequentialSAEConfig, TopKSAEConfig
from fastsae.modules.sequential import FROZEN

# Of a GPU's memory, what is left for an SAE: the driver, the allocator's gaps and libraries have the rest. Assumed.
USABLE = 0.92
# Estimate: bytes of a candidate for the k largest of all ranks, while it is sent and sorted (distributed/ops.py).
_CANDIDATE = 32
# A Trainer's step over the bare product of the encoder in fp32, about, at B=2048 D=1024 M=65536 k=64 on two cores
# (docs/benchmarks.md); where bounds in bf16 screen the features, and where not.
_STEP_OVER_PRODUCT = {True: {"topk": 0.4, "joint": 0.5}, False: {"topk": 1.2, "joint": 1.35}}
# Weights that make their step in the backward, so that no gradient of theirs is held.
_IN_BACKWARD = ("W_enc", "W_dec", "W_lin", "V")


@dataclass(frozen=True)
class Memory:
    """A choice of how weights and Adam's state are kept."""

    name: str
    flags: str
    """Flags of `fastsae train` that ask for it."""
    dtype: torch.dtype = torch.float32
    optimizer_state: narrow.OptimizerState = "fp32"
    adam_in_backward: bool = False

    def gradient_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        held = not (self.adam_in_backward and name in _IN_BACKWARD)
        return math.prod(shape) * self.dtype.itemsize if held else 0

    def optimizer_bytes(self, shape: tuple[int, ...]) -> int:
        """Moments, and the fp32 copy that Adam in the backward trains in place of narrow weights."""
        kept = narrow.kinds(shape, self.optimizer_state).values()
        master = 4 * math.prod(shape) if self.adam_in_backward and self.dtype.itemsize < 4 else 0
        return sum(math.prod(size) * dtype.itemsize for size, dtype in kept) + master


MEMORY = (
    Memory("fp32 weights and state", ""),
    Memory("fp32, Adam in the backward", "--adam-in-backward", adam_in_backward=True),
    Memory("bf16, Adam in the backward", "--dtype bfloat16 --adam-in-backward", torch.bfloat16, adam_in_backward=True),
    Memory("bf16 weights, fp32 state", "--dtype bfloat16", torch.bfloat16),
    Memory("fp32 weights, 8-bit state", "--optimizer-state 8bit", optimizer_state="8bit"),
    Memory("bf16 weights, 8-bit state", "--dtype bfloat16 --optimizer-state 8bit", torch.bfloat16, "8bit"),
)


@dataclass(frozen=True)
class Plan:
    """Counted, except for `activations_bytes`, which is an estimate."""

    parameters: dict[str, int]
    """Entries of each parameter that a process holds."""
    trained: tuple[str, ...]
    """Those that have gradients and moments."""
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    """Adam's two moments, with their scales in 8 bits; fp32 copies of narrow weights with Adam in the backward."""
    pre_activations_bytes: int
    """The one reused chunk of rows of pre-activations (CPU backend)."""
    activations_bytes: int
    """Estimate: tensors that grow with the batch: about ten (batch, d_in), two (batch, k) with their indices, and the
    candidates of all feature ranks, of which each row has k per rank."""
    flops_per_step: int
    """Forward and backward: the encoder's matrix product, the sparse sums over active features, and the network over
    z. Of frozen weights the forward only."""
    steps: int
    """Optimizer steps to see all tokens once."""

    @property
    def n_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_bytes(self) -> int:
        held = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return held + self.pre_activations_bytes + self.activations_bytes


def plan(
    config: TopKSAEConfig,
    batch_size: int = 2048,
    tokens: int = 100_000_000,
    memory: Memory = MEMORY[0],
    feature_ranks: int = 1,
) -> Plan:
    """The plan for training `config` on batches of `batch_size` rows, kept in memory as `memory` says.

    feature_ranks: processes that share the SAE, equally; entries and bytes are those of one of them.
    """
    if batch_size < 1 or tokens < 1:
        raise ValueError(f"plan: expected batch_size and tokens of at least 1; got {batch_size} and {tokens}")
    d_in, d_sae, k, each = config.d_in, config.d_sae, config.k, config.d_sae // feature_ranks
    dtype = memory.dtype
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (each, d_in), "b_enc": (each,), "W_dec": (each, d_in)}
    if config.pre_bias:
        shapes["b_dec"] = (d_in,)
    frozen = isinstance(config, SequentialSAEConfig)
    # Decode, its two gradients, and the encoder's weight gradient.
    sparse = 2 * batch_size * k * d_in * (1 if frozen else 4)
    if isinstance(config, JointSAEConfig):
        n, E = config.n, config.d_embedding
        if config.linear:
            shapes |= {"W_lin": (each, d_in), "b_lin": (d_in,)}
            sparse += 2 * batch_size * n * d_in * (2 if frozen else 3)  # a frozen encoder needs no gradient of a_j
        if config.interaction:
            shapes |= {"V": (each, E), "W1": (E, E), "b1": (E,), "W2": (d_in, E), "b2": (d_in,)}
            sparse += 2 * batch_size * n * E * (4 if frozen else 6) + 6 * batch_size * E * (E + d_in)
    gathered = _CANDIDATE * feature_ranks * min(k, each) if feature_ranks > 1 else 0
    parameters = {name: math.prod(shape) for name, shape in shapes.items()}
    trained = tuple(name for name in parameters if not (frozen and name in FROZEN))
    return Plan(
        parameters=parameters,
        trained=trained,
        weights_bytes=sum(parameters.values()) * dtype.itemsize,
        gradients_bytes=sum(memory.gradient_bytes(name, shapes[name]) for name in trained),
        optimizer_bytes=sum(memory.optimizer_bytes(shapes[name]) for name in trained),
        pre_activations_bytes=cpu.plan(batch_size, d_in, each, min(k, each), dtype).bytes,
        activations_bytes=batch_size * (10 * d_in * dtype.itemsize + 2 * k * (dtype.itemsize + 8) + gathered),
        flops_per_step=2 * batch_size * d_in * d_sae + sparse,
        steps=math.ceil(tokens / batch_size),
    )


def product_rate() -> float:
    """Operations per second of a matrix product in fp32 on this machine's CPU, measured for a third of a second."""
    a, b = (torch.randn(*size, device="cpu") for size in ((1024, 1024), (1024, 2048)))
    torch.mm(a, b)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < 0.3:
        torch.mm(a, b)
        done += 1
    return done * 2 * a.numel() * b.shape[1] / (time.perf_counter() - began)


def cpu_seconds(config: TopKSAEConfig, batch_size: int, rate: float) -> float:
    """Seconds of a step on a CPU whose products make `rate` operations a second. An estimate: other shapes than that
    of the benchmark take other shares."""
    screened = cpu.plan(batch_size, config.d_in, config.d_sae, config.k, torch.float32).screened
    kind = "joint" if isinstance(config, JointSAEConfig) else "topk"
    return _STEP_OVER_PRODUCT[screened][kind] * 2 * batch_size * config.d_in * config.d_sae / rate


_UNITS = {"days": 86400, "hours": 3600, "minutes": 60}


def duration(seconds: float) -> str:
    """In words, with about two digits: 48 seconds, 5.3 minutes, 2.1 hours, 12 days."""
    unit, size = next(((unit, size) for unit, size in _UNITS.items() if seconds >= 2 * size), ("seconds", 1))
    number = seconds / size
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.2g} {unit}"


def on_gpu(config: TopKSAEConfig, gpu_bytes: float, batch_size: int, memory: Memory, feature_ranks: int = 1) -> float:
    """Bytes that training takes on a GPU with `gpu_bytes` of memory: the plan's, with pre-activations as that backend
    keeps them."""
    counted = plan(config, batch_size, memory=memory, feature_ranks=feature_ranks)
    each = config.d_sae // feature_ranks
    pre_activations = min(batch_size * each * memory.dtype.itemsize, PRE_ACTIVATIONS * gpu_bytes)
    return counted.total_bytes - counted.pre_activations_bytes + pre_activations


def largest(
    config: TopKSAEConfig, gpu_bytes: float, batch_size: int, memory: Memory, feature_ranks: int = 1
) -> int | None:
    """The largest d_sae, 1024 features of each process or a multiple, that trains on GPUs with `gpu_bytes` of memory;
    None if none does."""
    step = 1024 * feature_ranks

    def fits(steps: int) -> bool:
        wider = dataclasses.replace(config, d_sae=steps * step)
        return on_gpu(wider, gpu_bytes, batch_size, memory, feature_ranks) <= USABLE * gpu_bytes

    low = math.ceil(config.k / step)
    if not fits(low):
        return None
    high = 2 * low
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step
