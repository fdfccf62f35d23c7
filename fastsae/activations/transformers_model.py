"""A transformers model in memory as one with named hooks."""

import copy
import sys
from typing import Any

from fastsae import packages, quiet
from fastsae.extras import LAB


def with_hooks(model: Any, tokenizer: Any = None) -> Any:
    """A transformers model as a TransformerBridge of TransformerLens; any other model as it is.

    The bridge shares the weights and leaves the model as it was. `model.tokenizer` is the tokenizer, None without one.
    Raises TypeError for a model that TransformerLens cannot name hooks in.
    """
    transformers = sys.modules.get("transformers")  # its models are only where it is
    kind = getattr(transformers, "PreTrainedModel", None)
    if not isinstance(kind, type) or not isinstance(model, kind):
        return model
    packages.need("transformer_lens", "taking activations from a transformers model")
    try:
        with quiet.imports():
            from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise ImportError(f"taking activations from a transformers model needs TransformerLens: {LAB}") from error

    weights = [*model.parameters(), *model.buffers()]
    # A bridge puts its own modules in the place of the model's: those of a copy, with the same weights.
    ours = copy.deepcopy(model, {id(t): t for t in weights})
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    try:
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=ours, tokenizer=_placeholder(), device=str(model.device), dtype=model.dtype
        )
    except Exception as error:  # as many kinds as there are models it does not know
        raise TypeError(
            f"TransformerLens cannot name the hooks of this {type(model).__name__} ({error}). Give a model with its "
            "head, as AutoModelForCausalLM makes it, of an architecture that TransformerBridge knows"
        ) from error
    bridge.tokenizer = None  # where there is another one before, a tokenizer is given special tokens
    bridge.tokenizer = tokenizer
    if tokenizer is not None:
        tokenizer.model_cfg = bridge.cfg
    return bridge.train(model.training)


def _placeholder() -> Any:
    """A tokenizer for TransformerBridge, which would look for one on the hub."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    nothing = Tokenizer(models.WordLevel({"-": 0}, unk_token="-"))
    same = {name: "-" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=nothing, name_or_path="-", add_bos_token=True, **same)
