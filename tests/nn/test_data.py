"""The bytes every Python carries: split by document, windows that line up with what follows them."""

from collections import Counter

import pytest
import torch

from gpt4lib.nn import data


def test_documents_are_topics_and_modules_and_none_is_on_both_sides():
    names = list(data.documents())
    assert any(n.startswith("topic ") for n in names) and "module argparse" in names
    training, validation = data.split()
    assert training.dtype == torch.uint8
    joined = len(training) + len(validation) + 2 - len(names)
    assert joined == sum(map(len, data.documents().values()))              # one newline between documents
    assert 0.03 < len(validation) / len(training) < 0.3


def test_windows_are_consecutive_bytes_and_the_same_for_the_same_seed():
    text = torch.arange(200, dtype=torch.uint8)
    first, second = (data.windows(text, 5, 8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (5, 9) and first.dtype == torch.int64
    assert torch.equal(first[:, 1:] - first[:, :-1], torch.ones(5, 8, dtype=torch.int64))


def test_the_last_byte_can_be_reached():
    assert data.windows(torch.arange(9, dtype=torch.uint8), 3, 8, torch.Generator()).max() == 8


# --- the mixture ----------------------------------------------------------------------------------------------
SOURCES = {"text": [bytes([i]) * (3 + i) for i in range(1, 8)], "code": [bytes([100 + i]) * (5 + 2 * i) for i in range(9)]}
EPOCHS = {"text": 2, "code": 4}


def mixture(**changes):
    return data.Mixture(**{"sources": SOURCES, "epochs": EPOCHS, "length": 10, **changes})


def line(stream):
    """The line of tokens as its windows have it."""
    return stream.rows(0, len(stream))[:, :-1].flatten().tolist()


def test_every_document_is_read_as_often_as_its_source_says():
    stream = mixture(length=1)                              # every token but the last starts a window
    counts = Counter(line(stream))
    for name, documents in SOURCES.items():
        for text in documents:
            assert counts[text[0]] == EPOCHS[name] * len(text)
    assert counts[0] == 2 * 7 + 4 * 9 - 1                   # the closing token of the last document is only a target
    assert stream.tokens_read(len(stream) + 1) == {n: EPOCHS[n] * sum(len(t) + 1 for t in SOURCES[n]) for n in SOURCES}


def test_each_epoch_reads_every_document_once_in_its_own_order():
    order = [which for name, which in mixture().order if name == "code"]
    passes = [order[i:i + 9] for i in range(0, 36, 9)]
    assert all(sorted(p) == list(range(9)) for p in passes) and len({tuple(p) for p in passes}) == 4


def test_sources_advance_together():
    order = [name for name, _ in mixture().order]
    for i in range(len(order)):
        done = {name: order[:i].count(name) / (EPOCHS[name] * len(SOURCES[name])) for name in SOURCES}
        assert abs(done["text"] - done["code"]) <= 1 / 14 + 1 / 36


def test_targets_are_the_tokens_one_further_and_windows_follow_each_other():
    rows = mixture().rows(0, 999)
    assert torch.equal(rows[:-1, -1], rows[1:, 0])
    assert rows[:, :-1].flatten().tolist() == line(mixture(length=1))[:rows[:, :-1].numel()]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 16])
def test_ranks_share_a_batch_without_loss_or_overlap(world_size):
    stream = mixture()
    for size in (world_size, 2 * world_size, 5):
        seen = []
        for start in range(0, len(stream), size):
            parts = [stream.rows(start, size, rank, world_size) for rank in range(world_size)]
            rows = torch.zeros(sum(map(len, parts)), 11, dtype=torch.int64)
            for rank, part in enumerate(parts):
                rows[rank::world_size] = part
            seen.append(rows)
        assert torch.equal(torch.cat(seen), stream.rows(0, len(stream)))


def test_resumed_anywhere_the_rest_is_the_same():
    whole = list(mixture().batches(4))
    assert whole[-1][0] == len(mixture())
    for i, (state, _) in enumerate(whole):
        rest = list(mixture().batches(4, start=state))
        assert [s for s, _ in rest] == [s for s, _ in whole[i + 1:]]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(rest, whole[i + 1:]))


def test_windows_do_not_depend_on_where_reading_began():
    stream = mixture()
    whole = stream.rows(0, len(stream))
    for start in range(len(stream) + 2):
        assert torch.equal(stream.rows(start, 3), whole[start:start + 3])


def test_resumed_on_another_number_of_ranks_or_with_another_batch_no_token_is_lost():
    stream = mixture()
    first = [rows for _, rows in zip(range(3), (stream.batches(4)))]
    state = first[-1][0]
    after = [torch.cat([rows for _, rows in stream.batches(6, start=state, rank=r, world_size=3)]) for r in range(3)]
    before = torch.cat([rows for _, rows in first])
    assert sorted(torch.cat([before, *after]).tolist()) == sorted(stream.rows(0, len(stream)).tolist())


def test_a_seed_is_a_line():
    assert line(mixture()) == line(mixture()) != line(mixture(seed=1))


def test_epochs_are_counted_as_they_pass():
    stream = mixture()
    for windows in range(len(stream)):
        read = stream.tokens_read(windows)
        assert sum(read.values()) == windows * 10
        more = stream.tokens_read(windows + 1)
        assert all(more[n] >= read[n] for n in read)


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ValueError, match="do not go with the sources"):
        mixture(epochs={"text": 2})
    with pytest.raises(ValueError, match="none empty"):
        mixture(sources={"text": [], "code": [b"x"]})
    with pytest.raises(ValueError, match="do not fill a window"):
        mixture(length=10_000)


def test_the_two_sources_are_what_is_trained_on():
    found = data.sources()
    assert sum(len(t) + 1 for texts in found.values() for t in texts) == len(data.split()[0]) + 1
    assert not any(data.END in t for texts in found.values() for t in texts)


@pytest.mark.parametrize("epochs, length, words", [({"text": 0, "code": 1}, 4, "text=0"), ({"text": 1.5, "code": 1}, 4, "text=1.5"),
                                                   (EPOCHS, 0, "length=0"), (EPOCHS, True, "length=True")])
def test_a_mixture_of_nonsense_is_refused(epochs, length, words):
    with pytest.raises(ValueError, match=f"{words} is not accepted; give an integer >= 1"):
        data.Mixture(SOURCES, epochs, length)
