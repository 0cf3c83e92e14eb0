"""Methods on models that PEFT has wrapped: adapters train, the base is frozen."""

import pytest
import torch
from doubles import MixedGradient

from wellposed import Compose, Regularizer
from wellposed.losses.adapter_teacher import DisabledAdapterTeacher, InitialAdapterTeacher
from wellposed.losses.bias_alleviating import BiasAlleviatingLoRA
from wellposed.weights import WeightCompander
from wellposed.weights.half_fine_tuning import HalfFineTuning

peft = pytest.importorskip("peft")

from tiny_transformers import (  # noqa: E402
    Confidence,
    Path,
    Ridge,
    arguments,
    as_examples,
    assert_same_path,
    language_model,
    pad,
    reference,
    text_rows,
)

from wellposed.integrations.peft_models import base_model_of, is_peft  # noqa: E402
from wellposed.integrations.transformers_trainer import RegularizedTrainer  # noqa: E402


def adapted(init=True, **options):
    model = language_model()
    settings = {
        "r": 2,
        "target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.0,
        "task_type": "CAUSAL_LM",
        **options,
    }
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=init, **settings))


def trainer_for(folder, regularizer, model=None, options=None, **rest):
    return RegularizedTrainer(
        model or adapted(), arguments(folder, **(options or {})), data_collator=pad,
        train_dataset=as_examples(*text_rows()), regularizer=regularizer, **rest,
    )  # fmt: skip


def test_base_model_is_found():
    model = adapted()
    assert is_peft(model) and not is_peft(language_model())
    assert base_model_of(model) is model.base_model.model


@pytest.mark.parametrize("method", [lambda: Compose(Ridge(), Confidence()), lambda: MixedGradient(0.1)])
def test_equals_fit_and_leaves_the_base_alone(tmp_path, method):
    first, second = Path(), Path()
    trainer = trainer_for(tmp_path, Compose(method(), first))
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    reference(adapted(), Compose(method(), second), tokens=True)
    assert_same_path(first, second)
    assert len(base) > 5
    for name, value in trainer.model.named_parameters():
        assert name not in base or torch.equal(value, base[name])


def test_bias_alleviating_adaptation_equals_fit(tmp_path):
    """A principal-singular start, whose base is no longer pretrained, and a teacher made of its first factors."""

    def method():
        teacher = InitialAdapterTeacher()
        strengths = {"consistency": 5.0, "diversity": 1.0, "concentration": 0.0}
        return BiasAlleviatingLoRA("generation", **strengths, teacher=teacher, schedules="constant")

    first, second = Path(), Path()
    trainer_for(tmp_path, Compose(method(), first), model=adapted("pissa")).train()
    reference(adapted("pissa"), Compose(method(), second), tokens=True)
    assert_same_path(first, second, atol=2e-6)
    plain = Path()
    trainer_for(tmp_path, plain, model=adapted("pissa")).train()
    assert (plain.path[-1] - first.path[-1]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="the base weights were replaced"):
        wrong = BiasAlleviatingLoRA("generation", teacher=DisabledAdapterTeacher())
        trainer_for(tmp_path, wrong, model=adapted("pissa"))


@pytest.mark.parametrize("name", ["teacher", "parametrised adapters"])
def test_adapters_continue_bit_for_bit(tmp_path, name):
    """PEFT saves the adapters alone; what a method needs beside them is in regularizer.pt."""

    def train(folder, resume=None):
        own = BiasAlleviatingLoRA("generation", k=2) if name == "teacher" else WeightCompander()
        options = {"save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random"}
        trainer = trainer_for(folder, Compose(MixedGradient(0.1), own), model=adapted("pissa"), options=options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole = train(tmp_path / "whole")
    again = train(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-3"))
    for key, value in whole.items():
        assert torch.equal(value, again[key]), key


class NeedsBase(Regularizer):
    needs_base_weights = True


class Thaws(Regularizer):
    def attach(self, model):
        base_model_of(model).lm_head.requires_grad_(True)
        return model


def test_methods_that_need_the_base_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="NeedsBase needs the base weights, but the model is wrapped by PEFT"):
        trainer_for(tmp_path, Compose(Ridge(), NeedsBase()))
    trainer_for(tmp_path, NeedsBase(), model=language_model())
    with pytest.raises(ValueError, match=r"Thaws made '.*lm_head.weight' trainable, a weight of the base"):
        trainer_for(tmp_path, Compose(Ridge(), Thaws()))
    with pytest.raises(ValueError, match="HalfFineTuning needs the base weights, but the model is wrapped by PEFT"):
        trainer_for(tmp_path, HalfFineTuning())


def test_virtual_tokens_need_the_trainers_own_loss(tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")

    def model():
        torch.manual_seed(3)
        return peft.get_peft_model(language_model(), config)

    with pytest.raises(ValueError, match="prompt learning makes outputs longer"):
        trainer_for(tmp_path, Ridge(), model=model())
    path = Path()
    trainer_for(
        tmp_path, Compose(Ridge(), path), model=model(), criterion="trainer", options={"num_train_epochs": 1}
    ).train()
    assert not torch.equal(path.path[0], path.path[-1])
