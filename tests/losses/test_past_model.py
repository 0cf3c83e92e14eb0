"""The past model as teacher: what it predicts, when its weights are copied, and where it fits."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from doubles import HalfTraining, data, flat, noisy_network, smooth_network
from torch import nn

from wellposed import Compose, DivergenceError, Hyperparameter, Regularizer, Step, TensorLoader, fit
from wellposed.evaluation import predict
from wellposed.losses import Mixup, PastModelTeacher, ProgressiveSelfDistillation, progressive_targets

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
X, Y = data()


def train(method, model=None, epochs=3, targets=Y, inputs=X, **options):
    loader = TensorLoader(inputs, targets, batch_size=16, shuffle=True)
    return fit(model or smooth_network(), loader, epochs=epochs, regularizer=method, optimizer=SGD, **options)


class Clean(ProgressiveSelfDistillation):
    """Stores no training predictions; its memory is filled by a pass over the clean data at the end of each epoch."""

    def on_backward(self, step):
        pass

    def on_epoch(self, step):
        super().on_epoch(step)
        if step.epoch > 0:
            outputs, _ = predict(step.model, TensorLoader(X, Y))
            self.memory.write(torch.arange(64), outputs.softmax(1))


def test_it_equals_a_memory_filled_by_a_clean_pass_at_the_end_of_each_epoch():
    ours = train(PastModelTeacher(4), smooth_network(), epochs=4).model
    theirs = train(Clean(64, 4), smooth_network(), epochs=4).model
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=1e-6)
    noisy = [flat(train(m, noisy_network(), epochs=4).model) for m in (PastModelTeacher(4), Clean(64, 4))]
    torch.testing.assert_close(noisy[0], noisy[1], rtol=0, atol=1e-5)


def test_the_first_epoch_is_plain_training_bit_for_bit_but_for_the_form_of_the_targets():
    hot = F.one_hot(Y, 4).float()
    ours, plain = train(PastModelTeacher(4), epochs=1), train(Regularizer(), epochs=1, targets=hot)
    assert torch.equal(flat(ours.model), flat(plain.model))


def test_the_teacher_is_the_model_at_the_end_of_the_last_epoch():
    seen = []

    class Watch(Regularizer):
        def on_epoch(self, step):
            self.start = copy.deepcopy(step.model).eval()

        def on_batch(self, step):
            if step.epoch > 0:
                seen.append((step.targets, self.start(step.inputs).softmax(1), step.epoch, Y[step.index]))

    train(Compose(PastModelTeacher(4, 0.6), Watch()), noisy_network(), epochs=3)
    assert len(seen) == 8
    for found, past, epoch, labels in seen:
        torch.testing.assert_close(found, progressive_targets(labels, past.detach(), 0.6 * (epoch + 1) / 3))


def test_the_teachers_pass_leaves_no_trace_on_the_model():
    for mode in ("eval", "train"):
        model = noisy_network()
        teacher = PastModelTeacher(4, epochs=2, mode=mode)
        teacher.set_epoch(1, model)
        model.train()
        state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        past = copy.deepcopy(teacher.past)
        teacher.soften(model, X, Y)
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
        torch.testing.assert_close(teacher.past, past, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(part.training for part in model.modules())


def test_in_training_mode_the_teacher_drops_units_and_uses_the_batchs_statistics():
    model = noisy_network()
    soft = {}
    for mode in ("eval", "train"):
        teacher = PastModelTeacher(4, 1.0, epochs=2, mode=mode)
        teacher.set_epoch(1, model)
        torch.manual_seed(0)
        soft[mode] = teacher.soften(model, X, Y)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(soft["eval"], twin.eval()(X).softmax(1))
    torch.manual_seed(0)
    torch.testing.assert_close(soft["train"], twin.train()(X).softmax(1))
    assert not torch.allclose(soft["eval"], soft["train"])


def test_behind_mixup_it_predicts_the_mixed_input():
    model = smooth_network()
    teacher = PastModelTeacher(4, 0.8)
    teacher._enter(1, model)
    step = Step(model, inputs=X[:8], targets=Y[:8], index=torch.arange(8), epoch=1, epochs=2)
    Mixup(1.0, num_classes=4).on_batch(step)
    labels, inputs = step.targets, step.inputs
    teacher.on_batch(step)
    torch.testing.assert_close(step.targets, 0.2 * labels + 0.8 * model(inputs).softmax(1).detach())
    assert torch.isfinite(flat(train(Compose(Mixup(1.0, num_classes=4), PastModelTeacher(4))).model)).all()


class Detector(nn.Module):
    """Three boxes an image, their classes and their places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.classes, self.places = nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, images):
        return {"classes": self.classes(images).view(-1, 3, 4), "boxes": self.places(images).view(-1, 3, 4)}


def detection_loss(outputs, targets):
    classes = -(targets["labels"] * outputs["classes"].log_softmax(-1)).sum(-1).mean(-1)
    return classes + (outputs["boxes"] - targets["boxes"]).square().mean((1, 2))


class Boxes(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(0, 4, (32, 3), generator=generator)
        self.labels[::4, 2] = -100
        self.boxes = torch.rand(32, 3, 4, generator=generator)

    def __len__(self):
        return 32

    def __getitem__(self, i):
        return X[i], {"labels": self.labels[i], "boxes": self.boxes[i]}


def test_a_detectors_class_targets_are_softened_and_its_boxes_are_left_alone():
    model = Detector()
    teacher = PastModelTeacher(4, output_key="classes", target_key="labels")
    seen = []

    class Watch(Regularizer):
        def on_batch(self, step):
            assert step.targets["boxes"].shape == (len(step.inputs), 3, 4)
            seen.append((step.epoch, step.targets["labels"], Boxes().labels[step.index]))

    fit(model, Boxes(), epochs=2, batch_size=16, regularizer=Compose(teacher, Watch()), criterion=detection_loss)
    for epoch, soft, labels in seen:
        valid = labels != -100
        torch.testing.assert_close(soft[valid].sum(-1), torch.ones(int(valid.sum())))
        assert not soft[~valid].any()
        assert (soft[valid].max(-1).values < 1).all() == (epoch == 1)


def test_boxes_without_a_target_do_not_count_in_the_mean():
    boxes = Boxes()
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(8, 12), nn.Unflatten(1, (3, 4)))
    expected = F.cross_entropy(head(X[:32]).transpose(1, 2), boxes.labels)
    found = fit(head, TensorLoader(X[:32], boxes.labels, batch_size=32), epochs=1, regularizer=PastModelTeacher(4))
    assert found.history[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert train(PastModelTeacher(4), head, inputs=X[:32], targets=boxes.labels).history[-1]["loss"] > 0


def test_a_tensor_that_is_unfrozen_later_is_still_the_past_one():
    model = smooth_network()
    model[2].weight.requires_grad_(False)
    teacher = PastModelTeacher(4, 1.0, epochs=2)
    teacher.set_epoch(1, model)
    assert "2.weight" not in teacher.past
    expected = copy.deepcopy(model)(X).softmax(1)
    model[2].weight.requires_grad_(True)
    torch.testing.assert_close(teacher.soften(model, X, Y), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(teacher.soften(model, X, Y), expected)
    train(Compose(HalfTraining(), PastModelTeacher(4)))


def test_the_weights_are_copied_once_an_epoch():
    model = smooth_network()
    teacher = PastModelTeacher(4, epochs=3)
    teacher.set_epoch(1, model)
    before = teacher.past["0.weight"].clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    teacher.set_epoch(1, model)
    assert torch.equal(teacher.past["0.weight"], before)
    teacher.set_epoch(2, model)
    assert torch.equal(teacher.past["0.weight"], model[0].weight)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_interrupted_run_continues_bit_for_bit(mode, tmp_path):
    def interrupted(step, entry):
        if entry["epoch"] == 3:
            raise KeyboardInterrupt

    make = partial(PastModelTeacher, 4, mode=mode)
    expected = train(make(), noisy_network(), epochs=4)
    path = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        train(make(), noisy_network(), epochs=4, checkpoint=path, on_epoch_end=interrupted)
    found = train(make(), noisy_network(), epochs=4, checkpoint=path)
    assert torch.equal(flat(found.model), flat(expected.model))


def test_a_state_dict_taken_in_the_middle_of_an_epoch_keeps_the_past_weights():
    model = smooth_network()
    teacher, twin = PastModelTeacher(4, epochs=2), PastModelTeacher(4, epochs=2)
    teacher.set_epoch(1, model)
    soft = teacher.soften(model, X, Y)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    twin.load_state_dict(teacher.state_dict())
    twin.set_epoch(1, model)
    assert torch.equal(twin.soften(model, X, Y), soft)


def test_gradients_do_not_depend_on_how_a_batch_is_cut():
    a, b = (train(PastModelTeacher(4), accumulation=parts).model for parts in (1, 4))
    torch.testing.assert_close(flat(a), flat(b), rtol=0, atol=1e-6)


def test_a_teacher_that_overflows_leaves_the_labels():
    model = smooth_network()
    teacher = PastModelTeacher(4, epochs=2)
    teacher.set_epoch(1, model)
    poisoned = X.clone()
    poisoned[3] = float("inf")
    soft = teacher.soften(model, poisoned, Y)
    assert torch.equal(soft[3], F.one_hot(Y[3], 4).float())
    torch.testing.assert_close(soft.sum(1), torch.ones(64))
    with pytest.raises(DivergenceError):
        train(PastModelTeacher(4), inputs=poisoned)


def test_a_wrapped_model_is_copied_without_its_wrapper():
    model = smooth_network()
    teacher = PastModelTeacher(4, epochs=2)
    teacher.set_epoch(1, nn.DataParallel(model))
    assert set(teacher.past) == {name for name, _ in model.named_parameters()}
    sharded = type("FSDPLinear", (nn.Linear,), {})(2, 2)
    with pytest.raises(RuntimeError, match="FSDPLinear spreads the weights over the ranks"):
        teacher.set_epoch(0, sharded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, r"PastModelTeacher: alpha must be in \[0, 1\], got -0.1"),
        ({"num_classes": 1}, "PastModelTeacher: num_classes must be >= 2, got 1"),
        ({"epochs": 1.5}, "PastModelTeacher: epochs must be an integer >= 1 or None, got 1.5"),
        ({"schedule": "no"}, "PastModelTeacher: schedule must be 'epoch', 'step' or 'constant', got 'no'"),
        ({"mode": "test"}, "PastModelTeacher: mode must be 'eval' or 'train', got 'test'"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments, message):
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message):
            PastModelTeacher(**{"num_classes": 4, **arguments})
    finally:
        config.update("jaxtyping_disable", False)


def test_what_does_not_fit_is_refused_by_name():
    model = smooth_network()
    teacher = PastModelTeacher(5, epochs=2)
    teacher.set_epoch(1, model)
    with pytest.raises(ValueError, match=r"logits must have 5 classes in the last dimension, got \(64, 4\)"):
        teacher.soften(model, X, Y)
    with pytest.raises(ValueError, match="epochs is missing"):
        PastModelTeacher(4).set_epoch(0, model)
    other = PastModelTeacher(4, epochs=2)
    other.set_epoch(1, noisy_network())
    with pytest.raises(ValueError, match="the model has no tensor"):
        other.soften(model, X, Y)


def test_alpha_may_be_a_hyperparameter():
    train(PastModelTeacher(4, Hyperparameter(0.5, 0.0, 1.0)), epochs=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_an_accelerator_it_ends_as_on_the_cpu():
    models = [train(PastModelTeacher(4), device=device).model.cpu() for device in ("cpu", "cuda")]
    torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=0, atol=1e-3)
