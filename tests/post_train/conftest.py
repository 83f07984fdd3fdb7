"""The rows and the checkpoint of small runs that learn from rewards."""

import pytest
from reward_runs import letters, plug_in, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("questions"))


@pytest.fixture
def paid_for_letters(monkeypatch):
    """The reward "letters" of `reward_runs.LETTERS`."""
    plug_in(monkeypatch, "letters", letters)
