"""Ways to split a network into what learns each task and what is meta-learned, each with its plasticity rule.

`check_support` says of training tasks whether a modular one can find their modules.
"""

from contrastive_meta.architectures._attention import Attended as Attended
from contrastive_meta.architectures._attention import attention as attention
from contrastive_meta.architectures._attention import attention_params as attention_params
from contrastive_meta.architectures._cnn import cnn as cnn
from contrastive_meta.architectures._cnn import cnn_params as cnn_params
from contrastive_meta.architectures._hypernetwork import hypernetwork as hypernetwork
from contrastive_meta.architectures._mlp import mlp as mlp
from contrastive_meta.architectures._mlp import mlp_params as mlp_params
from contrastive_meta.architectures._mlp import with_context as with_context
from contrastive_meta.architectures._mlp import with_gains as with_gains
from contrastive_meta.architectures._mlp import with_modules as with_modules
from contrastive_meta.architectures._networks import context_parameters as context_parameters
from contrastive_meta.architectures._networks import fast_head as fast_head
from contrastive_meta.architectures._networks import fast_head_on_features as fast_head_on_features
from contrastive_meta.architectures._networks import gain_modulation as gain_modulation
from contrastive_meta.architectures._networks import modular_hypernetwork as modular_hypernetwork
from contrastive_meta.architectures._split import Architecture as Architecture
from contrastive_meta.architectures._split import fast_and_slow as fast_and_slow
from contrastive_meta.architectures._support import SupportReport as SupportReport
from contrastive_meta.architectures._support import check_support as check_support
from contrastive_meta.architectures._synapses import complex_synapse as complex_synapse
from contrastive_meta.architectures._synapses import learned_initialisation as learned_initialisation
from contrastive_meta.architectures._synapses import plasticity_mask as plasticity_mask
