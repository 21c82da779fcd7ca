# SPDX-License-Identifier: Apache-2.0
"""Fast, path-filtered supernet NAS for object detection.

A supernet is pre-trained on classification, transferred to detection, and pruned by a path filter (a
predictor that ranks paths of similar cost), so that training concentrates on the best candidates at every
budget; then a Pareto front of detectors is searched. After DetOFA, arXiv:2303.13121.
"""

from pfnas_fast.data import (
    Augmentation,
    DetectionData,
    DetectionDataset,
    Roles,
    evaluate,
    load_classification,
    load_detection,
)
from pfnas_fast.detection import Detection, DetectionSupernet, Detector
from pfnas_fast.errors import InputError
from pfnas_fast.filter import (
    Balanced,
    BestUp,
    BudgetThresholds,
    Filtered,
    PathFilter,
    RandomPrune,
    Uniform,
)
from pfnas_fast.run import Run, RunConfig, make_config
from pfnas_fast.search import Front, hypervolume, pareto_front, search
from pfnas_fast.space import BudgetSampler, CostModel, Path, Space, load_space, uniform_population
from pfnas_fast.supernet import (
    BNStatistics,
    ClassificationSupernet,
    load_ofa_weights,
    recalibrate,
    set_running_statistics,
    use_statistics,
)
from pfnas_fast.train import Labels, PathEvaluator, label_paths, pretrain, train

__version__ = "0.1.0"

__all__ = [
    "Augmentation",
    "BNStatistics",
    "Balanced",
    "BestUp",
    "BudgetSampler",
    "BudgetThresholds",
    "ClassificationSupernet",
    "CostModel",
    "Detection",
    "DetectionData",
    "DetectionDataset",
    "DetectionSupernet",
    "Detector",
    "Filtered",
    "Front",
    "InputError",
    "Labels",
    "Path",
    "PathEvaluator",
    "PathFilter",
    "RandomPrune",
    "Roles",
    "Run",
    "RunConfig",
    "Space",
    "Uniform",
    "evaluate",
    "hypervolume",
    "label_paths",
    "load_classification",
    "load_detection",
    "load_ofa_weights",
    "load_space",
    "make_config",
    "pareto_front",
    "pretrain",
    "recalibrate",
    "search",
    "set_running_statistics",
    "train",
    "uniform_population",
    "use_statistics",
]
