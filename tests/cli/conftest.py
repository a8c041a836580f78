"""What tests of commands share."""

import pytest


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
