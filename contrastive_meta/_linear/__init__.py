"""Linear systems H u = v where H is known only by its products: the public inverse Hessians, and their loop."""

from contrastive_meta._linear.base import InverseHessian as InverseHessian
from contrastive_meta._linear.base import LinearSolution as LinearSolution
from contrastive_meta._linear.conjugate_gradient import ConjugateGradient as ConjugateGradient
from contrastive_meta._linear.conjugate_gradient import LinearSolve as LinearSolve
from contrastive_meta._linear.conjugate_gradient import Stopping as Stopping
from contrastive_meta._linear.conjugate_gradient import conjugate_gradient as conjugate_gradient
from contrastive_meta._linear.conjugate_gradient import solve_by_conjugate_gradient as solve_by_conjugate_gradient
from contrastive_meta._linear.dense import DenseInverse as DenseInverse
from contrastive_meta._linear.identity import IdentityHessian as IdentityHessian
from contrastive_meta._linear.neumann import NeumannSeries as NeumannSeries
from contrastive_meta._linear.nystrom import Nystrom as Nystrom
