"""Mails: headers and tags go, hashed words keep their order, and the table of counts is what the registry promises."""

import json

import numpy as np
import pytest

from wellposed.datasets import DatasetError, find_dataset, load_dataset
from wellposed.datasets.mails import hashed_words, parse_mail, read_mails, words

RAW = "From: a@list.org\nsubject: Win NOW\nX-Mailing-List: secret\n\n<b>Free</b> money, it's yours\n"


@pytest.fixture
def folder(tmp_path):
    names = ["easy-ham-1/1.txt", "hard-ham-1/2.txt", "spam-2/3.txt"]
    for name in names:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(RAW.encode() + b"caf\xe9\n")
    (tmp_path / "data/file_list.json").write_text(json.dumps(names))
    return tmp_path


def test_subject_and_body_stay_and_all_else_goes():
    mail = parse_mail(RAW, "spam-1")
    assert words(mail.text) == ["win", "now", "free", "money", "it's", "yours"]
    assert mail.spam and not parse_mail(RAW, "hard-ham-1").spam
    assert "secret" not in mail.text and "list" not in mail.text
    assert parse_mail("no headers at all", "spam-1").text.strip() == ""


def test_mails_are_read_in_the_order_of_the_list(folder):
    mails = read_mails(folder)
    assert [mail.group for mail in mails] == ["easy-ham-1", "hard-ham-1", "spam-2"]
    assert [mail.spam for mail in mails] == [False, False, True]


def test_the_registry_loads_a_table_of_counts(folder):
    data = load_dataset("spam-assassin", root=folder)
    assert data.inputs.shape == (3, 1024) and data.targets.tolist() == [0, 0, 1] and data.classes == ("ham", "spam")
    assert np.expm1(data.inputs).sum(1) == pytest.approx([7, 7, 7])
    (folder / "data/spam-2/3.txt").unlink()
    with pytest.raises(DatasetError, match="spam-assassin: the files in .* are damaged"):
        load_dataset("spam-assassin", root=folder)
    assert "wellposed data get spam-assassin" in find_dataset("spam-assassin").how_to_get


def test_hashed_words_are_positive_in_order_and_padded():
    table = hashed_words(["win money win", "money", ""], length=4, buckets=50)
    assert table.shape == (3, 4) and table.max() < 50
    assert table[0, 0] == table[0, 2] > 0 and table[0, 1] == table[1, 0]
    assert table[0, 3] == 0 and not table[2].any()
    assert hashed_words(["a b c"], length=2, buckets=50).shape == (1, 2)
