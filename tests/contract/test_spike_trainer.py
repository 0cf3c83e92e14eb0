"""A gradient method inside transformers.Trainer with four micro-batches equals `fit`, step for step."""

from functools import partial

import pytest
import torch
from doubles import MixedGradient

from wellposed import Compose, Step, TensorLoader, fit
from wellposed.accumulation import Accumulation
from wellposed.gradients import SharpnessAwareMinimization
from wellposed.losses import EarlyLearning
from wellposed.objective import cross_entropy

transformers = pytest.importorskip("transformers")

ROWS, CLASSES, MICRO, PARTS = 32, 3, 2, 4


def tiny_model():
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, num_labels=CLASSES, attn_implementation="eager",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,  # the Trainer draws its own random numbers in between
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def tokens():
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randint(0, 20, (ROWS, 6), generator=generator)
    return inputs, torch.randint(0, CLASSES, (ROWS,), generator=generator)


class RegularizedTrainer(transformers.Trainer):
    """What an adapter needs: the pool of an optimizer step, its micro-batches, and a moment before clipping."""

    def __init__(self, *args, regularizer, **kwargs):
        super().__init__(*args, **kwargs)
        self.regularizer = regularizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        joined = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
        labels, index = joined.pop("labels"), joined.pop("index")
        pool = Step(
            self.model, self.optimizer, joined, labels, index, number=self.state.global_step, total=self.state.max_steps
        )
        self.regularizer.on_batch(pool)
        self.accumulation = Accumulation(pool, self.regularizer, cross_entropy, len(batches))
        self.micro = 0
        return batches, count

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.accumulation.evaluate(self.micro)
        self.micro += 1
        if self.micro == len(self.accumulation.steps):
            self.accumulation.on_gradients()  # before the Trainer clips
        return loss

    def _save(self, *args, **kwargs):
        return None


@pytest.mark.parametrize("method", [SharpnessAwareMinimization, MixedGradient])
def test_trainer_equals_fit_step_for_step(tmp_path, method):
    inputs, labels = tokens()
    rows = [
        {"input_ids": x, "labels": y, "index": torch.tensor(i)}
        for i, (x, y) in enumerate(zip(inputs, labels, strict=True))
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=MICRO, gradient_accumulation_steps=PARTS, num_train_epochs=2,
        learning_rate=1e-2, lr_scheduler_type="constant", optim="adamw_torch", max_grad_norm=0.5, report_to=[],
        save_strategy="no", use_cpu=True, remove_unused_columns=False, disable_tqdm=True, logging_strategy="no",
        label_names=["labels"], train_sampling_strategy="sequential",
    )  # fmt: skip
    path_a, path_b = [], []

    class Record(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            path_a.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))

    first = Compose(EarlyLearning(ROWS, CLASSES), method())
    trainer = RegularizedTrainer(
        tiny_model().eval(), arguments, train_dataset=rows, regularizer=first, callbacks=[Record()]
    )
    trainer.train()

    second = Compose(EarlyLearning(ROWS, CLASSES), method())
    batches = TensorLoader({"input_ids": inputs}, labels, batch_size=MICRO * PARTS)
    recorded = RecordSteps(path_b)
    fit(
        tiny_model(), batches, epochs=2, regularizer=Compose(second, recorded), accumulation=PARTS, clip_norm=0.5,
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0),
    )  # fmt: skip
    assert len(path_a) == len(path_b) == 2 * ROWS // (MICRO * PARTS)
    for a, b in zip(path_a, path_b, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    torch.testing.assert_close(first.regularizers[0].table.rows, second.regularizers[0].table.rows, rtol=0, atol=1e-6)


class RecordSteps(EarlyLearning):
    """Keeps the weights after every step."""

    requires = frozenset()

    def __init__(self, path):
        super().__init__(1, 2)
        self.path = path

    def penalty(self, step):
        return None

    def on_backward(self, step):
        return None

    def on_step(self, step):
        self.path.append(torch.cat([p.detach().flatten().clone() for p in step.model.parameters()]))
