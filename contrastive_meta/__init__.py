"""Meta-gradients by running learning twice: a free phase, a nudged phase, and their contrast."""

from contrastive_meta._problem import BilevelProblem as BilevelProblem
from contrastive_meta._problem import Diagnostics as Diagnostics
from contrastive_meta._problem import EstimatorState as EstimatorState
from contrastive_meta._problem import MetaGradient as MetaGradient
from contrastive_meta._problem import Status as Status
from contrastive_meta._estimators import Contrastive as Contrastive
from contrastive_meta._estimators import MetaGradientEstimator as MetaGradientEstimator
from contrastive_meta._nudging import LinearNudge as LinearNudge
from contrastive_meta._nudging import LossNudge as LossNudge
from contrastive_meta._nudging import Nudge as Nudge
from contrastive_meta._nudging import NudgeScheme as NudgeScheme
from contrastive_meta._nudging import central_difference as central_difference
from contrastive_meta._nudging import circle as circle
from contrastive_meta._nudging import complex_step as complex_step
from contrastive_meta._nudging import forward_difference as forward_difference
from contrastive_meta._nudging import four_point as four_point
from contrastive_meta._nudging import relative as relative
from contrastive_meta._nudging import second_order_forward as second_order_forward
from contrastive_meta._plasticity import Autodiff as Autodiff
from contrastive_meta._plasticity import PlasticityRule as PlasticityRule
from contrastive_meta._solvers import LBFGS as LBFGS
from contrastive_meta._solvers import InnerSolver as InnerSolver
from contrastive_meta._solvers import OptaxDescent as OptaxDescent
from contrastive_meta._solvers import Solution as Solution
from contrastive_meta._solvers import Stop as Stop
