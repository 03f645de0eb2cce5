"""Random sketches: frozen factors that server and clients draw from a seed.

`draw` holds the specification of a drawing, the laws of random matrices and their constants,
`bases` the orthonormal ones, made a few rows at a time.
"""

from __future__ import annotations

from fedraclora.sketch.draw import (
    SKETCHES,
    Blocks,
    Constants,
    Normalise,
    Sketch,
    SketchSpec,
    check_sketch,
    constants,
)

__all__ = [
    "SKETCHES",
    "Blocks",
    "Constants",
    "Normalise",
    "Sketch",
    "SketchSpec",
    "check_sketch",
    "constants",
]
