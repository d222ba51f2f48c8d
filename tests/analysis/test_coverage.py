"""Intervals cover what they say, and verdicts err as seldom: `make coverage`, in short.

Bounds are the level itself and three standard errors of the simulation, sqrt(p (1 - p) / studies).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from benchmarks.coverage import AT, INTO, SPREAD, draw, verdicts

from healing_utils.analysis.claims import MARGIN
from healing_utils.analysis.effects import p_values, t_interval

STUDIES = 500


@pytest.mark.parametrize("seeds", [3, 6])
def test_intervals_of_seed_means_cover_and_those_of_pairs_do_not(seeds):
    studies = draw(np.random.default_rng(seeds), STUDIES, seeds, MARGIN)
    error = 3 * math.sqrt(0.95 * 0.05 / STUDIES)  # 0.029
    covered = [i.low <= MARGIN <= i.high for i in map(t_interval, studies.mean(axis=1))]
    assert np.mean(covered) == pytest.approx(0.95, abs=error)
    pooled = [i.low <= MARGIN <= i.high for i in (t_interval(each.ravel()) for each in studies)]
    assert 0.84 <= np.mean(pooled) <= 0.92


@pytest.mark.parametrize("direction", AT)
def test_claims_at_the_margin_hold_as_rarely_as_they_may(direction):
    rng = np.random.default_rng(6)
    studies = draw(rng, STUDIES, 6, AT[direction])
    p = np.array([p_values(means, direction, MARGIN)[0] for means in studies.mean(axis=1)])
    level = 3 / 64  # the largest below 0.05 that six seeds can reach
    assert np.mean(p < 0.05) == pytest.approx(level, abs=3 * math.sqrt(level / STUDIES))  # 0.029
    decided = verdicts(studies[:20], direction)
    assert decided["p"].tolist() == pytest.approx(p[:20])
    beyond = draw(rng, 20, 6, AT[direction] + 4 * INTO[direction] * SPREAD)
    assert (verdicts(beyond, direction)["verdict"] == "holds").all()
