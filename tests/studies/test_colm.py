"""CoLM's study: the mixture is what the card says, arms and estimands do what they say, smoke runs everything."""

import json
import math

import pytest
import torch
from jaxtyping import config

from wellposed.gradients.mini_batch_coreset import MiniBatchCoreset
from wellposed.lab.space import Choice, Range
from wellposed.lab.study import Seed, protocol_of
from wellposed.lab.study_run import StudyOptions, run_study
from wellposed.lab.trial import Outcome, Trial
from wellposed.papers.catalogue import find_card
from wellposed.step import DivergenceError, Step
from wellposed.studies import colm
from wellposed.studies.colm import METHODS, STUDY, HighestLoss, MeasuredSelection, run
from wellposed.studies.problems.coreset_cases import replay_shortfall
from wellposed.studies.problems.source_mixture import BIG, SIZES, Pools, source_mixture
from wellposed.studies.training import multilayer_perceptron

SETTINGS = {
    "method": "colm",
    "pool": 128,
    "steps": 3,
    "lr": 0.03,
    "weight_decay": 0.01,
    "topk": 120,
    "scale": 0.02,
    "trainings": 2,
}


def trial(phase="evaluate", **settings):
    return Trial("s", "arm", "smoke", phase, {**SETTINGS, **settings}, 1000 if phase == "evaluate" else 0, "f")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colm")
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)  # for speed; the tests of the method check shapes
    found = run_study(STUDY, find_card("colm"), StudyOptions("smoke", folder, engine="serial"))
    config.update("jaxtyping_disable", before)
    return found


def test_smoke_runs_every_arm_claim_and_figure(smoke):
    assert set(smoke.values) == set(STUDY.estimands)
    assert all(o.status == "finished" for arm in smoke.arms.values() for o in arm.outcomes)
    (figure,) = STUDY.figures(smoke)
    assert figure.svg.startswith("<svg") and "CoLM" in figure.svg
    STUDY.check(find_card("colm"))


def test_the_card_registers_what_the_dossier_says():
    card = find_card("colm")
    claims = {claim.id: claim for claim in card.claims}
    assert [c.id for c in card.claims if c.primary] == ["larger_batches"]
    assert {c.id: c.margin for c in card.claims if c.margin is not None} == {
        "larger_batches": 0, "ranking": 0, "exact_ranking": 0, "keep_small": 0.018, "natural_mixture": 0.01, "equal_compute": 0,
    }  # fmt: skip
    assert claims["keep_small"].margin == pytest.approx(math.log(56.6 / 53.6) / 3, abs=2e-4)
    assert claims["natural_mixture"].kind == "equivalence" and claims["natural_mixture"].non_inferiority
    protocol = protocol_of(card)
    assert (protocol.seeds, protocol.tuning_rounds, protocol.tuning_seeds) == (12, 16, 2) and len(protocol.arms) == 14
    shared = {"lr", "weight_decay", "steps"}
    for name, arm in protocol.arms.items():
        assert shared <= set(arm.space) and arm.rounds == 16
        assert arm.space["lr"] == Range(3e-3, 1e-1, True, default=3e-2)
        assert arm.space["steps"].choices == ((250, 500) if name == "random-64-long" else (150, 300))
        own = {"random-128-ema": {"decay"}}.get(name, {"topk"} if name.startswith("colm") else set())
        assert set(arm.space) - shared == own
        assert arm.fixed["method"] in METHODS and arm.fixed["pool"] == (
            int(name.split("-")[1]) if name[:6] == "random" else 128
        )
    assert protocol.arms["colm"].space["topk"] == Choice((30, 120, 480), 120)
    assert {arm.fixed["method"] for arm in protocol.arms.values()} == set(METHODS)
    assert all(value == 0.1 for value in protocol.worst.values())


# ── the problem ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_mixture_has_the_shares_of_math_instruct():
    mixture = source_mixture(3)
    assert (
        mixture.train.shape == (39_800, 32)
        and mixture.test.shape == (10, 2000, 32)
        and mixture.validation.shape == (10, 1000, 32)
    )
    assert torch.bincount(mixture.source).tolist() == list(SIZES)
    method = METHODS["colm"]({}, mixture, 0)
    assert method.small == set(range(BIG, 10))
    share = float(mixture.shares[BIG:].sum())
    assert share == pytest.approx(0.271, abs=1e-3) and share * 128 / 64 == pytest.approx(0.54, abs=0.01)
    for q in range(10):
        own = mixture.train[mixture.source == q]
        assert float((own - own.mean(0)).std()) == pytest.approx(1, abs=0.03)
    centres = torch.stack([mixture.train[mixture.source == q].mean(0) for q in range(10)])
    assert float(centres.std()) == pytest.approx(1.2, abs=0.15)
    assert len(mixture.labels.unique()) == 10
    source_mixture.cache_clear()
    assert torch.equal(source_mixture(3).train, mixture.train) and not torch.equal(
        source_mixture(4).train, mixture.train
    )


def test_pools_are_drawn_without_replacement_and_differ_from_epoch_to_epoch():
    mixture = source_mixture(0, scale=0.02)
    pools = list(Pools(mixture, 128, 12, seed=1))
    per_epoch = len(mixture.labels) // 128
    first, second = (
        torch.cat([p.index for p in part]) for part in (pools[:per_epoch], pools[per_epoch : 2 * per_epoch])
    )
    assert len(first.unique()) == len(first) == 128 * per_epoch and not torch.equal(first, second)
    assert all(torch.equal(p.extra["source"], mixture.source[p.index]) for p in pools) and len(pools) == 12
    with pytest.raises(ValueError, match=r"size must lie in \[1, 796\]"):
        Pools(mixture, 1000, 1, 0)


# ── arms ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("method", METHODS)
def test_every_arm_runs_twice_alike(method):
    settings = {"method": method, "decay": 0.9, "trainings": 1}
    first, second = (run(trial(**settings)) for _ in range(2))
    assert first.metrics == second.metrics and first.curves == second.curves
    assert 0 < first.metrics["macro"] < 1
    assert ("gradient_error" in first.metrics) == (method not in ("random", "ema"))


def test_coreset_arms_differ_in_what_their_names_say():
    mixture = source_mixture(0, scale=0.02)
    made = {
        name: make({"topk": 30}, mixture, 5)
        for name, make in METHODS.items()
        if name not in ("random", "ema", "top_loss")
    }
    assert all(
        isinstance(m, MiniBatchCoreset) and m.ratio == 0.5 and m.topk == 30 and m.seed == 5 for m in made.values()
    )
    paper = made["colm"]
    assert paper.gradients.feature == "zo" and paper.gradients.fixed_z and paper.gradients.n_directions == 1
    assert (paper.adam, paper.metric, paper.weights, paper.ranking, paper.history) == (
        True,
        "l1",
        "uniform",
        "facility",
        "selected",
    )
    assert made["colm_m16"].gradients.n_directions == 16 and not made["colm_m16"].gradients.fixed_z
    assert made["colm_exact"].gradients.feature == "last_layer_grad" and made["colm_exact"].history == "optimizer"
    assert made["colm_no_keep"].small == frozenset() and not made["colm_no_adam"].adam
    assert made["colm_cluster"].weights == "cluster" and made["keep_random"].ranking == "random"
    assert made["keep_random_unbiased"].weights == "unbiased"


def test_the_control_has_the_sources_of_the_coreset():
    mixture = source_mixture(0, scale=0.2)
    (batch,) = Pools(mixture, 128, 1, seed=0)
    model = multilayer_perceptron([32, 48, 10], 0)
    found = []
    for name in ("colm", "keep_random"):
        step = Step(model, None, batch.inputs, batch.targets, batch.index, extra=dict(batch.extra))
        METHODS[name]({}, mixture, 0).on_batch(step)
        found.append((step.index, torch.bincount(step.extra["source"], minlength=10)))
    assert torch.equal(found[0][1], found[1][1]) and not torch.equal(found[0][0], found[1][0])
    assert int(found[0][1][BIG:].sum()) == int((batch.extra["source"] >= BIG).sum())


def test_the_highest_losses_are_those_of_the_model():
    mixture = source_mixture(0, scale=0.02)
    (batch,) = Pools(mixture, 128, 1, seed=0)
    model = multilayer_perceptron([32, 48, 10], 0)
    losses = torch.nn.functional.cross_entropy(model(batch.inputs), batch.targets, reduction="none")
    step = Step(model, None, batch.inputs, batch.targets, batch.index, extra=dict(batch.extra))
    measured = MeasuredSelection(HighestLoss())
    measured.on_batch(step)
    chosen = torch.isin(batch.index, step.index)
    assert int(chosen.sum()) == 64 and float(losses[chosen].detach().min()) >= float(losses[~chosen].detach().max())
    gradients = []
    for part in (losses[chosen], losses):
        model.zero_grad()
        part.mean().backward(retain_graph=True)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    expected = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    assert measured.errors == [pytest.approx(expected, rel=1e-4)]


def test_tuning_sees_one_number_and_evaluation_the_rest():
    assert set(run(trial("tune")).metrics) == {"score"}
    result = run(trial())
    metrics, by_source = result.metrics, torch.tensor(result.curves["by_source"])
    assert metrics["macro"] == pytest.approx(float(by_source.mean()))
    assert 10 * metrics["macro"] == pytest.approx(4 * metrics["big"] + 6 * metrics["small"])
    assert metrics["nat"] == pytest.approx(float((source_mixture(1000, 0.02).shares * by_source).sum()))
    assert metrics["small_share"] == pytest.approx(0.271, abs=2e-3)


def test_a_diverged_training_counts_as_a_tenth_on_every_source(monkeypatch):
    def fail(*args, **options):
        raise DivergenceError("lost")

    monkeypatch.setattr(colm, "fit", fail)
    metrics = run(trial()).metrics
    assert [metrics[name] for name in ("macro", "big", "small", "nat")] == pytest.approx([0.1] * 4)


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def seed(**arms):
    named = {name.replace("_", "-"): Outcome("finished", metrics) for name, metrics in arms.items()}
    return Seed(1000, named, {})


MADE_UP = {
    "random_64": {"macro": 0.50, "nat": 0.60, "big": 0.62, "small": 0.42, "small_share": 0.27},
    "random_128": {"macro": 0.54, "nat": 0.64}, "random_256": {"macro": 0.57, "nat": 0.66},
    "random_64_long": {"macro": 0.53}, "keep_random": {"macro": 0.55}, "colm": {"macro": 0.56, "nat": 0.61},
    "colm_exact": {"macro": 0.545}, "colm_no_keep": {"macro": 0.52},
}  # fmt: skip


def test_accuracies_are_compared_as_registered():
    value = {claim: estimand(seed(**MADE_UP)) for claim, estimand in STUDY.estimands.items()}
    assert value["larger_batches"] == pytest.approx({"random-128": 0.02, "random-256": -0.01})
    assert value["ranking"] == pytest.approx(0.01) and value["exact_ranking"] == pytest.approx(-0.005)
    assert value["keep_small"] == pytest.approx(math.log(0.56 / 0.52))
    assert value["natural_mixture"] == pytest.approx(-0.03) and value["equal_compute"] == pytest.approx(0.03)


def test_regimes_are_read_off_the_random_arms():
    regime = STUDY.regimes["larger_batches"]
    assert all(STUDY.regimes[c] is regime for c in STUDY.estimands if c != "keep_small")
    assert [(pytest.approx(c.value), c.holds) for c in regime([seed(**MADE_UP)])] == [(0.07, True), (0.27, True)]
    flat = {**MADE_UP, "random_256": {"macro": 0.505}, "random_64": {**MADE_UP["random_64"], "small_share": 0.36}}
    assert [c.holds for c in regime([seed(**flat)])] == [False, False]
    assert [c.holds for c in STUDY.regimes["keep_small"]([seed(**MADE_UP)])] == [True]
    even = {**MADE_UP, "random_64": {"big": 0.5, "small": 0.46}}
    assert [c.holds for c in STUDY.regimes["keep_small"]([seed(**even)])] == [False]


def test_the_exact_claims_hold_in_all_cases_and_could_fail(monkeypatch):
    found = {claim: cases() for claim, cases in STUDY.exact.items()}
    assert len(found["one_direction"]) == 40 and len(found["greedy"]) == 101
    assert all(case.holds for cases in found.values() for case in cases)
    S = torch.tensor([[3.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 3.0]])
    assert replay_shortfall(S, torch.tensor([0, 2])) == 0 and replay_shortfall(S, torch.tensor([0, 1])) > 0.3
    from wellposed.studies.problems import coreset_cases

    worst = lambda S, budget: (S.sum(0).argsort()[:budget], None)  # noqa: E731
    monkeypatch.setattr(coreset_cases, "facility_location", worst)
    assert not all(case.holds for case in coreset_cases.one_direction_cases())
    assert not all(case.holds for case in coreset_cases.greedy_cases())


# ── the published configuration ───────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def published(tmp_path, monkeypatch):
    """A tiny Phi with a tokenizer of digits and letters, and sums to learn."""
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    from wellposed.datasets.registry import ENVIRONMENT
    from wellposed.studies.published import colm as module
    from wellposed.studies.published.images import CHECKPOINTS

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    monkeypatch.setenv(CHECKPOINTS, str(tmp_path / "checkpoints"))
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .#:+\n"
    vocabulary = {letter: i for i, letter in enumerate(["<eos>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "phi-2")
    torch.manual_seed(0)
    transformers.PhiForCausalLM(
        transformers.PhiConfig(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
        )
    ).save_pretrained(tmp_path / "phi-2")  # fmt: skip
    rows = [
        {"instruction": f"{i} + 1", "output": str(i + 1), "source": "ab"[i % 4 == 0] + str(i % 2)} for i in range(24)
    ]
    (tmp_path / "math-instruct").mkdir()
    (tmp_path / "math-instruct" / "train.json").write_text(json.dumps(rows))
    for domain in module.DOMAINS:
        (tmp_path / "math-instruct" / domain).mkdir()
        questions = [{"instruction": row["instruction"], "answer": row["output"]} for row in rows[:3]]
        (tmp_path / "math-instruct" / domain / "sums.json").write_text(json.dumps(questions))
    return module


def test_every_published_arm_runs(published):
    paper = protocol_of(find_card("colm")).paper
    published.prepare(paper)
    assert paper.published == {"random-128": 49.8, "random-256": 51.8, "colm": 51.9} and len(paper.arms) == 4
    seen = {}
    for name, arm in paper.arms.items():
        small = {**arm.fixed, "pool": 8, "steps": 2, "rank": 2, "length": 128, "new_tokens": 2}
        seen[name] = published.run(Trial("s", name, "paper", "evaluate", small, 1000, "f")).metrics
        assert 0 <= seen[name]["accuracy"] <= 100 and 0 <= seen[name]["out_of_domain"] <= 100
    with pytest.raises(ValueError, match="method must be one of"):
        published.method_of({"method": "best"}, None, torch.zeros(1, dtype=torch.int64), 0)


def test_published_pools_predict_the_answer_alone(published):
    folder, data = published.folders()
    model, tokenizer = published.adapted_model(folder, 2, 0)
    rows = json.loads((data / "train.json").read_text())
    pools = published.TextPools(rows, tokenizer, 8, 2, 200, 0)
    batch = next(iter(pools))
    for row, i in enumerate(batch.index.tolist()):
        wanted = batch.targets[row][batch.targets[row] != -100]
        assert tokenizer.decode(wanted).replace(" ", "") == rows[i]["output"] + "<eos>"
        (places,) = (batch.targets[row] != -100).nonzero(as_tuple=True)
        # The input at the next position is the target at this one.
        assert torch.equal(batch.inputs["input_ids"][row, places[1:]], batch.targets[row, places[:-1]])
    assert len(pools.sources.unique()) == 3
    name = published.compared_tensor(model)
    assert "layers.1" in name and name.endswith("v_proj.lora_B.default.weight")
    method = published.method_of({"method": "colm", "topk": 5, "micro_batch": 2}, model, pools.sources, 0)
    step = Step(model, None, batch.inputs, batch.targets, batch.index, extra=dict(batch.extra))
    method.on_batch(step)
    assert len(step.index) == 4 and method.gradients.parameter == name
    wanted = [
        published.same_number(a, b) for a, b in (("x 12.", "12"), ("-3", "3"), ("1,000 apples", "1000"), ("", "1"))
    ]
    assert wanted == [True, False, True, False]


def test_missing_model_or_data_are_named(monkeypatch, tmp_path):
    from wellposed.datasets.registry import ENVIRONMENT, DatasetNotInstalled
    from wellposed.studies.published.colm import folders

    for value in (None, str(tmp_path)):
        monkeypatch.delenv(ENVIRONMENT, raising=False)
        if value:
            monkeypatch.setenv(ENVIRONMENT, value)
        with pytest.raises(
            DatasetNotInstalled, match=r"colm needs the model phi-2/.*train.json.*Nothing is downloaded"
        ):
            folders()
