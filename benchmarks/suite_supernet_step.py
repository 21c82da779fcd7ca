# SPDX-License-Identifier: Apache-2.0
"""A whole step of training a detection supernet by the sandwich rule, as `pfnas_fast.train` does it.

Loading and augmenting the images, four paths (largest, smallest, two free ones) forward and backward,
assignment, losses, distillation from the largest path, gradient clipping, AdamW and the weight average. Both
sides draw the same images and paths. One call is `STEPS` steps including what surrounds a training (building
optimiser and average), which is counted on both sides.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

from harness import Comparison
from training_nets import make_pair

import pfnas_fast as pf

__all__ = ["comparisons"]

STEPS = 2
# (space, longest side px, images per step)
SETTINGS = {
    "sandwich": ("ofa_mbv3_w1.0", 256, 8),
    "sandwich/416px": ("ofa_mbv3_w1.0", 416, 4),
    "sandwich/tiny": ("tiny", 160, 16),
}


def train(net: pf.DetectionSupernet, data: pf.DetectionData, batch_size: int, losses: list[float]) -> None:
    losses.clear()
    pf.train(
        net,
        data.fit,
        steps=STEPS,
        batch_size=batch_size,
        distill_after=0.0,
        learning_rate=1e-5,  # both sides stay where they are, however many steps are timed
        progress=lambda _stage, _step, _steps, values: losses.append(values["loss"]),
    )


def supernet_step(name: str) -> Comparison:
    space_name, size_px, batch_size = SETTINGS[name]
    space = dataclasses.replace(pf.load_space(space_name), resolutions=(size_px,))
    data = pf.load_detection("digits")
    fast, reference = make_pair(lambda backend: pf.DetectionSupernet(space, num_classes=10, backend=backend))
    our_losses: list[float] = []
    their_losses: list[float] = []

    def check() -> None:
        ours()
        theirs()
        pairs = zip(our_losses, their_losses, strict=True)
        assert all(abs(a - b) <= 1e-3 * abs(b) for a, b in pairs), (our_losses, their_losses)

    ours = partial(train, fast, data, batch_size, our_losses)
    theirs = partial(train, reference, data, batch_size, their_losses)
    return Comparison(f"supernet_step/{name}", ours, theirs, check, baseline="reference")


def comparisons() -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Every row's name with the function that prepares it."""
    for name in SETTINGS:
        yield f"supernet_step/{name}", partial(supernet_step, name)
