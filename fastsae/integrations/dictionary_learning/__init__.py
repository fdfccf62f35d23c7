"""fastsae in dictionary_learning: trainers for its trainSAE.

from fastsae.integrations.dictionary_learning import TopKTrainer       # or JointTrainer
trainSAE(data, [dict(trainer=TopKTrainer, activation_dim=768, dict_size=32768, k=32, steps=10_000, ...)], ...)
"""

try:
    import dictionary_learning.trainers.top_k  # noqa: F401  # so that what is missing is said in one line
except ImportError as error:
    raise ImportError(
        f"fastsae.integrations.dictionary_learning needs dictionary_learning and what it imports ({error}): "
        "pip install dictionary-learning; 0.1.0 is tested"
    ) from error

from fastsae.integrations.dictionary_learning.joint import JointDictionary, JointTrainer
from fastsae.integrations.dictionary_learning.topk import AutoEncoderTopK, TopKTrainer

__all__ = ["AutoEncoderTopK", "JointDictionary", "JointTrainer", "TopKTrainer"]
