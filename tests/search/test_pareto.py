# SPDX-License-Identifier: Apache-2.0
"""Fronts, hypervolume and MACs saved, on cases small enough to work out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfnas_fast.errors import InputError
from pfnas_fast.search import hypervolume, macs_saved_at_equal_ap, pareto_front

POINTS = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=0, max_size=12)


def test_front_drops_dominated_points_and_keeps_the_first_of_equals():
    macs = [5.0, 3.0, 3.0, 8.0, 8.0, 4.0]
    ap = [0.4, 0.2, 0.2, 0.5, 0.45, 0.1]
    assert pareto_front(macs, ap).tolist() == [1, 0, 3]


def test_front_of_nothing_is_empty():
    assert pareto_front([], []).tolist() == []


@given(POINTS)
def test_front_agrees_with_the_definition(points):
    macs = np.array([m for m, _ in points], float)
    ap = np.array([a for _, a in points], float)
    front = pareto_front(macs, ap)
    assert (np.diff(macs[front]) > 0).all()
    assert (np.diff(ap[front]) > 0).all()
    for m, a in points:
        assert any(macs[i] <= m and ap[i] >= a for i in front)
    for i in front:
        better = (macs <= macs[i]) & (ap >= ap[i]) & ((macs < macs[i]) | (ap > ap[i]))
        assert not better.any()


def test_hypervolume_by_hand():
    macs, ap = [1.0, 2.0, 3.0], [0.1, 0.3, 0.2]
    assert hypervolume(macs, ap, reference=(4.0, 0.0), log_macs=False) == pytest.approx(0.1 + 2 * 0.3)
    expected = 0.1 * math.log(2.0) + 0.3 * math.log(2.0)
    assert hypervolume(macs, ap, reference=(4.0, 0.0)) == pytest.approx(expected)


def test_hypervolume_ignores_points_beyond_the_reference():
    inside = hypervolume([2.0], [0.3], reference=(4.0, 0.1))
    assert hypervolume([2.0, 5.0, 1.0], [0.3, 0.9, 0.05], reference=(4.0, 0.1)) == inside
    assert hypervolume([], [], reference=(4.0, 0.0)) == 0.0


@given(POINTS, st.tuples(st.integers(1, 8), st.integers(0, 8)))
def test_hypervolume_never_falls_when_a_point_is_added(points, extra):
    macs, ap = [float(m) for m, _ in points], [float(a) for _, a in points]
    before = hypervolume(macs, ap, reference=(9.0, -1.0))
    after = hypervolume([*macs, float(extra[0])], [*ap, float(extra[1])], reference=(9.0, -1.0))
    assert after >= before - 1e-12


def test_macs_saved_at_equal_ap():
    ours = ([4.0, 8.0], [0.2, 0.4])
    theirs = ([8.0, 16.0], [0.2, 0.4])
    saved = macs_saved_at_equal_ap(ours, theirs, [8.0, 16.0, 20.0, 4.0])
    assert saved[8.0] == pytest.approx(0.5)
    assert saved[16.0] == pytest.approx(0.5)
    assert saved[20.0] == pytest.approx(0.5)  # against the 16 M the baseline needs there
    assert saved[4.0] is None  # the baseline has nothing within 4 M
    assert macs_saved_at_equal_ap(theirs, ours, [8.0])[8.0] == pytest.approx(-1.0)
    assert macs_saved_at_equal_ap(ours, ([9.0], [0.9]), [10.0])[10.0] is None  # never reached


def test_macs_saved_interpolates_in_log_macs():
    saved = macs_saved_at_equal_ap(([1.0, 4.0], [0.0, 1.0]), ([4.0], [0.5]), [4.0])
    assert saved[4.0] == pytest.approx(0.5)  # half way up is the geometric mean, 2 M


@pytest.mark.parametrize("macs", [[1.0], [0.0, 1.0], [float("nan"), 1.0]])
def test_bad_points_are_refused(macs):
    with pytest.raises(InputError, match="pareto_front: expected"):
        pareto_front(macs, [0.1, 0.2])


def test_bad_reference_is_refused():
    with pytest.raises(InputError, match="reference"):
        hypervolume([1.0], [0.1], reference=(0.0, 0.0))
