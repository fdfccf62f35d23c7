"""From text to activations: documents, token windows, a model's activations, a store, a shuffled stream."""

from fastsae.activations.arrays import ArrayActivations, batches, open_activations
from fastsae.activations.harvest import ModelActivations, check_hook, harvest
from fastsae.activations.store import ActivationStore
from fastsae.activations.stream import ActivationStream
from fastsae.activations.text import Document, is_held_out, read_documents
from fastsae.activations.tokens import TokenWindows, tokenize

__all__ = [
    "ActivationStore",
    "ActivationStream",
    "ArrayActivations",
    "Document",
    "ModelActivations",
    "TokenWindows",
    "batches",
    "check_hook",
    "harvest",
    "is_held_out",
    "open_activations",
    "read_documents",
    "tokenize",
]
