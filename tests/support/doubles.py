"""Small test doubles of later methods, written against the contract alone: where it bends, the contract is wrong."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from wellposed import Pair, Regularizer, record
from wellposed.gradients import perturbed
from wellposed.gradients.sharpness_aware import gradient_norm


class SelfDistillation(Regularizer):
    """Like PS-KD: soft targets from the last prediction of each example."""

    requires = frozenset({"index"})

    def __init__(self, rows, classes, alpha=0.8):
        super().__init__()
        self.classes, self.alpha = classes, alpha
        self.register_buffer("memory", torch.zeros(rows, classes))
        self.register_buffer("seen", torch.zeros(rows, dtype=torch.bool))

    def on_batch(self, step):
        hard = F.one_hot(step.targets, self.classes).float() if step.targets.ndim == 1 else step.targets
        share = self.alpha * step.progress
        past = torch.where(self.seen[step.index, None], self.memory[step.index], hard)
        step.targets = (1 - share) * hard + share * past

    def on_backward(self, step):
        self.memory[step.index] = step.outputs.detach().softmax(1)
        self.seen[step.index] = True


class MixedGradient(Regularizer):
    """Like GLAD: a convex combination of the gradient and the sharpness-aware one."""

    requires = frozenset({"closure", "gradients"})

    def __init__(self, rho=0.05, share=0.5):
        super().__init__()
        self.rho, self.share = rho, share

    def on_gradients(self, step):
        parameters = [p for p in step.model.parameters() if p.grad is not None]
        first = [p.grad.clone() for p in parameters]
        with perturbed(parameters, first, self.rho):
            step.closure()
        with torch.no_grad():
            for p, g in zip(parameters, first, strict=True):
                p.grad.mul_(self.share).add_(g, alpha=1 - self.share)


class MeanGradientNorm(Regularizer):
    """Like IGNITE: a finite-difference penalty on the gradient norm of the mean output, with a learned multiplier."""

    requires = frozenset({"gradients"})

    def __init__(self, rho=0.05, limit=0.1, rate=1e-3, radius=0.05):
        super().__init__()
        self.rho, self.limit, self.rate, self.radius = rho, limit, rate, radius
        self.register_buffer("multiplier", torch.tensor(1e-2))
        self.register_buffer("norm", torch.tensor(0.0))

    def on_gradients(self, step):
        parameters = [p for p in step.model.parameters() if p.requires_grad]

        def gradient():
            found = torch.autograd.grad(step.forward().mean(), parameters, allow_unused=True)
            return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

        first = gradient()
        self.norm.copy_(gradient_norm(first))
        with perturbed(parameters, first, self.radius):
            second = gradient()
        with torch.no_grad():
            for p, a, b in zip(parameters, first, second, strict=True):
                p.grad.add_((b - a) * self.multiplier * (self.rho / self.radius))

    def on_step(self, step):
        self.multiplier.add_(self.rate * (self.rho * self.norm - self.limit)).clamp_(min=0)


class CoTeaching(Regularizer):
    """Each of two networks trains on the examples that the other finds easy."""

    coupled = True

    def __init__(self, second, forget=0.25):
        super().__init__()
        self.second, self.forget = [second], forget

    def attach(self, model):
        return Pair(model, self.second[0])

    def loss(self, step):
        first, second = (F.cross_entropy(z, step.targets, reduction="none") for z in step.outputs)
        keep = int((1 - self.forget) * len(first) + 1e-9)
        easy_a, easy_b = (losses.detach().argsort()[:keep] for losses in (first, second))
        weight_a, weight_b = torch.zeros_like(first), torch.zeros_like(first)
        weight_a[easy_b] = weight_b[easy_a] = len(first) / keep
        return weight_a * first + weight_b * second


class Coreset(Regularizer):
    """Like CoLM: a pool comes in, medoids of the last layer's gradients go on."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def on_batch(self, step):
        p = step.forward(grad=False, training=False).softmax(1)
        errors = p - F.one_hot(step.targets, p.shape[1])
        distances = torch.cdist(errors, errors, p=1)
        similarity = distances.max() - distances
        covered, picks = torch.zeros(len(p)), []
        for _ in range(self.size):
            gain = (similarity - covered[:, None]).clamp(min=0).sum(0)
            gain[picks] = -1
            picks.append(int(gain.argmax()))
            covered = torch.maximum(covered, similarity[:, picks[-1]])
        chosen = torch.tensor(picks)
        step.inputs, step.targets, step.index = step.inputs[chosen], step.targets[chosen], step.index[chosen]


class HalfTraining(Regularizer):
    """Like HFT: a random half of the tensors trains in each epoch."""

    def on_epoch(self, step):
        names = [name for name, _ in step.model.named_parameters()]
        drawn = torch.rand(len(names), generator=step.generator)
        step.replace_parameters([n for n, u in zip(names, drawn, strict=True) if u < drawn.median() + 1e-6])


class RecordedError(Regularizer):
    """Like the regularization of a solver's heuristics: penalises what the model's forward recorded."""

    def penalty(self, step):
        return 10 * torch.stack(step.records["error"]).mean()


class RecordingBlock(nn.Module):
    """A two-stage step that records its own error estimate."""

    def __init__(self, width):
        super().__init__()
        self.field = nn.Linear(width, width)

    def forward(self, z):
        first = self.field(z).tanh()
        second = self.field(z + 0.5 * first).tanh()
        record("error", (second - first).pow(2).mean())
        return z + second


def noisy_network(seed=0, recording=False):
    """With BatchNorm and dropout: what re-evaluations must not disturb."""
    torch.manual_seed(seed)
    middle = RecordingBlock(16) if recording else nn.Identity()
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), middle, nn.Dropout(0.3), nn.Linear(16, 4))


def smooth_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def data(rows=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 8, generator=generator), torch.randint(0, 4, (rows,), generator=generator)


def clone(model):
    return copy.deepcopy(model)
