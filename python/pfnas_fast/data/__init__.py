# SPDX-License-Identifier: Apache-2.0
"""Data: folders and embedded digits in, batches and metrics out."""

from pfnas_fast.data.augment import Augmentation, ClassificationAugmentation
from pfnas_fast.data.datasets import Batch, ClassificationDataset, DetectionDataset, Record, Target
from pfnas_fast.data.eval_images import EvalImages
from pfnas_fast.data.evaluation import METRIC_NAMES, evaluate
from pfnas_fast.data.folder import ClassificationData, load_classification
from pfnas_fast.data.images import PAD_VALUE, check_images, letterbox, normalize, read_image, resize_batch
from pfnas_fast.data.load import load_detection
from pfnas_fast.data.loader import classification_batches, train_batches
from pfnas_fast.data.matching import Evaluator, Matches
from pfnas_fast.data.roles import DetectionData, Roles
from pfnas_fast.data.voc_metric import voc_ap50

__all__ = [
    "METRIC_NAMES",
    "PAD_VALUE",
    "Augmentation",
    "Batch",
    "ClassificationAugmentation",
    "ClassificationData",
    "ClassificationDataset",
    "DetectionData",
    "DetectionDataset",
    "EvalImages",
    "Evaluator",
    "Matches",
    "Record",
    "Roles",
    "Target",
    "check_images",
    "classification_batches",
    "evaluate",
    "letterbox",
    "load_classification",
    "load_detection",
    "normalize",
    "read_image",
    "resize_batch",
    "train_batches",
    "voc_ap50",
]
