"""What limits the accuracy of one contrastive estimate, and what to change."""

from contrastive_meta._report.diagnose.diagnose import diagnose as diagnose
from contrastive_meta._report.diagnose.diagnosis import Diagnosis as Diagnosis
