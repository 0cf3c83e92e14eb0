"""Any method inside transformers.Trainer equals `fit`, step for step."""

from functools import partial

import pytest
import torch
from doubles import HalfTraining, MeanGradientNorm, MixedGradient

from wellposed import Compose, Pair, Regularizer, TensorLoader
from wellposed.gradients import SharpnessAwareMinimization
from wellposed.losses import CoTeaching, EarlyLearning, GeneralizedCrossEntropy, ProgressiveSelfDistillation
from wellposed.regularizer import RequirementError
from wellposed.weights import EarlyStopping, WeightAveraging, WeightCompander

transformers = pytest.importorskip("transformers")

from tiny_transformers import (  # noqa: E402
    CLASSES,
    MICRO,
    PARTS,
    ROWS,
    Confidence,
    Path,
    Ridge,
    Seen,
    Shortest,
    arguments,
    as_examples,
    assert_same_path,
    classification_rows,
    classifier,
    language_model,
    pad,
    reference,
    text_rows,
)

from wellposed.integrations.transformers_trainer import RegularizedTrainer, RegularizerMixin  # noqa: E402


def trainer_for(folder, regularizer, tokens=False, model=None, options=None, **rest):
    rows = as_examples(*(text_rows() if tokens else classification_rows()))
    model = model or (language_model() if tokens else classifier())
    return RegularizedTrainer(
        model,
        arguments(folder, **(options or {})),
        data_collator=pad,
        train_dataset=rows,
        regularizer=regularizer,
        **rest,
    )


METHODS = {
    "plain": lambda: Regularizer(),
    "penalty": lambda: Compose(Ridge(), Confidence()),
    "table of past predictions": lambda: EarlyLearning(ROWS, CLASSES),
    "targets of the pool": lambda: ProgressiveSelfDistillation(ROWS, CLASSES),
    "second evaluation": lambda: Compose(EarlyLearning(ROWS, CLASSES), SharpnessAwareMinimization(0.1)),
    "forward passes of the pool": lambda: Compose(MeanGradientNormOfLogits()),
    "loss replaced": lambda: GeneralizedCrossEntropy(0.7),
    "parameters by epoch": lambda: HalfTraining(),
    "parametrised weights": lambda: WeightCompander(),
    "part of the pool": lambda: Shortest(5),
}


class MeanGradientNormOfLogits(MeanGradientNorm):
    def on_gradients(self, step):
        whole = step.forward

        def logits(**options):
            return whole(**options).logits

        step.forward = logits
        super().on_gradients(step)


@pytest.mark.parametrize("name", METHODS)
def test_equals_fit_step_for_step(tmp_path, name):
    first, second = Path(), Path()
    trainer = trainer_for(tmp_path, Compose(METHODS[name](), first))
    trainer.train()
    result = reference(classifier(), Compose(METHODS[name](), second))
    assert_same_path(first, second)
    for (key, a), (_, b) in zip(trainer.model.state_dict().items(), result.model.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize("method", [Regularizer, Confidence, lambda: Shortest(5), lambda: MixedGradient(0.1)])
def test_language_model_with_micro_batches_of_different_length_equals_fit(tmp_path, method):
    first, second = Path(), Path()
    trainer_for(tmp_path, Compose(method(), first), tokens=True).train()
    reference(language_model(), Compose(method(), second), tokens=True)
    assert_same_path(first, second)


def test_plain_method_equals_the_plain_trainer(tmp_path):
    """The trainer's own loss and ours, over the tokens of all micro-batches."""
    own = transformers.Trainer(
        language_model(), arguments(tmp_path), data_collator=pad, train_dataset=as_examples(*text_rows())
    )
    own.train()
    for criterion in (None, "trainer"):
        trainer = trainer_for(tmp_path, Regularizer(), tokens=True, criterion=criterion)
        trainer.train()
        for a, b in zip(own.model.parameters(), trainer.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_own_loss_follows_a_pool_that_became_small(tmp_path):
    """Normalised by the tokens that are left, as the unreduced criterion is."""
    paths = []
    for criterion in (None, "trainer"):
        path = Path()
        trainer_for(tmp_path, Compose(Shortest(3), path), tokens=True, criterion=criterion).train()
        paths.append(path)
    assert_same_path(*paths)


def test_small_pool_has_no_padding_and_fewer_micro_batches(tmp_path):
    method = Shortest(3)
    trainer_for(tmp_path, method, options={"num_train_epochs": 1}).train()
    assert len(method.widths) == 3 * (ROWS // (MICRO * PARTS))
    lengths = classification_rows()[1].sum(1).reshape(-1, MICRO * PARTS).sort(1).values[:, :3]
    assert [tuple(shape) for shape in method.widths] == [(1, int(n)) for n in lengths.flatten()]


@pytest.mark.parametrize("shuffled", [False, True])
def test_index_survives_column_removal_and_any_collator(tmp_path, shuffled):
    datasets = pytest.importorskip("datasets")
    rows = as_examples(*classification_rows())
    data = datasets.Dataset.from_list([{**row, "comment": "x", "source": i % 4} for i, row in enumerate(rows)])
    if shuffled:
        data = data.shuffle(seed=1)
    held = datasets.Dataset.from_list([{**row, "index": 0, "source": 1} for row in rows[:4]])
    sources = []

    class Source(Regularizer):
        def on_batch(self, step):
            sources.append((step.index, step.extra["source"]))

    seen = Seen()
    trainer = RegularizedTrainer(
        classifier(), arguments(tmp_path, train_sampling_strategy="random", num_train_epochs=1), data_collator=pad,
        train_dataset=data, eval_dataset=held, regularizer=Compose(seen, Source()), extra_columns=["source"],
    )  # fmt: skip
    trainer.train()
    assert torch.equal(seen.count, torch.ones(ROWS, dtype=torch.int64))
    for index, source in sources:
        assert source.tolist() == [data[i]["source"] for i in index.tolist()]
    assert "eval_loss" in trainer.evaluate()  # an index column in the evaluation data does not reach the model


def test_weights_column_weighs_the_examples(tmp_path):
    rows = as_examples(*classification_rows())
    halves = [{**row, "weights": float(i % 2)} for i, row in enumerate(rows)]
    path = Path()
    RegularizedTrainer(
        classifier(), arguments(tmp_path), data_collator=pad, train_dataset=halves, regularizer=path,
        extra_columns=["weights"],
    ).train()  # fmt: skip

    class OddOnly(Regularizer):
        def on_batch(self, step):
            step.weights = (step.index % 2).float()

    expected = Path()
    reference(classifier(), Compose(OddOnly(), expected))
    assert_same_path(path, expected)


@pytest.mark.parametrize("stream", [False, True])
def test_missing_index_is_refused(tmp_path, stream):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from as_examples(*classification_rows())

    rows = Stream() if stream else as_examples(*classification_rows())
    options = {"max_steps": 1} if stream else {}

    def make(regularizer):
        return RegularizedTrainer(
            classifier(), arguments(tmp_path, **options), data_collator=pad, train_dataset=rows, regularizer=regularizer
        )

    if stream:
        with pytest.raises(RequirementError, match="Seen requires 'index', which RegularizedTrainer"):
            make(Seen())
        path = Path()
        make(path).train()  # a stream without positions is fine for others
        assert len(path.path) == 1
    else:
        make(Seen()).train()


def test_epochs_steps_and_progress(tmp_path):
    seen = []

    class Clock(Regularizer):
        def on_epoch(self, step):
            seen.append((step.epoch, step.epochs, step.number, step.total, step.finished))

        def on_step(self, step):
            seen.append(step.number)

    trainer_for(tmp_path, Clock()).train()
    assert seen == [(0, 2, 0, 8, False), 0, 1, 2, 3, (1, 2, 4, 8, False), 4, 5, 6, 7, (2, 2, 8, 8, True)]


@pytest.mark.parametrize("when", ["epoch", "step"])
def test_stop_ends_training(tmp_path, when):
    class Stop(Regularizer):
        def on_epoch(self, step):
            if when == "epoch" and step.epoch == 1 and not step.finished:
                step.stop("enough")

        def on_step(self, step):
            if when == "step" and step.number == 2:
                step.stop("enough")

    path = Path()
    trainer = trainer_for(tmp_path, Compose(Stop(), path), options={"num_train_epochs": 5})
    trainer.train()
    assert trainer.stopped == "enough"
    assert trainer.state.global_step == len(path.path) == (4 if when == "epoch" else 3)


def test_validation_reaches_the_method_once_an_epoch(tmp_path):
    """Early stopping on labels that contradict the training set judges what `fit` judges."""
    inputs, mask, labels = classification_rows()
    wrong = (labels[:8] + 1) % CLASSES
    stopper, expected = EarlyStopping(patience=1), EarlyStopping(patience=1)
    trainer = trainer_for(
        tmp_path, stopper, options={"num_train_epochs": 4, "learning_rate": 0.05, "eval_strategy": "epoch"},
        eval_dataset=as_examples(inputs[:8], mask[:8], wrong),
    )  # fmt: skip
    evaluations = []
    evaluate = trainer.evaluation_loop
    trainer.evaluation_loop = lambda *a, **k: evaluations.append(trainer.state.global_step) or evaluate(*a, **k)
    trainer.train()
    held = TensorLoader({"input_ids": inputs[:8], "attention_mask": mask[:8]}, wrong, batch_size=8)
    result = reference(
        classifier(), expected, epochs=4, validation=held,
        optimizer=partial(torch.optim.AdamW, lr=0.05, weight_decay=0.0, eps=1e-4),
    )  # fmt: skip
    assert (trainer.stopped, stopper.best_epoch) == (result.stopped, expected.best_epoch) and trainer.stopped
    assert stopper.best_value == pytest.approx(expected.best_value, abs=1e-5)
    assert evaluations == [4 * (i + 1) for i in range(len(result.history))]


def test_logged_numbers_reach_the_trainers_log(tmp_path):
    class Talk(Regularizer):
        def on_step(self, step):
            step.log("number", step.number)

    trainer = trainer_for(
        tmp_path, Talk(), options={"logging_strategy": "steps", "logging_steps": 2, "num_train_epochs": 1}
    )
    trainer.train()
    assert [entry["number"] for entry in trainer.state.log_history if "number" in entry] == [0.5, 2.5]


def test_parameter_groups_keep_the_trainers_exclusions(tmp_path):
    class Wishes(Regularizer):
        def parameter_groups(self, model):
            return [
                {"names": ["classifier.weight"], "lr_factor": 10.0},
                {"names": ["classifier.bias"], "owned": True},
                {"names": ["bert.pooler.dense.weight"], "weight_decay": 0.9},
            ]

    trainer = trainer_for(tmp_path, Wishes(), options={"weight_decay": 0.1})
    trainer.create_optimizer()
    of = {n: (g["lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups for n in g["names"]}
    assert of["classifier.weight"] == (0.1, 0.1) and "classifier.bias" not in of
    assert of["bert.pooler.dense.weight"] == (0.01, 0.9)
    assert of["bert.embeddings.LayerNorm.weight"] == of["bert.pooler.dense.bias"] == (0.01, 0.0)
    assert len(of) == len(list(trainer.model.parameters())) - 1


def test_frozen_parameters_come_back_to_their_own_group(tmp_path):
    class Thaw(Regularizer):
        def attach(self, model):
            model.bert.embeddings.LayerNorm.requires_grad_(False)
            return model

        def on_epoch(self, step):
            if step.epoch == 1:
                step.replace_parameters([n for n, _ in step.model.named_parameters()])

    trainer = trainer_for(tmp_path, Thaw(), options={"weight_decay": 0.1})
    norm = trainer.model.bert.embeddings.LayerNorm.weight
    trainer.train()
    (group,) = [g for g in trainer.optimizer.param_groups if any(p is norm for p in g["params"])]
    assert group["weight_decay"] == 0.0 and not torch.equal(norm, torch.ones_like(norm))


def test_two_networks_train_and_are_evaluated_as_one(tmp_path):
    torch.manual_seed(3)
    trainer = trainer_for(
        tmp_path, CoTeaching(forget_rate=0.25, num_gradual=0), options={"num_train_epochs": 1, "gradient_accumulation_steps": 1},
        eval_dataset=as_examples(*classification_rows()), finish=False, compute_metrics=lambda p: {"n": len(p.predictions)},
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_n"] == ROWS and 0 < metrics["eval_loss"] < 5
    assert isinstance(trainer.finish(), Pair)


def test_averages_are_in_the_model_after_training_and_training_twice_is_refused(tmp_path):
    path = Path()
    trainer = trainer_for(tmp_path, Compose(WeightAveraging(), path), options={"num_train_epochs": 1})
    trainer.train()
    final = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert not torch.equal(final, path.path[-1])
    with pytest.raises(RuntimeError, match="the model is finished"):
        trainer.train()


def test_bf16_equals_fit(tmp_path):
    first, second = Path(), Path()
    options = {"bf16": True, "num_train_epochs": 1}
    trainer_for(tmp_path, Compose(MixedGradient(0.1), first), options=options).train()
    reference(classifier(), Compose(MixedGradient(0.1), second), epochs=1, amp=torch.bfloat16)
    assert_same_path(first, second, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    paths = []
    for checkpointing in (False, True):
        path = Path()
        options = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        options["num_train_epochs"] = 1
        trainer_for(tmp_path, Compose(MixedGradient(0.1), path), tokens=True, options=options).train()
        paths.append(path)
    assert_same_path(*paths)


def test_gradient_scaler_is_undone_before_the_hook_and_a_skipped_step_is_no_step(tmp_path):
    """A CPU scaler in the place of fp16's: gradients in hooks, closures and clipping are those without it."""
    paths = []
    for scaled in (False, True):
        path = Path()
        method = Compose(MixedGradient(0.1), path, Burst() if scaled else Regularizer())
        trainer = trainer_for(tmp_path, method, options={"num_train_epochs": 1})
        if scaled:
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
            accelerator = trainer.accelerator
            accelerator.scaler = scaler
            accelerator.unscale_gradients = lambda optimizer=None, a=accelerator: [
                a.scaler.unscale_(o.optimizer) for o in a._optimizers
            ]
        trainer.train()
        paths.append(path)
    plain, with_scaler = paths
    # The first step overflows and is skipped; the second then takes the second batch from the first weights.
    assert len(with_scaler.path) == len(plain.path) - 1

    shorter = Path()
    rows = as_examples(*classification_rows())[MICRO * PARTS :]
    RegularizedTrainer(
        classifier(), arguments(tmp_path, num_train_epochs=1), data_collator=pad, train_dataset=rows,
        regularizer=Compose(MixedGradient(0.1), shorter),
    ).train()  # fmt: skip
    assert_same_path(with_scaler, shorter)


class Burst(Regularizer):
    """A first step whose gradient a scaler makes infinite."""

    def penalty(self, step):
        return (1e12 if step.number == 0 else 0.0) * sum(p.sum() for p in step.model.parameters())


class Attaching(Regularizer):
    def attach(self, model):
        return model


class Twice(Regularizer):
    requires = frozenset({"double_backward"})


class NeedsValidation(Regularizer):
    requires = frozenset({"validation"})


def test_bad_input_is_refused_by_name(tmp_path):
    model = classifier()
    built = (torch.optim.SGD(model.parameters(), lr=0.1), None)
    with pytest.raises(
        ValueError, match="optimizers holds an optimizer that is already built, but Attaching acts in attach"
    ):
        trainer_for(tmp_path, Compose(Ridge(), Attaching()), model=model, optimizers=built)
    trainer_for(tmp_path, Ridge(), model=model, optimizers=built)
    with pytest.raises(TypeError, match="regularizer must be a Regularizer, got str"):
        trainer_for(tmp_path, "elr")
    with pytest.raises(ValueError, match="criterion must be None, 'trainer' or a function"):
        trainer_for(tmp_path, Ridge(), criterion="cross entropy")
    with pytest.raises(ValueError, match="model_init would build a second model"):
        RegularizedTrainer(args=arguments(tmp_path), model_init=classifier, regularizer=Ridge())
    with pytest.raises(ValueError, match="GeneralizedCrossEntropy replaces the task loss"):
        trainer_for(tmp_path, GeneralizedCrossEntropy(0.5), criterion="trainer")
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer_for(tmp_path, Ridge(), options={"label_smoothing_factor": 0.1})
    with pytest.raises(ValueError, match="compute_loss_func would be ignored"):
        trainer_for(tmp_path, Ridge(), compute_loss_func=lambda *a, **k: None)
    with pytest.raises(RequirementError, match="NeedsValidation requires 'validation'"):
        trainer_for(tmp_path, NeedsValidation())
    with pytest.raises(ValueError, match="auto_find_batch_size"):
        trainer_for(tmp_path, Ridge(), options={"auto_find_batch_size": True})
    with pytest.raises(ValueError, match="use_reentrant=True"):
        trainer_for(
            tmp_path, MixedGradient(),
            options={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        )  # fmt: skip


def test_fused_attention_cannot_be_differentiated_twice_unless_told_so(tmp_path):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fused = classifier()
    fused.set_attn_implementation("sdpa")
    trainer = trainer_for(tmp_path, Twice(), model=fused, options={"max_steps": 1})
    with pytest.raises(RequirementError, match="Twice requires 'double_backward'"):
        trainer.train()
    with sdpa_kernel(SDPBackend.MATH):
        trainer.train()
    trainer_for(tmp_path, Twice(), options={"max_steps": 1}).train()


def test_trainer_with_a_loss_of_its_own_must_say_which_counts(tmp_path):
    class Doubled(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    class RegularizedDoubled(RegularizerMixin, Doubled):
        pass

    rows = as_examples(*classification_rows())
    with pytest.raises(ValueError, match="Doubled computes its own loss"):
        RegularizedDoubled(classifier(), arguments(tmp_path), train_dataset=rows, regularizer=Ridge())
    rows, paths = as_examples(*text_rows()), []
    for kind, options in ((RegularizedDoubled, {"criterion": "trainer"}), (RegularizedTrainer, {})):
        path = Path()
        kind(
            language_model(), arguments(tmp_path, optim="sgd", max_grad_norm=0.0, learning_rate=0.1 if options else 0.2),
            data_collator=pad, train_dataset=rows, regularizer=path, **options,
        ).train()  # fmt: skip
        paths.append(path)
    assert_same_path(*paths)
