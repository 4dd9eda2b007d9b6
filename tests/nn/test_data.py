"""The bytes every Python carries: split by document, windows that line up with what follows them."""

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
