"""Pages: escaped, complete or an error, and written whole or not at all."""

import errno
import os

import jinja2
import pytest

from wellposed.lab.files import WriteError, write_atomically
from wellposed.lab.page import duration, figure, render


def test_base_page_stands_alone():
    page = render("base.html.j2")
    assert page.startswith("<!doctype html>") and "prefers-color-scheme: dark" in page
    assert "http:" not in page and "https:" not in page and "@import" not in page and "<link" not in page


def test_text_is_escaped_and_figures_are_not():
    template = jinja2.Environment(autoescape=True).from_string("{{ text }} {{ svg }}")
    assert template.render(text="<b>", svg=figure("<svg></svg>")) == "&lt;b&gt; <svg></svg>"


def test_missing_content_is_an_error_and_no_blank():
    with pytest.raises(jinja2.UndefinedError):
        render("comparison.html.j2", "wellposed.compare")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0421, "0.042 s"), (9.96, "10 s"), (59.4, "59 s"), (60, "1 min"), (95, "1 min 35 s"), (3600, "1 h 0 min")],
)
def test_duration_reads_like_speech(seconds, words):
    assert duration(seconds) == words


def test_full_disk_leaves_the_old_page_and_no_rubbish(tmp_path, monkeypatch):
    page = tmp_path / "index.html"
    write_atomically(page, "old")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space left on device"):
        write_atomically(page, "new")
    assert page.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
