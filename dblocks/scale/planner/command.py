"""`dblocks plan`: its flags and output."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, get_type_hints

import torch

from dblocks.blocks.config import Shared
from dblocks.checkpoint import current, naming, read_config
from dblocks.checkpoint.networks import BLOCK_FILE, CONFIG_FILE, blocks_inside
from dblocks.config import check_count, read_json
from dblocks.integrations.build import UnknownModel
from dblocks.scale.planner.costs import Costs
from dblocks.scale.planner.optimizers import Optimizer
from dblocks.scale.planner.plan import Machine, Planner, Prefetch, Split
from dblocks.scale.planner.report import as_json, chart, chart_endings, table
from dblocks.scale.planner.subject import CONFIGS, Subject, of_model, of_network, of_saved
from dblocks.scale.planner.units import parse_bytes, parse_count, parse_flops, parse_rate


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """Plan the memory and time of training a network end to end and in any number of blocks.

    NETWORK is vit, causal-lm, masked-lm, recurrent or dit, with sizes as flags (see `dblocks plan
    vit --help`), a folder of `dblocks train`, or a model of another library (see
    `dblocks info --help`). Prints a table; all figures are modelled. Nothing is downloaded, and no
    weights are allocated.
    """

    memory: str
    """Memory of each device, such as 24GiB."""
    link: str = "50GB/s"
    """Bandwidth between a device and the host, such as 50GB/s."""
    flops: str = "400T"
    """Floating-point operations per second that a device reaches in training, not its peak."""
    devices: int = 1
    """Number of devices. They do not communicate: each trains one block, or several in turn."""
    batch_size: int = 1
    """Samples in a batch."""
    tokens: int | None = None
    """Sequence length in tokens; by default the network's maximum, up to 2,048."""
    shared: Literal["train", "frozen", "private"] | None = None
    """How parameters outside the layers are trained; for reduce, use private. Default on one
    device: train; on several devices: private for networks of dblocks, frozen for other libraries'
    models."""
    optimizer: Optimizer = "adamw"
    """Optimizer. adamw is fused; adamw-foreach copies the parameters in a step; sgd has momentum;
    adafactor updates one parameter at a time (foreach=False); muon updates all matrices, and adamw
    the rest."""
    ema: float | None = None
    """Decay of a moving average of the weights, as in `dblocks train --ema`; figures do not depend
    on its value."""
    bf16: bool = False
    """Compute the layers in bfloat16 (autocast)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights, gradients and moments of another library's model."""
    prefetch: Prefetch = "none"
    """The part of the next block that is copied to the device while a block is trained."""
    steps_per_visit: int = 10
    """Steps on a block before the next one replaces it on the device."""
    split: Split = "even"
    """Division of the layers into blocks: even, or minimising the largest memory or time."""
    blocks: int | None = None
    """Number of blocks to report in detail; by default the fewest that fit."""
    train_tokens: str | None = None
    """Number of tokens (or images) to train on, such as 15T; prints the time needed."""
    json: Path | None = None
    """File for all figures as JSON."""
    chart: Path | None = None
    """File for a stacked bar chart, such as plan.png or plan.svg."""

    @abstractmethod
    def subject(self) -> Subject:
        """The network."""

    def machine(self) -> Machine:
        """The machine described by the flags."""
        return Machine(
            memory=parse_bytes("--memory", self.memory),
            link=parse_rate("--link", self.link),
            flops=parse_flops("--flops", self.flops),
            devices=self.devices,
            steps_per_visit=self.steps_per_visit,
            prefetch=self.prefetch,
        )

    def __call__(self) -> None:
        """Print the plan."""
        machine = self.machine()
        check_file("--json", self.json)
        check_file("--chart", self.chart, chart_endings() if self.chart else ())
        check_count("batch_size", self.batch_size)
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"--ema must be at least 0 and less than 1, got {self.ema}")
        trained = None
        if self.train_tokens is not None:
            trained = parse_count("--train-tokens", self.train_tokens)
        subject = self.subject()
        costs = Costs(
            subject,
            self.batch_size,
            shared=self.shared_by(subject),
            optimizer=self.optimizer,
            bf16=self.bf16,
            average=self.ema is not None,
        )
        planner = Planner(costs, machine, self.split)
        if self.blocks is not None and not 1 <= self.blocks <= costs.num_layers:
            raise ValueError(
                f"--blocks must be from 1 to the number of layers, {costs.num_layers}, "
                f"got {self.blocks}"
            )
        ways = planner.ways()
        if self.chart is not None:
            with option("--chart"):
                chart(self.chart, planner, ways)
        if self.json is not None:
            with option("--json"):
                self.json.write_text(as_json(planner, ways), encoding="utf-8")
        print(table(planner, ways, self.blocks, trained))

    def shared_by(self, subject: Subject) -> Shared:
        """How the parameters outside the layers are trained.

        Raises:
            ValueError: several devices would train them, which needs communication.
        """
        if self.shared == "train" and self.devices > 1:
            raise ValueError(
                "--shared must be frozen or private with several --devices, which do not "
                f"communicate, got train with {self.devices} devices"
            )
        if self.shared is not None:
            return self.shared
        if self.devices == 1:
            return "train"
        return "frozen" if subject.pretrained else "private"


@dataclass(frozen=True, kw_only=True)
class PlanModel(Plan):
    """A plan of another library's model."""

    source: str
    """A model as in `dblocks info --model`; a folder of `dblocks train`, or its config.json; or the
    name of a network: vit, causal-lm, masked-lm, recurrent, dit."""

    def subject(self) -> Subject:
        """The model."""
        if (folder := own_folder(Path(self.source))) is not None:
            about = read_config(folder)
            _check_float32(self.dtype, about["model"].replace("_", "-"))
            with naming(folder / CONFIG_FILE):
                return of_saved(about, length=self.tokens)
        dtype = torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        try:
            return of_model(self.source, length=self.tokens, dtype=dtype)
        except UnknownModel as error:
            raise ValueError(f"{error}; networks of dblocks are {', '.join(CONFIGS)}") from error


PlanModel.__doc__ = Plan.__doc__


RECIPE_HELP = "paper: the network, batch and length of the paper's experiment, on one H200."
DATA_HELP = "With --recipe paper: the data set of the experiment; the first one by default."


def check_file(flag: str, path: Path | None, endings: Sequence[str] = ()) -> None:
    """Raises ValueError if a file cannot be written, before any work is done."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{flag} must name a file, got the folder {path}; name a file in it")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{flag} must be in a folder that exists, got {path}; make it first")
    if endings and path.suffix.lower().removeprefix(".") not in endings:
        raise ValueError(f"{flag} must end in one of {', '.join(endings)}, got {path}")


@contextmanager
def option(flag: str) -> Iterator[None]:
    """Adds the name of the option to errors of writing its file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{flag} must name a file that can be written, got: {error}") from error


def command(tyro: Any, argv: Sequence[str], defaults: Mapping[str, Any] | None = None) -> Any:
    """The command, with the flags of the network that `argv` names after "plan".

    Args:
        tyro: the package.
        argv: the words of the command line.
        defaults: defaults of the network's flags that replace its own.
    """
    chosen = next((word for word in argv[1:] if word in CONFIGS), None)
    if list(argv[:1]) != ["plan"] or chosen is None:
        return _made([_positional(tyro, str)], (PlanModel,), {})
    kind = CONFIGS[chosen]

    def subject(plan: Any) -> Subject:
        _check_float32(plan.dtype, chosen)
        # Created here, not by the parser, so that errors of the config's checks take one line.
        config = kind(**{f.name: getattr(plan, f.name) for f in dataclasses.fields(kind)})
        return of_network(config, length=plan.tokens)

    fields = [_positional(tyro, Literal[chosen])]  # pyright: ignore[reportInvalidTypeForm]
    recipe = Annotated[Optional[Literal["paper"]], tyro.conf.arg(help=RECIPE_HELP)]  # noqa: UP045
    data = Annotated[Optional[str], tyro.conf.arg(help=DATA_HELP)]  # noqa: UP045
    fields += [("recipe", recipe, None), ("data", data, None)]
    hints = get_type_hints(Plan) | get_type_hints(kind)
    fields += [(name, hints[name], value) for name, value in (defaults or {}).items()]
    return _made(fields, (Plan, kind), {"subject": subject})


def own_folder(path: Path) -> Path | None:
    """The folder of a saved dblocks network, given the folder or its config.json.

    Also accepts the folder of a block or of several, for which a later error says what to do.
    """
    folder = path.parent if path.name == CONFIG_FILE else path
    file = current(folder, CONFIG_FILE)
    if not file.is_file():
        of_blocks = current(folder, BLOCK_FILE).exists() or blocks_inside(folder)
        return folder if of_blocks else None
    found = read_json(file, infinite=True)
    return folder if isinstance(found, dict) and "model_config" in found else None


def _check_float32(dtype: str, name: str) -> None:
    if dtype != "float32":
        raise ValueError(
            f"--dtype must be float32 for {name}, whose parameters are, got {dtype}; "
            "--bf16 computes in bfloat16"
        )


def _positional(tyro: Any, kind: Any) -> tuple[str, Any]:
    return "source", Annotated[kind, tyro.conf.Positional, tyro.conf.arg(metavar="NETWORK")]


def _made(fields: list[Any], bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
    namespace = {"__post_init__": lambda plan: None, **namespace}
    made: Any = make_dataclass(
        "Plan", fields, bases=bases, namespace=namespace, frozen=True, kw_only=True
    )
    made.__doc__ = Plan.__doc__
    return made
