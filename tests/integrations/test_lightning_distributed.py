"""Under strategy "ddp" two processes take the steps of `fit` in one, and continue from a checkpoint bit for bit."""

import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from doubles import data, smooth_network

from wellposed import Compose, TensorLoader, fit
from wellposed.gradients import SharpnessAwareMinimization, SurrogateSharpness
from wellposed.losses import EarlyLearning

pytest.importorskip("lightning")

SCRIPT = """
    import sys, warnings
    sys.path[:0] = [{support!r}]
    import lightning as L
    import torch
    import torch.nn.functional as F
    from doubles import HalfTraining, data, smooth_network
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset
    from wellposed import Compose, TensorLoader
    from wellposed.gradients import SharpnessAwareMinimization, SurrogateSharpness
    from wellposed.integrations.lightning_callback import RegularizerCallback
    from wellposed.losses import EarlyLearning
    from wellposed.weights import EarlyStopping

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = sys.argv[1]
    X, Y = data()

    class Share:
        "Batches of 16, of which each rank takes unequal parts."
        def __init__(self, rank):
            self.rank, self.whole = rank, TensorLoader(X, Y, batch_size=16, shuffle=True)
        def __len__(self):
            return len(self.whole)
        def set_epoch(self, epoch):
            self.whole.set_epoch(epoch)
        def __iter__(self):
            for b in self.whole:
                part = slice(0, 10) if self.rank == 0 else slice(10, 16)
                yield b.inputs[part], b.targets[part], b.index[part]

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = smooth_network()
        def training_step(self, batch):
            raise AssertionError("the callback drives the step")
        def validation_step(self, batch, number):
            self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)
        def train_dataloader(self):
            return Share(self.trainer.global_rank)
        def val_dataloader(self):
            half = slice(self.trainer.global_rank, None, 2)
            return DataLoader(TensorDataset(X[half], Y[half]), 32)

    def method():
        return Compose(
            EarlyLearning(64, 4), SurrogateSharpness(lam=0.5, eps=0.06, lam_lr=1.0, output_fn=lambda z: z[:, 0]),
            SharpnessAwareMinimization(0.05), EarlyStopping(),
        )

    def run(regularizer, **options):
        module, keep = Module(), ModelCheckpoint(folder + "/kept", filename="{{epoch}}", save_top_k=-1)
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, logger=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
            callbacks=[RegularizerCallback(regularizer, accumulation=2, clip_norm=0.7), keep],
        )
        trainer.fit(module, **options)
        return trainer, module

    whole = method()
    trainer, module = run(whole)
    resumed = method()
    _, again = run(resumed, ckpt_path=folder + "/kept/epoch=1.ckpt")
    try:
        run(HalfTraining())
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    torch.save(
        {{
            "model": module.model.state_dict(), "table": whole.regularizers[0].table.rows,
            "multiplier": whole.regularizers[1].multiplier, "best": whole.regularizers[-1].best_value,
            "loss": trainer.callback_metrics["train_loss"], "refused": refused,
            "again": again.model.state_dict(), "table again": resumed.regularizers[0].table.rows,
        }},
        f"{{folder}}/{{trainer.global_rank}}.pt",
    )
"""


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT).format(support=str(Path(__file__).parents[1] / "support")))
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))

    table, sharpness = (
        EarlyLearning(64, 4),
        SurrogateSharpness(lam=0.5, eps=0.06, lam_lr=1.0, output_fn=lambda z: z[:, 0]),
    )
    result = fit(
        smooth_network(), TensorLoader(*data(), batch_size=16, shuffle=True), epochs=3,
        regularizer=Compose(table, sharpness, SharpnessAwareMinimization(0.05)),
        optimizer=partial(torch.optim.SGD, lr=0.1), accumulation=2, clip_norm=0.7,
    )  # fmt: skip
    for name, value in result.model.state_dict().items():
        assert torch.equal(first["model"][name], second["model"][name])
        torch.testing.assert_close(first["model"][name], value, rtol=0, atol=1e-5)
        assert torch.equal(first["model"][name], first["again"][name])
    torch.testing.assert_close(first["table"], table.table.rows, rtol=0, atol=1e-5)
    assert torch.equal(first["table"], first["table again"]) and torch.equal(first["table"], second["table"])
    torch.testing.assert_close(first["multiplier"], sharpness.multiplier, rtol=0, atol=1e-4)
    assert float(first["loss"]) == float(second["loss"]) == pytest.approx(result.history[-1]["loss"], abs=1e-4)
    assert first["best"] == second["best"]
    assert "cannot change which parameters train" in first["refused"] and first["refused"] == second["refused"]
