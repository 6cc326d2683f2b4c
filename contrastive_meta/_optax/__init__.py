"""Optimiser wrappers: meta-gradients inside optax, and hyperparameters that improve while a model trains."""

from contrastive_meta._optax.meta_gradient import MetaGradientState as MetaGradientState
from contrastive_meta._optax.meta_gradient import meta_gradient as meta_gradient
from contrastive_meta._optax.meta_optimizer import MetaOptimizerState as MetaOptimizerState
from contrastive_meta._optax.meta_optimizer import meta_optimizer as meta_optimizer
