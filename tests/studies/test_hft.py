"""HFT's study: data and model are what the card says, arms and claims do what they say, smoke runs everything."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import config

from wellposed.lab.study import Seed, protocol_of
from wellposed.lab.study_run import StudyOptions, run_study
from wellposed.lab.trial import Outcome, Trial
from wellposed.papers.catalogue import find_card
from wellposed.step import DivergenceError
from wellposed.studies import hft
from wellposed.studies.hft import RATES, STUDY, chosen_rate, run
from wellposed.studies.problems import continual_runs
from wellposed.studies.problems.continual_runs import (
    Sizes,
    kept_at,
    kept_between_processes,
    pareto_front,
    problem_of,
    run_stages,
)
from wellposed.studies.problems.fact_table import (
    CONTENT,
    FACT,
    LONGEST,
    TASKS,
    VOCABULARY,
    Knowledge,
    fact_table,
    knowledge_batches,
    stage_batches,
    stream,
    task_accuracy,
    task_sequences,
)
from wellposed.studies.problems.half_freezing_cases import frozen_movement
from wellposed.studies.problems.tiny_llama import TinyLlama

SMALL = {"facts": 20, "knowledge_steps": 2, "test_size": 16, "steps": 2, "rates": 2, "weight_decay": 0.01}
OWN = {
    "fft": {"method": "fft"},
    "hft-category": {"method": "hft", "strategy": "category"},
    "hft-layer": {"method": "hft", "strategy": "layer"},
    "hft-model": {"method": "hft", "strategy": "model"},
    "fft-wise": {"method": "fft-wise", "alpha": 0.5},
    "l2sp": {"method": "l2sp", "strength": 0.1},
    "lora": {"method": "lora", "rank": 4},
}


@pytest.fixture(autouse=True, scope="module")
def own_folder(tmp_path_factory):
    """Temporary files of these tests alone: what is tested must not come from an earlier version."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual_runs, "temporary_folder", lambda: folder)
        problem_of.cache_clear()
        yield folder
        problem_of.cache_clear()


def trial(phase="evaluate", seed=None, **settings):
    seed = (1000 if phase == "evaluate" else 0) if seed is None else seed
    return Trial("s", "arm", "smoke", phase, {**SMALL, **settings}, seed, "f")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hft")
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)  # for speed; the tests of the arms check shapes
    found = run_study(STUDY, find_card("hft"), StudyOptions("smoke", folder, engine="serial"))
    config.update("jaxtyping_disable", before)
    return found


def test_smoke_runs_every_arm_claim_and_figure(smoke):
    assert set(smoke.values) == set(STUDY.estimands)
    assert all(o.status == "finished" for arm in smoke.arms.values() for o in arm.outcomes)
    figures = STUDY.figures(smoke)
    assert len(figures) == 2 and all(figure.svg.startswith("<svg") for figure in figures)
    recipe, plain = smoke.arms["hft-recipe"].settings, smoke.arms["fft"].settings
    assert {k: recipe[k] for k in ("weight_decay", "steps")} == {k: plain[k] for k in ("weight_decay", "steps")}
    assert recipe["strategy"] == "category" and smoke.arms["hft-recipe"].tuning == []


def test_the_protocol_is_the_registered_one():
    card = find_card("hft")
    STUDY.check(card)
    protocol = protocol_of(card)
    assert (protocol.seeds, protocol.tuning_rounds, protocol.tuning_seeds) == (12, 8, 2)
    assert set(protocol.arms) == {*OWN, "hft-recipe"} and protocol.arms["hft-recipe"].rounds == 0
    for name, arm in protocol.arms.items():
        if name != "hft-recipe":
            assert arm.space["weight_decay"].choices == (0.0, 0.01, 0.1) and arm.space["steps"].choices == (
                60,
                100,
                150,
            )
            assert arm.rounds == 8
    assert protocol.arms["fft-wise"].space["alpha"].choices == (0.5, 0.6, 0.7, 0.8, 0.9)
    assert protocol.arms["lora"].space["rank"].choices == (4, 8, 16)
    strength = protocol.arms["l2sp"].space["strength"]
    assert (strength.low, strength.high, strength.log) == (1e-3, 1.0, True)
    assert RATES == (3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3)
    margins = {claim.id: claim.margin for claim in card.claims}
    assert [c.id for c in card.claims if c.primary] == ["retention"] and margins["no_loss"] == 0.02
    assert margins["same_recipe"] == pytest.approx(math.log(18.1 / 14.7) / 3, abs=1e-3)


# ── data and model ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_facts_are_distinct_pairs_with_uniform_values():
    table = fact_table(5)
    assert table.questions.shape == (300, 4) and len(torch.unique(table.questions[:, 1:3], dim=0)) == 300
    assert bool((table.questions[:, 0] == FACT).all()) and int(table.values.max()) < CONTENT
    counts = np.bincount(np.concatenate([fact_table(s).values.numpy() for s in range(40)]), minlength=CONTENT)
    assert ((counts - 375) ** 2 / 375).sum() < 70  # chi-square with 31 degrees of freedom, p = 1e-4
    assert torch.equal(fact_table(5).questions, table.questions)
    assert not torch.equal(fact_table(6).values, table.values)
    with pytest.raises(ValueError, match="facts must lie in"):
        fact_table(0, 1025)


def test_tasks_do_what_they_say_and_streams_do_not_meet():
    x = torch.tensor([[0, 1, 30, 31]])
    assert {name: task(x).tolist() for name, task in TASKS.items()} == {
        "shift": [[5, 6, 3, 4]], "reverse": [[31, 30, 1, 0]], "swap": [[1, 0, 31, 30]],
    }  # fmt: skip
    tokens, answers = task_sequences("swap", 64, stream(0, "test", 3))
    assert tokens.shape == (64, LONGEST) and int(tokens.max()) < VOCABULARY
    assert torch.equal(answers, TASKS["swap"](tokens[:, 1:5])) and torch.equal(tokens[:, 6:], answers[:, :3])
    others = [stream(0, "validation", 3), stream(0, "test", 2), stream(1, "test", 3), stream(0, "train", 3)]
    assert not any(torch.equal(task_sequences("swap", 64, g)[0], tokens) for g in others)
    assert len({task_sequences(t, 1, stream(0, "test"))[0][0, 0].item() for t in (*TASKS, "copy")}) == 4


def test_the_loss_of_stage_0_is_the_mean_over_facts_and_a_quarter_of_the_mean_over_copies():
    model, table = TinyLlama(VOCABULARY, LONGEST, 8, 2, 1), fact_table(0, 30)
    batch = knowledge_batches(table, 1, stream(0, "knowledge"))[0]
    losses = F.cross_entropy(Knowledge(model)(*batch.inputs), batch.targets, reduction="none")
    ours = (losses * batch.weights).sum() / len(losses)
    torch.testing.assert_close(ours, losses[:96].mean() + 0.25 * losses[96:].mean())
    assert len(losses) == 96 + 24 * 4


def test_the_model_is_causal_packs_do_not_meet_and_the_last_rows_are_those_of_the_whole():
    model = TinyLlama(VOCABULARY, LONGEST, 16, 2, 3, seed=1)
    tokens = torch.randint(VOCABULARY, (6, LONGEST), generator=torch.Generator().manual_seed(0))
    whole = model(tokens, LONGEST)
    torch.testing.assert_close(model(tokens, 4), whole[:, -4:])
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY
    torch.testing.assert_close(model(changed, LONGEST)[:, :-1], whole[:, :-1])
    assert not torch.allclose(model(changed, 1), whole[:, -1:])
    torch.testing.assert_close(model(tokens[:1], LONGEST), whole[:1])  # odd: no pack
    swapped = model(tokens.flip(0), LONGEST)
    torch.testing.assert_close(swapped.flip(0), whole)
    with pytest.raises(ValueError, match="divisible by heads"):
        TinyLlama(8, 4, width=9, heads=2)


def test_the_model_is_that_of_transformers():
    """Llama of transformers with the same weights, its rotation of positions switched off, ours without positions."""
    transformers = pytest.importorskip("transformers")
    ours = TinyLlama(VOCABULARY, LONGEST, 16, 2, 2, seed=3)
    ours.embed_positions.weight.data.zero_()
    cfg = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        rms_norm_eps=1e-6, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(cfg).eval()
    names = {n.replace("self_attn.", "").replace("mlp.", "").removeprefix("model."): n for n in theirs.state_dict()}
    state = ours.state_dict()
    theirs.load_state_dict({full: state[short] for short, full in names.items()})
    rotary = theirs.model.rotary_emb
    rotary.forward = lambda x, position_ids, **_: (torch.ones(1, x.shape[1], 8), torch.zeros(1, x.shape[1], 8))
    tokens = torch.randint(VOCABULARY, (4, LONGEST))
    torch.testing.assert_close(ours(tokens, LONGEST), theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_the_model_has_the_cards_size():
    count = sum(p.numel() for p in TinyLlama(VOCABULARY, LONGEST).parameters())
    assert round(count / 1e6, 2) == 0.22 and "0.22 million" in protocol_of(find_card("hft")).problem


# ── fronts ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_matched_retention_reads_the_front():
    points = [(0.03, 1.0), (0.4, 0.9), (0.3, 0.5), (0.8, 0.3), (0.7, 0.1)]
    assert pareto_front(points) == [(0.03, 1.0), (0.4, 0.9), (0.8, 0.3)]
    x, y = zip(*pareto_front(points), strict=True)
    grid = np.linspace(0, 1, 41)
    expected = np.where(grid <= 0.8, np.interp(grid, x, y), 0.0)
    np.testing.assert_allclose(kept_at(points, grid.tolist()), expected, atol=1e-12)


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("arm", OWN)
def test_every_arm_runs_twice_alike_and_differs_from_full_fine_tuning(arm, monkeypatch):
    problem = problem_of(3, Sizes(20, 2, 16), False, "f")
    real, ends = continual_runs.fit, []
    monkeypatch.setattr(continual_runs, "fit", lambda *a, **k: ends.append(real(*a, **k)) or ends[-1])
    for own in (OWN[arm], OWN[arm], OWN["fft"]):
        run_stages(problem, hft.METHODS[own["method"]](own, 3), 1e-2, 0.01, 2, all_tasks=False)
    first, second, plain = (ends[i].model.state_dict() for i in (2, 5, 8))
    assert list(first) == list(plain) and all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(first[k], plain[k]) for k in first) == (arm == "fft")


def test_tuning_sees_one_number_and_evaluation_the_rest():
    assert set(run(trial("tune", method="fft")).metrics) == {"score"}
    found = run(trial(method="fft"))
    assert found.metrics["score"] == found.metrics["retention"] and {"x_1", "y1_1", "recall"} <= set(found.metrics)
    assert len(found.curves["front"]) == 21 and len(found.curves["learned"]) == 2


def test_the_rate_is_that_of_full_fine_tuning_on_the_tuning_seeds(monkeypatch):
    table = {0: [(0.9, 0.1), (0.5, 0.9)], 1: [(0.9, 0.3), (0.2, 0.1)]}
    monkeypatch.setattr(hft, "_plain_point", lambda seed, s, rate, code: table[seed][RATES.index(rate)])
    assert chosen_rate({"method": "hft"}, RATES[:2], "f") == 0  # 2.2 against 1.7
    table[1][1] = (0.9, 0.9)
    assert chosen_rate({"method": "hft"}, RATES[:2], "f") == 1
    metrics = run(trial(method="hft", strategy="category", rate="of fft")).metrics
    assert metrics["rate_star"] == 1 and set(metrics) == {"rate_star", "x_star", "y_star", "score"}


def test_the_runs_of_the_rate_are_those_of_tuning_and_do_not_depend_on_files(own_folder, monkeypatch):
    settings = {**SMALL, "method": "fft"}
    for seed in (0, 1):
        run(trial("tune", seed=seed, method="fft"))
    kept = [hft._plain_point(seed, settings, rate, "f") for seed in (0, 1) for rate in RATES[:2]]
    calls = []
    true_run = hft.run_at
    monkeypatch.setattr(hft, "run_at", lambda *a, **k: calls.append(a) or true_run(*a, **k))
    assert [hft._plain_point(s, settings, r, "f") for s in (0, 1) for r in RATES[:2]] == kept and not calls
    monkeypatch.setattr(continual_runs, "temporary_folder", lambda: own_folder / "empty")
    problem_of.cache_clear()
    assert [hft._plain_point(s, settings, r, "f") for s in (0, 1) for r in RATES[:2]] == kept and len(calls) == 4


def test_what_is_kept_between_processes_comes_back_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(continual_runs, "temporary_folder", lambda: tmp_path)
    value = {"state": {"w": torch.randn(5)}, "point": [0.1 + 0.2]}
    assert kept_between_processes(["a", 1], lambda: value) is value
    again = kept_between_processes(["a", 1], lambda: pytest.fail("it is kept"))
    assert torch.equal(again["state"]["w"], value["state"]["w"]) and again["point"] == value["point"]
    assert kept_between_processes(["a", 2], lambda: {"other": 1})["other"] == 1
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    assert kept_between_processes(["a", 1], lambda: value) is value
    monkeypatch.setattr(continual_runs, "temporary_folder", lambda: tmp_path / "file" / "below")
    (tmp_path / "file").write_text("no folder")
    assert kept_between_processes(["a", 1], lambda: value) is value


def test_stage_0_is_the_same_with_and_without_its_file(own_folder, monkeypatch):
    sizes = Sizes(20, 2, 16)
    first = problem_of(7, sizes, False, "f").start
    problem_of.cache_clear()
    read = problem_of(7, sizes, False, "f").start
    monkeypatch.setattr(continual_runs, "temporary_folder", lambda: own_folder / "none")
    problem_of.cache_clear()
    made = problem_of(7, sizes, False, "f").start
    assert all(torch.equal(first[k], read[k]) and torch.equal(first[k], made[k]) for k in first)


def test_a_diverged_run_counts_as_nothing_learned_and_nothing_kept(monkeypatch):
    problem = problem_of(3, Sizes(20, 2, 16), False, "f")
    real, calls = continual_runs.fit, []

    def fit(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise DivergenceError("lost")
        return real(*args, **kwargs)

    monkeypatch.setattr(continual_runs, "fit", fit)
    found = run_stages(problem, lambda stage: None, 1e-3, 0.0, 2, all_tasks=False)
    assert found.x == found.y == 0 and found.x1 >= 0 and len(calls) == 2


def test_learning_reaches_the_task_and_accuracy_counts_tokens():
    model = TinyLlama(VOCABULARY, LONGEST, 16, 2, 1)
    tokens, answers = task_sequences("shift", 32, stream(0, "test"))
    right = (model(tokens, 4).argmax(-1) == answers).double().mean()
    assert task_accuracy(model, tokens, answers) == pytest.approx(float(right))
    batch = stage_batches("shift", 3, 8, stream(0, "train"))
    assert len(batch) == 3 and batch[0].inputs[0].shape == (8, LONGEST) and batch[0].inputs[1] == 4


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def seed(**arms):
    return Seed(1000, {name.replace("_", "-"): Outcome("finished", m) for name, m in arms.items()}, {})


def test_estimands_and_regimes_are_the_registered_ones():
    names = ("fft", "hft-category", "hft-layer", "hft-model", "fft-wise", "l2sp", "lora")
    metrics = {
        name: Outcome("finished", {"retention": 0.1 * i, "retention1": 0.2 * i}) for i, name in enumerate(names, 1)
    }
    metrics["fft"].metrics.update(recall=1.0, x_max=0.95, x1_max=1.0, y1_top=0.1, x_0=0.9, y_0=0.2, x_1=0.8, y_1=0.6)
    metrics["hft-recipe"] = Outcome("finished", {"rate_star": 1.0, "x_star": 0.7, "y_star": 0.9})
    found = Seed(1000, metrics, {})
    value = {claim: estimand(found) for claim, estimand in STUDY.estimands.items()}
    assert value["retention"] == pytest.approx(0.1) and value["single_stage"] == pytest.approx(0.2)
    assert value["rivals"] == pytest.approx({"fft-wise": -0.3, "l2sp": -0.4, "lora": -0.5})
    assert value["strategy"] == pytest.approx({"hft-layer": -0.1, "hft-model": -0.2})
    assert value["same_recipe"] == pytest.approx(math.log(0.91 / 0.61)) and value["no_loss"] == pytest.approx(-0.1)
    for claim, regime in STUDY.regimes.items():
        assert all(condition.holds for condition in regime([found])), claim
    metrics["fft"].metrics.update(recall=0.9, x_max=0.8, y1_top=0.95, y_1=0.75, retention=0.95)
    for claim, regime in STUDY.regimes.items():
        assert not any(c.holds for c in regime([found]) if "first task" not in c.text), claim


def test_the_exact_claims_hold_in_all_their_cases():
    cases = STUDY.exact["bound"]()
    assert len(cases) == 60 and all(case.holds for case in cases)
    assert [frozen_movement(strategy, False, steps=3) for strategy in ("category", "element")] == [0.0, 0.0]


# ── the published configuration ───────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder as the card describes it, with a model of two tiny layers."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    from wellposed.datasets.registry import ENVIRONMENT
    from wellposed.studies.published import hft as published
    from wellposed.studies.published.images import CHECKPOINTS

    root = tmp_path / "hft"
    words = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "yes", "no", "who", "Answer", "with", "a", "few"]
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tok, **special)
    torch.manual_seed(0)
    cfg = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    for name in ("llama-2-7b", "llama-2-7b-chat"):
        transformers.LlamaForCausalLM(cfg).save_pretrained(root / name)
        fast.save_pretrained(root / name)
    talk = {"messages": [{"role": "user", "content": "who"}, {"role": "assistant", "content": "yes"}]}
    (root / "tulu-v2.jsonl").write_text("\n".join([json.dumps(talk)] * 3))
    (root / "closed-book").mkdir()
    for name in published.QUESTIONS:
        (root / "closed-book" / f"{name}.jsonl").write_text(json.dumps({"question": "who", "answers": ["yes", "no"]}))
    for task in published.TRACE:
        (root / "trace" / task).mkdir(parents=True)
        for part in ("train", "test"):
            (root / "trace" / task / f"{part}.json").write_text(
                json.dumps([{"prompt": "who ", "answer": "yes no"}] * 2)
            )
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    monkeypatch.setenv(CHECKPOINTS, str(tmp_path / "checkpoints"))
    monkeypatch.setattr(published, "NEW_TOKENS", 2)
    return published


def test_the_published_arms_run(files, monkeypatch):
    paper = protocol_of(find_card("hft")).paper
    files.prepare(paper)
    assert len(paper.arms) == 10
    assert paper.published == {"hft_tulu": 18.1, "fft_tulu": 14.7, "hft_trace": 51.3, "fft_trace": 45.7}
    monkeypatch.setattr(files, "TRACE", files.TRACE[:2])
    for name in ("hft_tulu", "wise_tulu", "hft_trace"):
        small = {**paper.arms[name].fixed, "epochs": 1, "batch_size": 2, "accumulation": 2, "learning_rate": 1e-2}
        found = files.run(Trial("s", name, "paper", "evaluate", small, 1000, "f")).metrics
        assert 0 <= found["score"] <= 100


def test_missing_files_are_named(tmp_path, monkeypatch):
    from wellposed.datasets.registry import ENVIRONMENT, DatasetNotInstalled
    from wellposed.studies.published import hft as published

    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    with pytest.raises(DatasetNotInstalled, match=r"needs llama-2-7b/config\.json .* nothing is downloaded"):
        published.prepare(protocol_of(find_card("hft")).paper)


def test_labels_count_what_the_assistant_says_and_scores_are_the_usual_ones(files):
    from difflib import SequenceMatcher

    tokenizer = files._model("llama-2-7b", torch.device("cpu"))[1]
    tokens, labels = files.tokenised(tokenizer, [("who", False), ("yes no", True)], 99)
    assert tokens == [1, 7, 5, 6, 2] and labels == [-100, -100, 5, 6, 2]
    batch = next(iter(files.Conversations([(tokens, labels), ([1, 7], [-100, 7])], 2, 0, 0)))
    long = batch.targets[batch.inputs["attention_mask"].sum(1) == 5][0]
    assert long.tolist() == [-100, 5, 6, 2, -100]  # each position holds the token that follows
    assert files.exact_match("The Cat!\nand more", "cat") == 1 and files.exact_match("dog", "cat") == 0
    assert files.edit_similarity("abcd", "abxd") == SequenceMatcher(None, "abcd", "abxd").ratio()
    assert files.longest_common_subsequence("a b c d", "x a y c") == pytest.approx(0.5)
    assert files.score_of("FOMC") is files.exact_match
