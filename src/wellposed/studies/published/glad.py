"""The family of GLAD at the paper's scale: CLIP ViT-B/16, LoRA on q, k and v, base-to-novel (arXiv 2507.13089).

The paper's own rule and recipe are not public; the recipe is CLIP-LoRA's (Zanella and Ben Ayed 2024, arXiv 2405.18541).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from ...batching import Batch
from ...datasets.registry import ENVIRONMENT, DatasetNotInstalled
from ...fit import fit
from ...gradients.sharpness_steering import RegularizedGradient
from ...lab.protocol import Protocol
from ...lab.study import Study
from ...lab.trial import Trial, TrialResult
from ...step import mode
from ...weights.low_rank import add_low_rank
from ..glad import cosine
from ..problems.paired_towers import PairedTowers, StepLoader, harmonic_mean
from .images import checkpoints, choose_device

FOLDER = "clip-vit-base-patch16"
PARTS = ("train", "test")
SUFFIXES = (".jpg", ".jpeg", ".png")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EVALUATED_AT_ONCE = 100


class ClipImages(nn.Module):
    """The image encoder with its projection; takes bytes and normalises them as CLIP was trained."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(self, images: UInt8[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch outputs"]:
        pixels = (images.float() / 255 - self.mean) / self.std
        return self.projection(self.encoder(pixel_values=pixels).pooler_output)


class ClipTexts(nn.Module):
    """The text encoder with its projection."""

    def __init__(self, encoder: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection

    def embed(self, candidates: Int[Tensor, "classes length"]) -> Int[Tensor, "classes length"]:
        """Tokens as they are: no prompt is learned here."""
        return candidates

    def forward(self, embedded: Int[Tensor, "classes length"]) -> Float[Tensor, "classes outputs"]:
        return self.projection(self.encoder(input_ids=embedded).pooler_output)


def folder_of(name: str) -> Path:
    """A folder inside the one that the environment variable names.

    Raises:
        DatasetNotInstalled: saying what is missing and where it was looked for.
    """
    root = os.environ.get(ENVIRONMENT)
    folder = Path(root or ".") / name
    if root is None or not folder.is_dir():
        raise DatasetNotInstalled(
            f"glad: needs the folder {name} in the folder that the environment variable {ENVIRONMENT} names "
            f"({'not set' if root is None else root}); nothing is downloaded"
        )
    return folder


def image_files(name: str) -> dict[str, dict[str, list[Path]]]:
    """Files by part ("train", "test") and class, sorted.

    Raises:
        DatasetNotInstalled: if the data set, one of its parts, or images of a class are missing.
    """
    folder = folder_of(name)
    found: dict[str, dict[str, list[Path]]] = {}
    for part in PARTS:
        classes = sorted(p for p in (folder / part).glob("*") if p.is_dir())
        found[part] = {c.name: sorted(f for f in c.iterdir() if f.suffix.lower() in SUFFIXES) for c in classes}
    if set(found["train"]) != set(found["test"]) or len(found["train"]) < 2:
        raise DatasetNotInstalled(
            f"glad: {folder} must hold train/CLASS and test/CLASS for the same two or more classes"
        )
    for part, classes_of in found.items():
        if empty := [c for c, files in classes_of.items() if not files]:
            raise DatasetNotInstalled(f"glad: {folder / part / empty[0]} holds no image ({', '.join(SUFFIXES)})")
    return found


def load_clip() -> tuple[Any, Any]:
    """Model and tokenizer of the checkpoint."""
    from transformers import AutoTokenizer, CLIPModel

    folder = str(folder_of(FOLDER))
    return (
        CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
    )


def towers_of(clip: Any, candidates: Tensor) -> PairedTowers:
    """CLIP as two towers; its own temperature."""
    image, text = (
        ClipImages(clip.vision_model, clip.visual_projection),
        ClipTexts(clip.text_model, clip.text_projection),
    )
    return PairedTowers(image, text, candidates, float(clip.logit_scale.detach())).requires_grad_(False)


def tokens_of(tokenizer: Any, classes: Sequence[str]) -> Tensor:
    """Padded tokens of "a photo of a NAME."."""
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in classes]
    return tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")["input_ids"]


def read_image(file: Path, side: int) -> UInt8[Tensor, "3 side side"]:
    """An image whose shorter side has `side` pixels, cut to its middle square."""
    from PIL import Image

    with Image.open(file) as opened:
        image = opened.convert("RGB")
    scale = side / min(image.size)
    width, height = (max(side, round(scale * length)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


class Mirrored(StepLoader):
    """Batches of which a random half of the images is mirrored, on a device."""

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int, steps: int, seed: int) -> None:
        super().__init__(inputs, targets, batch_size, steps, seed)
        self.seed = seed

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(self.seed + 1)
        for batch in super().__iter__():
            mirrored = torch.rand(len(batch.targets), 1, 1, 1, generator=generator) < 0.5
            yield Batch(torch.where(mirrored, batch.inputs.flip(3), batch.inputs), batch.targets, batch.index)


def share_right(model: PairedTowers, classes: Mapping[str, Sequence[Path]], candidates: Tensor, side: int) -> float:
    """Share of right answers on files, among the classes given."""
    device = model.log_scale.device
    files = [(file, label) for label, found in enumerate(classes.values()) for file in found]
    model.candidates, right = candidates.to(device), 0
    with torch.no_grad(), mode(model, False):
        for start in range(0, len(files), EVALUATED_AT_ONCE):
            part = files[start : start + EVALUATED_AT_ONCE]
            images = torch.stack([read_image(file, side) for file, _ in part]).to(device)
            right += int((model(images).argmax(1).cpu() == torch.tensor([label for _, label in part])).sum())
    return right / len(files)


def run(trial: Trial) -> TrialResult:
    """Tune CLIP on the base classes of one data set, by one arm."""
    settings, device = trial.settings, choose_device(trial)
    files = image_files(str(settings["dataset"]))
    names = list(files["train"])
    base, novel = names[: (len(names) + 1) // 2], names[(len(names) + 1) // 2 :]
    clip, tokenizer = load_clip()
    side = int(clip.config.vision_config.image_size)
    tokens = {"base": tokens_of(tokenizer, base), "novel": tokens_of(tokenizer, novel)}
    model = towers_of(clip, tokens["base"]).to(device)
    metrics: dict[str, float] = {}
    if settings["method"] != "zero_shot":
        random = np.random.default_rng(trial.seed)
        shots = [(file, i) for i, name in enumerate(base) for file in _shots(files["train"][name], settings, random)]
        images = torch.stack([read_image(file, side) for file, _ in shots])
        labels = torch.tensor([label for _, label in shots])
        generator = torch.Generator(device).manual_seed(trial.seed)
        add_low_rank(
            model, int(settings["rank"]), float(settings["alpha"]), ["q_proj", "k_proj", "v_proj"],
            float(settings["dropout"]), generator=generator,
        )  # fmt: skip
        rule = str(settings.get("rule", ""))
        rho, lam = float(settings["rho"]), float(settings["lam"])
        with checkpoints(trial) as file:
            result = fit(
                model,
                Mirrored(images, labels, int(settings["batch_size"]), int(settings["steps"]), trial.seed),
                epochs=1,
                regularizer=RegularizedGradient(rho, rule, lam) if rule else None,  # type: ignore[arg-type]
                optimizer=partial(
                    torch.optim.AdamW, lr=float(settings["learning_rate"]), weight_decay=float(settings["weight_decay"])
                ),
                scheduler=cosine,
                amp=torch.bfloat16 if settings["bf16"] and device.type == "cuda" else None,
                seed=trial.seed,
                checkpoint=file("adapter"),
            )
        entry = result.history[-1]
        metrics = {name: entry[f"gradient_{name}"] for name in ("cosine", "conflict") if f"gradient_{name}" in entry}
    for part, classes in (("base", base), ("novel", novel)):
        metrics[part] = share_right(model, {name: files["test"][name] for name in classes}, tokens[part], side)
    metrics["hm"] = harmonic_mean(metrics["base"], metrics["novel"])
    return TrialResult({**metrics, "score": metrics["hm"]})


def _shots(files: Sequence[Path], settings: Mapping[str, Any], random: np.random.Generator) -> list[Path]:
    count = min(int(settings["shots"]), len(files))
    return [files[i] for i in random.choice(len(files), count, replace=False)]


def prepare(protocol: Protocol) -> None:
    """Look for the checkpoint and all data sets before any of them trains."""
    folder_of(FOLDER)
    for name in dict.fromkeys(str(arm.fixed["dataset"]) for arm in protocol.arms.values()):
        image_files(name)


STUDY = Study(
    slug="glad", run=run, estimands={}, headline=("hm", "harmonic mean of base and novel accuracy"), prepare=prepare
)
