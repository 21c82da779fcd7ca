# SPDX-License-Identifier: Apache-2.0
"""Fast, path-filtered supernet NAS for object detection."""

__version__ = "0.1.0"
