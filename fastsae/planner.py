"""What a shape costs before anything is allocated: parameters, memory, floating-point operations, steps."""

import math
from dataclasses import dataclass

import torch

from fastsae.backends import cpu
from fastsae.config import JointSAEConfig, SequentialSAEConfig, TopKSAEConfig
from fastsae.modules.sequential import FROZEN


@dataclass(frozen=True)
class Plan:
    """Counted, except for `activations_bytes`, which is an estimate."""

    parameters: dict[str, int]
    """Entries of each parameter."""
    trained: tuple[str, ...]
    """Those that have gradients and moments."""
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    """Adam's two moments."""
    pre_activations_bytes: int
    """The one reused chunk of rows of pre-activations (CPU backend)."""
    activations_bytes: int
    """Estimate: tensors that grow with the batch: about ten (batch, d_in), two (batch, k) with their indices."""
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
    config: TopKSAEConfig, batch_size: int = 2048, tokens: int = 100_000_000, dtype: torch.dtype = torch.float32
) -> Plan:
    """The plan for training `config` in `dtype` on batches of `batch_size` rows."""
    if batch_size < 1 or tokens < 1:
        raise ValueError(f"plan: expected batch_size and tokens of at least 1; got {batch_size} and {tokens}")
    d_in, d_sae, k = config.d_in, config.d_sae, config.k
    parameters = {"W_enc": d_sae * d_in, "b_enc": d_sae, "W_dec": d_sae * d_in}
    if config.pre_bias:
        parameters["b_dec"] = d_in
    frozen = isinstance(config, SequentialSAEConfig)
    # Decode, its two gradients, and the encoder's weight gradient.
    sparse = 2 * batch_size * k * d_in * (1 if frozen else 4)
    if isinstance(config, JointSAEConfig):
        n, E = config.n, config.d_embedding
        if config.linear:
            parameters |= {"W_lin": d_sae * d_in, "b_lin": d_in}
            sparse += 2 * batch_size * n * d_in * (2 if frozen else 3)  # a frozen encoder needs no gradient of a_j
        if config.interaction:
            parameters |= {"V": d_sae * E, "W1": E * E, "b1": E, "W2": d_in * E, "b2": d_in}
            sparse += 2 * batch_size * n * E * (4 if frozen else 6) + 6 * batch_size * E * (E + d_in)
    trained = tuple(name for name in parameters if not (frozen and name in FROZEN))
    gradients = sum(parameters[name] for name in trained) * dtype.itemsize
    return Plan(
        parameters=parameters,
        trained=trained,
        weights_bytes=sum(parameters.values()) * dtype.itemsize,
        gradients_bytes=gradients,
        optimizer_bytes=2 * gradients,
        pre_activations_bytes=cpu.plan(batch_size, d_in, d_sae, k, dtype).bytes,
        activations_bytes=batch_size * (10 * d_in * dtype.itemsize + 2 * k * (dtype.itemsize + 8)),
        flops_per_step=2 * batch_size * d_in * d_sae + sparse,
        steps=math.ceil(tokens / batch_size),
    )
