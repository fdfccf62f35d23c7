"""Features that respond to two factors together, and the effect of changing them: 2x2 stimuli, discovery, clamping."""

from fastsae.factorial.clamp import Carrier, Clamp, Target
from fastsae.factorial.discover import Discovery, discover
from fastsae.factorial.effects import Effect, effect, judged
from fastsae.factorial.generate import generate
from fastsae.factorial.run import run_factorial
from fastsae.factorial.stimuli import SHIPPED, Stimuli

__all__ = [
    "SHIPPED",
    "Carrier",
    "Clamp",
    "Discovery",
    "Effect",
    "Stimuli",
    "Target",
    "discover",
    "effect",
    "generate",
    "judged",
    "run_factorial",
]
