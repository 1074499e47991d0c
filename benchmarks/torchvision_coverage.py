"""What becomes of every torchvision classifier: one line each.

    python benchmarks/torchvision_coverage.py --log coverage.jsonl    # all; the same command again goes on where it was
    python benchmarks/torchvision_coverage.py --log coverage.jsonl --table docs/torchvision.md
    python benchmarks/torchvision_coverage.py --models resnet18,vgg11
    python benchmarks/torchvision_coverage.py --quick                 # four small models, T = 4 and 8
    python benchmarks/torchvision_coverage.py --maxpool before        # all before the neurons, not gated

A model is fully spiking, or spiking with surgery (coverage in %), or refused (first reason). The two largest are only
prepared, on the meta device, as several copies of their weights would take more than 8 GB.

Fully spiking models are compared with their ANN on 16 different inputs, 64×64 pixels or the model's smallest input:
the cosine of both outputs after each one's mean over the batch is subtracted, at every T asked for, from one network
calibrated for the largest. Max-pools are gated, which adds no error; with ``--maxpool before`` the maximum
of currents that vary in time is too large, and where the values of a window are close, as at random weights, that
error does not vanish with T. Beside it: the wrong twin, the same network with every threshold divided by 4, at the
largest T, and the ANN with its activations rounded to T levels (QCFS with the same thresholds), which no network of
T steps with these thresholds can be expected to beat.

Weights are random (seed 0), BatchNorm statistics are those of the batch, and BatchNorm's bias is 1: with PyTorch's 0 a
deep random network is chaotic, every layer makes a disturbance 1.2 times larger, and rounding alone takes the cosine
of resnet50 to 0.5 at T = 128 (``--norm-bias 0`` shows it). Last line: one JSON object.
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmh import QCFS, __version__, sites, zoo
from lmh.calibrate import MinError
from lmh.convert import Conversion, ReluSurgery, convert, prepare
from lmh.convert.maxpool import MAXPOOLS
from lmh.errors import AuditError, LMHError
from lmh.records import Prepared
from lmh.time_axis import prefixes
from lmh.torchvision_shim import torchvision

QUICK = ("resnet18", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small")
SMALLEST = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 518}
TRANSFORMERS = ("vit_", "swin_")
PREPARED_ONLY = ("vit_h_14", "regnet_y_128gf")
SAMPLES = 16
PASS = 0.95
REFUSED, SURGERY, FULL = "refused", "spiking with surgery", "fully spiking"


@dataclass(frozen=True)
class Settings:
    """What a line depends on besides its model; lines of other settings are not taken from the log."""

    timesteps: tuple[int, ...]
    norm_bias: float
    maxpool: str
    compare: bool
    version: str = __version__
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of one model; cosines by T, None where they were not measured."""

    model: str
    fate: str = REFUSED
    coverage: float = 0.0
    reason: str = ""
    cosine: dict[str, float] = field(default_factory=dict)
    wrong_twin: float | None = None
    rounded_ann: float | None = None
    prepared_only: bool = False
    seconds: float = 0.0


def input_size(name: str) -> int:
    """Return the smallest input that a model takes, at least 64 pixels."""
    return SMALLEST.get(name, 224 if name.startswith(TRANSFORMERS) else 64)


def centred_cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two outputs [N, C] after each one's batch mean is subtracted."""
    return float(F.cosine_similarity((a - a.mean(0)).flatten(), (b - b.mean(0)).flatten(), dim=0))


def build(name: str, images: Tensor, norm_bias: float) -> nn.Module:
    """Return a model with random weights and BatchNorm statistics of ``images``."""
    torch.manual_seed(0)
    model = zoo.card(f"torchvision:{name}").build().eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.constant_(norm.bias, norm_bias)
        norm.momentum = None
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        model(images)
    return model.eval()


def cosines(conversion: Conversion, expected: Tensor, images: Tensor, steps: Sequence[int]) -> list[float]:
    """Return the centred cosine after each number of steps, from one run."""
    part = 4 if images.shape[-1] < 100 else 2
    with torch.no_grad():
        outputs = torch.cat([prefixes(conversion.snn, x)[[t - 1 for t in steps]] for x in images.split(part)], 1)
    return [centred_cosine(output, expected) for output in outputs]


def wrong_twin(conversion: Conversion, expected: Tensor, images: Tensor, steps: int) -> float:
    """Return the cosine with every threshold divided by 4; the conversion is spoilt by it."""
    for site in sites(conversion.snn).values():
        site.base_threshold /= 4
    return cosines(conversion, expected, images, [steps])[0]


def rounded_ann(conversion: Conversion, expected: Tensor, images: Tensor, levels: int) -> float:
    """Return the cosine of the ANN whose activations are rounded to ``levels`` levels up to the neurons' θ."""
    model = copy.deepcopy(conversion.prepared.model)
    for path, theta in conversion.calibration.v_threshold.items():
        rounding = QCFS(levels, 1.0, channels=len(theta) if theta.ndim else None)
        rounding.raw_threshold.data = theta.log()
        model.set_submodule(path, rounding)
    with torch.no_grad():
        return centred_cosine(model(images), expected)


def prepared_on_meta(name: str) -> Outcome:
    """Say what would become of a model, from its graph alone."""
    model = zoo.card(f"torchvision:{name}").build().eval().to("meta")
    shape = (3, input_size(name), input_size(name))
    try:
        prepared, reason = prepare(model, shape), ""
    except AuditError as error:
        prepared, reason = prepare(model, shape, surgery=ReluSurgery()), error.problems[0]
    return replace(described(name, prepared, reason), prepared_only=True)


def described(name: str, prepared: Prepared, reason: str) -> Outcome:
    """Return the outcome of a model that can be converted; ``reason`` is why surgery was needed, if it was."""
    return Outcome(name, SURGERY if reason else FULL, prepared.spiking_coverage, reason)


def examined(name: str, settings: Settings) -> Outcome:
    """Convert one model and compare it with its ANN.

    Raises:
        LMHError: if it is refused even with surgery.
    """
    size, last = input_size(name), settings.timesteps[-1]
    images = torch.randn(SAMPLES, 3, size, size, generator=torch.Generator().manual_seed(1))
    model = build(name, images, settings.norm_bias)
    policy, reason = MinError(), ""
    try:
        conversion = convert(model, last, data=images, calibration=policy, maxpool=MAXPOOLS[settings.maxpool])
    except AuditError as error:
        reason = error.problems[0]
        conversion = convert(
            model, 4, data=images[:2], calibration=policy, surgery=ReluSurgery(), maxpool=MAXPOOLS[settings.maxpool]
        )
    outcome = described(name, conversion.prepared, reason)
    with torch.no_grad():
        if reason or not settings.compare:
            finite = bool(torch.isfinite(conversion.snn(images[:1])).all())
            return outcome if finite else replace(outcome, fate=REFUSED, reason="the outputs are not finite")
        expected = model(images)
    found = cosines(conversion, expected, images, settings.timesteps)
    return replace(
        outcome,
        cosine={str(t): value for t, value in zip(settings.timesteps, found, strict=True)},
        rounded_ann=rounded_ann(conversion, expected, images, last),
        wrong_twin=wrong_twin(conversion, expected, images, last),
    )


def outcome_of(name: str, settings: Settings) -> Outcome:
    """Return what became of a model, whatever it was."""
    started = time.perf_counter()
    try:
        found = prepared_on_meta(name) if name in PREPARED_ONLY else examined(name, settings)
    except LMHError as error:
        found = Outcome(name, reason=str(error).splitlines()[-1].strip(" -"))
    except Exception as error:
        found = Outcome(name, fate="traceback", reason=f"{type(error).__name__}: {error}")
    return replace(found, seconds=time.perf_counter() - started)


def line(outcome: Outcome) -> str:
    """Return the printed line of a model."""
    parts = [f"{outcome.model:20} {outcome.fate:20} {100 * outcome.coverage:5.1f} %"]
    parts += [f"T={steps} {value:6.3f}" for steps, value in outcome.cosine.items()]
    for what, value in {"wrong twin": outcome.wrong_twin, "rounded ANN": outcome.rounded_ann}.items():
        if value is not None:
            parts.append(f"{what} {value:6.3f}")
    if outcome.prepared_only:
        parts.append("(prepared only)")
    if outcome.reason:
        parts.append(f"[{outcome.reason[:100]}]")
    return "  ".join([*parts, f"{outcome.seconds:.0f} s"])


def table(outcomes: Sequence[Outcome], head: str) -> str:
    """Return all outcomes as a page of Markdown."""
    steps = next((list(outcome.cosine) for outcome in outcomes if outcome.cosine), [])
    columns = ["model", "fate", "coverage", *(f"T = {t}" for t in steps), "wrong twin", "rounded ANN", "why not fully"]
    rows = []
    for outcome in outcomes:
        measured = [*(outcome.cosine.get(t) for t in steps), outcome.wrong_twin, outcome.rounded_ann]
        cells = ["" if value is None else f"{value:.3f}" for value in measured]
        fate = outcome.fate + (", prepared only" if outcome.prepared_only else "")
        rows.append([outcome.model, fate, f"{100 * outcome.coverage:.1f} %", *cells, outcome.reason.partition(" (")[0]])
    lines = [columns, ["---"] * len(columns), *rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
    return (
        "# torchvision's classifiers\n\nWritten by `python benchmarks/torchvision_coverage.py --table FILE`, which "
        f"says what is measured. Reasons are the first that the audit gives.\n\n{head}\n\n{body}\n\n"
        f"    {json.dumps(summary(outcomes))}\n"
    )


def known(log: Path | None, settings: Settings) -> dict[str, Outcome]:
    """Return the outcomes that an earlier run with the same settings wrote."""
    if log is None or not log.exists():
        return {}
    entries = [json.loads(text) for text in log.read_text().splitlines()]
    own = [entry["outcome"] for entry in entries if entry["settings"] == json.loads(json.dumps(asdict(settings)))]
    return {outcome["model"]: Outcome(**outcome) for outcome in own}


def summary(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Return the figures of the last line."""
    measured = [outcome for outcome in outcomes if outcome.cosine]
    finals = {outcome.model: [*outcome.cosine.values()][-1] for outcome in measured}
    return {
        "models": len(outcomes),
        "accounted": sum(outcome.fate != "traceback" for outcome in outcomes),
        "fully_spiking": sum(outcome.fate == FULL for outcome in outcomes),
        "compared": len(measured),
        "cosine_pass": sum(value >= PASS for value in finals.values()),
        "cosine_rises": sum([*o.cosine.values()] == sorted(o.cosine.values()) for o in measured),
        "wrong_twin_below": sum((o.wrong_twin or 0.0) < finals[o.model] - 0.1 for o in measured),
        "converted": sum(outcome.fate in (FULL, SURGERY) and not outcome.prepared_only for outcome in outcomes),
        "prepared_only": [outcome.model for outcome in outcomes if outcome.prepared_only],
        "refused": sum(outcome.fate == REFUSED for outcome in outcomes),
        "tracebacks": sum(outcome.fate == "traceback" for outcome in outcomes),
    }


@click.command()
@click.option("--models", help="Names separated by commas; all unless given.")
@click.option("--timesteps", default="32,128", show_default=True, help="The T at which cosines are taken.")
@click.option("--norm-bias", default=1.0, show_default=True, help="BatchNorm's bias in the random networks.")
@click.option("--maxpool", type=click.Choice(list(MAXPOOLS)), default="gated", show_default=True, help="Max-pools.")
@click.option("--audit-only", is_flag=True, help="Convert, but do not compare with the ANN.")
@click.option("--log", type=click.Path(dir_okay=False, path_type=Path), help="File of JSON lines to go on from.")
@click.option("--table", "page", type=click.Path(dir_okay=False, path_type=Path), help="File for a table in Markdown.")
@click.option("--quick", is_flag=True, help="Four small models at T = 4 and 8.")
def main(
    models: str | None,
    timesteps: str,
    norm_bias: float,
    maxpool: str,
    audit_only: bool,
    log: Path | None,
    page: Path | None,
    quick: bool,
) -> None:
    """Convert torchvision's classifiers and say what became of each."""
    module = torchvision().models
    names = QUICK if quick else models.split(",") if models else module.list_models(module=module)
    steps = (4, 8) if quick else tuple(sorted(int(part) for part in timesteps.split(",")))
    settings = Settings(steps, norm_bias, maxpool, compare=not audit_only)
    head = (
        f"seed 0, n = {SAMPLES} inputs, T = {list(steps)}, BatchNorm bias {norm_bias:g}, max-pools {maxpool}, lmh "
        f"{__version__}, torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads; prepared "
        f"only: {', '.join(PREPARED_ONLY)}"
    )
    print(head, flush=True)
    before = known(log, settings)
    outcomes = []
    for name in names:
        outcome = before.get(name) or outcome_of(name, settings)
        if log is not None and name not in before:
            with log.open("a") as file:
                file.write(json.dumps({"settings": asdict(settings), "outcome": asdict(outcome)}) + "\n")
        outcomes.append(outcome)
        print(line(outcome), flush=True)
    if page is not None:
        page.write_text(table(outcomes, head))
    print(json.dumps(summary(outcomes)))


if __name__ == "__main__":
    main()
