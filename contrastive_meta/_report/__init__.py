"""Reports: comparisons, checks, diagnoses, horizons and runs that tune themselves, in numbers and in sentences."""

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
from contrastive_meta._report.tuning import TuningReport as TuningReport
from contrastive_meta._report.tuning import tuning_report as tuning_report
from contrastive_meta._report.tuning import watch as watch
