"""Problems with known answers, shared by tests, benchmarks and examples."""

from contrastive_meta.problems._classification import classification_data as classification_data
from contrastive_meta.problems._classification import logistic_regression as logistic_regression
from contrastive_meta.problems._classification import softmax_regression as softmax_regression
from contrastive_meta.problems._data_cleaning import CorruptedData as CorruptedData
from contrastive_meta.problems._data_cleaning import DataCleaningTask as DataCleaningTask
from contrastive_meta.problems._data_cleaning import corrupt_labels as corrupt_labels
from contrastive_meta.problems._data_cleaning import corrupted_data as corrupted_data
from contrastive_meta.problems._data_cleaning import data_cleaning as data_cleaning
from contrastive_meta.problems._exact import exact_meta_gradient as exact_meta_gradient
from contrastive_meta.problems._instance import ExactMetaGradient as ExactMetaGradient
from contrastive_meta.problems._instance import ProblemInstance as ProblemInstance
from contrastive_meta.problems._instance import SplitData as SplitData
from contrastive_meta.problems._losses import Linear as Linear
from contrastive_meta.problems._mlp import MLPTask as MLPTask
from contrastive_meta.problems._mlp import mlp_strengths as mlp_strengths
from contrastive_meta.problems._quadratic import QuadraticTask as QuadraticTask
from contrastive_meta.problems._quadratic import quadratic as quadratic
from contrastive_meta.problems._ridge import ridge as ridge
from contrastive_meta.problems._ridge import ridge_data as ridge_data
from contrastive_meta.problems._sinusoids import Anchor as Anchor
from contrastive_meta.problems._sinusoids import sinusoid_tasks as sinusoid_tasks
from contrastive_meta.problems._sinusoids import sinusoids as sinusoids
