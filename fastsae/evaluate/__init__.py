"""Measuring a trained SAE on documents it was not trained on."""

from fastsae.evaluate.behavior import Behavior, behavior
from fastsae.evaluate.features import FeatureExamples, RowExample, strongest_rows, top_features
from fastsae.evaluate.geometry import Geometry, geometry
from fastsae.evaluate.intervals import DocumentSums, Interval
from fastsae.evaluate.pairs import Drivers, Pair, drivers, top_pairs
from fastsae.evaluate.reconstruction import Reconstruction, reconstruction

__all__ = [
    "Behavior",
    "DocumentSums",
    "Drivers",
    "FeatureExamples",
    "Geometry",
    "Interval",
    "Pair",
    "Reconstruction",
    "RowExample",
    "behavior",
    "drivers",
    "geometry",
    "reconstruction",
    "strongest_rows",
    "top_features",
    "top_pairs",
]
