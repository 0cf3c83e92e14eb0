"""The pretrained model as its own teacher, on this library's adapters and on PEFT's; and adapters as plain LoRA again."""

import copy
import os

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from wellposed import Compose, Step, TensorLoader, fit
from wellposed.losses.adapter_layers import adapter_layers, carries_weights, disabled
from wellposed.losses.adapter_teacher import (
    DisabledAdapterTeacher,
    FrozenCopyTeacher,
    InitialAdapterTeacher,
    StoredTeacher,
)
from wellposed.losses.logit_terms import LogitConsistency
from wellposed.weights.low_rank import LowRankAdaptation, add_low_rank, merge_low_rank
from wellposed.weights.principal_adapter import adapter_start, plain_factors, scale_adapters, to_plain_adapter


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).to(dtype)


def adapted(init, dtype=torch.float32, **options):
    pretrained = network(dtype)
    model = copy.deepcopy(pretrained)
    add_low_rank(model, 2, init=init, generator=torch.Generator().manual_seed(1), **options)
    return pretrained, model


def trained(model):
    """The model with other adapters, as if it had trained."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5).add_(0.1)
    return model


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()


def with_peft(model, init, **options):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "down_proj"]
    configuration = LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=init, target_modules=targets, **{"lora_dropout": 0.0, **options}
    )
    return get_peft_model(copy.deepcopy(model), configuration)


IDS = torch.arange(12).reshape(2, 6)
INPUTS = {"input_ids": IDS}


# Where teachers agree


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_the_initial_adapter_is_the_pretrained_model(init):
    pretrained, model = adapted(init)
    x = torch.randn(7, 6)
    teachers = [InitialAdapterTeacher(), FrozenCopyTeacher(), FrozenCopyTeacher(copy.deepcopy(pretrained))]
    for teacher in teachers:
        teacher.attach(model)
    trained(model)
    step = Step(model, inputs=x)
    for teacher in teachers:
        found = teacher.logits(step)
        torch.testing.assert_close(found, pretrained(x), rtol=0, atol=1e-5)
        assert not found.requires_grad
    assert not torch.allclose(model(x), pretrained(x), atol=0.1)


@pytest.mark.parametrize("init", [True, "pissa", "pissa_niter_4", "olora"])
def test_the_initial_adapter_of_peft_is_the_pretrained_model(llama, init):
    model = with_peft(llama, init)
    teacher = InitialAdapterTeacher()
    teacher.attach(model)
    trained(model)
    found = teacher.logits(Step(model, inputs=INPUTS))
    expected = llama(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert float((model(IDS).logits - expected).detach().abs().max()) > 1e-3


def test_without_adapter_plain_lora_is_pretrained_and_pissa_is_not(llama):
    expected = llama(IDS).logits
    plain = with_peft(llama, True)
    teacher = DisabledAdapterTeacher()
    teacher.attach(plain)
    trained(plain)
    torch.testing.assert_close(teacher.logits(Step(plain, inputs=INPUTS)), expected, rtol=0, atol=1e-6)
    pissa = with_peft(llama, "pissa")
    with disabled(adapter_layers(pissa)), torch.no_grad():
        assert float((pissa(IDS).logits - expected).abs().max()) > 1e-2
    with torch.no_grad():
        torch.testing.assert_close(pissa(IDS).logits, expected, rtol=0, atol=2e-5)  # scalings are back


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_replaced_base_is_refused_as_teacher(llama, init):
    for options in ({}, {"base_is_pretrained": True}):
        with pytest.raises(ValueError, match=f"init_lora_weights='{init}', so the base weights were replaced"):
            DisabledAdapterTeacher(**options).attach(with_peft(llama, init))
    with pytest.raises(ValueError, match="the adapter of '0' is not zero"):
        DisabledAdapterTeacher().attach(adapted("pissa")[1])
    pretrained, model = adapted("kaiming")
    DisabledAdapterTeacher().attach(model)
    teacher = DisabledAdapterTeacher(base_is_pretrained=True)
    teacher.attach(trained(model))
    x = torch.randn(3, 6)
    torch.testing.assert_close(teacher.logits(Step(model, inputs=x)), pretrained(x))


def test_what_a_scaling_does_not_switch_off_is_refused(llama):
    with pytest.raises(ValueError, match="more than a product of two factors"):
        DisabledAdapterTeacher().attach(with_peft(llama, True, use_dora=True))
    model = adapted("kaiming")[1]
    model[2].base.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'2.base.bias' trains beside the adapters"):
        DisabledAdapterTeacher().attach(model)


# What a teacher leaves alone


def test_a_teacher_takes_no_random_numbers_and_moves_nothing():
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 5))
    add_low_rank(model, 2, init="pissa")
    teacher = InitialAdapterTeacher()
    teacher.attach(model)
    trained(model.train())
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = teacher.logits(Step(model, inputs=torch.ones(4, 6)))
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(part.training for part in model.modules())
    assert torch.equal(first, teacher.logits(Step(model, inputs=torch.ones(4, 6))))


def test_running_statistics_of_the_start_are_kept():
    pretrained = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 5))
    model = copy.deepcopy(pretrained)
    add_low_rank(model, 2)
    teacher = InitialAdapterTeacher()
    teacher.attach(model)
    model.train()(torch.randn(8, 6) + 3.0)
    x = torch.randn(4, 6)
    torch.testing.assert_close(teacher.logits(Step(model, inputs=x)), pretrained.eval()(x))


def test_a_head_that_trains_is_kept_and_told(recwarn):
    pretrained, model = adapted("pissa")
    model[2].base.weight.requires_grad_(True)
    teacher = InitialAdapterTeacher()
    with pytest.warns(UserWarning, match=r"'2.base.weight' trains beside the adapters.*fitted before"):
        teacher.attach(model)
    trained(model)
    x = torch.randn(3, 6)
    torch.testing.assert_close(teacher.logits(Step(model, inputs=x)), pretrained(x), rtol=0, atol=1e-5)
    model[0].base.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'0.base.bias' trains now, but was frozen"):
        teacher.logits(Step(model, inputs=x))


def test_the_students_graph_survives_the_teachers_pass():
    _, model = adapted("pissa", torch.float64)
    teacher = InitialAdapterTeacher()
    teacher.attach(model)
    trained(model)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = torch.autograd.grad(model(x).square().sum(), model[0].lora_A)[0]
    loss = model(x).square().sum()
    teacher.logits(Step(model, inputs=x))
    assert torch.equal(torch.autograd.grad(loss, model[0].lora_A)[0], expected)


def test_the_first_consistency_and_its_gradient_are_zero():
    for init in ("kaiming", "pissa"):
        _, model = adapted(init, torch.float64)
        term = LogitConsistency(1.0)
        term.attach(model)
        x = torch.randn(7, 6, dtype=torch.float64)
        value = term.penalty(Step(model, inputs=x, outputs=model(x))).mean()
        value.backward()
        assert abs(float(value.detach())) < 1e-12
        assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-12


def test_a_resumed_run_has_the_same_teacher(tmp_path):
    inputs, targets = torch.randn(32, 6), torch.arange(32) % 5

    def run(epochs, stop=None, **options):
        method = Compose(LowRankAdaptation(2, init="pissa"), LogitConsistency(1.0))
        loader = TensorLoader(inputs, targets, batch_size=8, shuffle=True)

        def stopped(step, entry):
            if entry["epoch"] == stop:
                raise KeyboardInterrupt

        return fit(network(), loader, epochs=epochs, regularizer=method, on_epoch_end=stopped, **options).model

    whole = run(4)
    with pytest.raises(KeyboardInterrupt):
        run(4, stop=3, checkpoint=tmp_path / "c.pt")  # the checkpoint of epoch 2 is the last that was written
    resumed = run(4, checkpoint=tmp_path / "c.pt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_teacher_is_the_stored_one_and_not_a_new_copy():
    pretrained, model = adapted("pissa")
    first = LogitConsistency(1.0)
    first.attach(model)
    state = copy.deepcopy(first.state_dict())
    trained(model)
    second = LogitConsistency(1.0)
    second.attach(model)  # a model that has trained already
    x = torch.randn(3, 6)
    assert not torch.allclose(second.teacher.logits(Step(model, inputs=x)), pretrained(x), atol=1e-3)
    second.load_state_dict(state)
    torch.testing.assert_close(second.teacher.logits(Step(model, inputs=x)), pretrained(x), rtol=0, atol=1e-5)


# What is refused


def test_models_without_an_acting_adapter_are_refused(llama):
    with pytest.raises(ValueError, match="holds no low-rank adapter; attach it first"):
        InitialAdapterTeacher().attach(network())
    with pytest.raises(ValueError, match="holds no low-rank adapter"):
        Compose(LogitConsistency(1.0), LowRankAdaptation(2)).attach(network())  # the wrong order
    model = with_peft(llama, "pissa")
    teacher = InitialAdapterTeacher()
    teacher.attach(model)
    model.merge_adapter()
    for check in (lambda: InitialAdapterTeacher().attach(model), lambda: DisabledAdapterTeacher().attach(model)):
        with pytest.raises(ValueError, match="is merged into its base weight; unmerge it first"):
            check()
    with pytest.raises(ValueError, match="is merged into its base weight"):
        teacher.logits(Step(model, inputs=INPUTS))


def test_dropout_on_principal_adapters_is_refused(llama):
    with pytest.raises(ValueError, match=r"dropout of the adapter of .* must be 0, got 0.1"):
        InitialAdapterTeacher().attach(with_peft(llama, "pissa", lora_dropout=0.1))
    for teacher in (InitialAdapterTeacher(), DisabledAdapterTeacher()):
        plain = with_peft(llama, True, lora_dropout=0.1).train()
        teacher.attach(plain)
        trained(plain)
        found = teacher.logits(Step(plain, inputs=INPUTS))
        torch.testing.assert_close(found, llama(IDS).logits, rtol=0, atol=1e-6)


def test_a_teacher_must_not_be_the_model_that_trains():
    model = adapted("kaiming")[1]
    with pytest.raises(ValueError, match="another object than the model that trains"):
        FrozenCopyTeacher(model).attach(model)
    with pytest.raises(RuntimeError, match="there is no model yet"):
        FrozenCopyTeacher().logits(Step(model, inputs=torch.ones(1, 6)))


def test_adapters_are_found_by_what_they_hold(llama):
    ours = adapted("pissa")[1]
    assert [layer.name for layer in adapter_layers(ours)] == ["0", "2"]
    theirs = adapter_layers(with_peft(llama, True))
    assert len(theirs) == 6 and all(layer.is_mapping and not carries_weights(layer) for layer in theirs)
    assert all(carries_weights(layer) for layer in adapter_layers(with_peft(llama, "pissa")))
    assert len(theirs[0].parameters) == 2


def test_a_stored_teacher_reads_the_rows_of_the_batch():
    table = torch.randn(5, 3)
    step = Step(nn.Identity(), index=torch.tensor([4, 0]))
    assert torch.equal(StoredTeacher(table).logits(step), table[[4, 0]])
    assert LogitConsistency(0.1, teacher=StoredTeacher(table)).requires == {"index"}


# PiSSA as plain LoRA


def test_a_principal_adapter_is_a_plain_one_of_twice_the_rank():
    pretrained, model = adapted("pissa", alpha=3.0)
    start, x = adapter_start(model), torch.randn(7, 6)
    expected = trained(model)(x)
    to_plain_adapter(model, start)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    for name in ("0", "2"):
        original = pretrained.get_submodule(name).weight
        torch.testing.assert_close(model.get_submodule(name).base.weight, original, rtol=0, atol=1e-6)
    assert model[0].lora_A.shape == (4, 6) and model[0].rank == 4 and model[0].lora_A.requires_grad
    torch.testing.assert_close(scale_adapters(model, 0.0)(x), pretrained(x), rtol=0, atol=1e-5)


def test_the_factors_are_those_of_pefts_own_conversion(llama, tmp_path):
    from safetensors.torch import load_file

    model = with_peft(llama, "pissa")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    start = a.detach().clone(), b.detach().clone()
    trained(model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    stored = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    wide_a, wide_b = plain_factors(a.detach(), b.detach(), *start)
    torch.testing.assert_close(wide_b @ wide_a, stored[f"{prefix}B.weight"] @ stored[f"{prefix}A.weight"])


def test_half_precision_bases_are_restored_in_single():
    pretrained, model = adapted("pissa", torch.bfloat16)
    to_plain_adapter(model, adapter_start(model))
    difference = (model[0].base.weight - pretrained[0].weight).detach().abs().max()
    assert model[0].base.weight.dtype == torch.bfloat16 and float(difference) < 2**-7 * float(
        pretrained[0].weight.detach().abs().max()
    )


def test_a_second_conversion_and_a_second_merge_are_refused():
    _, model = adapted("pissa")
    start = adapter_start(model)
    to_plain_adapter(model, start)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="has rank 4, at the start it had 2: it was converted before"):
        to_plain_adapter(model, start)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merge_low_rank(model)
    for again in (lambda: merge_low_rank(model), lambda: to_plain_adapter(model, start), lambda: adapter_start(model)):
        with pytest.raises(ValueError, match="it was merged before, or never adapted"):
            again()


def test_a_start_of_another_model_is_refused():
    _, model = adapted("pissa")
    start = adapter_start(model)
    with pytest.raises(ValueError, match="'2': start does not know it"):
        to_plain_adapter(model, {"0": start["0"]})
    scale_adapters(model, 0.5)
    with pytest.raises(ValueError, match=r"scaling of '0' must be what it was at the start, 1.0, got 0.5"):
        to_plain_adapter(model, start)
    with pytest.raises(ValueError, match="share must be >= 0, got -1"):
        scale_adapters(model, -1.0)
