"""Meta-gradient estimators behind one interface."""

from contrastive_meta._estimators.backprop import BackpropThroughLearning as BackpropThroughLearning
from contrastive_meta._estimators.base import MetaGradientEstimator as MetaGradientEstimator
from contrastive_meta._estimators.first_order import FirstOrder as FirstOrder
from contrastive_meta._estimators.first_order import Reptile as Reptile
from contrastive_meta._estimators.implicit import ImplicitDifferentiation as ImplicitDifferentiation
from contrastive_meta._estimators.zeroth_order import EvolutionStrategies as EvolutionStrategies
from contrastive_meta._estimators.zeroth_order import FiniteDifference as FiniteDifference
