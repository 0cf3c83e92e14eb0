"""MAID's published problems on tiny files of the real formats: sizes, starts, moduli, and messages where data are missing."""

import dataclasses
import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from wellposed.datasets.registry import ENVIRONMENT, DatasetError, DatasetNotInstalled
from wellposed.lab.study import protocol_of
from wellposed.lab.trial import Trial
from wellposed.papers.catalogue import find_card
from wellposed.studies.problems.published_bilevel import MNIST_FILES, kodak, mnist_at_twelve
from wellposed.studies.published.maid import STUDY, MnistLogistic, _foe, _tv, run

PAPER = protocol_of(find_card("maid")).paper
TINY = {"images": 2, "size": 12, "experts": 3, "held_out": 10, "budget": 40}


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def data(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    (tmp_path / "kodak").mkdir()
    (tmp_path / "mnist").mkdir()
    for number in range(3):
        pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "kodak" / f"kodim{number:02d}.png")
    for name, count in zip(MNIST_FILES, (40, 40, 20, 20), strict=True):
        array = generator.integers(0, 256, (count, 28, 28)) if "images" in name else np.arange(count) % 10
        (tmp_path / "mnist" / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("arm", ["tv_maid", "foe_maid", "mnist_hoag_cubic"])
def test_every_problem_runs_and_no_loss_rises(arm, data):
    settings = {**PAPER.arms[arm].fixed, **TINY}
    found = run(Trial("s", arm, "paper", "evaluate", settings, 1000, "f")).metrics
    assert 0 < found["loss_ratio"] <= 1 and found["units"] <= 45
    assert ("psnr" in found) != ("accuracy" in found)


def test_sizes_and_starts_are_those_of_the_paper(data):
    assert {arm.fixed["method"] for arm in PAPER.arms.values()} == {
        "maid",
        "hoag_geometric",
        "hoag_quadratic",
        "hoag_cubic",
    }
    foe = {**PAPER.arms["foe_maid"].fixed, **{k: TINY[k] for k in ("images", "size")}}
    problem = _foe(foe, 0)[0]
    assert len(problem.lower.u0) == 2449
    raw = {name: h.raw for name, h in problem.hypers.items()}
    torch.testing.assert_close(raw["strength"], torch.tensor(-3.0, dtype=torch.float64))
    torch.testing.assert_close(raw["smoothings"], torch.full((48,), -3.5, dtype=torch.float64))
    assert float(raw["filters"].mean((1, 2)).abs().max()) < 1e-6
    tv = _tv({**PAPER.arms["tv_maid"].fixed, **TINY}, 0)[0]
    assert tv.lower.u0.tolist() == [-5.0, -5.0] and tv.lower.mu.lower({}) == 1.0
    mnist = MnistLogistic(0, 10)
    assert mnist.levels().lower.u0.shape == (1440,) and len(mnist.inputs) == 30 and len(mnist.test) == 20
    assert not torch.equal(MnistLogistic(1, 10).labels, mnist.labels)


def test_pixels_are_averaged_and_squares_are_central(data):
    train, labels, test, _ = mnist_at_twelve()
    assert train.shape == (40, 144) and test.shape == (20, 144) and labels.tolist()[:3] == [0, 1, 2]
    assert float(train.min()) >= 0 and float(train.max()) <= 1
    with gzip.open(data / "mnist" / f"{MNIST_FILES[0]}.gz") as file:
        first = np.frombuffer(file.read(), np.uint8, offset=16)[:784].reshape(28, 28)
    assert float(train[0, 0]) == pytest.approx(first[2:4, 2:4].mean() / 255)
    squares = kodak(2, 12)
    with Image.open(sorted((data / "kodak").glob("*.png"))[0]) as image:
        gray = np.asarray(image.convert("L"))
    np.testing.assert_allclose(squares[0].numpy(), gray[4:16, 9:21] / 255)


def test_missing_and_damaged_data_are_told(data, monkeypatch):
    with pytest.raises(DatasetNotInstalled, match=r"Kodak: 24 photographs \(.png\): .* holds 3"):
        STUDY.prepare(dataclasses.replace(protocol_of(find_card("maid")), arms=PAPER.arms))
    with pytest.raises(DatasetError, match="is smaller than 64 x 64"):
        kodak(1, 64)
    target = data / "mnist" / f"{MNIST_FILES[1]}.gz"
    target.write_bytes(gzip.compress(idx(np.arange(40))[:-5]))
    with pytest.raises(DatasetError, match="is cut off: 35 values, 40 announced"):
        mnist_at_twelve()
    target.write_bytes(gzip.compress(b"hello"))
    with pytest.raises(DatasetError, match="wrong magic number"):
        mnist_at_twelve()
    target.unlink()
    with pytest.raises(DatasetNotInstalled, match="train-labels-idx1-ubyte not found"):
        mnist_at_twelve()
    monkeypatch.delenv(ENVIRONMENT)
    with pytest.raises(DatasetNotInstalled, match="WELLPOSED_DATA names, which is not set"):
        kodak(1, 4)
