"""Networks that learn by local rules: their outputs as functions whose derivative is what their synapses would do."""

from contrastive_meta.local_learners._equilibrium_propagation import Equilibrium as Equilibrium
from contrastive_meta.local_learners._equilibrium_propagation import EquilibriumPropagation as EquilibriumPropagation
from contrastive_meta.local_learners._feedback_alignment import FeedbackAlignment as FeedbackAlignment
from contrastive_meta.local_learners._feedback_alignment import random_feedback as random_feedback
from contrastive_meta.local_learners._population import population_spikes as population_spikes
from contrastive_meta.local_learners._predictive_coding import PredictiveCoding as PredictiveCoding
from contrastive_meta.local_learners._relaxation import Relaxation as Relaxation
from contrastive_meta.local_learners._relaxation import Relaxed as Relaxed
from contrastive_meta.local_learners._spiking import EProp as EProp
from contrastive_meta.local_learners._spiking import Spiking as Spiking
from contrastive_meta.local_learners._spiking import spiking_params as spiking_params
