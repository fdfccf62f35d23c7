"""Providers that are measured: ours by each backend and path, the architectures in plain PyTorch, and the peers."""

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.providers import ours, pytorch
from benchmarks.providers.base import Candidate, Provider
from benchmarks.providers.dictionary_learning import DictionaryLearning
from benchmarks.providers.eleuther import Sparsify
from benchmarks.providers.sae_lens import SAELens


def _ours(joint: bool) -> list[Candidate]:
    """One of our architectures by each path, backend, and way to train; TopKSAE also as the peers train theirs."""
    kind, name = ("joint", "fastsae JointSAE") if joint else ("topk", "fastsae TopKSAE")

    def candidate(suffix: str, make: Callable[..., Provider], **about: Any) -> Candidate:
        return Candidate(f"{name}, {suffix}", kind, partial(make, joint=joint), **about)

    recipes = () if joint else ("unit norm", "clipped", "clipped, unit norm")
    return [
        candidate("Trainer", ours.TrainerStep),
        candidate("Trainer, unscreened", partial(ours.TrainerStep, screened=False)),
        *(
            candidate(f"Trainer, {recipe}", partial(ours.TrainerStep, trained=recipe), recipe=recipe)
            for recipe in recipes
        ),
        candidate("autograd", ours.Autograd),
        _compiled(candidate("autograd", ours.Autograd), f"{name}, torch.compile"),
        candidate("CUDA backend", ours.on_cuda),
        candidate("AdamInBackward", partial(ours.on_cuda, in_backward=True)),
        candidate("reference backend", ours.reference, small_only=True),
    ]


def _compiled(eager: Candidate, name: str) -> Candidate:
    return Candidate(name, eager.architecture, partial(eager.make, compiled=True), compiled=True)


DENSE_TOPK = Candidate("PyTorch TopK, dense", "topk", pytorch.DenseTopK, small_only=True)
DENSE_JOINT = Candidate("PyTorch joint, dense", "joint", pytorch.DenseJoint)

# The order in which they are measured, within one process.
CANDIDATES = [
    *_ours(joint=False),
    Candidate("PyTorch TopK, topk + embedding_bag", "topk", pytorch.SparseTopK),
    DENSE_TOPK,
    _compiled(DENSE_TOPK, "PyTorch TopK, dense, torch.compile"),
    Candidate("sparsify", "topk", Sparsify, recipe="unit norm"),
    Candidate("dictionary_learning", "topk", DictionaryLearning, recipe="clipped, unit norm"),
    Candidate("SAELens", "topk", SAELens, recipe="clipped"),
    Candidate("SAELens, use_sparse_activations", "topk", partial(SAELens, sparse=True), recipe="clipped"),
    *_ours(joint=True),
    DENSE_JOINT,
    _compiled(DENSE_JOINT, "PyTorch joint, dense, torch.compile"),
]
