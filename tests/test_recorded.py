"""Recorded measurements: found where the repository keeps them, and named when they are not."""

import pytest

from gpt4lib import recorded


def test_every_recording_says_where_and_when_it_was_made():
    names = [p.stem for p in recorded.FOLDER.glob("*.json")]
    assert names
    for name in names:
        run = recorded.load(name)
        assert run["machine"]["date"] in recorded.where(run) and run["machine"]["cpu"]


def test_an_unknown_recording_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'moe_tpu' does not exist; accepted: .*moe_cpu"):
        recorded.load("moe_tpu")


def test_an_installation_without_the_repository_is_told_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(recorded, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="pip install -e ."):
        recorded.load("moe_cpu")
