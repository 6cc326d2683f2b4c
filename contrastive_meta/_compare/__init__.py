"""How estimators fare against one another: measured, in a table, and in words."""

from contrastive_meta._compare.checking import check as check
from contrastive_meta._compare.comparison import Comparison as Comparison
from contrastive_meta._compare.comparison import compare as compare
from contrastive_meta._compare.diagnosing import diagnose as diagnose
from contrastive_meta._compare.diagnosis import Diagnosis as Diagnosis
from contrastive_meta._compare.measurement import Measurement as Measurement
from contrastive_meta._compare.measurement import measure as measure
from contrastive_meta._compare.measurement import measure_interleaved as measure_interleaved
from contrastive_meta._compare.report import CheckReport as CheckReport
