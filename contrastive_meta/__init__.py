"""Meta-gradients by running learning twice: a free phase, a nudged phase, and their contrast."""

from contrastive_meta._problem import BilevelProblem as BilevelProblem
from contrastive_meta._problem import Diagnostics as Diagnostics
from contrastive_meta._problem import EstimatorState as EstimatorState
from contrastive_meta._problem import MetaGradient as MetaGradient
from contrastive_meta._problem import Status as Status
