"""From text to activations: documents, token windows, a model's activations, a store, a shuffled stream."""

from fastsae.activations.arrays import ArrayActivations, batches, open_activations
from fastsae.activations.harvest import ModelActivations, harvest
from fastsae.activations.reading import PaddingMask, check_hook, check_tokens, output_mask
from fastsae.activations.store import ActivationStore
from fastsae.activations.stream import ActivationStream
from fastsae.activations.text import Document, is_held_out, read_documents
from fastsae.activations.tokens import TokenWindows, first_token, prepends_bos, special_tokens, tokenize
from fastsae.activations.transformers_model import with_hooks

__all__ = [
    "ActivationStore",
    "ActivationStream",
    "ArrayActivations",
    "Document",
    "ModelActivations",
    "PaddingMask",
    "TokenWindows",
    "batches",
    "check_hook",
    "check_tokens",
    "first_token",
    "harvest",
    "is_held_out",
    "open_activations",
    "output_mask",
    "prepends_bos",
    "read_documents",
    "special_tokens",
    "tokenize",
    "with_hooks",
]
