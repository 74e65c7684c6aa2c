"""Packing against a slow obvious loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.shards.packing import Group, Sequence, pack


@st.composite
def groups(draw):
    def sequence(first_may_be_target):
        n = draw(st.integers(1, 6))
        target = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
        target[0] &= first_may_be_target
        return Sequence(np.array(draw(st.lists(st.integers(0, 99), min_size=n, max_size=n))), target)

    return [Group(sequence(False), [sequence(True) for _ in range(draw(st.integers(0, 3)))]) for _ in range(draw(st.integers(1, 4)))]


@settings(max_examples=200, deadline=None)
@given(groups())
def test_pack_equals_the_obvious_loop(gs):
    row = pack(gs)
    ids, positions, pairs = [], [], []
    for group in gs:
        start = len(ids)
        for k, sequence in enumerate([group.prefix, *group.branches]):
            offset = 0 if k == 0 else len(group.prefix.ids)
            for j, (token, target) in enumerate(zip(sequence.ids, sequence.target)):
                if target:  # predicted by the token before it in its own context
                    before = len(ids) - 1 if j else start + len(group.prefix.ids) - 1
                    pairs.append((before, token))
                ids.append(token)
                positions.append(offset + j)
    assert row.input_ids.tolist() == ids and row.position_ids.tolist() == positions
    assert list(zip(row.predict_at.tolist(), row.targets.tolist())) == pairs
    ends = [start for start, _, _ in row.layout[1:]] + [len(ids)]
    assert ends == [end + sum(branches) for _, end, branches in row.layout]  # no token of padding


def test_a_prefix_cannot_be_predicted_from_nothing():
    with pytest.raises(ValueError, match="nothing before it"):
        pack([Group(Sequence(np.array([1]), np.array([True])), [])])
