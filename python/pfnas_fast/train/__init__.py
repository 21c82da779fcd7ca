# SPDX-License-Identifier: Apache-2.0
"""Training of supernets: schedules, the loop, classification and detection tasks, labelling."""

from pfnas_fast.train.classification import classification_accuracy, pretrain
from pfnas_fast.train.detection import train
from pfnas_fast.train.engine import Refresh
from pfnas_fast.train.evaluate import PathEvaluator
from pfnas_fast.train.labelling import Labels, label_paths

__all__ = [
    "Labels",
    "PathEvaluator",
    "Refresh",
    "classification_accuracy",
    "label_paths",
    "pretrain",
    "train",
]
