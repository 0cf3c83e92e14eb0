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


def test_text_among_numbers_is_a_missing_number_and_is_quoted(table):
    path, frame = table
    frame["income"] = frame["income"].astype(object)
    frame.loc[7, "income"] = "n/k"
    frame.to_csv(path, index=False)
    refuse(r"1 in 'income' \(first in row 8: 'n/k'\)", path, target="churned")
    assert "income" in read_source(str(path), "churned", drop_missing=True).features


def test_numbers_beyond_single_precision_are_infinite(table, tmp_path):
    path, frame = table
    frame.loc[3, "income"] = 1e300
    frame.to_csv(path, index=False)
    refuse(r"1 in 'income' \(first in row 4\)", path, target="churned")
    np.savez(tmp_path / "big.npz", x=np.full((40, 2), 1e300), y=np.arange(40) % 2)
    refuse(r"every row has a missing or infinite value, 40 in 'feature 0'", tmp_path / "big.npz")
    refuse("--drop-missing would leave nothing", tmp_path / "big.npz", drop_missing=True)


def test_missing_targets_are_named_and_can_be_left_out(table, tmp_path):
    path, frame = table
    frame["churned"] = frame["churned"].where(frame.index != 5)
    frame.to_csv(path, index=False)
    refuse(r"1 in 'churned' \(first in row 6\)", path, target="churned")
    assert read_source(str(path), "churned", drop_missing=True).classes == ("no", "yes")
    targets = np.where(np.arange(40) == 2, np.nan, np.arange(40) % 2)
    np.savez(tmp_path / "a.npz", x=np.arange(80.0).reshape(40, 2), y=targets)
    refuse(r"1 in 'targets' \(first in row 3\)", tmp_path / "a.npz")
    source = read_source(str(tmp_path / "a.npz"), drop_missing=True)
    assert source.classes == ("0", "1")
    assert source.row_ids.tolist() == [0, 1, *range(3, 40)]


def test_many_columns_with_missing_values_are_told_in_one_line(tmp_path):
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(40, 6)), columns=list("abcdef"))
    for count, column in enumerate("abcde", 1):
        frame.loc[: count - 1, column] = np.nan
    frame.to_csv(tmp_path / "t.csv", index=False)
    refuse(r"5 in 'e' \(first in row 1\), 4 in 'd' .* and 2 more columns\. Clean", tmp_path / "t.csv", target="f")


def test_identifiers_dates_durations_and_nested_values_are_left_out(tmp_path):
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "customer_id": np.arange(60) + 1000,
            "width": np.arange(60),
            "day": pd.date_range("2020", periods=60),
            "zoned": pd.date_range("2020", periods=60, tz="UTC"),
            "length": pd.to_timedelta(random.integers(1, 9, 60), "D"),
            "list": [[1, 2]] * 60,
            "level": pd.array(random.integers(0, 4, 60), dtype="Int64"),
            "flag": pd.array(random.random(60) < 0.5, dtype="boolean"),
            "kind": pd.Categorical(random.choice(["u", "v"], 60)),
            "y": random.choice(["no", "yes"], 60),
        }
    )
    frame.to_parquet(tmp_path / "t.parquet")
    source = read_source(str(tmp_path / "t.parquet"), "y")
    assert source.features == ("width", "level", "flag", "kind=u", "kind=v")
    assert source.columns == 4
    assert [note.partition(": ")[2] for note in source.notes] == ["an identifier", "a date", "a date", "a duration", "neither number nor text"]  # fmt: skip


def test_semicolons_decimal_commas_tabs_and_named_indices_are_understood(tmp_path):
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"a": random.normal(size=40).round(4), "b": random.normal(size=40).round(4), "y": np.arange(40) % 2}
    )
    frame.to_csv(tmp_path / "plain.csv", index=False)
    frame.to_csv(tmp_path / "german.csv", index=False, sep=";", decimal=",")
    frame.to_csv(tmp_path / "mixed.csv", index=False, sep=";")
    frame.to_csv(tmp_path / "tabs.TSV", index=False, sep="\t")
    frame.set_index("a").to_parquet(tmp_path / "index.parquet")
    digests = {read_source(str(path), "y").digest for path in tmp_path.iterdir()}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"   \n\n", "is empty"),
        (b"a,b,y\n", "has no rows"),
        (b"a,y\n1,n\n1,2,3,4\n", "cannot be read: Error tokenizing data"),
        ("a,y\n1,é\n".encode("latin-1"), "is not UTF-8 .*; save it as UTF-8"),
        (b"y\n" + b"1\n2\n" * 20, "no column beside 'y' can be used: it is the only one"),
        (b"a,y\n" + b"3,1\n3,2\n" * 20, r"no column beside 'y' can be used \(left out 'a': constant\)"),
        (b"a,y\n" + b"1,n\n2,n\n" * 20, r"only one class \('n'\)"),
        (
            b"a,y\n" + b"1,n\n2,p\n" * 20 + b"3,q\n",
            r"41 rows for 3 classes; each class needs at least 5; too rare: 'q' \(1\)",
        ),
        (b"a,y\n" + b"1,1.5\n2,3.5\n", "2 rows are too few; at least 20 are needed"),
    ],
)
def test_a_table_without_enough_in_it_is_refused(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    refuse(rf"t\.csv.*{message}", tmp_path / "t.csv", target="y")


def test_a_target_that_does_not_fit_the_task_is_refused(table):
    path, _ = table
    refuse("the target holds text such as 'no'; use --task classification", path, target="churned", task="regression")
    refuse("the target has 60 different texts in 60 rows; is it an identifier", path, target="name")
    refuse("--task regression does not fit digits", "digits", task="regression")
    refuse("--task classification does not fit diabetes", "diabetes", task="classification")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((40, 2)), "y": np.arange(40) % 2}, "every feature is constant"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, r"is empty: inputs have shape \(0, 2\)"),
        ({"x": np.zeros(40), "y": np.zeros(40)}, r"must be \(rows, features\) or images, got shape \(40,\)"),
        ({"x": np.zeros((40, 2), complex), "y": np.zeros(40)}, "inputs must be numbers, got complex128"),
        ({"x": np.zeros((40, 2)), "y": np.zeros(40, complex)}, "targets must be numbers, got complex128"),
        ({"x": np.float32(1), "y": np.float32(1)}, r"inputs \(\) and targets \(\) must have one row an example"),
        ({"x": np.zeros((40, 2)), "y": np.eye(40)}, r"targets \(40, 40\) must have one row an example"),
        ({"x": np.array([[1, None]] * 40), "y": np.zeros(40)}, "not a readable .npz file"),
        ({"inputs": np.zeros((40, 2))}, r"has no targets: keys are \['inputs'\]; allowed: y, targets"),
    ],
)
def test_unfit_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    refuse(rf"a\.npz.*{message}", tmp_path / "a.npz")


def test_a_truncated_archive_and_a_single_array_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((400, 2)), y=np.zeros(400))
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: len(content) // 2])
    refuse("a.npz: not a readable .npz file", tmp_path / "a.npz")
    np.save(tmp_path / "b.npy", np.zeros(3))
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    refuse("b.npz: not a readable .npz file", tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("images", "largest"),
    [
        (np.full((40, 4, 4), 255, np.uint8), 1.0),
        (np.full((40, 4, 4), 65535, np.uint16), 1.0),
        (np.full((40, 4, 4), 255, np.float64), 1.0),
        (np.full((40, 4, 4), 0.7, np.float64), 0.7),
        (np.full((40, 4, 4), 2.5, np.float64), 2.5),
        (np.full((40, 4, 4), True), 1.0),
    ],
)
def test_images_of_whole_numbers_become_shares_and_others_stay(tmp_path, images, largest):
    np.savez(tmp_path / "i.npz", x=images, y=np.arange(40) % 2)
    source = read_source(str(tmp_path / "i.npz"))
    assert source.inputs.shape == (40, 1, 4, 4)
    assert source.inputs.max() == pytest.approx(largest)


def folder(path, image, count=5):
    for name in ("a", "b"):
        (path / name).mkdir(parents=True)
        for i in range(count):
            image.save(path / name / f"{i}.png")
    return str(path)


def test_transparent_images_stand_on_white_and_16_bits_keep_their_greys(tmp_path):
    clear = read_source(folder(tmp_path / "clear", Image.new("RGBA", (9, 9), (0, 0, 0, 0))))
    assert clear.inputs.shape == (10, 3, 32, 32)
    assert clear.inputs.min() == 1
    deep = read_source(folder(tmp_path / "deep", Image.fromarray(np.full((9, 9), 32768, np.uint16))))
    assert deep.inputs.shape == (10, 1, 32, 32)
    assert deep.inputs.mean() == pytest.approx(0.5, abs=0.01)


def test_one_coloured_image_makes_all_coloured_and_hidden_files_are_no_images(tmp_path):
    path = folder(tmp_path / "mixed", Image.new("L", (9, 9), 51))
    Image.new("RGB", (9, 9), (255, 0, 0)).save(tmp_path / "mixed/b/red.jpg")
    (tmp_path / "mixed/a/._0.png").write_bytes(b"no image")
    (tmp_path / "mixed/.hidden").mkdir()
    (tmp_path / "mixed/notes").mkdir()
    source = read_source(path, image_size=8)
    assert source.inputs.shape == (11, 3, 8, 8)
    np.testing.assert_allclose(source.inputs[0], 0.2, atol=1e-6)


def test_folders_of_parts_are_not_taken_for_classes(tmp_path):
    for part in ("train", "test"):
        folder(tmp_path / "pets" / part, Image.new("L", (9, 9)))
    refuse("pets holds the parts test, train, not classes: give one of them", tmp_path / "pets")
    assert read_source(str(tmp_path / "pets/train")).classes == ("a", "b")
    refuse("--image-size must be at least 4, got 0", tmp_path / "pets/train", image_size=0)


@pytest.mark.parametrize("damage", [lambda content: content[:-30], lambda _: b"", lambda content: content[:60]])
def test_an_unreadable_image_is_named(tmp_path, damage):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8))
    path = folder(tmp_path / "pets", image)
    bad = tmp_path / "pets/b/3.png"
    bad.write_bytes(damage(bad.read_bytes()))
    refuse(r"cannot read the image .*pets/b/3\.png: ", path)


def test_a_damaged_data_set_is_told_from_an_unknown_one(monkeypatch, tmp_path):
    for name in ("train-images", "t10k-images"):
        (tmp_path / f"{name}-idx3-ubyte.gz").write_bytes(b"nonsense")
        (tmp_path / f"{name.replace('images', 'labels')}-idx1-ubyte.gz").write_bytes(b"nonsense")
    monkeypatch.setenv("WELLPOSED_DATA", str(tmp_path))
    refuse("fashion-mnist: the files in .* are damaged .*; remove them and get them again", "fashion-mnist")


@pytest.mark.parametrize("data", ["", "nowhere/data.csv", "no-such-thing-at-all"])
def test_data_that_do_not_exist_are_one_line(data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refuse(f"no file (and no data set )?'{data}'", data)


def test_the_digest_follows_the_content_and_not_the_name(table, tmp_path):
    path, frame = table
    frame.to_csv(tmp_path / "copy.csv", index=False)
    assert read_source(str(path), "churned").digest == read_source(str(tmp_path / "copy.csv"), "churned").digest
    frame.loc[0, "income"] += 1
    frame.to_csv(path, index=False)
    assert read_source(str(path), "churned").digest != read_source(str(tmp_path / "copy.csv"), "churned").digest
