"""The other packages, as they can be imported here. Tests of one are skipped only where it is not installed."""

import os
import sys
from types import ModuleType

# Without a GPU sparsify chooses its Triton decoder, which then fails.
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

# dictionary_learning needs it for its buffers alone; nnsight 0.3 breaks torch.compile by being imported.
if "nnsight" not in sys.modules:
    stub = ModuleType("nnsight")
    stub.LanguageModel = None  # type: ignore[attr-defined]
    sys.modules["nnsight"] = stub
