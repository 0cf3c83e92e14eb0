"""Half fine-tuning as a callback of the plain trainer: the steps of `RegularizedTrainer`, or a refusal by name."""

import copy

import pytest
import torch
from two_processes import two_processes_and_one

from wellposed.weights import HalfFineTuning

transformers = pytest.importorskip("transformers")

from tiny_transformers import arguments, as_examples, language_model, pad, text_rows  # noqa: E402

from wellposed.integrations.half_fine_tuning_callback import HalfFineTuningCallback  # noqa: E402
from wellposed.integrations.transformers_trainer import RegularizedTrainer  # noqa: E402

DECAY = {"weight_decay": 0.1, "num_train_epochs": 1}


class Watch(transformers.TrainerCallback):
    """All weights after every step."""

    def __init__(self):
        self.path = []

    def on_step_end(self, args, state, control, model=None, **others):
        self.path.append({name: p.detach().clone() for name, p in model.named_parameters()})


def model():
    return language_model(num_hidden_layers=2)


def plain(folder, network, method, options=None, callbacks=(), **rest):
    return transformers.Trainer(
        network, arguments(folder, **{**DECAY, **(options or {})}), data_collator=pad,
        train_dataset=as_examples(*text_rows()), callbacks=[HalfFineTuningCallback(method), *callbacks], **rest,
    )  # fmt: skip


def test_it_takes_the_steps_of_the_regularized_trainer_in_every_stage(tmp_path):
    own, other = model(), model()
    methods = HalfFineTuning(seed=2), HalfFineTuning(seed=2)
    halves = []
    for _ in range(2):
        paths = Watch(), Watch()
        before = copy.deepcopy(own.state_dict())
        trainer = plain(tmp_path, own, methods[0], callbacks=[paths[0]])
        frozen = {name for name, p in own.named_parameters() if not p.requires_grad}
        trainer.train()
        RegularizedTrainer(
            other, arguments(tmp_path, **DECAY), data_collator=pad, train_dataset=as_examples(*text_rows()),
            regularizer=methods[1], criterion="trainer", callbacks=[paths[1]],
        ).train()  # fmt: skip
        assert len(paths[0].path) == len(paths[1].path) == 4
        for a, b in zip(paths[0].path, paths[1].path, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
        moved = {name for name, value in own.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == set(before) - frozen and len(frozen) == 9
        held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for name, p in own.named_parameters() if name not in frozen}
        assert {id(p) for p in trainer.optimizer.state} == {id(p) for p in held}
        assert all(p.requires_grad for p in own.parameters())  # set free again
        halves.append(frozen)
    assert halves[0] != halves[1] and methods[0].stage == 2


def test_a_resumed_run_ends_where_the_whole_one_does_and_another_half_is_told(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}
    whole = plain(tmp_path, model(), HalfFineTuning(seed=2), options)
    whole.train()
    again = plain(tmp_path, model(), HalfFineTuning(seed=2), options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    late = HalfFineTuning(seed=2)
    late.stage = 1
    with pytest.raises(ValueError, match=r"of stage 0, this run drew another half as stage 1; .* method\.stage = 0"):
        plain(tmp_path, model(), late, options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_without_a_half_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1, "save_only_model": True}
    settings, rows = arguments(tmp_path, **options), as_examples(*text_rows())
    transformers.Trainer(model(), settings, data_collator=pad, train_dataset=rows).train()
    with pytest.raises(ValueError, match="the checkpoint was written without this callback"):
        plain(tmp_path, model(), HalfFineTuning(), options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_what_a_callback_cannot_do_is_refused_by_name(tmp_path):
    for resample in ("epoch", 3):
        with pytest.raises(ValueError, match=f"resample must be 'stage', got {resample!r}.*RegularizedTrainer"):
            HalfFineTuningCallback(HalfFineTuning(resample=resample))
    with pytest.raises(ValueError, match="strategy='element' freezes single entries"):
        HalfFineTuningCallback(HalfFineTuning(strategy="element"))
    with pytest.raises(TypeError, match="method must be a HalfFineTuning, got str"):
        HalfFineTuningCallback("half")
    network = model()
    built = torch.optim.AdamW(network.parameters()), None
    with pytest.raises(ValueError, match="optimizers holds a AdamW that was built before"):
        plain(tmp_path, network, HalfFineTuning(), optimizers=built)
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint=True would replace"):
        plain(tmp_path, network, HalfFineTuning(), {"restore_callback_states_from_checkpoint": True})
    assert all(p.requires_grad for p in network.parameters())


def test_blocks_of_fused_matrices_are_refused_and_cost_no_stage(tmp_path):
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20, "n_positions": 16}
    network, method = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), HalfFineTuning(balance="params")
    with pytest.raises(ValueError, match="freezes blocks of fused matrices, single entries"):
        plain(tmp_path, network, method)
    assert method.stage == 0 and all(p.requires_grad for p in network.parameters())


def test_a_model_without_a_half_is_refused_before_the_first_step(tmp_path):
    trainer = plain(tmp_path, model(), HalfFineTuning())
    trainer.train()
    with pytest.raises(RuntimeError, match="build a new trainer for every stage"):
        trainer.train()
    late = transformers.Trainer(
        model(), arguments(tmp_path), data_collator=pad, train_dataset=as_examples(*text_rows())
    )
    late.add_callback(HalfFineTuningCallback(HalfFineTuning()))
    with pytest.raises(RuntimeError, match="pass the callback to the trainer's constructor"):
        late.train()
    with pytest.raises(RuntimeError, match="with model= and not model_init="):
        plain(tmp_path, None, HalfFineTuning(), model_init=model).train()


def test_an_optimizer_with_frozen_tensors_is_refused(tmp_path):
    class Greedy(transformers.Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.AdamW(self.model.parameters())
            return self.optimizer

    trainer = Greedy(
        model(), arguments(tmp_path), data_collator=pad, train_dataset=as_examples(*text_rows()),
        callbacks=[HalfFineTuningCallback(HalfFineTuning())],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"optimizer holds 'model\.layers.*', which is frozen"):
        trainer.train()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_models_are_refused(tmp_path, monkeypatch, kind):
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    settings = arguments(tmp_path)
    transformers.Trainer(model(), settings, data_collator=pad)  # makes the state
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType(kind))
    callback = HalfFineTuningCallback(HalfFineTuning())
    with pytest.raises(ValueError, match=f"HalfFineTuningCallback: {kind} is not supported"):
        callback.on_init_end(settings, None, None, model=model())


def test_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="HalfFineTuning needs the base weights, but the model is wrapped by PEFT"):
        plain(tmp_path, adapted, HalfFineTuning())


SCRIPT = """
    import os
    if world > 1:
        os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": "29500"}  # the group exists already, and nothing listens there
    import transformers
    from tiny_transformers import arguments, as_examples, language_model, pad, text_rows
    from wellposed.integrations.half_fine_tuning_callback import HalfFineTuningCallback
    from wellposed.weights import HalfFineTuning

    method, network = HalfFineTuning(seed=2), language_model(num_hidden_layers=2)
    result = []
    for stage in range(2):
        start = {name: p.detach().clone() for name, p in network.named_parameters()}
        options = {"gradient_accumulation_steps": 4 // world, "ddp_backend": "gloo" if world > 1 else None}
        settings = arguments(folder, num_train_epochs=1, weight_decay=0.1, **options)
        assert settings.world_size == world
        transformers.Trainer(network, settings, data_collator=pad, train_dataset=as_examples(*text_rows()),
                             callbacks=[HalfFineTuningCallback(method)]).train()
        frozen = [name for name, trained in method.mask().items() if not trained]
        assert all(torch.equal(p, start[name]) for name, p in network.named_parameters() if name in frozen)
        result.append((frozen, {name: p.detach().clone() for name, p in network.named_parameters()}))
"""


@pytest.mark.slow
def test_two_ranks_freeze_one_half_and_train_as_one_process(tmp_path):
    for first, second, single in zip(*two_processes_and_one(tmp_path, SCRIPT), strict=True):
        assert first[0] == second[0] == single[0] and len(first[0]) == 9
        for name, value in single[1].items():
            assert torch.equal(first[1][name], second[1][name])
            torch.testing.assert_close(first[1][name], value, rtol=0, atol=2e-6)
