"""A trainer that was interrupted and continues from its checkpoint ends like one that was not, bit for bit."""

import shutil

import pytest
import torch
from doubles import MixedGradient

from wellposed import Compose, Regularizer
from wellposed.checkpoint import CheckpointError
from wellposed.losses import EarlyLearning
from wellposed.weights import EarlyStopping, WeightAveraging, WeightCompander
from wellposed.weights.half_fine_tuning import HalfFineTuning

transformers = pytest.importorskip("transformers")

from tiny_transformers import (  # noqa: E402
    CLASSES,
    ROWS,
    Confidence,
    arguments,
    as_examples,
    classification_rows,
    classifier,
    language_model,
    pad,
    text_rows,
)

from wellposed.integrations.transformers_trainer import RegularizedTrainer  # noqa: E402


class Draws(Regularizer):
    """Uses both sources of random numbers, wherever a hook may."""

    def __init__(self):
        super().__init__()
        self.register_buffer("drawn", torch.zeros(4))

    def on_epoch(self, step):
        self.drawn[0] += torch.rand(()) + torch.rand((), generator=step.generator)

    def on_batch(self, step):
        noise = torch.rand(len(step.index), generator=step.generator)
        step.weights = 0.5 + noise + torch.rand(())
        step.log("noise", noise.mean())

    def on_step(self, step):
        self.drawn[2] += torch.rand(()) + torch.rand((), generator=step.generator)


METHODS = {
    "tables, second evaluations, draws": lambda: Compose(Draws(), EarlyLearning(ROWS, CLASSES), MixedGradient(0.1)),
    "half fine-tuning": lambda: Compose(HalfFineTuning(resample="epoch"), Draws()),
    "parametrised weights": lambda: Compose(WeightCompander(), Draws()),
    "averages and early stopping": lambda: Compose(WeightAveraging(), EarlyStopping(patience=3), Draws()),
}


def train(folder, method, resume=None, model=None, **options):
    torch.manual_seed(5)
    model = model or classifier()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    rows = as_examples(*(text_rows() if hasattr(model, "lm_head") else classification_rows()))
    settings = {
        "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 3, "train_sampling_strategy": "random",
        "logging_strategy": "steps", "logging_steps": 3, "lr_scheduler_type": "linear", "weight_decay": 0.1,
    }  # fmt: skip
    trainer = RegularizedTrainer(
        model, arguments(folder, **{**settings, **options}), data_collator=pad, train_dataset=rows,
        eval_dataset=rows[:8], regularizer=method,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def assert_identical(first, second):
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else str(a) == str(b), name


@pytest.mark.parametrize("name", METHODS)
def test_continues_bit_for_bit(tmp_path, name):
    whole = train(tmp_path / "whole", METHODS[name]())
    for step in (4, 6):  # between epochs 1 and 2, and inside epoch 2
        again = train(tmp_path / f"from-{step}", METHODS[name](), resume=tmp_path / "whole" / f"checkpoint-{step}")
        assert_identical(whole.model, again.model)
        assert_identical(whole.regularizer, again.regularizer)
        logged = [[e["noise"] for e in t.state.log_history if "noise" in e] for t in (whole, again)]
        assert logged[0] == logged[1]


@pytest.mark.parametrize("tied", [False, True])
def test_language_model_continues_bit_for_bit(tmp_path, tied):
    """With tied embeddings under the names of a parametrisation, which transformers does not know."""

    def run(folder, resume=None):
        method = Compose(Confidence(), MixedGradient(0.1), Draws(), *([WeightCompander()] if tied else []))
        model = language_model(tie_word_embeddings=tied)
        return train(folder, method, resume, model, num_train_epochs=2)

    whole = run(tmp_path / "whole")
    again = run(tmp_path / "again", tmp_path / "whole" / "checkpoint-6")
    assert_identical(whole.model, again.model)


def test_best_model_comes_back_with_the_methods_state_of_then(tmp_path):
    class Count(Regularizer):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def on_step(self, step):
            self.steps += 1

    method = Count()
    trainer = train(
        tmp_path, method, num_train_epochs=3, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="eval_runtime", greater_is_better=True, learning_rate=1e-3,
    )  # fmt: skip
    best = int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1])
    assert method.steps == best


def test_checkpoints_that_do_not_belong_here_are_refused(tmp_path):
    train(tmp_path, Draws(), max_steps=2)
    folder = tmp_path / "checkpoint-2"
    with pytest.raises(
        CheckpointError, match=r"belongs to a run with \['Draws'\], this one has \['Draws', 'MixedGradient'\]"
    ):
        train(tmp_path / "other", Compose(Draws(), MixedGradient()), resume=folder)
    with pytest.raises(CheckpointError, match=r"'bert.embeddings.*weight' was not restored"):
        trainer = RegularizedTrainer(
            classifier(), arguments(tmp_path / "other"), data_collator=pad, regularizer=Draws(),
            train_dataset=as_examples(*classification_rows()),
        )  # fmt: skip
        trainer._load_from_checkpoint = lambda *_: None  # what a warning of the trainer would tell
        trainer.train(resume_from_checkpoint=str(folder))
    (folder / "regularizer.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="regularizer.pt cannot be read"):
        train(tmp_path / "other", Draws(), resume=folder)
    (folder / "regularizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"holds no regularizer.pt"):
        train(tmp_path / "other", Draws(), resume=folder)
    shutil.rmtree(folder)
