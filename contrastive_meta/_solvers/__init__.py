"""Inner solvers: the learners that both phases run."""

from contrastive_meta._solvers.base import InnerSolver as InnerSolver
from contrastive_meta._solvers.base import Solution as Solution
from contrastive_meta._solvers.base import Stop as Stop
from contrastive_meta._solvers.callable import CallableSolver as CallableSolver
from contrastive_meta._solvers.external import ExternalLearner as ExternalLearner
from contrastive_meta._solvers.lbfgs import LBFGS as LBFGS
from contrastive_meta._solvers.optax_descent import OptaxDescent as OptaxDescent
from contrastive_meta._solvers.penalty import BoundPenalty as BoundPenalty
from contrastive_meta._solvers.penalty import Penalty as Penalty
from contrastive_meta._solvers.proximal_descent import ProximalDescent as ProximalDescent
from contrastive_meta._solvers.scipy_minimize import ScipyMinimize as ScipyMinimize
