"""Random sketches: frozen factors that server and clients draw from a seed.

`draw` holds the specification of a drawing and its constants, `kinds` the laws of random matrices,
`bases` the orthonormal ones, made a few rows at a time.
"""

from __future__ import annotations

from fedraclora.sketch.draw import Constants, Sketches, SketchSpec, check_sketch, constants
from fedraclora.sketch.kinds import SKETCHES

__all__ = ["SKETCHES", "Constants", "SketchSpec", "Sketches", "check_sketch", "constants"]
