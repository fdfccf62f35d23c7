"""Measuring a trained SAE on documents it was not trained on."""

from fastsae.evaluate.behavior import Behavior, behavior
from fastsae.evaluate.reconstruction import Reconstruction, reconstruction

__all__ = ["Behavior", "Reconstruction", "behavior", "reconstruction"]
