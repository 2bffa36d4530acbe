"""Train the bundled backbone ``h2t_resnet20`` on CIFAR-10 and write its float16 weights.

    python benchmarks/pretrain_backbone.py TRAIN_TAR TEST_TAR [--epochs 80] [--seed 0] [--out weights.safetensors]

The tars hold JPEG images as ``class/name.jpg``. 500 training images per class are held out and choose the checkpoint;
the test images are read once, after that choice, through the rounded weights. Every epoch draws its shuffling and
augmentation from (seed, epoch) alone, so an interrupted run continues from its state file exactly where it stopped,
and one seed, thread count and torch version gives one result.
"""

import argparse
import io
import json
import math
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from h2t_store.backbones.resnet_cifar import ResNetCifar, default_cfgs

HELD_OUT_PER_CLASS = 500
WARMUP_EPOCHS = 2
PADDING = 4


def read_tar(path: Path) -> tuple[Tensor, Tensor]:
    """Decode ``class/name.jpg`` members, sorted by name, to uint8 (n, 3, 32, 32) and int64 (n,)."""
    images: dict[str, np.ndarray] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".jpg"):
                data = tar.extractfile(member)
                assert data is not None
                images[member.name] = np.asarray(Image.open(io.BytesIO(data.read())).convert("RGB"))
    names = sorted(images)
    classes = sorted({name.split("/")[-2] for name in names})
    labels = torch.tensor([classes.index(name.split("/")[-2]) for name in names])
    return torch.from_numpy(np.stack([images[name] for name in names])).permute(0, 3, 1, 2).contiguous(), labels


def hold_out(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and indices that choose the checkpoint, the same number from every class."""
    rng = torch.Generator().manual_seed(seed)
    held = torch.cat(
        [
            members[torch.randperm(len(members), generator=rng)[:HELD_OUT_PER_CLASS]]
            for members in ((labels == label).nonzero().flatten() for label in labels.unique())
        ]
    )
    mask = torch.ones(len(labels), dtype=torch.bool)
    mask[held] = False
    return mask.nonzero().flatten(), held


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Random horizontal flips and random 32x32 crops of the reflected-padded images."""
    n, _, height, width = images.shape
    padded = F.pad(images.float(), (PADDING,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * PADDING + 1, (2, n), generator=rng)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    flip = torch.rand(n, generator=rng) < 0.5
    columns[flip] = columns[flip].flip(1)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalise(images: Tensor, config: dict) -> Tensor:
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def accuracy(model: ResNetCifar, images: Tensor, labels: Tensor, config: dict) -> float:
    model.eval()
    hits = sum(
        int((model(normalise(x, config)).argmax(1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return hits / len(labels)


def learning_rate(progress: float, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to zero; ``progress`` counts epochs."""
    if progress < WARMUP_EPOCHS:
        return args.lr * progress / WARMUP_EPOCHS
    return args.lr * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP_EPOCHS) / (args.epochs - WARMUP_EPOCHS)))


def train_epoch(
    model: ResNetCifar, optimizer: torch.optim.SGD, images: Tensor, labels: Tensor, epoch: int, args: argparse.Namespace
) -> float:
    config = default_cfgs["h2t_resnet20"].default.to_dict()
    rng = torch.Generator().manual_seed(args.seed * 10_000 + epoch)
    batches = torch.randperm(len(labels), generator=rng).split(args.batch_size)[: len(labels) // args.batch_size]
    model.train()
    total = 0.0
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch + step / len(batches), args)
        x = normalise(augment(images[batch], rng), config)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
            loss = F.cross_entropy(model(x).float(), labels[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_tar", type=Path)
    parser.add_argument("test_tar", type=Path)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("-b", "--batch-size", type=int, default=128)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--out", type=Path, default=Path("h2t_resnet20.safetensors"))
    parser.add_argument("--state", type=Path, help="where the run is kept between epochs (default: OUT.state)")
    args = parser.parse_args()
    state_path = args.state or args.out.with_suffix(".state")
    recipe = {k: v for k, v in vars(args).items() if isinstance(v, int | float)}

    torch.manual_seed(args.seed)
    images, labels = read_tar(args.train_tar)
    kept, held = hold_out(labels, args.seed)
    model = ResNetCifar().to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD(
        [dict(params=decayed, weight_decay=args.weight_decay), dict(params=plain, weight_decay=0.0)],
        lr=args.lr,
        momentum=0.9,
        nesterov=True,
    )
    config = default_cfgs["h2t_resnet20"].default.to_dict()
    first, best = 0, dict(accuracy=-1.0, epoch=-1)
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        if state["recipe"] != recipe:
            raise SystemExit(f"{state_path} was made with {state['recipe']}, not {recipe}: choose another --state")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, best = state["epoch"] + 1, state["best"]
        print(f"resuming at epoch {first}", flush=True)
    for epoch in range(first, args.epochs):
        start = time.perf_counter()
        loss = train_epoch(model, optimizer, images[kept], labels[kept], epoch, args)
        held_accuracy = accuracy(model, images[held], labels[held], config)
        if held_accuracy >= best["accuracy"]:
            best = dict(accuracy=held_accuracy, epoch=epoch)
            half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
            save_file({k: v.contiguous() for k, v in half.items()}, args.out)
        partial = state_path.with_name(state_path.name + ".partial")
        torch.save(
            dict(recipe=recipe, model=model.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch, best=best),
            partial,
        )
        partial.replace(state_path)
        print(
            f"epoch {epoch:3d}  loss {loss:.4f}  held-out {held_accuracy:.4f}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    model.load_state_dict(load_file(args.out))
    test_images, test_labels = read_tar(args.test_tar)
    report = dict(
        test_accuracy=accuracy(model, test_images, test_labels, config),
        held_out_accuracy=best["accuracy"],
        epoch=best["epoch"],
        bytes=args.out.stat().st_size,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        **recipe,
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
