"""Tiny transformers with random weights, their data, and what `fit` and a trainer need to be compared step for step."""

import gc
from functools import partial

import torch
import transformers

from wellposed import Regularizer, TensorLoader, fit
from wellposed.integrations.trainer_batches import shift_labels

gc.freeze()  # each training begins with a garbage collection, which need not look at these libraries again

ROWS, CLASSES, MICRO, PARTS, VOCABULARY, LENGTH = 32, 3, 2, 4, 20, 9
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def classifier(seed=0, **options):
    """Without dropout: a trainer draws its own random numbers between the steps."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=16, num_labels=CLASSES, attn_implementation="eager",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES, **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(config)


def language_model(seed=0, **options):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=32, num_key_value_heads=1, attn_implementation="eager",
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **{"tie_word_embeddings": False, **SIZES, **options},
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


def classification_rows():
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    mask = torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (ROWS, 1), generator=generator)
    return inputs * mask, mask.long(), labels


def text_rows():
    """Sentences of different length; the first token of each is a prompt without a label."""
    inputs, mask, _ = classification_rows()
    labels = inputs.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return inputs, mask, labels


def as_examples(inputs, mask, labels):
    """One dict of lists a row, each of its own length."""
    examples = []
    for row, used, label in zip(inputs, mask.bool(), labels, strict=True):
        examples.append({"input_ids": row[used].tolist(), "labels": label[used].tolist() if label.ndim else int(label)})
    return examples


def pad(examples):
    """A collator that pads to the longest of its micro-batch."""
    width = max(len(e["input_ids"]) for e in examples)

    def column(name, fill):
        return torch.tensor([e[name] + [fill] * (width - len(e[name])) for e in examples])

    batch = {"input_ids": column("input_ids", 0)}
    batch["attention_mask"] = torch.tensor(
        [[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples]
    )
    tokens = isinstance(examples[0]["labels"], list)
    batch["labels"] = column("labels", -100) if tokens else torch.tensor([e["labels"] for e in examples])
    return batch


def arguments(folder, kind=transformers.TrainingArguments, **options):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": MICRO, "gradient_accumulation_steps": PARTS,
        "num_train_epochs": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 0.5, "seed": 0,
        "optim": "adamw_torch", "adam_epsilon": 1e-4,  # large: Adam would blow rounding of tiny gradients up
        "save_strategy": "no", "logging_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return kind(**{**settings, **options})


def reference(model, regularizer, tokens=False, epochs=2, **options):
    """`fit` on the same rows, in the same order and with the same settings."""
    inputs, mask, labels = text_rows() if tokens else classification_rows()
    targets = shift_labels(labels) if tokens else labels
    loader = TensorLoader({"input_ids": inputs, "attention_mask": mask}, targets, batch_size=MICRO * PARTS)
    settings = {
        "epochs": epochs, "regularizer": regularizer, "accumulation": PARTS, "clip_norm": 0.5,
        "optimizer": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0, eps=1e-4),
    }  # fmt: skip
    return fit(model, loader, **{**settings, **options})


class Path(Regularizer):
    """Keeps the trainable weights after every step."""

    def __init__(self):
        super().__init__()
        self.path = []

    def on_step(self, step):
        self.path.append(torch.cat([p.detach().flatten().clone() for p in step.model.parameters() if p.requires_grad]))


def assert_same_path(first, second, atol=1e-6):
    assert len(first.path) == len(second.path) > 0
    for a, b in zip(first.path, second.path, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


class Ridge(Regularizer):
    """A scalar penalty on whatever trains."""

    def penalty(self, step):
        return 0.05 * sum(p.square().sum() for p in step.model.parameters() if p.requires_grad)


class Confidence(Regularizer):
    """A penalty by token, or by example: the negative entropy of the prediction."""

    def penalty(self, step):
        p = step.logits.log_softmax(-1)
        return 0.3 * (p.exp() * p).sum(-1)


class Shortest(Regularizer):
    """Trains on part of the pool: the examples with the fewest tokens, whose padding then is cut away."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep
        self.widths = []

    def on_batch(self, step):
        chosen = step.inputs["attention_mask"].sum(1).argsort(stable=True)[: self.keep]
        step.inputs = {name: value[chosen] for name, value in step.inputs.items()}
        step.targets, step.index = step.targets[chosen], step.index[chosen]

    def on_backward(self, step):
        self.widths.append(step.inputs["input_ids"].shape)


class Seen(Regularizer):
    """Counts how often each example was trained on, and keeps the last loss of each."""

    requires = frozenset({"index"})

    def __init__(self, rows=ROWS):
        super().__init__()
        self.register_buffer("count", torch.zeros(rows, dtype=torch.int64))

    def on_backward(self, step):
        self.count[step.index] += 1
