"""OpenAI's sparse_autoencoder: one file, a state dict with the name of the activation in it."""

from pathlib import Path

import torch

from fastsae.integrations.convert.form import (
    Converted,
    by_name,
    expect,
    expect_k,
    expect_weights,
    read_pickled,
    topk,
    topk_only,
    write_pickled,
)

_NOT_NORMALISED = (
    "OpenAI's TopK SAEs see each token less its mean, over its standard deviation, and OpenAI's loader does that for "
    "each of them. This one was not trained so, and takes activations as they are: in OpenAI's code, set "
    "autoencoder.normalize = False after Autoencoder.from_state_dict(...)."
)
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
FILES = "a .pt file with encoder.weight, decoder.weight, pre_bias and latent_bias"


def written(source: Path) -> bool:
    return source.is_file()


def read(source: Path) -> Converted:
    state = read_pickled(source)
    if ("decoder.weight" in state and "threshold" in state) or "sae.W_enc" in state:
        raise ValueError(
            f"{source} is a file of dictionary_learning; give a folder in which it is named ae.pt, with the trainer's "
            "config.json beside it"
        )
    names = ("encoder.weight", "latent_bias", "decoder.weight", "pre_bias")
    weights = expect_weights(source, state, names, ignored=_STATISTICS)
    (activation,) = expect(source, state, ("activation",))
    options = by_name(f"{source}, activation_state_dict", state.get("activation_state_dict", {}))
    if activation != "TopK" or options.get("postact_fn", "ReLU") != "ReLU":
        given = f"{activation} followed by {options['postact_fn']}" if "postact_fn" in options else activation
        raise ValueError(f"{source} has the activation {given}; expected TopK followed by ReLU")
    k = expect_k(f"{source}, activation_state_dict", options)
    sae = topk(source, source, k, weights | {"W_dec": weights["W_dec"].T})
    normalised = options.get("normalize", True) is not False
    return Converted(sae, notes=[] if normalised else [_NOT_NORMALISED], sees_normalised_tokens=normalised)


def write(found: Converted, target: Path) -> list[str]:
    k, w = topk_only(found.sae, "openai")
    d_sae = found.sae.d_sae
    state = {
        "pre_bias": w["b_dec"],
        "latent_bias": w["b_enc"],
        "stats_last_nonzero": torch.zeros(d_sae, dtype=torch.long, device="cpu"),
        "latents_activation_frequency": torch.ones(d_sae, device="cpu"),
        "latents_mean_square": torch.zeros(d_sae, device="cpu"),
        "encoder.weight": w["W_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "activation": "TopK",
        # OpenAI's loader takes k and postact_fn from here and passes over the rest; we read it again.
        "activation_state_dict": {"k": k, "postact_fn": "ReLU", "normalize": found.sees_normalised_tokens},
    }
    write_pickled(target, state)
    said = found.sees_normalised_tokens or _NOT_NORMALISED in found.notes
    return [] if said else [_NOT_NORMALISED]
