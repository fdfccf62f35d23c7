"""Who is measured: ours by each backend and path, the architectures in plain PyTorch, and the peers."""

from functools import partial

from benchmarks.providers import ours, pytorch
from benchmarks.providers.base import Candidate
from benchmarks.providers.dictionary_learning import DictionaryLearning
from benchmarks.providers.eleuther import Sparsify
from benchmarks.providers.sae_lens import SAELens


def _trainer(recipe: str) -> Candidate:
    """Our Trainer, training as a peer does."""
    make = partial(ours.TrainerStep, joint=False, trained=recipe)
    return Candidate(f"fastsae TopKSAE, Trainer, {recipe}", "topk", make, recipe=recipe)


# The order in which they are measured, within one process.
CANDIDATES = [
    Candidate("fastsae TopKSAE, Trainer", "topk", partial(ours.TrainerStep, joint=False)),
    Candidate("fastsae TopKSAE, Trainer, unscreened", "topk", partial(ours.TrainerStep, joint=False, screened=False)),
    *(_trainer(recipe) for recipe in ("unit norm", "clipped", "clipped, unit norm")),
    Candidate("fastsae TopKSAE, autograd", "topk", partial(ours.Autograd, joint=False)),
    Candidate(
        "fastsae TopKSAE, torch.compile", "topk", partial(ours.Autograd, joint=False, compiled=True), compiled=True
    ),
    Candidate("fastsae TopKSAE, CUDA backend", "topk", partial(ours.on_cuda, joint=False)),
    Candidate("fastsae TopKSAE, AdamInBackward", "topk", partial(ours.on_cuda, joint=False, in_backward=True)),
    Candidate("fastsae TopKSAE, reference backend", "topk", partial(ours.reference, joint=False), small_only=True),
    Candidate("PyTorch TopK, topk + embedding_bag", "topk", pytorch.SparseTopK),
    Candidate("PyTorch TopK, dense", "topk", pytorch.DenseTopK, small_only=True),
    Candidate("PyTorch TopK, dense, torch.compile", "topk", partial(pytorch.DenseTopK, compiled=True), compiled=True),
    Candidate("sparsify", "topk", Sparsify, recipe="unit norm"),
    Candidate("dictionary_learning", "topk", DictionaryLearning, recipe="clipped, unit norm"),
    Candidate("SAELens", "topk", SAELens, recipe="clipped"),
    Candidate("SAELens, use_sparse_activations", "topk", partial(SAELens, sparse=True), recipe="clipped"),
    Candidate("fastsae JointSAE, Trainer", "joint", partial(ours.TrainerStep, joint=True)),
    Candidate("fastsae JointSAE, Trainer, unscreened", "joint", partial(ours.TrainerStep, joint=True, screened=False)),
    Candidate("fastsae JointSAE, autograd", "joint", partial(ours.Autograd, joint=True)),
    Candidate(
        "fastsae JointSAE, torch.compile", "joint", partial(ours.Autograd, joint=True, compiled=True), compiled=True
    ),
    Candidate("fastsae JointSAE, CUDA backend", "joint", partial(ours.on_cuda, joint=True)),
    Candidate("fastsae JointSAE, AdamInBackward", "joint", partial(ours.on_cuda, joint=True, in_backward=True)),
    Candidate("fastsae JointSAE, reference backend", "joint", partial(ours.reference, joint=True), small_only=True),
    Candidate("PyTorch joint, dense", "joint", pytorch.DenseJoint),
    Candidate(
        "PyTorch joint, dense, torch.compile", "joint", partial(pytorch.DenseJoint, compiled=True), compiled=True
    ),
]
