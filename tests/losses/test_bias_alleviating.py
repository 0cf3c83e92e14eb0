"""BA-LoRA as a method: both versions, plain training where all strengths are zero, accumulation, causal models under PEFT."""

import copy
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from wellposed import Compose, Step, TensorLoader, fit
from wellposed.accumulation import Accumulation
from wellposed.batching import IGNORE_INDEX
from wellposed.losses.adapter_teacher import FrozenCopyTeacher, InitialAdapterTeacher, StoredTeacher
from wellposed.losses.bias_alleviating import BiasAlleviatingLoRA
from wellposed.losses.logit_consistency import kl_consistency, normalized_mse_consistency
from wellposed.losses.logit_diversity import logit_covariance, topk_entropy
from wellposed.losses.logit_spectrum import spectral_concentration
from wellposed.losses.logit_terms import LogitConsistency, LogitDiversity
from wellposed.losses.spectral_term import SpectralConcentration
from wellposed.objective import cross_entropy
from wellposed.weights.low_rank import LowRankAdaptation

NAMES = ("consistency", "diversity", "concentration")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.2), nn.Tanh(), nn.Linear(9, 8)).to(dtype)


def loader(**options):
    return TensorLoader(normal(40, 6), torch.arange(40) % 8, batch_size=8, shuffle=True, **options)


def tuned(method=None, epochs=2, **options):
    parts = [LowRankAdaptation(2, init="pissa"), *([] if method is None else [method])]
    return fit(network(), loader(), epochs=epochs, regularizer=Compose(*parts), **options).model


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# The two versions


def test_v6_for_classification_is_its_formula():
    z, teacher = normal(16, 9), normal(16, 9, seed=1)
    method = BiasAlleviatingLoRA("classification")
    found = method(z, teacher, progress=0.0)
    terms = kl_consistency(z, teacher, 2.0).mean(), logit_covariance(z), spectral_concentration(z, 5)
    torch.testing.assert_close(torch.stack(found[1:4]), torch.stack(terms))
    torch.testing.assert_close(found.total, 0.15 * terms[0])  # the others have not begun
    late = method(z, teacher, progress=1.0).total
    torch.testing.assert_close(late, 0.015 * terms[0] + 0.03 * terms[1] + 0.03 * terms[2])
    assert found.rows == 16 and method.coupled


def test_v6_for_generation_is_its_formula():
    z, teacher, labels = normal(2, 7, 40), normal(2, 7, 40, seed=1), torch.arange(14).reshape(2, 7)
    labels[:, :3], labels[1, 5:] = IGNORE_INDEX, IGNORE_INDEX
    method = BiasAlleviatingLoRA("generation", k=2)
    found = method(z, teacher, labels, shift=True)
    rows, wanted = z[:, :-1][labels[:, 1:] != -100], teacher[:, :-1][labels[:, 1:] != -100]
    assert found.rows == len(rows) == 6
    terms = (
        kl_consistency(rows, wanted, 2.0).mean(),
        topk_entropy(rows, 20).mean(),
        spectral_concentration(rows, 2, "frobenius"),
    )
    torch.testing.assert_close(torch.stack(found[1:4]), torch.stack(terms))
    torch.testing.assert_close(found.total, 0.0025 * terms[0] + 0.005 * terms[1] + 0.005 * terms[2])


def test_v5_is_its_formulas():
    z, teacher = normal(16, 9), normal(16, 9, seed=1)
    found = BiasAlleviatingLoRA("classification", "v5")(z, teacher, progress=0.3)
    terms = normalized_mse_consistency(z, teacher).mean(), logit_covariance(z), spectral_concentration(z, 3)
    torch.testing.assert_close(torch.stack(found[1:4]), torch.stack(terms))
    torch.testing.assert_close(found.total, 1e-4 * terms[0] + 3e-4 * terms[1] + 1e-4 * terms[2])
    z, teacher = normal(6, 4, 9), normal(6, 4, 9, seed=1)
    found = BiasAlleviatingLoRA("generation", "v5")(z, teacher)
    batchmean = F.kl_div(z.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    p = z.softmax(-1)
    terms = batchmean, (p * p.log()).sum(-1).mean(), spectral_concentration(z.reshape(6, 36), 3)
    torch.testing.assert_close(torch.stack(found[1:4]), torch.stack(terms))


def test_published_strengths_and_schedules():
    table = {
        ("v6", "classification"): (0.15, 0.03, 0.03, 5, 2.0),
        ("v6", "generation"): (0.025, 0.005, 0.005, 10, 2.0),
        ("v5", "classification"): (1e-4, 3e-4, 1e-4, 3, 2.0),
        ("v5", "generation"): (1e-4, 3e-4, 1e-4, 3, 1.0),
    }
    for (variant, task), expected in table.items():
        method = BiasAlleviatingLoRA(task, variant)
        strengths = [term.strength for term in method.terms]
        assert (*strengths, method.concentration.k, method.consistency.temperature) == expected
        scheduled = [term.schedule for term in method.terms]
        assert scheduled == (["cosine", "two_phase", "two_phase"] if variant == "v6" else ["constant"] * 3)
    assert BiasAlleviatingLoRA("generation").diversity.top_k == 20
    assert BiasAlleviatingLoRA("generation", "v5").diversity.top_k is None
    assert BiasAlleviatingLoRA("generation", top_k=5).diversity.top_k == 5


# In training


def test_without_strengths_it_is_plain_training_bit_for_bit():
    off = BiasAlleviatingLoRA("classification", consistency=0.0, diversity=0.0, concentration=0.0)
    plain = tuned()
    assert same(tuned(off), plain)
    assert not same(tuned(BiasAlleviatingLoRA("classification")), plain)


def test_without_strengths_it_is_pefts_own_training_bit_for_bit():
    from peft import LoraConfig, get_peft_model

    def run(method):
        torch.manual_seed(3)
        configuration = LoraConfig(r=2, lora_alpha=2, target_modules=["0", "3"], init_lora_weights=True)
        model = get_peft_model(network(), configuration)
        if method == "by hand":
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            torch.manual_seed(0)
            for epoch in range(2):
                batches = loader()
                batches.set_epoch(epoch)
                for batch in batches:
                    optimizer.zero_grad()
                    F.cross_entropy(model(batch.inputs), batch.targets, reduction="none").sum().div(8.0).backward()
                    optimizer.step()
            return model
        make = partial(torch.optim.AdamW, lr=1e-2)
        return fit(model, loader(), epochs=2, regularizer=method, optimizer=make).model

    off = BiasAlleviatingLoRA("classification", consistency=0.0, diversity=0.0, concentration=0.0)
    plain = run("by hand")
    found = run(off)
    assert same(plain, found)


def test_terms_take_no_random_numbers():
    """Dropout draws what it draws without them: with strengths so small that rounding hides them, nothing changes."""
    tiny = dict.fromkeys(NAMES, 1e-300)
    assert same(tuned(BiasAlleviatingLoRA("classification", schedules="constant", **tiny)), tuned())


def test_the_parts_are_the_whole():
    whole = BiasAlleviatingLoRA("classification", schedules="constant")
    parts = Compose(LogitConsistency(0.15), LogitDiversity(0.03), SpectralConcentration(0.03, k=5))
    assert same(tuned(whole), tuned(parts))


@pytest.mark.parametrize("name", NAMES)
def test_each_term_moves_the_model_by_itself(name):
    alone = BiasAlleviatingLoRA("classification", schedules="constant", **{**dict.fromkeys(NAMES, 0.0), name: 0.5})
    assert not same(tuned(alone), tuned())


@pytest.mark.parametrize("teacher", [InitialAdapterTeacher, FrozenCopyTeacher])
def test_a_stored_teacher_trains_the_same_model(teacher):
    with torch.no_grad():
        stored = StoredTeacher(network().eval()(normal(40, 6)))
    a = tuned(BiasAlleviatingLoRA("classification", teacher=stored))
    b = tuned(BiasAlleviatingLoRA("classification", teacher=teacher()))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


def test_stronger_consistency_stays_nearer_to_the_start():
    x = normal(40, 6)
    start, found = network().eval(), []
    for strength in (0.0, 1.0, 30.0):
        make = partial(torch.optim.AdamW, lr=1e-2, fused=True)
        model = tuned(LogitConsistency(strength), epochs=6, optimizer=make).eval()
        found.append(float(kl_consistency(model(x), start(x)).mean().detach()))
    assert found[0] > 1.1 * found[1] > 2.2 * found[2] > 0


# Sequences and accumulation


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body, self.head = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30)

    def forward(self, ids):
        return self.head(self.body(self.embedding(ids)).tanh())


def sequences():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 30, (6, 5), generator=generator)
    targets = torch.randint(0, 30, (6, 5), generator=generator)
    for row, kept in enumerate((5, 1, 3, 2, 5, 4)):
        targets[row, kept:] = IGNORE_INDEX
    return ids, targets


@pytest.mark.parametrize("parts", [1, 3, 4])
def test_token_terms_are_means_over_the_valid_tokens_however_a_batch_is_cut(parts):
    ids, targets = sequences()
    terms = BiasAlleviatingLoRA(
        "generation", concentration=0.0, schedules="constant", consistency=1.0, diversity=1.0
    )  # fmt: skip
    method = Compose(LowRankAdaptation(2, init="pissa"), terms)
    model = method.attach(Tokens().double())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    z = model(ids)
    task = F.cross_entropy(z.transpose(1, 2), targets)
    whole = task + terms(z, terms.consistency.teacher.logits(Step(model, inputs=ids)), targets).total
    expected = torch.autograd.grad(whole, trained)
    pool = Step(model, inputs=ids, targets=targets)
    loss = Accumulation(pool, method, cross_entropy, parts).run()
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-9, atol=0)
    for p, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-6, atol=1e-12)


def test_batch_statistics_are_told_to_depend_on_it():
    assert BiasAlleviatingLoRA("classification").coupled and BiasAlleviatingLoRA("generation").coupled
    assert not BiasAlleviatingLoRA("generation", concentration=0.0).coupled
    with pytest.warns(UserWarning, match="couples the examples of a batch"):
        tuned(BiasAlleviatingLoRA("classification"), epochs=1, accumulation=2)


@pytest.mark.parametrize("variant", ["v6", "v5"])
def test_padding_and_prompt_change_no_penalty(variant):
    ids, targets = sequences()
    method = BiasAlleviatingLoRA("generation", variant, schedules="constant", k=2, teacher=FrozenCopyTeacher(Tokens()))
    torch.manual_seed(1)
    model = Tokens()
    model.head.weight.data.mul_(1.5)

    def totals(ids, targets):
        from wellposed.objective import _reduce

        step = Step(model, inputs=ids, targets=targets, outputs=model(ids))
        step.num_examples, step.normalizer = float(len(ids)), float((targets != IGNORE_INDEX).sum())
        return torch.stack([_reduce(term, step).detach() for term in method.penalty(step)])

    wide = torch.cat([torch.full((6, 2), 7), ids, torch.full((6, 3), 9)], 1)
    mask = F.pad(targets, (2, 3), value=IGNORE_INDEX)
    torch.testing.assert_close(totals(wide, mask), totals(ids, targets), rtol=1e-5, atol=1e-7)


def test_a_batch_without_targets_counts_nothing():
    z, labels = normal(2, 3, 30).requires_grad_(), torch.full((2, 3), IGNORE_INDEX)
    found = BiasAlleviatingLoRA("generation")(z, normal(2, 3, 30, seed=1), labels)
    assert found.rows == 0 and float(found.total.detach()) == 0.0
    found.total.backward()
    assert z.grad.isfinite().all()


# A causal language model under PEFT


@pytest.fixture(scope="module")
def causal():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, **sizes))


def causal_run(causal, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "down_proj"]
    configuration = LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=targets)
    model = get_peft_model(copy.deepcopy(causal), configuration)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 60, (8, 7), generator=generator)
    labels = ids.clone()
    labels[:, :2] = IGNORE_INDEX
    data = TensorLoader({"input_ids": ids[:, :-1]}, labels[:, 1:], batch_size=4)  # aligned: outputs[:, t] -> labels
    method = BiasAlleviatingLoRA("generation", schedules="constant", k=3, consistency=1.0, concentration=0.1, **options)
    result = fit(model, data, epochs=3, regularizer=method, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    return {n: p.detach().clone() for n, p in result.model.named_parameters() if "lora_" in n}, method


def test_the_basis_of_the_head_and_one_model_train_the_same_adapter(causal):
    plain, _ = causal_run(causal)
    cheap, method = causal_run(causal, head="lm_head")
    two, _ = causal_run(causal, teacher=FrozenCopyTeacher(copy.deepcopy(causal)))
    assert int(method.concentration.failures) == 0
    for name, value in plain.items():
        torch.testing.assert_close(cheap[name], value, rtol=1e-3, atol=2e-4, msg=name)
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-4, msg=name)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "regression"}, "task must be 'classification' or 'generation', got 'regression'"),
        ({"variant": "v7"}, "variant must be 'v6' or 'v5', got 'v7'"),
        ({"schedules": "none"}, "schedules must be"),
        ({"consistency": -1.0}, "strength must be >= 0, got -1.0"),
        ({"k": 0}, "k must be an integer >= 1, got 0"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"top_k": -3}, "top_k must be an integer >= 1"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    from jaxtyping import TypeCheckError

    with pytest.raises((ValueError, TypeCheckError)) as found:
        BiasAlleviatingLoRA(**{"task": "classification", **options})
    if isinstance(found.value, ValueError):
        assert message in str(found.value)


def test_shapes_that_do_not_fit_are_named():
    method = BiasAlleviatingLoRA("generation")
    with pytest.raises(ValueError, match=r"labels must have shape \(2, 3\), got \(2, 4\)"):
        method(normal(2, 3, 30), normal(2, 3, 30), torch.zeros(2, 4).long())
    with pytest.raises(ValueError, match="shift needs labels"):
        method(normal(2, 3, 30), normal(2, 3, 30), shift=True)
    with pytest.raises(ValueError, match=r"teacher_logits must have the shape"):
        method(normal(2, 3, 30), normal(2, 3, 31))
    with pytest.raises(ValueError, match=r"top_k must lie in \[1, 9\].*got 20"):
        method(normal(2, 3, 9), normal(2, 3, 9))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_an_accelerator_trains_the_same_model():
    def run(device):
        method = Compose(
            LowRankAdaptation(2, init="pissa"), BiasAlleviatingLoRA("classification", schedules="constant")
        )
        model = network()
        model[1].p = 0.0  # its numbers differ from device to device
        return fit(model, loader(), epochs=2, regularizer=method, device=device).model.cpu()

    for a, b in zip(run("cpu").parameters(), run("cuda").parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
