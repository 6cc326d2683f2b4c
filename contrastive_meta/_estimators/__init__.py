"""Meta-gradient estimators behind one interface."""

from contrastive_meta._estimators.base import MetaGradientEstimator as MetaGradientEstimator
from contrastive_meta._estimators.contrastive import Contrastive as Contrastive
