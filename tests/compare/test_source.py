"""Reading data: every way in which it can be wrong is one clear line, before any training."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from wellposed.compare.errors import UserError
from wellposed.compare.source import read_source


@pytest.fixture
def table(tmp_path):
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "age": random.integers(18, 80, 60),
            "income": random.normal(3, 1, 60).round(3),
            "plan": random.choice(["basic", "plus"], 60),
            "active": random.random(60) < 0.5,
            "constant": 1,
            "name": [f"person {i}" for i in range(60)],
            "churned": random.choice(["no", "yes"], 60),
        }
    )
    path = tmp_path / "customers.csv"
    frame.to_csv(path, index=False)
    return path, frame


def refuse(message, *arguments, **options):
    with pytest.raises(UserError, match=message) as error:
        read_source(*map(str, arguments), **options)
    assert "\n" not in str(error.value)


def test_a_table_is_encoded_and_what_is_left_out_is_told(table):
    path, _ = table
    source = read_source(str(path), "churned")
    assert source.features == ("age", "income", "plan=basic", "plan=plus", "active")
    assert source.kind == "classification"
    assert source.classes == ("no", "yes")
    assert source.inputs.dtype == np.float32
    assert set(source.notes) == {"left out 'constant': constant", "left out 'name': text with 60 different values"}


def test_parquet_holds_the_same_as_csv(table, tmp_path):
    path, frame = table
    frame.to_parquet(tmp_path / "customers.parquet")
    a, b = read_source(str(path), "churned"), read_source(str(tmp_path / "customers.parquet"), "churned")
    assert a.digest == b.digest


def test_numbers_are_regression_and_few_whole_numbers_are_classes(table):
    path, _ = table
    assert read_source(str(path), "income").kind == "regression"
    assert read_source(str(path), "age", task="regression").kind == "regression"
    assert read_source("digits").kind == "classification"


def test_missing_files_and_columns_suggest_the_nearest(table, tmp_path):
    path, _ = table
    refuse(r"no file '.*custmers.csv'. Did you mean 'customers.csv'\?", tmp_path / "custmers.csv", target="churned")
    refuse(
        r"customers.csv has no column 'churn'. Did you mean 'churned'\? Columns: age, income, .* \(7\)",
        path,
        target="churn",
    )
    refuse("say which column to predict with --target", path)
    refuse(r"no file and no data set 'digit'. Did you mean 'digits'\?", "digit")


def test_missing_values_are_named_and_can_be_left_out(table):
    path, frame = table
    frame.loc[[3, 8], "income"] = np.nan
    frame.loc[[8, 9], "age"] = np.nan
    frame.to_csv(path, index=False)
    refuse(r"2 in '(income|age)' \(first in row \d\).*--drop-missing to leave out 3 of 60 rows", path, target="churned")
    source = read_source(str(path), "churned", drop_missing=True)
    assert len(source.targets) == 57
    assert 8 not in source.row_ids
    assert "left out 3 of 60 rows with missing values" in source.notes


def test_infinite_values_in_arrays_are_named(tmp_path):
    x = np.arange(80, dtype=np.float32).reshape(40, 2)
    x[4, 1] = np.inf
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(40) % 2)
    refuse(r"1 in 'feature 1' \(first in row 5\).*leave out 1 of 40 rows", tmp_path / "a.npz")
    assert len(read_source(str(tmp_path / "a.npz"), drop_missing=True).targets) == 39


def test_one_class_and_too_few_rows_are_refused(tmp_path):
    np.savez(tmp_path / "one.npz", x=np.zeros((40, 2)), y=np.zeros(40, int))
    refuse(r"only one class \('0'\); at least two are needed", tmp_path / "one.npz")
    np.savez(tmp_path / "few.npz", x=np.zeros((12, 2)), y=np.arange(12) % 3)
    refuse(r"12 rows for 3 classes; each class needs at least 5; too rare: '0' \(4\)", tmp_path / "few.npz")
    np.savez(tmp_path / "same.npz", x=np.zeros((40, 2)), y=np.full(40, 0.5))
    refuse("all targets are 0.5; there is nothing to predict", tmp_path / "same.npz", task="regression")


def test_archives_with_wrong_keys_or_shapes_are_refused(tmp_path):
    np.savez(tmp_path / "keys.npz", a=np.zeros(3))
    refuse(r"keys.npz has no inputs: keys are \['a'\]", tmp_path / "keys.npz")
    np.savez(tmp_path / "rows.npz", x=np.zeros((3, 2)), y=np.zeros(4))
    refuse(r"inputs \(3, 2\) and targets \(4,\) must have one row an example", tmp_path / "rows.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK nonsense")
    refuse("broken.npz: not a readable .npz file", tmp_path / "broken.npz")
    (tmp_path / "empty.csv").write_text("")
    refuse("empty.csv is empty", tmp_path / "empty.csv", target="a")
    (tmp_path / "a.docx").write_text("x")
    refuse("cannot read '.docx'", tmp_path / "a.docx")
    refuse("--target applies to CSV and Parquet only", "digits", target="y")
    refuse("--task must be classification or regression, got 'guess'", "digits", task="guess")


def test_images_last_become_images_first_and_bytes_become_shares(tmp_path):
    np.savez(tmp_path / "i.npz", images=np.full((20, 8, 9, 3), 255, np.uint8), labels=np.arange(20) % 2)
    source = read_source(str(tmp_path / "i.npz"))
    assert source.inputs.shape == (20, 3, 8, 9)
    assert source.inputs.max() == 1.0


def test_a_folder_of_images_by_class(tmp_path):
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(random.integers(0, 255, (20, 30), dtype=np.uint8)).save(
                tmp_path / "pets" / name / f"{i}.png"
            )
    source = read_source(str(tmp_path / "pets"), image_size=16)
    assert source.inputs.shape == (12, 1, 16, 16)
    assert source.classes == ("cat", "dog")
    (tmp_path / "pets" / "dog" / "bad.png").write_bytes(b"no image")
    refuse("cannot read the image .*bad.png", tmp_path / "pets")
    (tmp_path / "nothing").mkdir()
    refuse("no images in folders by class", tmp_path / "nothing")


def test_a_data_set_that_is_not_installed_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr("wellposed.datasets.registry.locate", lambda *_: None)
    refuse(
        r"fashion-mnist is not installed; get it with: wellposed data get fashion-mnist \(Debian package dataset-fashion-mnist, 30.9 MB, MIT\)",
        "fashion-mnist",
    )
