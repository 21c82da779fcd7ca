# SPDX-License-Identifier: Apache-2.0
"""Settings of a whole job that takes seconds; later settings override earlier ones."""

TOY_SETTINGS = [
    "warmup_steps=2",
    "train_steps=8",
    "batch_size=2",
    "labels_per_bin=4",
    "num_bins=3",
    "calib_images=4",
    "filter_members=1",
    "force_filter=true",
    "search_iterations=2",
    "random_paths=2",
    "backend=reference",
]
