"""Train ICNet, on a data set or on groups made by cut and paste.

The defaults are the paper's (§4.1): batches of 10 images of one group, random horizontal flips, soft IoU loss over
four maps (eq. 3), Adam with learning rate 1e-5 and weight decay 1e-4, 60 epochs, a pretrained VGG16, everything else
from N(0, 0.01).

Every step's batch follows from the seed and the step alone, so an interrupted run goes on as if it had not been.
"""

import argparse
import copy
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from export.checkpoint import load_backbone, load_checkpoint, read_checkpoint, save_checkpoint
from export.icnet import SIZE, CorrelationFusion, ICNet, Uint8Interface, resize
from runtime.commands.options import number, positive
from runtime.contract import CARD, MAX_CARD, card_of
from runtime.errors import CheckpointError, ICNetError, InputError
from runtime.files import check_outputs, replacing, write_picture
from training.batches import Batch, DataSetBatches, PastedBatches
from training.paste import CutPaste
from training.photographic import PhotographicPaste
from training.progress import Steps, half_cosine
from training.validation import Validation

INITIAL_STD = 0.01  # of all weights but the backbone's (§4.1)


class TrainingError(ICNetError):
    """Training can't go on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet train`."""
    data = parser.add_argument_group("data: a data set, or cut-outs and backgrounds")
    data.add_argument("--data", type=Path, help="folder with img/GROUP/NAME.jpg, gt/GROUP/NAME.png and sism/...")
    data.add_argument("--cutouts", type=Path, help="folder with CLASS/NAME.png, RGBA")
    data.add_argument("--backgrounds", type=Path, help="photographs, in folders of any depth")
    data.add_argument("--photographic", action="store_true", help="paste as in photographs; see `icnet data paste`")
    data.add_argument("--validation", type=Path, metavar="DATA", help="data set by which --weights is chosen")
    data.add_argument("--images", type=number(2), default=10, help="images of one group per step (default 10)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="checkpoint, written every --save-every steps")
    parser.add_argument("--weights", type=Path, help="write the weights alone as well, in FP16, when training is done")
    parser.add_argument(
        "--card", type=_card, metavar="TEXT", help="what the checkpoint is for, in one line, e.g. 'drawings, a demo'"
    )
    parser.add_argument("--resume", action="store_true", help="go on from --output, if it is there")
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="the weights to begin with, all layers")
    parser.add_argument(
        "--backbone", type=Path, help="vgg16_feat.pth, torchvision's VGG16, or from `icnet data pretrain`"
    )
    parser.add_argument("--width", type=float, default=1.0, help="of the network, a multiple of 1/32 (default 1)")
    parser.add_argument(
        "--init",
        choices=("paper", "he"),
        default="paper",
        help="initial weights of all but the backbone: N(0, 0.01), or He's, for larger learning rates",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=number(), default=60, help="passes over the data set (default 60)")
    length.add_argument("--steps", type=number(), help="instead of epochs; needed with --cutouts")
    parser.add_argument("--lr", type=positive, default=1e-5, help="learning rate (default 1e-5)")
    parser.add_argument("--backbone-lr", type=float, help="learning rate of the backbone (default: that of --lr)")
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument(
        "--schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="of the learning rate; cosine starts with a warm-up",
    )
    parser.add_argument(
        "--attention-loss",
        type=float,
        default=0,
        help="weight of a loss on the co-salient attention (default 0)",
    )
    parser.add_argument("--clip", type=float, help="largest norm of a gradient")
    parser.add_argument("--amp", action="store_true", help="mixed precision (bfloat16)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--save-every", type=number(), default=500, help="steps (default 500)")
    parser.add_argument("--seed", type=int, default=0)


# A run can be resumed only with the same values of these.
SETTINGS = (
    "images", "width", "init", "epochs", "steps", "lr", "backbone_lr", "weight_decay", "schedule", "attention_loss",
    "clip", "amp", "seed", "photographic",
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train, and write the checkpoint and its loss curve.

    Raises:
        InputError: options exclude each other, or the data can't be used; the message names the file.
        CheckpointError: the backbone, or the checkpoint to resume, does not fit.
        TrainingError: the loss is not finite; the last checkpoint is kept.
        OutputError: the checkpoint can't be written, or an output is an input.
    """
    _check(args)
    batches = _batches(args)
    torch.manual_seed(args.seed)
    network = _network(args)
    network = network.train().to(args.device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on a CPU
    optimizer = torch.optim.Adam(_parameters(args, network), args.lr, weight_decay=args.weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # as PyTorch's own schedules call it
    losses: list[float] = []
    scores: list[float] = []
    if args.resume and args.output.exists():
        losses, scores = _resume(args, network, optimizer)
    validation = Validation(args.validation, args.images, scores) if args.validation else None
    train(args, network, optimizer, batches, losses, validation)
    if args.weights and not args.validation:
        save_checkpoint(args.weights, _smaller(network), card=args.card)
    return 0


def train(
    args: argparse.Namespace,
    network: ICNet,
    optimizer: torch.optim.Optimizer,
    batches: DataSetBatches | PastedBatches,
    losses: list[float],
    validation: Validation | None = None,
) -> None:
    """Take the remaining steps; `losses` has one entry per step already taken."""
    steps = len(batches)
    interface = Uint8Interface(network).to(args.device)
    attention = AttentionLoss(network) if args.attention_loss else None
    loader = DataLoader(
        batches, batch_size=None, sampler=range(len(losses), steps), num_workers=2, worker_init_fn=_ignore_interrupts
    )
    with Steps("training", steps, len(losses)) as progress, _interrupts() as interrupted:
        for batch in loader:
            if isinstance(batch, ICNetError):
                raise batch
            if args.schedule == "cosine":
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * half_cosine(len(losses), steps)
            loss = _step(args, interface, optimizer, batch, attention)
            if not math.isfinite(loss):
                kept = f"{args.output} holds an earlier step" if args.output.exists() else "nothing was saved yet"
                where = f"step {len(losses) + 1}, group {batch.name!r}"
                raise TrainingError(f"loss {loss} in {where}; {kept}; try a lower --lr, or --clip 1")
            losses.append(loss)
            progress.advance(loss=loss)
            if len(losses) % args.save_every == 0 or len(losses) == steps or interrupted:
                if validation and validation.is_best(interface, args.device) and args.weights:
                    save_checkpoint(args.weights, _smaller(copy.deepcopy(network)), card=args.card)
                _save(args, network, optimizer, losses, validation.scores if validation else [])
            if interrupted:
                break


class AttentionLoss:
    """Soft IoU loss of the co-salient attention (foreground) at every level, with SIVs by the SISMs and by the truth.

    This loss is not the paper's. With a weak backbone a network learns to clean up each SISM, and to attend to objects
    of any kind, but not to compare. SIVs by the ground truth describe the common object alone, so attention by them is
    right only if the features tell it from the distractors.
    """

    def __init__(self, network: ICNet) -> None:
        self._seen: list[tuple[CorrelationFusion, Tensor, Tensor]] = []
        for module in network.modules():
            if isinstance(module, CorrelationFusion):
                module.register_forward_hook(lambda module, inputs, _output: self._seen.append((module, *inputs)))

    def __call__(self, truth: Tensor) -> Tensor:
        """The loss of the forward pass before this call; `truth` as for `iou_loss`."""
        ious = []
        for module, features, sisms in self._seen:
            f = module.normalise(features)  # [N, C, HW]
            expected = F.interpolate(truth, (module.size, module.size), mode="area")
            for marked in (sisms, truth):
                csa = module.attention(f, module.sivs(f, marked))[:, :1]  # [N, 1, HW]
                ious.append(soft_iou(csa.unflatten(2, (module.size, module.size)), expected))
        self._seen.clear()
        return 1 - torch.stack(ious).mean()


def _smaller(network: ICNet) -> ICNet:
    """The network with its convolutions in FP16, in place; batch norms' variances can leave FP16's range."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.half()
    return network


def iou_loss(maps: tuple[Tensor, ...], truth: Tensor) -> Tensor:
    """The loss of eq. 3: 1 − the soft IoU, mean over maps and images.

    Args:
        maps: [N, 1, s, s] in [0, 1] each; resized to the ground truth's size.
        truth: [N, 1, 224, 224] in [0, 1].
    """
    return 1 - torch.stack([soft_iou(resize(prediction.float(), SIZE), truth) for prediction in maps]).mean()


def soft_iou(prediction: Tensor, truth: Tensor) -> Tensor:
    """Σ min / Σ max over the pixels of each image: [N, 1, H, W] in [0, 1], twice → [N]."""
    smaller, larger = torch.minimum(prediction, truth), torch.maximum(prediction, truth)
    return smaller.sum((1, 2, 3)) / larger.sum((1, 2, 3)).clamp_min(1e-6)


def _step(
    args: argparse.Namespace,
    interface: Uint8Interface,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    attention: AttentionLoss | None,
) -> float:
    """One step; its loss on the maps. If a loss is not finite, no step is taken and that one is returned."""
    images, sisms = interface.normalise(batch.images.to(args.device), batch.sisms.to(args.device))
    truth = batch.masks.to(args.device).unsqueeze(1) / 255
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp):
        maps = interface.network(images.contiguous(memory_format=torch.channels_last), sisms)
        on_maps = loss = iou_loss(maps, truth)
        if attention:
            loss = on_maps + args.attention_loss * attention(truth)
    if not math.isfinite(loss.item()):
        return loss.item()
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    if args.clip:
        nn.utils.clip_grad_norm_(interface.parameters(), args.clip)
    optimizer.step()
    return on_maps.item()


def _card(text: str) -> str:
    if len(text) > MAX_CARD or text != card_of({CARD: text}):
        raise argparse.ArgumentTypeError(f"expected one line of at most {MAX_CARD} characters")
    return text


def _check(args: argparse.Namespace) -> None:
    if (args.data is None) == (args.cutouts is None) or (args.cutouts is None) != (args.backgrounds is None):
        raise InputError("give either --data, or --cutouts and --backgrounds")
    if args.cutouts and args.steps is None:
        raise InputError("--steps is needed with --cutouts: the number of groups made by cut and paste is unlimited")
    if args.init == "paper" and args.backbone is None and args.start is None:
        raise InputError("the paper's start needs a pretrained --backbone (or --init he, and a larger --lr)")
    if args.output.exists() and not args.resume:
        raise InputError(f"{args.output}: is there already; --resume to go on with it, or choose another --output")
    check_outputs(
        [args.output, args.output.with_suffix(".png"), args.weights],
        [args.start, args.backbone, args.validation, args.data, args.cutouts, args.backgrounds],
    )
    try:
        if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"--device {args.device}: PyTorch finds no usable GPU")
    except RuntimeError as error:
        raise InputError(f"--device {args.device}: not a device of PyTorch's; cuda or cpu") from error


def _batches(args: argparse.Namespace) -> DataSetBatches | PastedBatches:
    if args.cutouts:
        maker = (PhotographicPaste if args.photographic else CutPaste)(args.cutouts, args.backgrounds)
        return PastedBatches(maker, args.seed, args.steps, args.images)
    batches = DataSetBatches(args.data, args.seed, args.images, args.epochs, args.steps)
    for name in batches.skipped:
        print(f"{args.data}: group {name!r} has one image only and is skipped", file=sys.stderr)
    return batches


def _network(args: argparse.Namespace) -> ICNet:
    try:
        network = ICNet(args.width)
    except ValueError as error:
        raise InputError(f"--width: {error}") from error
    if args.init == "paper":
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 4:
                nn.init.normal_(parameter, 0, INITIAL_STD)
    if args.start:
        try:
            network.load_state_dict(load_checkpoint(args.start).state_dict())
        except RuntimeError as error:
            raise CheckpointError(f"{args.start}: is not of --width {args.width}") from error
    if args.backbone:
        load_backbone(network, args.backbone)
    return network


def _parameters(args: argparse.Namespace, network: ICNet) -> list[dict[str, Any]]:
    if args.backbone_lr is None:
        return [{"params": list(network.parameters())}]
    backbone = {id(parameter) for parameter in network.vgg.parameters()}
    rest = [parameter for parameter in network.parameters() if id(parameter) not in backbone]
    return [{"params": rest}, {"params": list(network.vgg.parameters()), "lr": args.backbone_lr}]


def _resume(
    args: argparse.Namespace, network: ICNet, optimizer: torch.optim.Optimizer
) -> tuple[list[float], list[float]]:
    """Load what `_save` wrote; the losses so far, and the scores on the validation set."""
    load_checkpoint(args.output)  # its tensors are checked by name and shape
    checkpoint = read_checkpoint(args.output)
    training = checkpoint.get("training")
    if not isinstance(training, dict) or "optimizer" not in checkpoint:
        raise CheckpointError(f"{args.output}: has no state of a training to resume; choose another --output")
    if other := [name for name in SETTINGS if training["settings"].get(name) != getattr(args, name)]:
        raise InputError(
            f"{args.output}: was trained with other settings: "
            + ", ".join(f"--{name.replace('_', '-')} {training['settings'].get(name)}" for name in other)
            + "; give these again, or choose another --output"
        )
    network.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    args.card = args.card or card_of(checkpoint)
    return training["losses"], training.get("validation", [])


def _save(
    args: argparse.Namespace,
    network: ICNet,
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    scores: list[float],
) -> None:
    settings = {name: getattr(args, name) for name in SETTINGS}
    training: dict[str, Any] = {"losses": losses, "validation": scores, "settings": settings}
    save_checkpoint(args.output, network, optimizer, training, args.card)
    _plot(args.output.with_suffix(".png"), losses)


def _plot(path: Path, losses: list[float]) -> None:
    """The loss of every step, and its running mean, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    window = max(len(losses) // 50, 1)
    means = torch.tensor(losses).unfold(0, window, 1).mean(1)
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.4, color="0.75")
    axes.plot(range(window, len(losses) + 1), means, color="tab:blue", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss: 1 − soft IoU", title=path.stem)
    axes.legend()
    with replacing(path) as temporary:
        write_picture(temporary, figure.savefig, dpi=120)


def _ignore_interrupts(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that trains decides


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that gets an entry on Ctrl-C or SIGTERM; they take effect after the block, not in a step."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received:  # twice: now
            raise KeyboardInterrupt
        received.append(number)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
