"""Whether estimators agree with one another and with finite differences."""

from contrastive_meta._report.check.check import check as check
from contrastive_meta._report.check.report import CheckReport as CheckReport
