# SPDX-License-Identifier: Apache-2.0
"""Reports: comparison of runs, plots, drawn detections."""
