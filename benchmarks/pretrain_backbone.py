"""Train the bundled backbone ``h2t_resnet20`` on CIFAR-10 and write its float16 weights.

    python benchmarks/pretrain_backbone.py TRAIN_TAR TEST_TAR [--epochs 80] [--seed 0] [--out weights.safetensors]

The tars hold JPEG images as ``class/name.jpg``. Some training images of each class are held out and choose the
checkpoint, an exponential moving average of the weights; the test images are read once, after that choice, through the
rounded weights. Every epoch draws its shuffling and augmentation from (seed, epoch) alone, so an interrupted run
continues from its state file exactly where it stopped, and one seed, thread count and torch version gives one result.
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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from h2t_store.network.resnet_cifar import ResNetCifar, default_cfgs

WARMUP_EPOCHS = 2
PADDING = 4
EMA_DECAY = 0.995


def read_tar(path: Path) -> tuple[Tensor, Tensor]:
    """Decode ``class/name.jpg`` members, sorted by name, to uint8 (n, 32, 32, 3) and int64 (n,)."""
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
    return torch.from_numpy(np.stack([images[name] for name in names])), labels


def hold_out(labels: Tensor, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and indices that choose the checkpoint, the same number from every class."""
    rng = torch.Generator().manual_seed(seed)
    held = torch.cat(
        [
            members[torch.randperm(len(members), generator=rng)[:per_class]]
            for members in ((labels == label).nonzero().flatten() for label in labels.unique())
        ]
    )
    mask = torch.ones(len(labels), dtype=torch.bool)
    mask[held] = False
    return mask.nonzero().flatten(), held


def pad(images: Tensor) -> Tensor:
    """Reflect images (n, h, w, 3) at their borders, for `augment` to crop from."""
    return torch.from_numpy(np.pad(images.numpy(), ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)), "reflect"))


def augment(padded: Tensor, config: dict, cutout: int, rng: torch.Generator) -> Tensor:
    """Random crops and horizontal flips of padded images, normalised, with a random square of each set to zero."""
    n, size = len(padded), padded.shape[1] - 2 * PADDING
    top, left = torch.randint(0, 2 * PADDING + 1, (2, n), generator=rng)
    rows, columns = top[:, None] + torch.arange(size), left[:, None] + torch.arange(size)
    flip = torch.rand(n, generator=rng) < 0.5
    columns[flip] = columns[flip].flip(1)
    images = normalise(padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]], config)
    centre = torch.randint(0, size, (2, n, 1), generator=rng)
    near = (torch.arange(size) - centre + 0.5).abs() <= cutout / 2
    return images.masked_fill_((near[0][:, :, None] & near[1][:, None, :])[:, None], 0.0)


def normalise(images: Tensor, config: dict) -> Tensor:
    """From uint8 (n, h, w, 3) to the network's input (n, 3, h, w), in channels-last memory."""
    mean, std = (torch.tensor(config[key]) for key in ("mean", "std"))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


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
    model: ResNetCifar,
    average: AveragedModel,
    optimizer: torch.optim.SGD,
    padded: Tensor,
    labels: Tensor,
    epoch: int,
    args: argparse.Namespace,
) -> float:
    """One pass over the training images; returns the mean loss."""
    config = default_cfgs["h2t_resnet20"].default.to_dict()
    rng = torch.Generator().manual_seed(args.seed * 10_000 + epoch)
    batches = torch.randperm(len(labels), generator=rng).split(args.batch_size)[: len(labels) // args.batch_size]
    model.train()
    total = 0.0
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch + step / len(batches), args)
        x = augment(padded[batch], config, args.cutout, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
            loss = F.cross_entropy(model(x).float(), labels[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
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
    parser.add_argument("--cutout", type=int, default=12, help="side of the square that is blanked, in pixels")
    parser.add_argument(
        "--held-out", type=int, default=100, help="training images per class that choose the checkpoint"
    )
    parser.add_argument("--init", type=Path, help="weights to start from, to continue another run's schedule")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--out", type=Path, default=Path("h2t_resnet20.safetensors"))
    parser.add_argument("--state", type=Path, help="where the run is kept between epochs (default: OUT.state)")
    args = parser.parse_args()
    state_path = args.state or args.out.with_suffix(".state")
    recipe = {k: v for k, v in vars(args).items() if isinstance(v, int | float)} | {"init": str(args.init)}

    torch.manual_seed(args.seed)
    images, labels = read_tar(args.train_tar)
    kept, held = hold_out(labels, args.held_out, args.seed)
    padded = pad(images[kept])
    model = ResNetCifar().to(memory_format=torch.channels_last)
    if args.init:
        model.load_state_dict(load_file(args.init))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
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
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, best = state["epoch"] + 1, state["best"]
        print(f"resuming at epoch {first}", flush=True)
    for epoch in range(first, args.epochs):
        start = time.perf_counter()
        loss = train_epoch(model, average, optimizer, padded, labels[kept], epoch, args)
        held_accuracy = accuracy(average.module, images[held], labels[held], config)
        if held_accuracy >= best["accuracy"]:
            best = dict(accuracy=held_accuracy, epoch=epoch)
            half = {k: v.half() if v.is_floating_point() else v for k, v in average.module.state_dict().items()}
            save_file({k: v.contiguous() for k, v in half.items()}, args.out)
        partial = state_path.with_name(state_path.name + ".partial")
        torch.save(
            dict(
                recipe=recipe,
                model=model.state_dict(),
                average=average.state_dict(),
                optimizer=optimizer.state_dict(),
                epoch=epoch,
                best=best,
            ),
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
