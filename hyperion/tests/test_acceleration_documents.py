"""Rows are shared out over packs without loss, and a pack is the rows end to end."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperion.acceleration.documents import packed, shared_out


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60))
def test_every_row_is_in_one_pack_and_no_pack_is_overfull(lengths, capacity):
    packs = shared_out(lengths, capacity)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert all(len(pack) == 1 or sum(lengths[row] for row in pack) <= capacity for pack in packs)
    assert packs == shared_out(lengths, capacity)


def test_best_fit_decreasing_fills_the_fullest_pack_that_has_room():
    assert shared_out([2, 5, 4, 7, 1, 3, 8], 10) == [[6, 0], [3, 5], [1, 2, 4]]


def test_a_pack_restarts_positions_and_asks_nothing_of_first_tokens():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    pack = packed(rows)
    assert pack["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert pack["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert pack["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert pack["documents"].lengths == (3, 2)
    assert pack["documents"].spans() == [(0, 3), (3, 5)]
    assert pack["documents"].numbers(torch.tensor([0, 2, 3, 4])).tolist() == [0, 0, 1, 1]
    assert rows[0]["labels"] == [5, 6, 7]  # the caller's own


ROWS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 5), st.integers(0, 50)), min_size=1, max_size=5
)  # tokens as in the others, tokens of its own, the first that is learnt


@given(ROWS)
def test_what_rows_share_is_alike_and_not_learnt(drawn):
    rows = []
    for number, (common, own, learnt) in enumerate(drawn):
        ids = [*range(common), *range(100 + 10 * number, 100 + 10 * number + own)]
        rows.append({"input_ids": ids, "labels": [-100] * min(learnt, len(ids)) + ids[learnt:]})
    pack = packed(rows)
    documents = pack["documents"]
    shared = documents.shared
    most = min(min(common, learnt - 1) for common, _, learnt in drawn)
    assert shared == (most if len(rows) > 1 and most >= 16 else 0)
    assert documents.tokens == sum(len(row["input_ids"]) for row in rows)
    assert documents.size == pack["input_ids"].shape[1]
    for row, (start, end) in zip(rows, documents.spans(), strict=True):
        for name, key in (("input_ids", "input_ids"), ("labels", "labels")):
            tokens = pack[name][0, :shared].tolist() + pack[name][0, start:end].tolist()
            given = row[key] if name == "input_ids" else [-100, *row[key][1:]]
            assert tokens == given
        positions = pack["position_ids"][0, :shared].tolist() + pack["position_ids"][0, start:end].tolist()
        assert positions == list(range(len(row["input_ids"])))
        # the last shared token predicts the first own one, for all rows at once: it must not be learnt
        assert not shared or pack["labels"][0, start] == -100
