"""How learning is nudged: schemes, their strength, and what nudges."""

from contrastive_meta._nudging.automatic import AutomaticStrength as AutomaticStrength
from contrastive_meta._nudging.automatic import automatic as automatic
from contrastive_meta._nudging.nudge import LinearNudge as LinearNudge
from contrastive_meta._nudging.nudge import LossNudge as LossNudge
from contrastive_meta._nudging.nudge import Nudge as Nudge
from contrastive_meta._nudging.scheme import NudgeScheme as NudgeScheme
from contrastive_meta._nudging.scheme import NudgeStrength as NudgeStrength
from contrastive_meta._nudging.scheme import is_concrete as is_concrete
from contrastive_meta._nudging.schemes import central_difference as central_difference
from contrastive_meta._nudging.schemes import circle as circle
from contrastive_meta._nudging.schemes import complex_step as complex_step
from contrastive_meta._nudging.schemes import forward_difference as forward_difference
from contrastive_meta._nudging.schemes import four_point as four_point
from contrastive_meta._nudging.schemes import second_order_forward as second_order_forward
from contrastive_meta._nudging.strength import RelativeStrength as RelativeStrength
from contrastive_meta._nudging.strength import relative as relative
