"""Other packages' own trainers, end to end: their loop with their SAE in it, and with ours."""

from benchmarks.trainers.base import Loop
from benchmarks.trainers.dictionary_learning import DictionaryLearningLoop
from benchmarks.trainers.eleuther import SparsifyLoop
from benchmarks.trainers.sae_lens import SAELensLoop

LOOPS: dict[str, type[Loop]] = {
    "SAELens": SAELensLoop,
    "dictionary_learning": DictionaryLearningLoop,
    "sparsify": SparsifyLoop,
}
