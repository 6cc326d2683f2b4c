"""Inverse Hessians: ways to solve H u = v where H is known only by its products."""

from contrastive_meta._inverse_hessian.base import InverseHessian as InverseHessian
from contrastive_meta._inverse_hessian.base import LinearSolution as LinearSolution
from contrastive_meta._inverse_hessian.conjugate_gradient import ConjugateGradient as ConjugateGradient
from contrastive_meta._inverse_hessian.conjugate_gradient import (
    solve_by_conjugate_gradient as solve_by_conjugate_gradient,
)
from contrastive_meta._inverse_hessian.dense import DenseInverse as DenseInverse
from contrastive_meta._inverse_hessian.identity import IdentityHessian as IdentityHessian
from contrastive_meta._inverse_hessian.neumann import NeumannSeries as NeumannSeries
from contrastive_meta._inverse_hessian.nystrom import Nystrom as Nystrom
