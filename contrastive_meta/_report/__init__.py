"""Reports on estimators: comparisons, checks, diagnoses and horizons, each in numbers and in sentences."""

from contrastive_meta._report.check import CheckReport as CheckReport
from contrastive_meta._report.check import check as check
from contrastive_meta._report.compare import Comparison as Comparison
from contrastive_meta._report.compare import Measurement as Measurement
from contrastive_meta._report.compare import compare as compare
from contrastive_meta._report.compare import measure as measure
from contrastive_meta._report.compare import measure_interleaved as measure_interleaved
from contrastive_meta._report.diagnose import Diagnosis as Diagnosis
from contrastive_meta._report.diagnose import diagnose as diagnose
from contrastive_meta._report.horizon import HorizonReport as HorizonReport
from contrastive_meta._report.horizon import check_horizon as check_horizon
