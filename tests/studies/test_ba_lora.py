"""BA-LoRA's study: the problem is what the card says, arms and estimands do what they say, smoke runs everything."""

import copy
import math
import os

import pytest
import torch
from jaxtyping import config
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from wellposed.datasets.registry import DatasetError, DatasetNotInstalled, find_dataset, is_installed
from wellposed.lab.study import Seed, protocol_of
from wellposed.lab.study_run import StudyOptions, run_study
from wellposed.lab.trial import Outcome, Trial
from wellposed.losses.bias_alleviating import BiasAlleviatingLoRA
from wellposed.losses.logit_terms import LogitConsistency
from wellposed.papers.catalogue import find_card
from wellposed.step import DivergenceError
from wellposed.studies.ba_lora import (
    METHODS,
    STUDY,
    FixedSteps,
    adapted,
    adapting_pays_and_imbalance_bites,
    class_weights,
    cosine,
    measured,
    minority_is_hard,
    noise_harms_the_teacher,
    pretrained,
    recalls,
    run,
)
from wellposed.studies.problems import rotated_digits as problems
from wellposed.studies.problems.bias_alleviating_figures import LEVELS, RIVALS, SHOWN, gains
from wellposed.studies.problems.math_questions import TokenBatches, is_right, read_examples, read_questions
from wellposed.studies.problems.rotated_digits import _block, corrupted, rotated, rotated_digits
from wellposed.studies.published import ba_lora as published

SMALL = {"source": "digits", "p": 0.3, "width": 32, "pretraining_steps": 20, "steps": 3}
SETTINGS = {**SMALL, "method": "plain", "init": "pissa", "learning_rate": 2e-3, "weight_decay": 0.01}
METHOD_SETTINGS = {
    "plain": {},
    "trio": {"consistency": 0.1, "diversity": 0.1, "concentration": 0.1, "schedule": "constant"},
    "v5": {"consistency": 0.1, "diversity": 0.1, "concentration": 0.1},
    "kl": {"consistency": 0.1, "schedule": "constant"},
    "balanced": {"exponent": 0.5},
    "smoothing": {"smoothing": 0.1},
    "mixup": {"alpha": 0.4},
    "ema": {"decay": 0.9},
    "sam": {"rho": 0.05},
    "wise": {"share": 0.5},
}
needs_mnist = pytest.mark.skipif(not is_installed(find_dataset("mnist")), reason="MNIST is not installed")


def trial(phase="evaluate", **settings):
    return Trial("s", "arm", "smoke", phase, {**SETTINGS, **settings}, 1000 if phase == "evaluate" else 0, "f")


def start(seed=1000, p=0.3):
    return pretrained(seed, p, "digits", 20, 32)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)  # for speed; the tests of the method check shapes
    found = run_study(
        STUDY, find_card("ba-lora"), StudyOptions("smoke", tmp_path_factory.mktemp("ba"), engine="serial")
    )
    config.update("jaxtyping_disable", before)
    return found


def test_smoke_runs_every_arm_claim_and_figure(smoke):
    assert set(smoke.values) == set(STUDY.estimands)
    assert all(o.status == "finished" for arm in smoke.arms.values() for o in arm.outcomes)
    assert [figure.svg.startswith("<svg") for figure in STUDY.figures(smoke)] == [True, True]
    assert [row.label for row in gains(smoke)] == list(RIVALS.values())
    assert all(f"{arm}_{level}" in smoke.arms for arm in {*SHOWN, *RIVALS} for level in LEVELS)
    STUDY.check(find_card("ba-lora"))


# The card


def test_the_card_registers_what_the_plan_says():
    card = find_card("ba-lora")
    protocol = protocol_of(card)
    claims = {claim.id: claim for claim in card.claims}
    assert [c.id for c in card.claims if c.primary] == ["trio"]
    assert {name: claims[name].margin for name in STUDY.estimands} == {
        "trio": 0.0, "beyond_kl": 0.0, "each_term": 0.0, "minority": 0.28, "noisier": 0.005,
    }  # fmt: skip
    assert claims["minority"].margin == pytest.approx(math.log(61.7 / 26.4) / 3, abs=5e-3)
    assert claims["noisier"].margin == pytest.approx((3.26 - 1.11) / 100 / 3 * 0.6 / 0.85, abs=1e-3)
    assert {claims[name].kind for name in STUDY.exact} == {"exact"}
    assert (protocol.seeds, protocol.tuning_rounds, protocol.tuning_seeds) == (12, 32, 2)
    assert protocol.worst["acc"] == 0.1 and protocol.worst["min"] == 0.0
    assert len(protocol.arms) == 3 * 16
    for level, p in LEVELS.items():
        names = [name for name in protocol.arms if name.endswith(level)]
        assert len(names) == 16 and all(protocol.arms[name].fixed["p"] == p for name in names)


def test_every_arm_searches_the_shared_knobs_and_its_own():
    arms = protocol_of(find_card("ba-lora")).arms
    own = {
        "lora": set(), "pissa": set(), "trio": {"consistency", "diversity", "concentration", "schedule"},
        "trio_no_cr": {"diversity", "concentration", "schedule"}, "trio_no_dr": {"consistency", "concentration", "schedule"},
        "trio_no_svd": {"consistency", "diversity", "schedule"}, "pissa_kl": {"consistency", "schedule"},
        "lora_kl": {"consistency", "schedule"}, "v5": {"consistency", "diversity", "concentration"},
        "pissa_balanced": {"exponent"}, "pissa_smoothing": {"smoothing"}, "pissa_mixup": {"alpha"},
        "pissa_ema": {"decay"}, "pissa_sam": {"rho"}, "pissa_wise": {"share"},
    }  # fmt: skip
    for level in LEVELS:
        assert not arms[f"teacher_{level}"].space
        for name, knobs in own.items():
            arm = arms[f"{name}_{level}"]
            assert set(arm.space) == {"learning_rate", "weight_decay", "steps"} | knobs, name
            assert arm.rounds == 32
            assert arm.fixed["init"] == ("kaiming" if name.startswith("lora") else "pissa")
    space = arms["trio_p30"].space
    assert (space["consistency"].low, space["consistency"].high, space["consistency"].default) == (0.015, 3.0, 0.15)
    assert (space["diversity"].low, space["diversity"].high, space["diversity"].default) == (0.003, 0.3, 0.03)
    assert (space["learning_rate"].low, space["learning_rate"].high) == (3e-4, 1e-2)
    assert space["steps"].choices == (50, 100, 200, 400)
    assert {arm.fixed["method"] for arm in arms.values()} == {*METHODS, "teacher"}


# The problem


def test_a_seed_redraws_the_problem_and_repeats_itself():
    a, b, again = (rotated_digits(seed, "digits") for seed in (1000, 1001, 1000))
    for name in ("upright", "train", "labels", "test"):
        assert torch.equal(getattr(a, name), getattr(again, name))
        assert getattr(a, name).shape != getattr(b, name).shape or not torch.equal(getattr(a, name), getattr(b, name))
    assert not torch.equal(a.minority, b.minority) or not torch.equal(a.labels[:20], b.labels[:20])


def test_five_classes_keep_three_examples_and_a_share_of_the_labels_is_wrong():
    for seed in (3, 1000):
        problem = rotated_digits(seed, "digits")
        counts = torch.bincount(problem.truth, minlength=10)
        assert (counts[problem.minority] == 3).all() and (counts[~problem.minority] > 10).all()
        assert int(problem.minority.sum()) == 5
        assert int((problem.labels != problem.truth).sum()) == round(0.15 * len(problem.truth))
        assert len(problem.validation) == 100 and len(problem.test) == 400


def test_wrong_labels_are_other_classes_drawn_uniformly():
    labels = torch.full((9000,), 4)
    given = corrupted(labels, 1.0, torch.Generator().manual_seed(0))
    counts = torch.bincount(given, minlength=10)
    assert counts[4] == 0 and (counts[counts > 0] - 1000).abs().max() < 150
    assert torch.equal(corrupted(labels, 0.0, torch.Generator()), labels)
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\], got 1.5"):
        corrupted(labels, 1.5, torch.Generator())


def test_rotation_turns_back_and_keeps_the_centre():
    image = torch.zeros(1, 1, 15, 15)
    image[0, 0, 7, 11] = 1.0  # to the right of the centre
    rows, columns = (torch.arange(15.0)[:, None], torch.arange(15.0))
    turned = rotated(image)[0, 0]
    mass = turned.sum()
    x, y = float((turned * columns).sum() / mass) - 7, 7 - float((turned * rows).sum() / mass)
    assert math.degrees(math.atan2(y, x)) == pytest.approx(30, abs=1)
    assert math.hypot(x, y) == pytest.approx(4, abs=0.1)
    smooth = torch.exp(-((rows - 7) ** 2 + (columns - 9) ** 2) / 8)[None, None]
    torch.testing.assert_close(rotated(rotated(smooth), -30.0), smooth, rtol=0, atol=0.1)


def test_blocks_are_disjoint_and_tuning_sees_no_image_of_the_evaluation():
    evaluation = [set(_block(1000 + i).tolist()) for i in range(12)]
    tuning = [set(_block(i).tolist()) for i in range(2)]
    assert all(len(block) == 5000 for block in evaluation + tuning)
    assert len(set.union(*evaluation)) == 60_000 and max(set.union(*evaluation)) < 60_000
    assert len(set.union(*tuning)) == 10_000 and min(set.union(*tuning)) >= 60_000


@needs_mnist
def test_mnist_has_the_sizes_of_the_card():
    problem = rotated_digits(1000)
    sizes = [len(x) for x in (problem.upright, problem.validation, problem.test)]
    assert sizes == [700, 500, 3300] and problem.test.shape[1] == 196
    assert 230 < len(problem.train) < 310
    assert abs(float(problem.upright.mean())) < 0.02 and abs(float(problem.upright.std()) - 0.93) < 0.03
    problems._images.cache_clear()  # 50 megabytes


# Arms


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_by_its_own_way(method):
    assert set(METHOD_SETTINGS) == set(METHODS)
    first = start()
    settings = {**SETTINGS, "steps": 12, "learning_rate": 1e-2, **METHOD_SETTINGS[method]}
    before = copy.deepcopy(first.model.state_dict())
    model = adapted(first, {**settings, "method": method}, 1000)
    assert all(torch.equal(value, before[name]) for name, value in first.model.state_dict().items())
    assert [type(part) for part in model] == [type(part) for part in first.model]
    repeated = adapted(first, {**settings, "method": method}, 1000)
    plain = adapted(first, {**settings, "method": "plain"}, 1000)
    assert torch.equal(model[0].weight, repeated[0].weight)
    assert torch.equal(model[0].weight, plain[0].weight) == (method == "plain")


def test_arms_of_one_start_share_it_and_begin_there():
    assert start() is start()
    assert not torch.equal(start(p=0.6).model[0].weight, start().model[0].weight)
    still = adapted(start(), {**SETTINGS, "learning_rate": 1e-12, "weight_decay": 0.0}, 1000)
    x = start().problem.test
    torch.testing.assert_close(still(x), start().model(x), rtol=0, atol=1e-4)


def test_wise_lies_between_the_pretrained_and_the_tuned_weights():
    first, settings = start(), {**SETTINGS, "steps": 12, "learning_rate": 1e-2}
    full = adapted(first, settings, 1000)
    for share in (0.0, 0.5, 1.0):
        found = adapted(first, {**settings, "method": "wise", "share": share}, 1000)
        for a, b, c in zip(found.parameters(), first.model.parameters(), full.parameters(), strict=True):
            torch.testing.assert_close(a, b + share * (c - b), rtol=0, atol=1e-5)


def test_terms_of_the_arms_have_the_settings_of_the_card():
    first = start()
    trio = METHODS["trio"]({"consistency": 0.5, "diversity": 0.2, "schedule": "published"}, first)
    assert isinstance(trio, BiasAlleviatingLoRA) and trio.variant == "v6"
    assert [term.strength for term in trio.terms] == [0.5, 0.2, 0.0]
    assert (trio.consistency.temperature, trio.concentration.k, trio.consistency.schedule) == (2.0, 5, "cosine")
    assert torch.equal(trio.consistency.teacher.table, first.model(first.problem.train))
    kl = METHODS["kl"]({"consistency": 0.5, "schedule": "constant"}, first)
    assert isinstance(kl, LogitConsistency) and kl.schedule == "constant" and kl.form == "kl"
    assert METHODS["v5"]({"consistency": 1.0}, first).consistency.form == "normalized_mse"


def test_batches_are_of_one_size_and_come_round():
    x = torch.arange(10.0)
    batches = list(FixedSteps(x, x.long(), steps=5, seed=0, weights=x, batch=4))
    assert len(batches) == 5
    seen = torch.cat([batch.index for batch in batches])
    assert (torch.bincount(seen, minlength=10) == 2).all()
    for batch in batches:
        assert torch.equal(batch.inputs, x[batch.index]) and torch.equal(batch.weights, x[batch.index])


def test_class_weights_have_mean_one_and_the_power_of_the_counts():
    labels = torch.tensor([0] * 8 + [1] * 2)
    weights = class_weights(labels, 0.5)
    assert float(weights.mean()) == pytest.approx(1) and float(weights[-1] / weights[0]) == pytest.approx(2)


def test_the_learning_rate_falls_along_a_cosine():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = cosine(optimizer, 4), []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466, 0.0])


def test_tuning_returns_a_score_alone_and_evaluation_everything():
    assert set(run(trial("tune")).metrics) == {"score"}
    metrics = run(trial()).metrics
    assert set(metrics) == {"score", "acc", "min", "maj", "kl", "train_accuracy"}
    assert metrics["acc"] == pytest.approx((metrics["min"] + metrics["maj"]) / 2)
    teacher = run(trial(method="teacher")).metrics
    assert teacher["kl"] == pytest.approx(0.0, abs=1e-6) and metrics["kl"] > 1e-4


def test_recalls_count_each_class_alike():
    logits, labels = torch.eye(10)[[0, 0, 1, 2]], torch.tensor([0, 0, 0, 2])
    found = recalls(logits, labels)
    assert found[:3].tolist() == pytest.approx([2 / 3, 0.0, 1.0])


def test_a_model_that_left_the_finite_numbers_diverged():
    first = start()
    broken = copy.deepcopy(first.model)
    broken[0].weight.fill_(math.nan)
    with pytest.raises(DivergenceError, match="not finite"):
        measured(broken, first, tuning=True)


# Claims


def outcome(**metrics):
    return Outcome("finished", metrics)


def seed(**changes):
    arms = {
        "lora_p30": outcome(acc=0.55, maj=0.8, min=0.3), "pissa_p30": outcome(acc=0.6, min=0.39),
        "trio_p30": outcome(acc=0.62, min=0.49), "pissa_kl_p30": outcome(acc=0.63), "trio_no_cr_p30": outcome(acc=0.61),
        "trio_no_dr_p30": outcome(acc=0.6), "trio_no_svd_p30": outcome(acc=0.62), "trio_p60": outcome(acc=0.5),
        "pissa_p60": outcome(acc=0.45), "trio_p00": outcome(acc=0.7), "pissa_p00": outcome(acc=0.69),
        "teacher_p30": outcome(acc=0.4), "teacher_p00": outcome(acc=0.5), "teacher_p60": outcome(acc=0.3),
    }  # fmt: skip
    return Seed(1000, {**arms, **changes}, dict(protocol_of(find_card("ba-lora")).worst))


def test_estimands_are_those_of_the_card():
    found = {name: estimand(seed()) for name, estimand in STUDY.estimands.items()}
    assert found["trio"] == pytest.approx({"lora": 0.07, "pissa": 0.02})
    assert found["beyond_kl"] == pytest.approx({"pissa_kl": -0.01})
    assert found["each_term"] == pytest.approx({"trio_no_cr": 0.01, "trio_no_dr": 0.02, "trio_no_svd": 0.0})
    assert found["minority"] == pytest.approx(math.log(0.5 / 0.4))
    assert found["noisier"] == pytest.approx(0.04)


def test_a_diverged_trial_counts_as_the_worst_value():
    diverged = seed(trio_p30=Outcome("diverged"))
    assert STUDY.estimands["trio"](diverged)["pissa"] == pytest.approx(-0.5)
    assert STUDY.estimands["minority"](diverged) == pytest.approx(math.log(0.01 / 0.4))


def test_regimes_are_judged_on_the_baselines_alone():
    assert [c.holds for c in adapting_pays_and_imbalance_bites([seed()])] == [True, True]
    stays = seed(lora_p30=outcome(acc=0.44, maj=0.5, min=0.38))
    assert [c.holds for c in adapting_pays_and_imbalance_bites([stays])] == [False, False]
    assert [c.holds for c in minority_is_hard([seed()])] == [True]
    assert [c.holds for c in minority_is_hard([seed(pissa_p30=outcome(acc=0.9, min=0.7))])] == [False]
    assert [c.holds for c in noise_harms_the_teacher([seed()])] == [True]
    assert [c.holds for c in noise_harms_the_teacher([seed(teacher_p60=outcome(acc=0.45))])] == [False]


@pytest.mark.parametrize("name", STUDY.exact)
def test_exact_claims_hold(name):
    cases = STUDY.exact[name]()
    assert [case.name for case in cases if not case.holds] == []
    assert len(cases) >= 20


# The published configuration


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of whole words, and questions of three forms."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    base = tmp_path_factory.mktemp("published")
    place = base / "ba-lora"
    place.mkdir()
    examples = [{"query": f"What is {i} plus 1 ?", "response": f"The answer is: {i + 1}"} for i in range(8)]
    words = sorted(
        {w for e in examples for text in e.values() for w in text.split()} | {"###", "Response:", "Instruction:"}
    )
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", "<s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", bos_token="<s>")
    fast.save_pretrained(place / "llama-2-7b")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(place / "llama-2-7b")
    (place / "MetaMathQA-395K.json").write_text(json.dumps(examples))
    gsm8k = [{"question": "What is 1 plus 1 ?", "answer": "it is 2\n#### 2"}]
    math_ = [{"problem": "What is 2 plus 1 ?", "solution": r"so \boxed{\frac{6}{2}}"}]
    for name, rows in (("gsm8k_test.jsonl", gsm8k), ("math_test.jsonl", math_)):
        (place / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    return base


TINY = {"rank": 4, "alpha": 4, "examples": 8, "batch_size": 4, "micro_batches": 2, "length": 40, "answer_tokens": 3}


@pytest.mark.parametrize("arm", ["lora_2e5", "pissa_kl_1e4", "ba_lora"])
def test_published_arms_run_end_to_end(arm, folder, monkeypatch):
    monkeypatch.setenv("WELLPOSED_DATA", str(folder))
    fixed = protocol_of(find_card("ba-lora")).paper.arms[arm].fixed
    result = published.run(Trial("s", arm, "paper", "evaluate", {**fixed, **TINY}, 1000, "f"))
    assert 0 <= result.metrics["gsm8k"] <= 100 and 0 <= result.metrics["math"] <= 100
    assert math.isfinite(result.metrics["loss"])


def test_published_settings_are_those_of_the_authors_code():
    paper = protocol_of(find_card("ba-lora")).paper
    assert len(paper.arms) == 13 and paper.seeds == 3
    for arm in paper.arms.values():
        fixed = arm.fixed
        assert (fixed["rank"], fixed["alpha"], fixed["batch_size"], fixed["length"], fixed["epochs"]) == (
            128,
            128,
            32,
            512,
            1,
        )
        assert fixed["examples"] == 100_000 and fixed["warmup"] == 0.03 and fixed["method"] in published.METHODS
    rates = {arm.fixed["learning_rate"] for name, arm in paper.arms.items() if name.startswith("pissa_kl")}
    assert rates == {5e-6, 2e-5, 5e-5, 1e-4} and paper.arms["ba_lora"].fixed["learning_rate"] == 2e-5
    assert paper.published == {"lora_2e5": 42.68, "pissa_2e5": 51.48, "ba_lora": 55.86}
    trio = published.METHODS["trio"]()
    assert [term.strength for term in trio.terms] == [0.025, 0.005, 0.005] and trio.concentration.k == 10


def test_tokens_of_the_answer_are_targets_and_prompts_are_not(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "ba-lora" / "llama-2-7b", local_files_only=True)
    (batch,) = TokenBatches([("What is 3 plus 1 ?", "The answer is: 4"), ("What", "4")], tokenizer, 2, 100, seed=0)
    for row in range(2):
        valid = batch.targets[row] != -100
        first = int(valid.nonzero()[0])
        assert tokenizer.decode(batch.inputs["input_ids"][row, first]) == "Response:"  # predicts the first answer token
        answer = tokenizer.decode(batch.targets[row][valid])
        assert answer.split() in (["The", "answer", "is:", "4", "</s>"], ["4", "</s>"])
        assert int(batch.inputs["attention_mask"][row].sum()) >= first + int(valid.sum())


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("The answer is: 1,234", "1234", True),
        ("The answer is: $7.0", "7", True),
        (r"The answer is: \dfrac{1}{2}.", r"\frac{1}{2}", True),
        (r"The answer is: \left( 1, 2 \right)", "(1,2)", True),
        ("The answer is: 8", "7", False),
        ("The answer is: ", "7", False),
        ("seven", "7", False),
    ],
)
def test_answers_are_compared_as_numbers_or_letter_by_letter(response, answer, right):
    assert is_right(response, answer) is right


def test_missing_and_damaged_files_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("WELLPOSED_DATA", raising=False)
    protocol = protocol_of(find_card("ba-lora"))
    with pytest.raises(DatasetNotInstalled, match="llama-2-7b, MetaMathQA.* which is not set"):
        published.STUDY.prepare(protocol)
    monkeypatch.setenv("WELLPOSED_DATA", str(tmp_path))
    with pytest.raises(DatasetNotInstalled, match="llama-2-7b, .*math_test.jsonl not found in"):
        published.STUDY.prepare(protocol)
    broken = tmp_path / "x.json"
    broken.write_text('[{"query": "a"}]')
    with pytest.raises(DatasetError, match="needs a JSON list of entries with 'query' and 'response'"):
        read_examples(broken, 1)
    broken.write_text('[{"query": "a", "response": "b"}]')
    with pytest.raises(DatasetError, match="needs 2 examples, has 1"):
        read_examples(broken, 2)
    broken.write_text('{"problem": "a", "solution": "no box"}')
    with pytest.raises(DatasetError, match="line 1: needs 'question'"):
        read_questions(broken)


def test_the_published_learning_rate_warms_up():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = published.warmed_up_cosine(optimizer, 100, 0.03), []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1]) and rates[100] == pytest.approx(0)
