"""Fixtures that the tests of this room share."""

import pytest

from wellposed.commands import run


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(here, capsys):
    """Runs words that must be refused: exit code 2 and one sentence with the message, before anything is trained."""

    def check(words, message):
        assert run(words) == 2
        errors = " ".join(capsys.readouterr().err.split())
        assert message in errors
        assert errors.startswith("error: ")
        assert "Traceback" not in errors
        assert not list(here.rglob("trials.sqlite"))

    return check
