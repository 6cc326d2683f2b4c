"""The contrastive estimator: nudged phases, and the contrast of what they measure."""

from contrastive_meta._contrastive.contrastive import Contrastive as Contrastive
from contrastive_meta._contrastive.newton_krylov import NewtonKrylov as NewtonKrylov
