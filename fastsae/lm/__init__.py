"""Language models to take activations from: the embedded one, or any that TransformerLens can load."""

import os
from pathlib import Path
from typing import Any

import torch

from fastsae import packages, quiet
from fastsae.activations.transformers_model import with_hooks
from fastsae.extras import LAB

EMBEDDED = "embedded"


def weights_folder() -> Path:
    """Give the folder of the embedded model's weights, tokenizer, metrics and card."""
    return Path(__file__).parent / "weights"


def load(name: Any = EMBEDDED, device: str | None = None, tokenizer: Any = None) -> Any:
    """A TransformerLens model (TransformerBridge, eval mode) with its tokenizer as `.tokenizer`.

    name: "embedded" (offline), a folder as transformers saves it, or a name on the Hugging Face hub such as "gpt2",
    read in fp32; or a transformers model in memory, as it is and where it is, which shares its weights.
    device: None is the CPU. tokenizer: of a model in memory.
    The tokenizer knows the model's configuration (`model_cfg`): whether its text begins with BOS, and how many ids it
    has. Raises TypeError for what is no name, ImportError without TransformerLens, OSError when a name is neither a
    folder nor reachable on the hub, ValueError when a folder is damaged.
    """
    if not isinstance(name, (str, os.PathLike)):
        return _in_memory(name, device, tokenizer)
    if tokenizer is not None:
        raise ValueError(f"lm.load: {str(name)!r} has its own tokenizer; give one with a model in memory only")
    name, device = os.fspath(name), device or "cpu"
    packages.need("transformer_lens", "loading a language model")
    try:
        with quiet.imports():
            from transformer_lens.model_bridge import TransformerBridge
            from transformers.utils import logging
    except ImportError as error:
        raise ImportError(f"loading a language model needs TransformerLens: {LAB}") from error

    logging.disable_progress_bar()
    source = str(weights_folder()) if name == EMBEDDED else name
    torch.empty(0, device=device)  # raises where there is none such, which is no fault of the folder
    try:
        model = TransformerBridge.boot_transformers(source, device=device)
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise as many kinds as there are damages
        if Path(source).is_dir():
            raise ValueError(
                f"lm.load: {source} cannot be read as a transformers model: {error}. Restore it or use another copy."
            ) from error
        if not isinstance(error, OSError):
            raise
        raise OSError(
            f"lm.load: {name!r} is neither 'embedded', nor a folder with a transformers model, nor a model that the "
            f"Hugging Face hub gave ({error}). Check the name and the network."
        ) from error
    if name == EMBEDDED:
        model.cfg.model_name = "fastsae-embedded"  # not the folder it happens to be installed in
    if model.tokenizer is not None:
        model.tokenizer.model_cfg = model.cfg
    return model.eval()


def _in_memory(model: Any, device: str | None, tokenizer: Any) -> Any:
    hooked = with_hooks(model, tokenizer)
    if hooked is model:
        raise TypeError(
            "lm.load: expected a folder, a name on the Hugging Face hub, or a transformers model; got "
            f"{type(model).__name__}"
        )
    if device is not None and torch.device(device).type != torch.device(hooked.cfg.device).type:
        raise ValueError(
            f"lm.load: the model is on {hooked.cfg.device}, and {device} was asked for; move it there (model.to)"
        )
    return hooked.eval()
