# SPDX-License-Identifier: Apache-2.0
"""Which location is responsible for which object (FCOS, arXiv:1904.01355, with centre sampling).

A location is a candidate for an object if it lies inside the box, within `radius` strides of its centre along
both axes, and if max(l, t, r, b) falls into the level's size range; the object of smallest area wins a
contested location.

A point within 1.5 strides of a centre is always one of the 3 x 3 cells around it, so candidates are
enumerated per object and level ([N, G, V, 9], 13 thousand entries for 16 images of 30 boxes) instead of
testing every location against every object.

Two additions keep small and crowded objects from being forgotten. An object without a candidate (smaller than
the grid, or between two size ranges) takes the location nearest to its centre on the level of its size. An
object that lost all its candidates to smaller ones takes the nearest free cell around its centre, on that
level if one is left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pfnas_fast.data.datasets import Target
from pfnas_fast.detection.grid import PointGrid
from pfnas_fast.errors import InputError

BACKGROUND = -1
IGNORED = -2


@dataclass(frozen=True, eq=False)
class Assignment:
    """Ground truth laid out over the locations of a batch.

    P is the number of positive locations of the whole batch; positives are in (image, location) order.

    Attributes:
        labels: Class per location, [N, L], int64; BACKGROUND (-1), or IGNORED (-2: no classification loss).
        image_index: Image of each positive, [P], int64.
        location: Location of each positive, [P], int64.
        object_index: Index of each positive's object within its image's target, [P], int64.
        boxes: Box of each positive's object, xyxy px, [P, 4].
        centerness: Target in (0, 1] of each positive, relative to the object's best location, [P].
    """

    labels: Tensor
    image_index: Tensor
    location: Tensor
    object_index: Tensor
    boxes: Tensor
    centerness: Tensor

    @property
    def num_positives(self) -> int:
        """P, the number of positive locations in the batch."""
        return self.location.shape[0]


def size_ranges(strides: Sequence[int], size_factor: float = 3.0) -> list[tuple[float, float]]:
    """The range of max(l, t, r, b) in px that each level is responsible for.

    Args:
        strides: Stride of each level in px, ascending.
        size_factor: Upper end of a level's range in strides. FCOS's own 64 px for stride 8 would leave the
            coarse levels without objects on small images.

    Returns:
        (low, high] per level; the first starts at 0, the last is open.

    Example:
        >>> size_ranges((8, 16, 32))
        [(0.0, 24.0), (24.0, 48.0), (48.0, inf)]
    """
    ends = [size_factor * s for s in strides[:-1]]
    return list(zip([0.0, *ends], [*ends, math.inf], strict=True))


def assign_targets(
    grid: PointGrid, targets: Sequence[Target], *, radius: float = 1.5, size_factor: float = 3.0
) -> Assignment:
    """Decide for every location of every image which object it has to predict, if any.

    Args:
        grid: The locations, on the device of the targets.
        targets: One per image: `boxes` [n, 4] xyxy canvas px, `labels` [n] int64, `ignore_boxes` [m, 4].
            Boxes without area are passed over.
        radius: Reach of centre sampling in strides.
        size_factor: See `size_ranges`.

    Returns:
        The assignment; it depends on the ground truth and the grid only, so paths of one resolution can share
        it.

    Raises:
        InputError: `targets` is empty.

    Source:
        FCOS, arXiv:1904.01355, sec. 3.2; centre sampling from its later version, arXiv:2006.09214.
    """
    if len(targets) == 0:
        raise InputError("assign_targets: expected at least one target for targets, got 0")
    device = grid.points.device
    boxes = pad_sequence([t.boxes.to(device, torch.float32) for t in targets], batch_first=True)  # [N, G, 4]
    classes = pad_sequence([t.labels.to(device) for t in targets], batch_first=True, padding_value=BACKGROUND)
    sides = boxes[..., 2:] - boxes[..., :2]  # [N, G, 2]; padding has no area
    valid = (sides > 0).all(-1)
    labels = torch.full((len(targets), grid.num_locations), BACKGROUND, dtype=torch.int64, device=device)
    _mark_ignored(labels, grid, [t.ignore_boxes.to(device) for t in targets])
    if not bool(valid.any()):
        return _assignment_of(labels, torch.full_like(labels, -1), boxes, classes, grid)
    owner = _owners(grid, boxes, sides, valid, radius, size_factor)
    return _assignment_of(labels, owner, boxes, classes, grid)


def _mark_ignored(labels: Tensor, grid: PointGrid, regions: list[Tensor]) -> None:
    """Set the locations inside ignore regions to IGNORED; positives overwrite them later."""
    if sum(len(r) for r in regions) == 0:
        return
    boxes = pad_sequence(regions, batch_first=True)[:, :, None]  # [N, M, 1, 4]
    points = grid.points[None, None]  # [1, 1, L, 2]
    inside = ((points > boxes[..., :2]) & (points < boxes[..., 2:])).all(-1).any(1)  # [N, L]
    labels[inside] = IGNORED


def _owners(
    grid: PointGrid, boxes: Tensor, sides: Tensor, valid: Tensor, radius: float, size_factor: float
) -> Tensor:
    """Object index per location, [N, L] int64, -1 where none."""
    num_images, num_objects = valid.shape
    size = grid.num_locations
    device = boxes.device
    cells = _Cells.around(grid, boxes, radius)
    ranges = torch.tensor(size_ranges(grid.strides, size_factor), dtype=boxes.dtype, device=device)  # [V, 2]
    corners = boxes[:, :, None, None]  # [N, G, 1, 1, 4]
    ltrb = torch.cat([cells.points - corners[..., :2], corners[..., 2:] - cells.points], dim=-1)
    reach = ltrb.amax(-1)
    in_range = (reach > ranges[:, :1]) & (reach <= ranges[:, 1:])
    near = cells.distance.amax(-1) < radius
    candidate = cells.on_grid & near & in_range & (ltrb.amin(-1) > 0) & valid[:, :, None, None]

    half_side = sides.amax(-1, keepdim=True) / 2
    own_level = (half_side > ranges[:, 1]).sum(-1)  # [N, G], < V since the last range is open
    orphan = valid & ~candidate.flatten(2).any(-1)
    image, obj = orphan.nonzero(as_tuple=True)
    candidate[image, obj, own_level[image, obj], cells.centre] = True

    # A minimum over ranks by area, instead of areas, has no ties and does not depend on the order of writing.
    area = torch.where(valid, sides.prod(-1), torch.inf)
    by_area = area.argsort(dim=1, stable=True)  # [N, G]
    rank = by_area.argsort(dim=1)
    offset = torch.arange(num_images, device=device)[:, None] * size
    best = torch.full((num_images * size,), num_objects, dtype=torch.int64, device=device)
    where = (cells.index + offset[..., None, None])[candidate]
    best.scatter_reduce_(0, where, rank[:, :, None, None].expand_as(candidate)[candidate], "amin")
    _serve_losers(best, rank, valid, cells, own_level, offset)
    best = best.view(num_images, size)
    return torch.where(best < num_objects, by_area.gather(1, best.clamp(max=num_objects - 1)), -1)


def _serve_losers(
    best: Tensor, rank: Tensor, valid: Tensor, cells: "_Cells", own_level: Tensor, offset: Tensor
) -> None:
    """Give objects that won no location the nearest free cell, if possible on their level; updates `best`."""
    num_images, num_objects = valid.shape
    levels = torch.arange(cells.index.shape[2], device=best.device)
    while True:
        won = torch.zeros((num_images, num_objects + 1), dtype=torch.bool, device=best.device)
        won.scatter_(1, best.view(num_images, -1), True)
        image, obj = (valid & ~won.gather(1, rank)).nonzero(as_tuple=True)
        if image.numel() == 0:
            return
        index = (cells.index[image, obj] + offset[image, :, None]).flatten(1)  # [losers, V * 9]
        free = cells.on_grid[image, obj].flatten(1) & (best[index] == num_objects)
        far = (levels - own_level[image, obj, None]).abs() * 1e6  # another level only if the own one is full
        distance = cells.distance[image, obj].square().sum(-1) + far[..., None]  # [losers, V, 9]
        distance = torch.where(free, distance.flatten(1), torch.inf)
        nearest = distance.argmin(-1, keepdim=True)
        chosen = free.gather(1, nearest).squeeze(1)
        if not bool(chosen.any()):
            return  # more objects around one cell than the grid has room for
        best.scatter_reduce_(0, index.gather(1, nearest).squeeze(1)[chosen], rank[image, obj][chosen], "amin")


@dataclass(frozen=True)
class _Cells:
    """The square of W cells around each object's centre on each level (W = 9 for radius 1.5).

    Attributes:
        points: (x, y) px, [N, G, V, W, 2].
        distance: |x - centre| and |y - centre| in strides, [N, G, V, W, 2].
        on_grid: Whether the cell exists, [N, G, V, W].
        index: Location index (0 where the cell does not exist), [N, G, V, W].
        centre: Position of the cell nearest to the centre among the W.
    """

    points: Tensor
    distance: Tensor
    on_grid: Tensor
    index: Tensor
    centre: int

    @staticmethod
    def around(grid: PointGrid, boxes: Tensor, radius: float) -> "_Cells":
        device, dtype = boxes.device, boxes.dtype
        stride = torch.tensor(grid.strides, dtype=dtype, device=device)[:, None]  # [V, 1]
        size = torch.tensor([(w, h) for h, w in grid.sizes], device=device)  # [V, 2] as (x, y)
        start = torch.tensor(grid.level_starts, device=device)
        centre = (boxes[..., :2] + boxes[..., 2:])[:, :, None] / (2 * stride) - 0.5  # [N, G, V, 2], in cells
        nearest = torch.minimum(centre.round().clamp(min=0), (size - 1).to(dtype))
        half = math.ceil(radius + 0.5) - 1
        step = torch.arange(-half, half + 1, dtype=dtype, device=device)
        window = torch.stack(torch.meshgrid(step, step, indexing="xy"), dim=-1).reshape(-1, 2)  # [W, 2]
        cell = nearest[..., None, :] + window  # [N, G, V, W, 2]
        on_grid = ((cell >= 0) & (cell < size[:, None])).all(-1)
        column, row = cell.long().unbind(-1)
        index = torch.where(on_grid, start[:, None] + row * size[:, None, 0] + column, 0)
        points = (cell + 0.5) * stride[..., None]
        return _Cells(points, (cell - centre[..., None, :]).abs(), on_grid, index, len(window) // 2)


def _assignment_of(
    labels: Tensor, owner: Tensor, boxes: Tensor, classes: Tensor, grid: PointGrid
) -> Assignment:
    image, location = (owner >= 0).nonzero(as_tuple=True)
    obj = owner[image, location]
    matched = boxes[image, obj]  # [P, 4]
    labels[image, location] = classes[image, obj]
    centerness = _relative_centerness(grid.points[location], matched, image * max(boxes.shape[1], 1) + obj)
    return Assignment(labels, image, location, obj, matched, centerness)


def _relative_centerness(points: Tensor, boxes: Tensor, group: Tensor) -> Tensor:
    """FCOS's centerness sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)), divided by the object's best,
    [P].

    A 12-px object on a stride of 8 may have no location better than 0.2, by its position alone; as a score
    and as a loss weight that would count against small objects. After the division each object has one
    location with target 1.
    """
    low, high = points - boxes[:, :2], boxes[:, 2:] - points  # [P, 2] each: (l, t) and (r, b)
    ratio = torch.minimum(low, high).clamp(min=0) / torch.maximum(low, high)
    raw = ratio.prod(-1).sqrt().clamp(min=1e-3)  # the floor serves points outside a box smaller than the grid
    if group.numel() == 0:
        return raw
    best = raw.new_zeros(int(group.max()) + 1).scatter_reduce(0, group, raw, "amax")
    return raw / best[group]
