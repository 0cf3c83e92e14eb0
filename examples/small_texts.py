"""What the examples share: a model (tiny with random weights, or any by name) and texts (built in, or your .jsonl)."""

import argparse
import json
from pathlib import Path

import torch
import transformers

COLOURS = ("red", "blue", "green", "grey")
SHAPES = ("ball", "cube", "cone", "ring")
TEXTS = [
    {"prompt": f"The {c} {s} is", "completion": f" in room {(3 * i + j) % 5}.", "source": int(i == 3)}
    for i, c in enumerate(COLOURS)
    for j, s in enumerate(SHAPES)
]
"""Sixteen facts; source 1, the grey things, is the small one."""


def parser(about):
    """Options of every example."""
    options = argparse.ArgumentParser(description=about)
    options.add_argument("--model", help="name or folder of a causal language model; a tiny random one by default")
    options.add_argument("--data", type=Path, help='.jsonl with {"prompt", "completion", "source" (optional)} a line')
    options.add_argument("--epochs", type=int, default=2)
    options.add_argument("--batch-size", type=int, default=2)
    options.add_argument("--learning-rate", type=float, default=2e-3)
    options.add_argument("--output", default="wellposed-report/finetune")
    return options


def load(options):
    """The model, the training rows (token ids, labels of the completion alone), and their collator."""
    texts = TEXTS if options.data is None else [json.loads(line) for line in options.data.read_text().splitlines()]
    if options.model is None:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=259, pad_token_id=0, **sizes))
        encode = lambda text: [3 + byte for byte in text.encode()]  # noqa: E731
        end, pad = 2, 0
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        end = tokenizer.eos_token_id
        pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = []
    for text in texts:
        prompt, completion = encode(text["prompt"]), [*encode(text["completion"]), end]
        labels = [-100] * len(prompt) + completion
        rows.append({"input_ids": prompt + completion, "labels": labels, "source": text.get("source", 0)})

    def collate(examples):
        width = max(len(e["input_ids"]) for e in examples)
        fill = lambda name, value: torch.tensor([e[name] + [value] * (width - len(e[name])) for e in examples])  # noqa: E731
        lengths = torch.tensor([[len(e["input_ids"])] for e in examples])
        mask = (torch.arange(width) < lengths).long()
        return {"input_ids": fill("input_ids", pad), "labels": fill("labels", -100), "attention_mask": mask}

    return model, rows, collate


def arguments(options, **more):
    """The trainer's settings."""
    return transformers.TrainingArguments(
        options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        **more,
    )
