"""The configuration of a run: frozen dataclasses, read from TOML, changed on the command line, kept in checkpoints.

A run is a TOML file with one table per section below. Any field can be set on the command line
(`--model.num-layers 6`), and the whole configuration goes as JSON into every checkpoint.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tcc_jax.terminal import UserError, parse_arguments

# Rows that a step may have.
MOST_ROWS = 2**20


@dataclass(frozen=True)
class Bounds:
    """The smallest and the largest value that a field may take; a field without is checked by its type alone."""

    low: float
    high: float


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives, and its seed."""

    directory: str = "runs/default"
    """Folder of the run: configuration, metrics and checkpoints. An existing run resumes."""
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 0
    """Seed of the parameters, the order of the data, the cut points and dropout."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    corpus: str = "corpora/default"
    """A prepared corpus, as written by `python -m tcc_jax.prepare`."""
    gene_order: Literal["shuffled", "file"] = "shuffled"
    """Order of the genes in a set: permuted afresh every epoch, or as in the GMT file."""
    library_weights: dict[str, float] = field(default_factory=dict)
    """How often the sets of a library are seen, beside 1 for those not named: `library_weights = {KEGG = 2.0}`, or
    `--data.library-weights KEGG 2`, which replaces the whole table."""
    library_balance: Annotated[float, Bounds(0, 1)] = 0.0
    """Exponent b: a set is seen (training sets of its library)^-b as often; 1 shows every library alike often."""
    cluster_balance: Annotated[float, Bounds(0, 1)] = 0.0
    """Exponent b: a set is seen (training sets of its near-duplicate cluster)^-b as often; `prepare --split tail` makes
    no clusters."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder."""

    num_layers: Annotated[int, Bounds(1, 1000)] = 12
    """Transformer blocks."""
    width: Annotated[int, Bounds(1, 2**20)] = 768
    """Width of the residual stream, a multiple of num_heads."""
    num_heads: Annotated[int, Bounds(1, 2**12)] = 12
    """Attention heads."""
    hidden_width: Annotated[int, Bounds(0, 2**22)] = 0
    """Hidden width of the feed-forward layers; 0 means 4 x width."""
    position: Literal["none", "learned", "rope"] = "none"
    """Code for the place of a gene in its set. A set has no order, so the default is none."""
    dropout: Annotated[float, Bounds(0, 0.99)] = 0.0
    """Share of the activations dropped after the embedding and each block's two branches."""
    matmul_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the matrix products; parameters, norms, softmax and losses are always float32."""
    residual_dtype: Literal["bfloat16", "float32"] = "float32"
    """Type of the residual stream as it lies in memory between blocks; bfloat16 moves half as much."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted, and where."""

    kind: Literal["remaining-set", "next-gene"] = "remaining-set"
    """The target at a prefix: all genes still to come, uniformly, or the next one in order."""
    cut_points: Annotated[int, Bounds(0, 1024)] = 0
    """Positions scored in each set, drawn at random; 0 scores every position."""
    cut_low: Annotated[float, Bounds(0, 1)] = 0.0
    """Cut points lie above this share of a set's genes."""
    cut_high: Annotated[float, Bounds(0, 1)] = 1.0
    """Cut points lie below this share of a set's genes; 1 can reach the end, whose target is <end>."""
    false_genes: Annotated[float, Bounds(0, 1)] = 0.0
    """Largest share of false genes in a training prompt. Each set draws a share up to it; that many of its genes are
    replaced by random ones as they are shown, and stay among the genes to find."""
    prompt_genes: Annotated[int, Bounds(0, 2**20)] = 0
    """Most genes of a set that a row holds, and at most the share cut_high of it: the prompts alone. The other genes
    are targets without a place in the row. 0 holds whole sets."""
    target_genes: Annotated[int, Bounds(1, 2**16)] = 128
    """With prompt_genes, the genes outside the row that stand for all of them, at most; a fresh sample each time."""
    frequency_bias: bool = True
    """Start the output bias at each gene's log frequency in the training sets, instead of at zero."""
    spectral_start: bool = False
    """Start the embedding at the leading singular vectors of the training sets, and the first block at taking the mean
    of what it is shown, instead of at random: the decoder then begins as a linear completion of sets."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    kind: Literal["adamw", "muon"] = "adamw"
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest."""
    learning_rate: Annotated[float, Bounds(0, 1e3)] = 1e-3
    """Peak learning rate; Muon's updates are scaled so that one rate suits both."""
    schedule: Literal["cosine", "stable-decay"] = "cosine"
    """After the warm-up: half a cosine, or constant and then linearly down over the last `decay_share` of the steps."""
    decay_share: Annotated[float, Bounds(0, 1)] = 0.2
    """Share of the steps over which the stable-decay schedule falls."""
    warmup_steps: Annotated[int, Bounds(0, 2**31)] = 100
    """Steps of linear warm-up from zero."""
    final_fraction: Annotated[float, Bounds(0, 1)] = 0.1
    """Learning rate at the last step as a share of the peak."""
    weight_decay: Annotated[float, Bounds(0, 1e3)] = 0.1
    """Decoupled weight decay on matrices; norms and biases have none."""
    beta1: Annotated[float, Bounds(0, 0.999999)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Bounds(0, 0.999999)] = 0.98
    """Decay of the second moment."""
    gradient_clip: Annotated[float, Bounds(0, 1e9)] = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    ema_decay: Annotated[float, Bounds(0, 0.999999)] = 0.0
    """Decay of a moving average of the parameters, which is then what is evaluated and exported; 0 keeps none."""


@dataclass(frozen=True)
class TrainingConfig:
    """Size of a step and length of a run."""

    steps: Annotated[int, Bounds(1, 2**31 - 1)] = 1000
    """Optimizer steps of the whole run."""
    batch_rows: Annotated[int, Bounds(1, MOST_ROWS)] = 64
    """Packed rows in a step, over all devices."""
    row_length: Annotated[int, Bounds(8, 2**20)] = 1024
    """Tokens in a row. A longer set contributes a fresh random subset each time."""
    segments_per_row: Annotated[int, Bounds(1, 2**14)] = 64
    """Most sets packed into one row. With `objective.cut_points`, places that no set takes cost the output layer as
    much as those that are taken: train says how many are."""
    microbatches: Annotated[int, Bounds(1, 2**20)] = 1
    """Parts a batch is taken through one after the other, on a CPU in pairs, for one update: less memory, the same mean
    over the batch."""
    log_every: Annotated[int, Bounds(1, 2**31)] = 10
    """Steps between two lines of metrics."""
    eval_every: Annotated[int, Bounds(0, 2**31)] = 500
    """Steps between two evaluations of the validation loss; 0 turns them off."""
    eval_steps: Annotated[int, Bounds(1, 2**31)] = 8
    """Batches in an evaluation of the validation loss, at most."""
    recall_sets: Annotated[int, Bounds(0, 2**31)] = 256
    """Random validation sets, at most, whose hidden genes are looked for at each evaluation; 0 turns the recall off."""
    skips_before_stop: Annotated[int, Bounds(1, 2**31)] = 10
    """Updates in a row whose loss or gradient is not finite; each is skipped, and after so many the run stops."""
    profile_steps: str = ""
    """Steps to profile, FIRST:LAST such as 10:15, into RUN/profile for TensorBoard. Also spelled --profile-steps."""
    tensorboard: bool = False
    """Also write the metrics to RUN/tensorboard (needs the `tensorboard` extra)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, what to keep, and what to start from."""

    every_steps: Annotated[int, Bounds(1, 2**31)] = 500
    """Steps between two checkpoints; the last step is always saved."""
    every_minutes: Annotated[float, Bounds(0, 1e6)] = 15.0
    """Minutes between two checkpoints, at most; 0 saves by steps alone."""
    keep: Annotated[int, Bounds(1, 10**6)] = 3
    """Checkpoints kept, newest first."""
    keep_every: Annotated[int, Bounds(0, 2**31)] = 0
    """Checkpoints of steps that are a multiple of this are kept for ever; 0 keeps none of them."""
    keep_best: bool = True
    """Save and keep the checkpoint with the best validation recall."""
    resume: Literal["latest", "last-good"] = "latest"
    """Go on from the latest checkpoint, or past damaged ones from the last good one. Also spelled --resume."""
    init_from: str = ""
    """A run, checkpoint or export whose weights a new run starts from. Also spelled --init-from."""


@dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out. The rows of a batch are spread over data x fsdp."""

    data: Annotated[int, Bounds(-1, 2**20)] = -1
    """Devices along the data axis, where parameters are repeated; -1 takes all that the other axes leave."""
    fsdp: Annotated[int, Bounds(1, 2**20)] = 1
    """Devices along the fsdp axis, over which parameters and the optimizer's state are spread."""
    tensor: Annotated[int, Bounds(1, 2**20)] = 1
    """Devices along the tensor axis, over which heads, hidden width and vocabulary are spread."""


@dataclass(frozen=True)
class ComputeConfig:
    """How the same numbers are computed: speed and memory. A run may go on with other values."""

    attention: Literal["auto", "xla", "pallas", "cudnn", "splash"] = "auto"
    """Attention kernel: plain XLA, Pallas (GPU), cuDNN (Hopper or newer) or splash (TPU); auto picks by device."""
    remat: Literal["none", "dots", "full"] = "none"
    """Activations computed again in the backward pass: none, all but matrix products, or all inside a block."""
    scan_layers: bool = False
    """Run the blocks in one loop: compiles faster, for deep models."""
    logits_tile: Annotated[int, Bounds(0, 2**31)] = 0
    """Positions whose logits are held at once, over all rows; 0 lets the size of the logits decide."""
    steps_in_flight: Annotated[int, Bounds(1, 1000)] = 2
    """Steps the host may be ahead of the devices."""


@dataclass(frozen=True)
class HostsConfig:
    """How several processes find each other. TPU pods and Slurm need nothing here."""

    coordinator: str = ""
    """ADDRESS:PORT of process 0; else JAX_COORDINATOR_ADDRESS, or what TPU pods and Slurm say."""
    count: Annotated[int, Bounds(0, 2**20)] = 0
    """Number of processes; else JAX_NUM_PROCESSES."""
    index: Annotated[int, Bounds(-1, 2**20)] = -1
    """Number of this process, from 0; else JAX_PROCESS_ID."""
    timeout_seconds: Annotated[int, Bounds(5, 2**20)] = 100
    """After so long without a sign of a process, and some seconds, the others end, with a message."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested dicts of JSON values."""
        return dataclasses.asdict(self)


# Short names on the command line, for what is asked for once and not written into a TOML file.
_SHORT = {
    "--resume": "--checkpoint.resume",
    "--init-from": "--checkpoint.init-from",
    "--profile-steps": "--training.profile-steps",
}


def from_dict(values: dict[str, Any], source: str = "config", *, check: bool = True) -> Config:
    """Build a `Config` from nested dicts, as read from TOML or from a checkpoint.

    Args:
        values: section -> field -> value; what is left out takes its default.
        source: what the values came from, named in errors.
        check: also `validate`; without, values may still be changed before they have to fit together.

    Raises:
        UserError: a key that does not exist (the nearest valid one is named), or a value of the wrong type or range.
    """
    sections = {}
    for section in dataclasses.fields(Config):
        section_type = typing.get_type_hints(Config)[section.name]
        sections[section.name] = _section(section_type, section.name, values.get(section.name, {}), source)
    for key in values:
        owners = [f"[{name}]" for name, section in sections.items() if key in vars(section)]
        if owners and key not in sections:
            raise UserError(f"{source}: no section [{key}]; {key} is a field of {' and '.join(owners)}")
        _known(key, list(sections), f"{source}: no section [{key}]")
    config = Config(**sections)
    return validate(config, source) if check else config


def validate(config: Config, source: str = "config") -> Config:
    """Return the configuration unchanged, or raise `UserError` naming the first field whose value cannot be used."""
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for name, hint in typing.get_type_hints(type(values), include_extras=True).items():
            value = getattr(values, name)
            for bounds in getattr(hint, "__metadata__", ()):
                if not bounds.low <= value <= bounds.high:
                    low, high = (
                        f"{one:,}" if isinstance(one, int) else f"{one:g}" for one in (bounds.low, bounds.high)
                    )
                    raise UserError(f"{source}: {section.name}.{name} = {value}: must lie between {low} and {high}")
    if config.model.width % config.model.num_heads:
        raise UserError(
            f"{source}: model.width = {config.model.width}: must be a multiple of model.num_heads = "
            f"{config.model.num_heads}"
        )
    if config.model.position == "rope" and (config.model.width // config.model.num_heads) % 2:
        raise UserError(f"{source}: model.width / model.num_heads must be even when model.position = 'rope'")
    if config.objective.cut_low >= config.objective.cut_high:
        raise UserError(
            f"{source}: objective.cut_low = {config.objective.cut_low}: must be under objective.cut_high = "
            f"{config.objective.cut_high}"
        )
    if config.objective.prompt_genes:
        _check_prompts(config, source)
    if config.training.batch_rows % config.training.microbatches:
        raise UserError(
            f"{source}: training.batch_rows = {config.training.batch_rows}: must be a multiple of "
            f"training.microbatches = {config.training.microbatches}"
        )
    for library, weight in config.data.library_weights.items():
        if not 0 <= weight <= 1e6:
            raise UserError(f"{source}: data.library_weights: {library} = {weight}: must lie between 0 and 1e+06")
    profile_window(config.training.profile_steps, source)
    if config.mesh.data == 0:
        raise UserError(f"{source}: mesh.data = 0: must be -1 (all devices) or a number of devices")
    return config


def _check_prompts(config: Config, source: str) -> None:
    objective, training = config.objective, config.training
    where = f"{source}: objective.prompt_genes = {objective.prompt_genes}"
    if objective.kind != "remaining-set" or not objective.cut_points:
        raise UserError(f"{where}: needs objective.kind = 'remaining-set' and objective.cut_points of 1 or more")
    if objective.cut_high >= 1:
        raise UserError(f"{where}: needs objective.cut_high under 1, so that every set has genes left to find")
    if objective.prompt_genes >= training.row_length:
        raise UserError(f"{where}: must be under training.row_length = {training.row_length}")
    if config.data.gene_order == "file":
        raise UserError(f"{where}: needs data.gene_order = 'shuffled'")


def profile_window(text: str, source: str = "config") -> range:
    """Return the steps that `training.profile_steps` asks for, empty for "".

    Raises:
        UserError: not FIRST:LAST with 1 <= FIRST <= LAST.
    """
    first, colon, last = text.partition(":")
    if not text:
        return range(0)
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"{source}: training.profile_steps = {text!r}: must be FIRST:LAST, such as 10:15")
    return range(int(first), int(last) + 1)


def read_toml(path: str | Path, *, check: bool = True) -> Config:
    """Read a run's TOML file; `check` as in `from_dict`.

    Raises:
        UserError: no such file, not TOML, or a wrong key, type or value; the message names it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"{path}: cannot read the configuration: {reason}") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    return from_dict(values, str(path), check=check)


def parse_command_line(arguments: list[str], command: str = "train") -> Config:
    """Turn `CONFIG.toml [--section.field value ...]` into a checked configuration.

    Args:
        arguments: the command line without the program. `--help`, with or without a TOML file before it, lists every
            field with its meaning and exits with 0.
        command: name of the command, for the help text.

    Raises:
        UserError: no TOML file, or a wrong key, type or value in it or on the command line; the message names it.
    """
    program = f"python -m tcc_jax.{command} CONFIG.toml"
    config, overrides = toml_first(arguments, f"{program} [--section.field value]")
    source = f"{arguments[0]} and the command line" if overrides else arguments[0]
    overrides = [_long_name(argument) for argument in overrides]
    return validate(parse_arguments(Config, overrides, default=config, prog=program), source)


def toml_first(arguments: list[str], usage: str) -> tuple[Config, list[str]]:
    """Return the configuration, not checked, in the TOML file that a command line begins with, and what follows it.

    One that begins with `--help` gives the defaults and is returned whole.

    Raises:
        UserError: no TOML file comes first (`usage` is shown), or as `read_toml`.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        return Config(), arguments
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"the first argument must be the TOML file of a run: {usage}")
    return read_toml(arguments[0], check=False), arguments[1:]


def _long_name(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return _SHORT.get(name, name) + equals + value


def _section(section_type: Any, section: str, values: Any, source: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{source}: {section} must be a section: write [{section}] on a line of its own")
    hints = typing.get_type_hints(section_type)
    for key, value in values.items():
        _known(key, list(hints), f"{source}: no field {section}.{key}", prefix=f"{section}.")
        _check_type(f"{section}.{key}", value, hints[key], source)
    return section_type(**{key: _with_floats(value, hints[key]) for key, value in values.items()})


def _with_floats(value: Any, expected: Any) -> Any:
    # TOML and JSON write 1 for 1.0; keep floats floats so that configurations compare equal.
    if typing.get_origin(expected) is dict:
        return {name: float(item) for name, item in value.items()}
    return float(value) if expected is float else value


def _known(key: str, valid: list[str], complaint: str, prefix: str = "") -> None:
    if key in valid:
        return
    nearest = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)
    raise UserError(f"{complaint}; the nearest is {prefix}{nearest[0]}")


def _check_type(key: str, value: Any, expected: Any, source: str) -> None:
    if typing.get_origin(expected) is Literal:
        choices = typing.get_args(expected)
        if value not in choices:
            nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)
            raise UserError(
                f"{source}: {key} = {value!r}: must be one of {', '.join(choices)}; the nearest is {nearest[0]}"
            )
        return
    if typing.get_origin(expected) is dict:
        if not isinstance(value, dict):
            raise UserError(f"{source}: {key} = {value!r}: must be a table, such as {{KEGG = 2.0}}")
        for name, item in value.items():
            _check_type(f"{key}.{name}", item, float, source)
        return
    accepted: tuple[type, ...] = (int, float) if expected is float else (expected,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        raise UserError(f"{source}: {key} = {value!r}: must be of type {expected.__name__}")
    if expected is float and isinstance(value, int | float) and abs(value) > sys.float_info.max:
        raise UserError(f"{source}: {key}: too large a number")
