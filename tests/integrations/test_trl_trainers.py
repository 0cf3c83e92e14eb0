"""Any method inside TRL's trainers: supervised fine-tuning equals `fit`, preference optimization equals TRL's own."""

import copy
import pathlib
import re

import pytest
import torch
from doubles import MixedGradient

from wellposed import Compose, Regularizer
from wellposed.losses import GeneralizedCrossEntropy
from wellposed.regularizer import RequirementError
from wellposed.weights import HalfFineTuning

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

import transformers  # noqa: E402
from tiny_transformers import (  # noqa: E402
    ROWS,
    VOCABULARY,
    Confidence,
    Path,
    Ridge,
    Seen,
    Shortest,
    arguments,
    as_examples,
    assert_same_path,
    language_model,
    reference,
    text_rows,
)
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trl.trainer.dpo_config import DPOConfig  # noqa: E402
from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from trl.trainer.sft_config import SFTConfig  # noqa: E402
from trl.trainer.sft_trainer import SFTTrainer  # noqa: E402

from wellposed.integrations.trl_trainers import RegularizedDPOTrainer, RegularizedSFTTrainer  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )


def sft(folder, tokenizer, regularizer, kind=RegularizedSFTTrainer, model=None, data=None, options=None, **rest):
    data = datasets.Dataset.from_list(as_examples(*text_rows())) if data is None else data
    settings = arguments(folder, SFTConfig, **{"gradient_checkpointing": False, "bf16": False, **(options or {})})
    extra = {"regularizer": regularizer} if regularizer is not None else {}
    return kind(model or language_model(), settings, train_dataset=data, processing_class=tokenizer, **extra, **rest)


@pytest.mark.parametrize("method", [Confidence, lambda: Shortest(5), lambda: MixedGradient(0.1)])
def test_supervised_fine_tuning_equals_fit(tmp_path, tokenizer, method):
    first, second = Path(), Path()
    sft(tmp_path, tokenizer, Compose(method(), first)).train()
    reference(language_model(), Compose(method(), second), tokens=True)
    assert_same_path(first, second)


def test_plain_fine_tuning_equals_trl(tmp_path, tokenizer):
    own = sft(tmp_path, tokenizer, None, kind=SFTTrainer)
    own.train()
    for criterion in (None, "trainer"):
        trainer = sft(tmp_path, tokenizer, Regularizer(), criterion=criterion)
        trainer.train()
        for a, b in zip(own.model.parameters(), trainer.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_statistics_count_each_token_once_although_the_loss_is_evaluated_twice(tmp_path, tokenizer):
    counts = []
    for method in (Regularizer(), MixedGradient(0.1)):
        trainer = sft(tmp_path, tokenizer, method, criterion="trainer", options={"num_train_epochs": 1})
        trainer.train()
        counts.append(trainer._total_train_tokens)
    assert counts == [int(text_rows()[1].sum())] * 2


def test_index_survives_preparation(tmp_path, tokenizer):
    """Positions are those of the data that were given, although truncation drops a row and the rest is shuffled."""
    examples = as_examples(*text_rows())
    examples[3]["labels"] = [-100] * len(examples[3]["labels"])
    seen = Seen()
    options = {"num_train_epochs": 1, "shuffle_dataset": True, "max_length": 32}
    data = datasets.Dataset.from_list(examples)
    sft(tmp_path, tokenizer, seen, data=data, options=options).train()
    expected = torch.ones(ROWS, dtype=torch.int64)
    expected[3] = 0
    assert torch.equal(seen.count, expected)


def test_prompts_have_no_loss_and_text_is_tokenized_as_trl_does(tmp_path, tokenizer):
    rows = [{"prompt": "w3 w4", "completion": f" w{5 + i % 4} w6"} for i in range(8)]
    targets = []

    class Look(Regularizer):
        def on_backward(self, step):
            targets.append(step.targets)

    trainer = sft(tmp_path, tokenizer, Look(), data=datasets.Dataset.from_list(rows), options={"max_steps": 1})
    trainer.train()
    # w3 w4 | w5 w6 </s>: the second prompt token predicts the first of the completion
    assert targets[0][0].tolist() == [-100, 5, 6, 2, -100]


def test_packing_is_refused_by_name_where_a_row_is_no_example(tmp_path, tokenizer):
    options = {"packing": True, "max_length": 16}
    with pytest.raises(RequirementError, match=r"Seen requires 'index', .*packing=False"):
        sft(tmp_path, tokenizer, Seen(), options=options)
    with pytest.raises(ValueError, match="Shortest acts on the examples of a batch.*packing=False"):
        sft(tmp_path, tokenizer, Shortest(2), options=options)
    path = Path()
    sft(tmp_path, tokenizer, Compose(Ridge(), Confidence(), path), options={**options, "max_steps": 1}).train()
    assert torch.isfinite(path.path[0]).all()


def test_copies_of_the_model_compute_with_their_own_weights(tmp_path, tokenizer):
    """TRL's patched forward remembers the original; a teacher copied from it would follow the student."""
    trainer = sft(tmp_path, tokenizer, Regularizer())
    twin = copy.deepcopy(trainer.model)
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = twin(input_ids=tokens).logits
        for p in trainer.model.parameters():
            p.zero_()
        assert torch.equal(twin(input_ids=tokens).logits, before) and before.abs().max() > 0
        assert twin(input_ids=tokens, labels=tokens, fused_lm_head=True).log_probs.abs().max() > 0


def test_adapters_alone_train(tmp_path, tokenizer):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
    path = Path()
    trainer = sft(
        tmp_path, tokenizer, Compose(Ridge(), MixedGradient(0.1), path), peft_config=config,
        options={"gradient_checkpointing": True, "num_train_epochs": 1},
    )  # fmt: skip
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert len(path.path) == 4 and not torch.equal(path.path[0], path.path[-1])
    for name, value in trainer.model.named_parameters():
        if name in base:
            assert torch.equal(value, base[name])


def preferences():
    return datasets.Dataset.from_list(
        [
            {"prompt": f"w{3 + i % 5}", "chosen": " w4" * (1 + i % 3), "rejected": " w7" * (1 + (i + 1) % 4)}
            for i in range(ROWS)
        ]
    )


def dpo(folder, tokenizer, regularizer, kind=RegularizedDPOTrainer, options=None, **rest):
    options = {"gradient_checkpointing": False, "bf16": False, "num_train_epochs": 1, **(options or {})}
    settings = arguments(folder, DPOConfig, **options)
    extra = {"regularizer": regularizer} if regularizer is not None else {}
    models = {"model": language_model(), "ref_model": language_model(), **rest}
    return kind(
        args=settings, train_dataset=preferences(), processing_class=tokenizer, **extra, **models,
    )  # fmt: skip


class Everything(Regularizer):
    """Acts on the pool without changing it: pairs are joined, cut, and given back to TRL."""

    def on_batch(self, step):
        assert step.inputs["input_ids"].ndim == 3 and step.inputs["input_ids"].shape[:2] == (8, 2)


@pytest.mark.parametrize("method", [Regularizer, Everything])
def test_plain_preference_optimization_equals_trl(tmp_path, tokenizer, method):
    own = dpo(tmp_path, tokenizer, None, kind=DPOTrainer)
    own.train()
    trainer = dpo(tmp_path, tokenizer, method())
    trainer.train()
    moved = 0.0
    start = language_model()
    for a, b, s in zip(own.model.parameters(), trainer.model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
        moved = max(moved, float((a - s).detach().abs().max()))
    assert moved > 1e-3


class Start(Regularizer):
    """Every weight, who trains and who has optimizer state, as a stage sees them; and the reference model's weights."""

    def __init__(self):
        super().__init__()
        self.start, self.trained, self.stateful = {}, [], []

    def attach(self, model):
        self.start = {name: p.detach().clone() for name, p in model.named_parameters()}
        return model

    def on_step(self, step):
        named = dict(step.model.named_parameters())
        held = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
        state = {id(p) for p in step.optimizer.state}
        self.trained = [name for name, p in named.items() if id(p) in held]
        self.stateful = [name for name, p in named.items() if id(p) in state]


def test_half_fine_tuning_goes_through_the_stages_of_a_model(tmp_path, tokenizer):
    """SFT, DPO, a further task: a new half in each, whose tensors have no optimizer state and keep their values."""
    method, network = HalfFineTuning(seed=3), language_model(num_hidden_layers=2)
    settings = {"weight_decay": 0.1, "num_train_epochs": 1}
    halves, seconds = [], []
    for stage in range(3):
        watch, before = Start(), {name: p.detach().clone() for name, p in network.named_parameters()}
        assert method.stage == stage and all(p.requires_grad for p in network.parameters())
        if stage == 1:
            reference_model = copy.deepcopy(network)
            trainer = dpo(
                tmp_path, tokenizer, Compose(method, watch), model=network, ref_model=reference_model, options=settings
            )
            seconds.append(trainer.ref_model)
        else:
            trainer = sft(tmp_path, tokenizer, Compose(method, watch), model=network, options=settings)
        frozen = [name for name, trained in method.mask().items() if not trained]
        assert frozen == [name for name, p in trainer.model.named_parameters() if not p.requires_grad]
        trainer.train()
        network = trainer.model
        for name, p in network.named_parameters():
            assert torch.equal(p, before[name]) == (name in frozen), (stage, name)
            assert p.grad is None or name not in frozen
        assert watch.trained == watch.stateful == [name for name in before if name not in frozen]
        if stage == 1:
            for name, p in trainer.ref_model.named_parameters():
                assert torch.equal(p, before[name]), name
        halves.append(frozen)
    assert [len(half) for half in halves] == [9, 9, 9] and len({tuple(half) for half in halves}) == 3
    again = HalfFineTuning(seed=3)
    again.stage = 1  # a stage in a process of its own draws the half that it would have had
    again.attach(language_model(num_hidden_layers=2))
    assert [name for name, trained in again.mask().items() if not trained] == halves[1]


def test_the_reference_is_whole_where_trl_makes_it_itself(tmp_path, tokenizer):
    """Without ref_model TRL copies the model: the copy keeps the start, whichever half trains."""
    network = language_model(num_hidden_layers=2)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network.config._name_or_path = str(tmp_path / "start")
    network.save_pretrained(tmp_path / "start")
    trainer = dpo(tmp_path, tokenizer, HalfFineTuning(seed=3), model=network, ref_model=None)
    trainer.train()
    assert trainer.ref_model is not None
    for name, p in trainer.ref_model.named_parameters():
        torch.testing.assert_close(p.float(), before[name], rtol=0, atol=0, msg=name)


class GradientOfRidge(Regularizer):
    """The gradient of `Ridge`, added by hand."""

    def on_gradients(self, step):
        for p in step.model.parameters():
            p.grad.add_(0.1 * p.detach())


class Again(Regularizer):
    """A second evaluation of the batch gives the same gradient and loss."""

    requires = frozenset({"closure"})

    def on_gradients(self, step):
        first = [p.grad.clone() for p in step.model.parameters()]
        step.closure()
        for a, p in zip(first, step.model.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad, rtol=0, atol=0)


def test_penalties_and_gradients_in_preference_optimization(tmp_path, tokenizer):
    paths, metrics = [], []
    for method in (Ridge(), Compose(Again(), GradientOfRidge())):
        path = Path()
        trainer = dpo(tmp_path, tokenizer, Compose(method, path))
        trainer.train()
        paths.append(path)
        metrics.append(
            next(e for e in reversed(trainer.state.log_history) if "rewards/margins" in e)["rewards/margins"]
        )
    assert_same_path(*paths)
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-5)


def test_preference_index_and_refusals(tmp_path, tokenizer):
    seen = Seen()
    dpo(tmp_path, tokenizer, seen).train()
    assert torch.equal(seen.count, torch.ones(ROWS, dtype=torch.int64))
    with pytest.raises(ValueError, match="GeneralizedCrossEntropy replaces the task loss"):
        dpo(tmp_path, tokenizer, GeneralizedCrossEntropy(0.5))
    with pytest.raises(ValueError, match="criterion must be 'trainer'"):
        dpo(tmp_path, tokenizer, Ridge(), criterion=lambda o, t: o)
    with pytest.raises(ValueError, match="loss_type='dft'"):
        sft(tmp_path, tokenizer, Ridge(), options={"loss_type": "dft"})


def test_the_guides_snippets_run(tmp_path, monkeypatch):
    guide = (pathlib.Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    own = "".join(guide.split("<!-- lightning -->")[::2])
    monkeypatch.chdir(tmp_path)
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", own, re.DOTALL):
        exec(compile(snippet, "docs/integrations.md", "exec"), names)
    assert set(names) >= {"trainer", "pairs", "method"}
