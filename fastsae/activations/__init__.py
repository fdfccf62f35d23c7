"""From text to activations: documents, token windows, a model's activations, a store, a shuffled stream."""

from fastsae.activations.harvest import ModelActivations, check_hook, harvest
from fastsae.activations.store import ActivationStore
from fastsae.activations.stream import ActivationStream
from fastsae.activations.text import Document, is_held_out, read_documents
from fastsae.activations.tokens import TokenWindows, tokenize

__all__ = [
    "ActivationStore",
    "ActivationStream",
    "Document",
    "ModelActivations",
    "TokenWindows",
    "check_hook",
    "harvest",
    "is_held_out",
    "read_documents",
    "tokenize",
]
