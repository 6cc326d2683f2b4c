"""Iterative methods for linear systems H x = b, where H is known only by its products."""

from contrastive_meta._linear.conjugate_gradient import LinearSolve as LinearSolve
from contrastive_meta._linear.conjugate_gradient import Stopping as Stopping
from contrastive_meta._linear.conjugate_gradient import conjugate_gradient as conjugate_gradient
