"""The examples run as they stand, on their tiny model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, folder, monkeypatch, *options):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, "--output", str(folder), "--epochs", "1", *options])
    torch.manual_seed(0)
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name", ["finetune_hft.py", "finetune_ba_lora.py", "finetune_colm.py"])
def test_trains_and_saves_a_plain_model(tmp_path, monkeypatch, name):
    trainer = run(name, tmp_path / "out", monkeypatch)["trainer"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) >= 2 and all(loss == loss for loss in losses)
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.tensor([[70, 71, 72]])
    with torch.no_grad():
        model = trainer.model if name != "finetune_ba_lora.py" else trainer.model.get_base_model()
        torch.testing.assert_close(saved(tokens).logits, model.eval()(tokens).logits, rtol=0, atol=1e-5)
    assert all(p.requires_grad for p in saved.parameters())


def test_options_and_data_of_your_own(tmp_path, monkeypatch):
    lines = [{"prompt": f"{i} +", "completion": " 1"} for i in range(6)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = run(
        "finetune_hft.py", tmp_path / "out", monkeypatch, "--data", str(tmp_path / "mine.jsonl"), "--strategy", "layer"
    )  # fmt: skip
    frozen = [name for name, p in found["trainer"].model.named_parameters() if p.equal(found["before"][name])]
    assert {name.split(".")[2] for name in frozen if ".layers." in name} in ({"0"}, {"1"})
    again = run("finetune_colm.py", tmp_path / "out", monkeypatch, "--ranking", "random", "--ratio", "0.25")
    assert again["coreset"].updates == 2
    with pytest.raises(SystemExit):
        run("finetune_colm.py", tmp_path / "out", monkeypatch, "--ranking", "best")
