# SPDX-License-Identifier: Apache-2.0
"""Dense detection: neck and FCOS-lite head, assignment, losses, distillation, post-processing, detectors."""

from pfnas_fast.detection.assignment import BACKGROUND, IGNORED, Assignment, assign_targets, size_ranges
from pfnas_fast.detection.detector import DenseScores, Detector
from pfnas_fast.detection.grid import PointGrid, make_grid
from pfnas_fast.detection.losses import detection_loss, distillation_loss
from pfnas_fast.detection.neck_head import Head, Neck
from pfnas_fast.detection.output import Detection, DetectorOutput, ltrb_to_boxes
from pfnas_fast.detection.postprocess import postprocess
from pfnas_fast.detection.supernet import DetectionSupernet

__all__ = [
    "BACKGROUND",
    "IGNORED",
    "Assignment",
    "DenseScores",
    "Detection",
    "DetectionSupernet",
    "Detector",
    "DetectorOutput",
    "Head",
    "Neck",
    "PointGrid",
    "assign_targets",
    "detection_loss",
    "distillation_loss",
    "ltrb_to_boxes",
    "make_grid",
    "postprocess",
    "size_ranges",
]
