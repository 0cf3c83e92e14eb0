"""Two processes inside transformers.Trainer agree with one on the joined batch."""

import contextlib
import io
import multiprocessing
import os
import socket
import traceback

import pytest
import torch
from doubles import MixedGradient

from wellposed import Compose
from wellposed.losses import EarlyLearning

pytest.importorskip("transformers")

from tiny_transformers import (
    CLASSES,
    PARTS,
    ROWS,
    Confidence,
    Ridge,
    Seen,
    Shortest,
    arguments,
    as_examples,
    classification_rows,
    classifier,
    language_model,
    pad,
    text_rows,
)

from wellposed.integrations.transformers_trainer import RegularizedTrainer


class ShortestOfBoth(Shortest):
    """What two ranks choose from their own halves of the pool, whose micro-batches alternate."""

    def on_batch(self, step):
        used = step.inputs["attention_mask"].sum(1)
        halves = [torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])]
        chosen = torch.cat([half[used[half].argsort(stable=True)[: self.keep]] for half in halves])
        step.inputs = {name: value[chosen] for name, value in step.inputs.items()}
        step.targets, step.index = step.targets[chosen], step.index[chosen]


def train(world, folder):
    ready = {}
    for name, tokens in (("classes", False), ("tokens", True)):
        rows = as_examples(*(text_rows() if tokens else classification_rows()))
        seen, table = Seen(), EarlyLearning(ROWS, CLASSES)
        own = (Shortest(1) if world > 1 else ShortestOfBoth(1)) if tokens else table
        settings = arguments(
            folder, gradient_accumulation_steps=PARTS // world, logging_strategy="epoch",
            ddp_backend="gloo" if world > 1 else None,
        )  # fmt: skip
        trainer = RegularizedTrainer(
            language_model() if tokens else classifier(), settings, data_collator=pad, train_dataset=rows,
            regularizer=Compose(seen, Ridge(), own, Confidence(), MixedGradient(0.1)),
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        assert settings.world_size == world
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        ready[name] = (trainer.model.state_dict(), seen.count, losses, None if tokens else table.table.rows)
    torch.save(ready, f"{folder}/{world}-{settings.process_index}.pt")


def rank(number, port, folder):
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    AcceleratorState._reset_state(reset_partial_state=True)  # of a trainer that the parent had
    try:
        train(2, folder)
    except BaseException:
        with open(f"{folder}/error-{number}.txt", "w") as file:  # noqa: PTH123
            file.write(traceback.format_exc())
        raise


def test_two_ranks_end_with_the_weights_and_tables_of_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked: importing these libraries takes longer than the test.
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank, args=(number, port, str(tmp_path))) for number in range(2)]
    for process in ranks:
        process.start()
    for number, process in enumerate(ranks):
        process.join(timeout=300)
        error = tmp_path / f"error-{number}.txt"
        assert process.exitcode == 0, error.read_text() if error.exists() else process.exitcode
    train(1, str(tmp_path))
    first, second, single = (torch.load(tmp_path / f"{name}.pt") for name in ("2-0", "2-1", "1-0"))
    for name in ("classes", "tokens"):
        for key, value in single[name][0].items():
            assert torch.equal(first[name][0][key], second[name][0][key])
            torch.testing.assert_close(first[name][0][key], value, rtol=0, atol=2e-6)
        assert first[name][2] == pytest.approx(single[name][2], abs=1e-5)
        assert torch.equal(first[name][1] + second[name][1], single[name][1])  # each has seen its share
    assert torch.equal(first["classes"][3], second["classes"][3])
    torch.testing.assert_close(first["classes"][3], single["classes"][3], rtol=0, atol=1e-6)
