"""Estimators side by side: errors, times and memory."""

from contrastive_meta._report.compare.comparison import Comparison as Comparison
from contrastive_meta._report.compare.comparison import compare as compare
from contrastive_meta._report.compare.measurement import Measurement as Measurement
from contrastive_meta._report.compare.measurement import measure as measure
from contrastive_meta._report.compare.measurement import measure_interleaved as measure_interleaved
