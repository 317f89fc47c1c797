"""DreamBooth on a tree: a style and the subjects below it, trained together on a few images each.

    ink/                 images and prompt.txt: "an ink drawing"
    ink/knight/          images and prompt.txt: "an ink drawing of sks knight"
    ink/wizard/          images and prompt.txt: "an ink drawing of zwx wizard"

Every folder is a node, and a folder inside another stacks on it. A batch mixes rows of all nodes,
each routed by its own path: the style learns from every image, a subject from its own.

    python examples/dreambooth_tree.py photos/ --base stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --out zoo/ --steps 800 --batch 4 --r 16 --lr 1e-4 --size 512 --device cuda

For pipelines of Stable Diffusion 1 and 2: one UNet, one CLIP text encoder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor

import lora_tree as lt
from lora_tree.integrations.diffusers import attach

IMAGES = {".png", ".jpg", ".jpeg", ".webp"}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Example:
    """One image of one node: its path in the tree, the prompt, and the pixels (3, size, size)."""

    path: str
    prompt: str
    pixels: Tensor


def read_examples(folder: Path, size: int) -> list[Example]:
    """Read every image below a folder; the folder that it lies in is its node.

    Raises:
        SystemExit: a folder with images has no prompt.txt; or there are no images.
    """
    examples = []
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in IMAGES:
            continue
        prompt = file.parent / "prompt.txt"
        if file.parent == folder or not prompt.is_file():
            raise SystemExit(f"{file}: expected it in a node's folder, with a prompt.txt beside it")
        path = file.parent.relative_to(folder).as_posix()
        examples.append(Example(path, prompt.read_text().strip(), read_pixels(file, size)))
    if not examples:
        raise SystemExit(f"{folder}: no images below it")
    return examples


def read_pixels(file: Path, size: int) -> Tensor:
    """Read an image, cut to its middle square and scaled: (3, size, size) in [-1, 1]."""
    image = Image.open(file).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size))
    return torch.from_numpy(numpy.array(square)).permute(2, 0, 1).float() / 127.5 - 1


def plant(examples: Sequence[Example], *, r: int) -> lt.AdapterTree:
    """Make a tree with a fresh node for every folder, and groups above them where needed."""
    tree = lt.AdapterTree(defaults=dict(r=r, lora_alpha=r, target_modules=TARGETS))
    learning = {example.path for example in examples}
    for path in sorted(learning):
        names = path.split("/")
        for depth in range(1, len(names) + 1):
            node = "/".join(names[:depth])
            if node not in tree:
                tree.add(node, group=node not in learning)
    return tree


def train(
    pipe: Any,
    tree: lt.AdapterTree,
    examples: Sequence[Example],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int = 0,
) -> list[float]:
    """Train all nodes of a tree together, and return the loss of every step.

    The tree is attached for the length of the call. The pipeline is bare afterwards.
    """
    generator = torch.Generator().manual_seed(seed)
    device = pipe.unet.device
    # The pictures never change, so they go through the frozen autoencoder once.
    with torch.no_grad():
        pixels = torch.stack([example.pixels for example in examples]).to(device, pipe.vae.dtype)
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    tokens = pipe.tokenizer(
        [example.prompt for example in examples],
        padding="max_length",
        truncation=True,
        max_length=pipe.tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids.to(device)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    v_prediction = schedule.config.prediction_type == "v_prediction"

    model = attach(tree, pipe)
    learning = sorted({example.path for example in examples})
    optimizer = torch.optim.AdamW(model.trainable(*learning), lr=lr)
    losses = []
    for _ in range(steps):
        chosen = torch.randperm(len(examples), generator=generator)[:batch].tolist()
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        limit = schedule.config.num_train_timesteps
        at = torch.randint(limit, (len(chosen),), generator=generator).to(device)
        noisy = schedule.add_noise(clean, noise, at)
        target = schedule.get_velocity(clean, noise, at) if v_prediction else noise
        # Each row goes through its own lineage, so its gradient reaches its node and those above.
        with model.route([examples[row].path for row in chosen]):
            text = pipe.text_encoder(tokens[chosen])[0]
            guess = pipe.unet(noisy, at, text, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(guess.float(), target.float())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.trainable()
    model.detach()
    return losses


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, help="a folder for each node, nested as the tree is")
    parser.add_argument("--base", required=True, help="folder or hub id of the pipeline")
    parser.add_argument("--out", type=Path, required=True, help="where the tree is saved")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)

    pipe = DiffusionPipeline.from_pretrained(given.base).to(given.device)
    examples = read_examples(given.photos, given.size)
    tree = plant(examples, r=given.r)
    losses = train(pipe, tree, examples, steps=given.steps, batch=given.batch, lr=given.lr)
    tree.save(given.out)
    for leaf in tree.leaves():
        # One file for each subject, its style included, for every program that loads LoRAs.
        file = (
            given.out.with_name(f"{given.out.name}-files") / f"{leaf.replace('/', '-')}.safetensors"
        )
        tree.flatten(leaf).save(file, form="kohya")
        print(f"{leaf}: {file}")
    first, last = losses[:10], losses[-10:]
    print(f"loss {sum(first) / len(first):.3f} at first, {sum(last) / len(last):.3f} at last")


if __name__ == "__main__":
    main()
