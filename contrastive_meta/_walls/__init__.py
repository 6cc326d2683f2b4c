"""Coordinates of learners whose end is no zero of a gradient: kinks, bounds, constraints, decay."""

from contrastive_meta._walls.of_solver import walls_of
from contrastive_meta._walls.walls import Walls

__all__ = ["Walls", "walls_of"]
