"""Documents in rows of one length, and the loader over them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_training import LENGTH, documents

from jeagle.training.documents import DataError, Document, fingerprint
from jeagle.training.packing import Loader, pack


def test_temperatures_are_part_of_the_data_where_they_matter():
    cold, hot = ([replace(d, temperature=t) for d in documents(3)] for t in (0.0, 1.0))
    assert fingerprint(cold, temperatures=False) == fingerprint(hot, temperatures=False)
    assert fingerprint(cold, temperatures=True) != fingerprint(hot, temperatures=True)


def test_packing_keeps_every_token_once():
    made = [replace(d, temperature=(None, 0.0, 0.7)[i % 3]) for i, d in enumerate(documents(100))]
    rows = pack(made, LENGTH)
    found = []
    for row in range(len(rows.token_BT)):
        for segment in range(1, rows.segment_BT[row].max() + 1):
            here = rows.segment_BT[row] == segment
            assert rows.position_BT[row][here].tolist() == list(range(here.sum()))
            tokens, learn = rows.token_BT[row][here], rows.learn_BT[row][here]
            (temperature,) = set(rows.temperature_BT[row][here].tolist())
            found.append((tuple(tokens), tuple(learn), temperature))
            assert not learn[-1]
    wanted = [
        (tuple(d.token_n), (*d.response_n[1:], False), (1.0, 0.0, np.float32(0.7))[i % 3]) for i, d in enumerate(made)
    ]
    assert sorted(found) == sorted(wanted)
    assert (rows.segment_BT > 0).mean() > 0.9


def test_long_documents():
    long = Document(np.arange(40, dtype=np.int32), np.ones(40, bool), place="talks.jsonl, line 2")
    with pytest.raises(DataError, match=r'^talks.jsonl, line 2 has 40 tokens.*data.long_documents to "cut" or "drop"'):
        pack([documents(1)[0], long], LENGTH)
    assert pack([long], LENGTH, long_documents="cut").token_BT.tolist() == [list(range(LENGTH))]
    with pytest.raises(DataError, match="no document with an answer fits"):
        pack([long], LENGTH, long_documents="drop")


def test_the_loader_is_a_function_of_the_step():
    rows = pack(documents(100), LENGTH)
    a, b = Loader(rows, (2, 1, 3), seed=4), Loader(rows, (2, 1, 3), seed=4)
    assert a[0].token_BT.shape == (2, 1, 3, LENGTH)
    np.testing.assert_array_equal(a[7].token_BT, b[7].token_BT)
    assert (a[7].token_BT != Loader(rows, (2, 1, 3), seed=5)[7].token_BT).any()
    # One epoch shows every row once.
    single = Loader(rows, (1, 1, 1), seed=0)
    n = len(rows.token_BT)
    epoch = sorted(tuple(single[i].token_BT.reshape(-1)) for i in range(n))
    assert epoch == sorted(map(tuple, rows.token_BT))
