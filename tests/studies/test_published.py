"""The published configurations: their data are read and corrupted as said, every arm runs, killed runs go on."""

import pickle
import warnings
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch

from wellposed.compose import Compose
from wellposed.datasets.registry import ENVIRONMENT, DatasetError, DatasetNotInstalled
from wellposed.evaluation import predict
from wellposed.lab.study import protocol_of
from wellposed.lab.study_run import StudyOptions, run_study
from wellposed.lab.trial import Trial
from wellposed.papers.catalogue import find_card
from wellposed.step import DivergenceError
from wellposed.studies.networks import NETWORKS, BasicBlock, ResidualNetwork
from wellposed.studies.problems.cifar import (
    ASYMMETRIC_PAIRS,
    corrupted_labels,
    noisy_images,
    read_cifar,
)
from wellposed.studies.problems.image_transforms import CropAndFlip, Normalise
from wellposed.studies.published import elr, images, nested_dropout
from wellposed.studies.published.images import CHECKPOINTS, ImageTask, checkpoints, require_data
from wellposed.studies.published.recipe import Recipe

PUBLISHED = ("elr", "ps-kd", "nested-dropout", "weight-compander")
TINY = {"width": 1 / 32, "batch_size": 32, "epochs": 1, "warmup_epochs": 0, "stage2_epochs": 1}
TINY_OF_CARD = {name: TINY[name] for name in ("width", "batch_size", "epochs")}
NESTED = {
    "dataset": "cifar10", "network": "tiny", "noise": "other", "rate": 0.2, "noisy_validation": False,
    "learning_rate": 0.05, "weight_decay": 5e-4, "compress": "nested", "sigma": 4.0, "co_teaching": True,
    "forget_rate": 0.2, "stage2_learning_rate": 0.01,
}  # fmt: skip


def write_cifar(folder):
    """Random images in the format of the real files: 100 to train and 20 to test, 10 and 5 classes."""
    generator = np.random.default_rng(0)

    def part(path, count, classes, key):
        path.parent.mkdir(exist_ok=True)
        labels = [i % classes for i in range(count)]
        table = {b"data": generator.integers(0, 256, (count, 3072), dtype=np.uint8), key: labels}
        path.write_bytes(pickle.dumps(table, protocol=4))

    for i in range(1, 6):
        part(folder / "cifar-10-batches-py" / f"data_batch_{i}", 20, 10, b"labels")
    part(folder / "cifar-10-batches-py" / "test_batch", 20, 10, b"labels")
    part(folder / "cifar-100-python" / "train", 100, 5, b"fine_labels")
    part(folder / "cifar-100-python" / "test", 20, 5, b"fine_labels")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_cifar(folder)
    return folder


@pytest.fixture
def data(written, tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, str(written))
    monkeypatch.setenv(CHECKPOINTS, str(tmp_path / "checkpoints"))
    monkeypatch.setitem(NETWORKS, "tiny", partial(ResidualNetwork, BasicBlock, (1, 1, 1, 1)))
    return written


def published_arms(slug):
    paper = protocol_of(find_card(slug)).paper if find_card(slug).protocol else None
    if paper is None:
        pytest.skip(f"the card of {slug} has no [protocol.paper]")
    return paper.arms


def trial(settings, phase="evaluate", slug="elr", seed=None):
    seed = (1000 if phase == "evaluate" else 0) if seed is None else seed
    return Trial(f"study:{slug}", "arm", "paper", phase, {**settings, **TINY}, seed, "f")


ELR = {
    "dataset": "cifar10", "network": "tiny", "noise": "uniform", "rate": 0.4, "learning_rate": 0.02,
    "weight_decay": 1e-3, "milestones": "1, 2", "loss": "elr", "strength": 3.0, "momentum": 0.7,
}  # fmt: skip


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_images_and_labels_are_read_as_they_were_written(data):
    found = read_cifar("cifar10")
    assert (found.train.shape, found.test.shape, found.classes) == ((100, 3, 32, 32), (20, 3, 32, 32), 10)
    table = pickle.loads((data / "cifar-10-batches-py" / "data_batch_3").read_bytes())
    # A row holds 1024 red, 1024 green and 1024 blue values, row by row.
    assert int(found.train[45, 1, 2, 3]) == int(table[b"data"][5][1024 + 2 * 32 + 3])
    assert found.labels[40:60].tolist() == table[b"labels"]
    assert read_cifar("cifar100").classes == 100
    assert read_cifar("cifar100", root=data / "cifar-100-python").labels.tolist() == [i % 5 for i in range(100)]


def test_files_of_python_2_are_read(tmp_path, data):
    """The real files were pickled by Python 2 and an old NumPy, which names its functions otherwise."""
    for name in ("train", "test"):
        table = pickle.loads((data / "cifar-100-python" / name).read_bytes())
        raw = pickle.dumps(table, protocol=2).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
        assert b"numpy.core.multiarray" in raw
        (tmp_path / "cifar-100-python").mkdir(exist_ok=True)
        (tmp_path / "cifar-100-python" / name).write_bytes(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(read_cifar("cifar100", root=tmp_path).train, read_cifar("cifar100").train)


def test_absent_data_are_named_with_the_place_that_was_searched(tmp_path, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(DatasetNotInstalled, match="cifar-10-batches-py.*WELLPOSED_DATA names, which is not set"):
        read_cifar("cifar10")
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    with pytest.raises(DatasetNotInstalled, match=f"there is no {tmp_path}/cifar-100-python.*Nothing is downloaded"):
        require_data([{"dataset": "cifar100"}])
    write_cifar(tmp_path)
    require_data([{"dataset": "cifar100"}, {"dataset": "cifar10"}])
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(DatasetNotInstalled, match="cifar-10-batches-py/data_batch_4 is missing"):
        elr.run(trial(ELR))
    with pytest.raises(ValueError, match=r"name must be one of \['cifar10', 'cifar100'\], got 'svhn'"):
        read_cifar("svhn")


class Harmful:
    def __reduce__(self):
        import os

        return os.system, ("true",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Ran out of input"),
        (b"not a pickle", ""),
        (pickle.dumps(Harmful()), "asks for (posix|nt).system"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}), "labels"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}), "2 images, 1 labels"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}), r"must lie in \[0, 10\)"),
    ],
)
def test_damaged_and_harmful_files_are_refused_by_name(tmp_path, content, reason):
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(DatasetError, match=f"test_batch is .*{reason}"):
        read_cifar("cifar10", root=tmp_path)


def test_noise_has_its_rate_and_its_targets():
    truth = torch.arange(10).repeat(2000)

    def wrong(noise, rate):
        given = corrupted_labels(truth, rate, noise, 10, torch.Generator().manual_seed(0))
        return given, given != truth

    given, changed = wrong("other", 0.4)
    assert torch.bincount(truth[changed]).tolist() == [800] * 10
    assert torch.bincount((given - truth)[changed] % 10, minlength=10)[1:].min() > 700  # 889 expected
    _, changed = wrong("uniform", 0.4)
    expected = 0.4 * 0.9
    assert abs(float(changed.float().mean()) - expected) < 4 * (expected * 0.64 / 20000) ** 0.5
    given, changed = wrong("asymmetric", 0.4)
    for label in range(10):
        mine = truth == label
        # Exactly its rate in every class: cats that became dogs are not turned back.
        assert float(changed[mine].float().mean()) == pytest.approx(0.4 if label in ASYMMETRIC_PAIRS else 0.0)
        assert set(given[mine & changed].tolist()) <= {ASYMMETRIC_PAIRS.get(label)}
    assert not bool(wrong("none", 0.4)[1].any()) and not bool(wrong("other", 0.0)[1].any())


def test_wrong_noise_is_refused_by_name():
    labels, generator = torch.zeros(4, dtype=torch.int64), torch.Generator()
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\], got 1.5"):
        corrupted_labels(labels, 1.5, "other", 10, generator)
    with pytest.raises(ValueError, match="got 'human'"):
        corrupted_labels(labels, 0.5, "human", 10, generator)
    with pytest.raises(ValueError, match="names classes of CIFAR-10, got classes=100"):
        corrupted_labels(labels, 0.5, "asymmetric", 100, generator)
    with pytest.raises(ValueError, match=r"held_out must lie in \[0, 1\), got 1"):
        noisy_images("cifar10", 0, held_out=1.0)


def test_the_split_is_stratified_disjoint_and_redrawn_by_the_seed(data):
    whole = read_cifar("cifar10")
    problem = noisy_images("cifar10", seed=0, rate=1 / 3, noise="other", noisy_validation=False)
    assert (len(problem.train), len(problem.validation)) == (90, 10)
    assert torch.bincount(problem.validation_labels).tolist() == [1] * 10  # clean, one of each class
    assert torch.bincount(problem.truth[problem.wrong]).tolist() == [3] * 10
    rows = {image.numpy().tobytes(): int(label) for image, label in zip(whole.train, whole.labels, strict=True)}
    for image, label in zip(problem.train, problem.truth, strict=True):
        assert rows.pop(image.numpy().tobytes()) == int(label)
    assert sorted(rows) == sorted(image.numpy().tobytes() for image in problem.validation)
    assert torch.equal(problem.test, whole.test) and torch.equal(problem.test_labels, whole.test_labels)
    again, other = (noisy_images("cifar10", seed=s, rate=1 / 3, noise="other") for s in (0, 1))
    assert torch.equal(again.train, problem.train) and torch.equal(again.labels, problem.labels)
    assert not torch.equal(other.train, problem.train)
    given = noisy_images("cifar10", seed=0, rate=1.0, noise="other").validation_labels
    assert bool((given != problem.validation_labels).all())
    assert len(noisy_images("cifar10", seed=0, held_out=0.0).validation) == 0


# ── augmentation ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_crop_is_a_window_of_the_image_with_a_black_margin_perhaps_mirrored():
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(1, 256, (64, 3, 8, 8), dtype=torch.uint8, generator=generator)
    found = CropAndFlip(margin=2)(batch, torch.Generator().manual_seed(1))
    mirrored, places = 0, set()
    for image, crop in zip(batch, found, strict=True):
        padded = torch.zeros(3, 12, 12, dtype=torch.uint8)
        padded[:, 2:10, 2:10] = image
        windows = {(y, x): padded[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)}
        hits = [
            (place, flip)
            for place, window in windows.items()
            for flip in (False, True)
            if torch.equal(crop, window.flip(2) if flip else window)
        ]
        assert len(hits) == 1
        mirrored += hits[0][1]
        places.add(hits[0][0])
    assert 16 < mirrored < 48 and len(places) > 15
    assert torch.equal(found, CropAndFlip(margin=2)(batch, torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match="margin must be >= 0, got -1"):
        CropAndFlip(margin=-1)


def test_normalised_training_images_have_mean_0_and_deviation_1_in_every_channel():
    batch = torch.randint(0, 200, (32, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = Normalise(batch)(batch, torch.Generator())
    assert found.dtype == torch.float32
    assert torch.allclose(found.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(found.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)
    black = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert bool(Normalise(black)(black, torch.Generator()).isfinite().all())


# ── recipe ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_learning_rate_follows_warm_up_and_milestones_step_by_step():
    recipe = Recipe(epochs=4, batch_size=8, learning_rate=2.0, weight_decay=0.0, milestones=(1, 3), warmup_epochs=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = recipe.schedule(optimizer, total=6 * 3)
    rates = []
    for _ in range(18):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [2 * (i + 1) / 6 for i in range(6)] + [2.0] * 3 + [0.2] * 6 + [0.02] * 3
    assert rates == pytest.approx(expected)


def test_a_recipe_names_what_is_missing_or_wrong():
    with pytest.raises(ValueError, match="the setting 'weight_decay' is missing"):
        Recipe.read({"epochs": 1, "batch_size": 1, "learning_rate": 0.1})
    with pytest.raises(ValueError, match="epochs and batch_size must be >= 1"):
        Recipe(0, 1, 0.1, 0.0)
    with pytest.raises(ValueError, match="decay_on must be 'all', 'weights' or 'method', got 'biases'"):
        Recipe(1, 1, 0.1, 0.0, decay_on="biases")


# ── arms ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("slug", PUBLISHED)
def test_every_published_arm_runs_end_to_end(slug, data, tmp_path):
    module = import_module(f"wellposed.studies.published.{slug.replace('-', '_')}")
    for name, arm in published_arms(slug).items():
        result = module.run(trial(arm.fixed, slug=slug))
        assert 0 <= result.metrics["accuracy"] <= 100, name
        assert result.metrics["error"] == pytest.approx(100 - result.metrics["accuracy"])
        assert {"nll", "ece", "aurc"} <= set(result.metrics)
        assert len(result.curves["test"]) == 1
        noisy = float(arm.fixed.get("rate", 0)) > 0
        assert ("memorised" in result.metrics) == noisy
        held_out = arm.fixed.get("held_out", 0.1) > 0
        assert ("accuracy_best_validation" in result.metrics) == held_out == ("score" in result.metrics)
    assert not list((tmp_path / "checkpoints").glob("*"))  # nothing is left of runs that are done


@pytest.mark.parametrize("slug", PUBLISHED)
def test_the_card_and_the_module_speak_of_one_thing(slug, data):
    study = import_module(f"wellposed.studies.published.{slug.replace('-', '_')}").STUDY
    assert (study.slug, study.estimands, study.headline[0]) == (slug, {}, "accuracy")
    paper = protocol_of(find_card(slug)).paper if find_card(slug).protocol else None
    if paper is None:
        pytest.skip(f"the card of {slug} has no [protocol.paper]")
    require_data(arm.fixed for arm in paper.arms.values())
    assert paper.metric in ("accuracy", "accuracy_best_validation") and paper.published
    assert {arm.role for arm in paper.arms.values()} >= {"method", "baseline"}
    settings = [set(arm.fixed) for arm in paper.arms.values()]
    assert all("bf16" in s and "epochs" in s for s in settings)


def test_the_laboratory_runs_the_published_arms_of_elr(data, tmp_path):
    options = StudyOptions(
        "paper", tmp_path / "out", seeds=2, overrides={**TINY_OF_CARD, "network": "tiny"}, engine="serial"
    )
    run = run_study(elr.STUDY, find_card("elr"), options)
    assert list(run.arms) == ["ce", "gce", "sce", "elr"] and run.verdicts == {}
    for arm in run.arms.values():
        assert [outcome.status for outcome in arm.outcomes] == ["finished", "finished"]
        assert (arm.settings["noise"], arm.settings["rate"]) == ("uniform", 0.4)


def test_tuning_sees_no_test_image(data, monkeypatch):
    result = elr.run(trial(ELR, phase="tune"))
    assert set(result.metrics) == {"score", "best_score"} and set(result.curves) == {"validation"}


def test_a_trial_is_a_function_of_its_seed(data):
    first, again, other = (elr.run(trial(ELR, seed=s)).metrics for s in (1000, 1000, 1001))
    assert first == again and first["nll"] != other["nll"]


def test_bfloat16_is_an_option(data):
    plain, half = elr.run(trial(ELR)), elr.run(trial({**ELR, "bf16": True}))
    assert np.isfinite(half.metrics["nll"])
    assert half.metrics["nll"] != plain.metrics["nll"]


def test_unknown_methods_are_refused_by_name(data):
    with pytest.raises(ValueError, match=r"loss must be one of \['ce', .*, got 'magic'"):
        elr.run(trial({**ELR, "loss": "magic"}))
    with pytest.raises(ValueError, match="compress must be 'none', 'nested' or 'dropout', got 'magic'"):
        nested_dropout.run(trial({**NESTED, "compress": "magic"}))
    with pytest.raises(ValueError, match=r"held_out must leave validation examples, got 0\.0"):
        nested_dropout.run(trial({**NESTED, "held_out": 0.0}))


def test_weight_decay_spares_biases_and_norms_where_the_recipe_says_so(data):
    """With a learning rate of almost nothing but decay, only what decays moves much."""
    task = ImageTask(trial(ELR))
    for decay_on, moves in (("weights", {"weights"}), ("all", {"weights", "norms"}), ("method", set())):
        network = task.network()
        with torch.no_grad():
            network.head.weight.zero_()  # no gradient reaches the rest
            network.head.bias.fill_(1.0)
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        recipe = Recipe(1, 32, 1e-6, 1e4, decay_on=decay_on)
        trained, _ = task.train(network, recipe)
        moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in trained.named_parameters()}
        changed = {
            "norms" if before[name].ndim == 1 else "weights"
            for name, by in moved.items()
            if not name.startswith("head") and by > 0.01 * (float(before[name].abs().max()) or 1.0)
        }
        assert changed == moves, decay_on


# ── nested dropout's two stages ───────────────────────────────────────────────────────────────────────────────────
def test_stage_2_fine_tunes_both_networks_of_stage_1_with_frozen_batch_norm(data, monkeypatch):
    """Both networks differ, co-teaching starts from them, and no statistics of BatchNorm move."""
    seen = []
    original = ImageTask.train

    def watched(self, model, recipe, method=None, **options):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trained, record = original(self, model, recipe, method, **options)
        after = {name: value.clone() for name, value in trained.state_dict().items()}
        seen.append((recipe, before, after, trained))
        return trained, record

    monkeypatch.setattr(ImageTask, "train", watched)
    result = nested_dropout.run(trial(NESTED))
    (_, _, a, _), (_, _, b, _), (recipe, start, end, pair) = seen
    assert recipe.learning_rate == 0.01
    assert not torch.equal(a["head.weight"], b["head.weight"]) and "head.bias" not in a
    for key, stage_1 in (("a", a), ("b", b)):
        for name, value in stage_1.items():
            assert torch.equal(start[f"{key}.{name}"], value)
        moved = {n for n in stage_1 if n in {k[2:] for k in end} and not torch.equal(end[f"{key}.{n}"], stage_1[n])}
        assert moved and not any("norm" in n or "running" in n or n.startswith("stem.1") for n in moved)
    task = ImageTask(trial(NESTED))
    logits, labels = predict(pair, task.test)
    # The returned networks are those of the best validation epoch.
    found = 100 * float((logits.argmax(1) == labels).float().mean())
    assert found == pytest.approx(result.metrics["accuracy_best_validation"])


def test_the_best_validation_epoch_is_kept(data):
    task = ImageTask(trial(ELR))
    recipe = Recipe(4, 32, 0.05, 0.0)
    model, record = task.train(task.network(), recipe, nested_dropout._method({"compress": "none"}))
    best = max(range(4), key=record.curves["validation"].__getitem__)
    logits, labels = predict(model, task.validation)
    assert 100 * float((logits.argmax(1) == labels).float().mean()) == pytest.approx(record.curves["validation"][best])
    assert record.metrics()["accuracy_best_validation"] == record.curves["test"][best]


# ── killed runs ───────────────────────────────────────────────────────────────────────────────────────────────────
class Killed(BaseException):
    pass


def kill_after(monkeypatch, epochs):
    """Let the process die in the middle of the epoch after so many, counted over all networks of a trial."""
    original, begun = CropAndFlip.__call__, []

    def crop(self, batch, generator):
        begun.append(None)
        if len(begun) == epochs * 3 + 2:  # 90 images in batches of 32
            raise Killed
        return original(self, batch, generator)

    monkeypatch.setattr(CropAndFlip, "__call__", crop)
    return begun


@pytest.mark.parametrize(
    ("module", "settings", "epochs"),
    [(elr, {**ELR, "epochs": 3}, 2), (nested_dropout, {**NESTED, "stage2_epochs": 2}, 3)],
    ids=["elr", "nested-dropout"],
)
def test_a_killed_run_goes_on_bit_for_bit(module, settings, epochs, data, tmp_path, monkeypatch):
    wanted = Trial("study:x", "arm", "paper", "evaluate", {**TINY, **settings}, 1000, "f")
    straight = module.run(wanted)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, epochs)
        module.run(wanted)
    assert list((tmp_path / "checkpoints").glob("*/*.pt"))
    with monkeypatch.context() as patch:
        begun = kill_after(patch, epochs=10**6)
        resumed = module.run(wanted)
    assert len(begun) == 3  # one epoch was left of each
    assert resumed.metrics == straight.metrics and resumed.curves == straight.curves
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_divergence_leaves_no_checkpoint_and_any_other_error_leaves_it(tmp_path, monkeypatch):
    monkeypatch.setenv(CHECKPOINTS, str(tmp_path))
    for error, left in ((DivergenceError("inf"), 0), (RuntimeError("out of memory"), 1)):
        with pytest.raises(type(error)), checkpoints(trial(ELR)) as place:
            place("network").parent.mkdir()
            place("network").write_bytes(b"x")
            raise error
        assert len(list(tmp_path.glob("*/*.pt"))) == left


def test_checkpoints_of_other_settings_or_seeds_are_not_mistaken(tmp_path, monkeypatch):
    monkeypatch.setenv(CHECKPOINTS, str(tmp_path))
    places = []
    for one in (trial(ELR), trial({**ELR, "strength": 1.0}), trial(ELR, seed=1001)):
        with checkpoints(one) as place:
            places.append(place("network"))
    assert len(set(places)) == 3 and all(place.is_relative_to(tmp_path) for place in places)


# ── devices ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_trials_spread_over_the_devices_and_stay_where_they_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    chosen = [images.choose_device(trial(ELR, seed=1000 + s)) for s in range(40)]
    assert {device.index for device in chosen} == {0, 1, 2} and chosen[0].type == "cuda"
    assert chosen[:5] == [images.choose_device(trial(ELR, seed=1000 + s)) for s in range(5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert images.choose_device(trial(ELR)).type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_arm_runs_on_the_accelerator(data):
    wanted = trial({**ELR, "bf16": True})
    assert ImageTask(wanted).images.is_cuda
    assert 0 <= elr.run(wanted).metrics["accuracy"] <= 100


def test_the_record_is_the_last_method(data):
    """It must see the prefix that the methods before it have chosen."""
    task = ImageTask(trial(NESTED))
    method = nested_dropout._method({**NESTED, "co_teaching": False})
    model, record = task.train(task.network(bias=False), Recipe(2, 32, 0.05, 0.0), method)
    assert isinstance(method, Compose) and len(record.curves["validation"]) == 2
    logits, labels = predict(model, task.validation)
    assert 100 * float((logits.argmax(1) == labels).float().mean()) == pytest.approx(max(record.curves["validation"]))
