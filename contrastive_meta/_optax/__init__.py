"""Optimiser wrappers: meta-gradients inside optax, and hyperparameters that improve while a model trains."""

from contrastive_meta._optax.alternating import Alternating as Alternating
from contrastive_meta._optax.meta_gradient import MetaGradientState as MetaGradientState
from contrastive_meta._optax.meta_gradient import meta_gradient as meta_gradient
from contrastive_meta._optax.meta_optimizer import MetaOptimizerState as MetaOptimizerState
from contrastive_meta._optax.meta_optimizer import meta_optimizer as meta_optimizer
from contrastive_meta._optax.single_loop import NudgedIterates as NudgedIterates
from contrastive_meta._optax.single_loop import SingleLoop as SingleLoop
from contrastive_meta._optax.tune_while_training import TuneState as TuneState
from contrastive_meta._optax.tune_while_training import current_meta_params as current_meta_params
from contrastive_meta._optax.tune_while_training import tune_while_training as tune_while_training
from contrastive_meta._optax.tuning_mode import TuningMode as TuningMode
