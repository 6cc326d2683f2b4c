"""A differentiable argmin: any learner as a layer, with any adjoint."""

from contrastive_meta._argmin.adjoints import Adjoint as Adjoint
from contrastive_meta._argmin.adjoints import BackpropAdjoint as BackpropAdjoint
from contrastive_meta._argmin.adjoints import ContrastiveAdjoint as ContrastiveAdjoint
from contrastive_meta._argmin.adjoints import ImplicitAdjoint as ImplicitAdjoint
from contrastive_meta._argmin.adjoints import OneStepAdjoint as OneStepAdjoint
from contrastive_meta._argmin.argmin import argmin as argmin
