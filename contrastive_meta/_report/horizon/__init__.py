"""Whether the meta-gradients of a training run point where the long run does."""

from contrastive_meta._report.horizon.check_horizon import check_horizon as check_horizon
from contrastive_meta._report.horizon.report import HorizonReport as HorizonReport
