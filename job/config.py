"""The settings: one typed tree, the only place where a setting, its default, its unit and its meaning are written.

A value comes from the class below, then from the file given by ``--config``, then from ``--section.key value`` on the
command line. The help texts, ``--print-config`` and the commented files in ``configs/`` are all made from this tree.
"""

import difflib
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ByteSize, ValidationError, model_validator
from pydantic.fields import FieldInfo

from job.errors import UserError, refuse
from job.redaction import learn_urls, redacted_tree
from job.setting_kinds import YEAR_SECONDS, Duration, Section, StepRange, members, setting
from job.suggestions import hint
from job.yaml_file import read_yaml, read_yaml_file

MiB = 2**20
GiB = 2**30
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
DeviceSetting = Literal["auto", "cuda", "cpu"]
_LARGEST_BATCH = 2**20
_LARGEST_WIDTH = 2**20
"""Upper limit of a layer's width: ten times the width of the largest models there are."""
_LIKENESS_OF_OPTION = 0.8
_LONGEST_REASON = 200
"""Characters of what is wrong with a value, which may repeat it."""


class Run(Section):
    """What this run is called and where everything it makes is kept."""

    output: str = setting(
        "data/run",
        "Where the run lives: checkpoints, final model and logs. A folder or a URL such as s3://bucket/runs/one",
        min_length=1,
    )
    name: str | None = setting(None, "Name of the run in the tracker; null: the last part of run.output")


class Store(Section):
    """How object stores are reached. Credentials come from the environment alone (AWS_ACCESS_KEY_ID, ...)."""

    endpoint_url: str | None = setting(
        None, "Address of the S3 service; null: AWS_ENDPOINT_URL, else the cloud's own", pattern="^https?://"
    )
    region: str | None = setting(None, "Region of the S3 service; null: AWS_DEFAULT_REGION")
    connect_timeout_seconds: float = setting(
        5.0, "Longest wait for a connection", unit="seconds", gt=0, le=YEAR_SECONDS
    )
    read_timeout_seconds: float = setting(
        30.0, "Longest silence of a server within an answer", unit="seconds", gt=0, le=YEAR_SECONDS
    )
    deadline_seconds: float = setting(
        300.0, "Longest time for one operation, retries included", unit="seconds", gt=0, le=YEAR_SECONDS
    )
    addressing: Literal["auto", "virtual", "path"] = setting(
        "auto",
        "How requests name a bucket: virtual: bucket.host/key, path: host/bucket/key; auto: virtual for Alibaba OSS, "
        "Tencent COS, Huawei OBS and Volcengine TOS and where path is refused, else path; Amazon S3: as AWS wants it",
    )
    single_writer: bool = setting(
        False,
        "Nobody else writes to data.shards and run.output at the same time; needed only for a store without "
        "conditional writes, where nothing else keeps two prepares or two runs apart",
    )
    anonymous: bool = setting(False, "Send requests without credentials: enough to read public buckets")


class Data(Section):
    """The corpus, the token shards made from it, and how training reads them."""

    source: str = setting(
        "fjcanyue/wikipedia-zh-cn",
        "The corpus: a data set on Hugging Face (owner/name), modelscope://owner/name, or the path, folder, URL or "
        "glob of JSON, JSON lines or Parquet files, plain, .gz or .zst; or of .txt, .csv, .tsv, .arrow or WebDataset "
        ".tar files, or a folder made by save_to_disk. Names that begin with . or _ below it, and what this program "
        "has written there, are left out",
        min_length=1,
    )
    subset: str | None = setting(
        None,
        "Configuration of a data set on Hugging Face or in a local folder with a README.md that lists them, such as "
        "20231101.zh; null: its default one, or all JSON and Parquet files where source_split is null as well",
        min_length=1,
    )
    source_split: str | None = setting(
        None,
        "Split of such a data set, or of a saved DatasetDict, that is the corpus, such as train; it is then split by "
        "validation_fraction like any corpus; null: the only one",
        min_length=1,
    )
    text_documents: Literal["paragraph", "line", "file"] | None = setting(
        None,
        "What a document is in .txt files: what lies between two empty lines, a line, or the whole file; null: "
        "paragraph, and of a data set on a hub or with a subset what that says, which is line unless it says otherwise",
    )
    text_field: str = setting("text", "Field of a record that holds the text", min_length=1)
    id_field: str = setting(
        "id",
        "Field that names a document, any scalar but a boolean; the train/validation split depends on it, or on the "
        "text where it is absent or null",
        min_length=1,
    )
    on_bad_record: Literal["stop", "skip"] = setting(
        "stop", "What a broken record does: stop with its position, or be counted and left out"
    )
    shards: str = setting("data/shards", "Where the token shards are kept: a folder or a URL", min_length=1)
    slice_bytes: ByteSize = setting(
        ByteSize(64 * MiB),
        "Size of the pieces the corpus is cut into; each gives one shard. Smaller files share a piece",
        unit="bytes",
        ge=1024,
    )
    validation_fraction: float = setting(0.1, "Share of the documents held out for evaluation", ge=0, lt=1)
    seed: int = setting(2333, "Seed of the train/validation split and of the order of training", ge=0, lt=2**63)
    processes: int = setting(1, "Processes that prepare shards on this machine", ge=1, le=256)
    worker: str | None = setting(
        None,
        "This worker's part of `prepare`, as i/n with 0 <= i < n; null: as an array job says, else all of it",
        pattern=r"^\d+/[1-9]\d*$",
    )
    cache_dir: str | None = setting(
        None, "Folder on the local disk for shards in use; null: shards in WIKILLM_SCRATCH, else in ~/.cache/wikillm"
    )
    cache_bytes: ByteSize = setting(
        ByteSize(32 * GiB), "Most local disk that shards may take", unit="bytes", ge=1 * MiB
    )
    shuffle_bytes: ByteSize = setting(
        ByteSize(16 * GiB), "Shards that are shuffled together, and on the disk at one time", unit="bytes", ge=1 * MiB
    )
    node_groups: int = setting(
        1, "Parts of the nodes, each of which reads its own part of the shards; above about 16 nodes", ge=1, le=2**20
    )
    prefetch_steps: int = setting(4, "Batches prepared ahead of the training step", unit="steps", ge=1, le=2**16)
    loader_workers: int = setting(1, "Threads that cut batches from shards, per process", ge=1, le=64)


class Tokenizer(Section):
    """The tokenizer of `prepare`, and how `job tokenizer` trains one."""

    source: str = setting(
        "Qwen/Qwen2-0.5B",
        "A tokenizer on Hugging Face (owner/name), modelscope://owner/name, or a folder or URL with tokenizer.json; "
        "`job tokenizer` writes it there",
        min_length=1,
    )
    vocab_size: int = setting(
        16384, "Entries of a tokenizer trained by `job tokenizer`", unit="tokens", ge=257, le=2**24
    )
    train_bytes: ByteSize = setting(
        ByteSize(200 * MiB), "Text that `job tokenizer` reads at most, from the corpus' start", unit="bytes", ge=1
    )
    engine: Literal["auto", "reference"] = setting(
        "auto",
        "What makes the tokens in `prepare`: a faster tokenizer for as long as it agrees with the reference, or the "
        "reference (Hugging Face's) alone; the tokens are the same",
    )


class Model(Section):
    """A Qwen2 architecture; the number of vocabulary entries is the tokenizer's."""

    hidden_size: int = setting(512, "Width of the residual stream", ge=1, le=_LARGEST_WIDTH)
    num_hidden_layers: int = setting(12, "Transformer layers", ge=1, le=2**16)
    num_attention_heads: int = setting(8, "Query heads", ge=1, le=2**16)
    num_key_value_heads: int = setting(2, "Key and value heads, shared by groups of query heads", ge=1, le=2**16)
    intermediate_size: int = setting(2048, "Width inside the feed-forward layers", ge=1, le=_LARGEST_WIDTH)
    tie_word_embeddings: bool = setting(True, "Use the input embedding as the output head")
    rope_theta: float = setting(1_000_000.0, "Base of the rotary position embedding", gt=0)
    rms_norm_eps: float = setting(1e-6, "Added to the mean square in RMSNorm", gt=0)
    initializer_range: float = setting(0.02, "Standard deviation of the initial weights", gt=0)


class Train(Section):
    """The training run."""

    strategy: Literal["zero2", "ddp"] = setting("zero2", "DeepSpeed ZeRO stage 2, or PyTorch's data parallel")
    device: DeviceSetting = setting(
        "auto", "What it computes on; auto: the GPUs of this machine, where there are none its CPU"
    )
    processes: int | None = setting(
        None, "Training processes on this machine; null: one for each GPU, or 1 where there is none", ge=1, le=1024
    )
    precision: Literal["bf16", "tf32", "fp32"] = setting(
        "bf16", "Number format of the matrix products; tf32 is fp32 with 10 bits of mantissa, on a GPU alone"
    )
    compile: bool | None = setting(
        None, "Compile the training step by torch.compile; null: on a GPU; where it cannot be, training goes on without"
    )
    context_length: int = setting(512, "Tokens that the model sees at once", unit="tokens", ge=2, le=2**24)
    micro_batch_size: int = setting(
        32, "Windows in one forward pass of one process", unit="sequences", ge=1, le=_LARGEST_BATCH
    )
    global_batch_size: int = setting(
        256,
        "Windows in one optimizer step, over all processes and accumulation",
        unit="sequences",
        ge=1,
        le=_LARGEST_BATCH,
    )
    epochs: int = setting(2, "Passes over the training shards", ge=1, le=10**9)
    max_steps: int | None = setting(None, "Stop after so many optimizer steps; null: when the epochs are done", ge=1)
    learning_rate: float = setting(5e-4, "Peak learning rate", gt=0)
    min_learning_rate: float = setting(0.0, "Learning rate at the end of the cosine", ge=0)
    warmup_steps: int = setting(200, "Steps of linear warm-up", unit="steps", ge=0)
    weight_decay: float = setting(0.1, "Weight decay, on matrices only", ge=0)
    beta1: float = setting(0.9, "AdamW's decay of the first moment", ge=0, lt=1)
    beta2: float = setting(0.999, "AdamW's decay of the second moment", ge=0, lt=1)
    epsilon: float = setting(1e-8, "AdamW's epsilon", gt=0)
    gradient_clipping: float = setting(1.0, "Largest norm of the gradient; 0: not clipped", ge=0)
    loss_chunk_tokens: int | None = setting(
        None,
        "Tokens whose logits exist at once; null: as many as fit 256 MiB, on a GPU 2 GiB",
        unit="tokens",
        ge=1,
        le=2**40,
    )
    document_masking: bool = setting(
        False,
        "Tokens see those of their own document only: on a GPU in bf16 without a mask, else by one, more slowly",
    )
    flash_attention_3: bool = setting(
        False,
        "Attention by FlashAttention-3: a Hopper GPU and its package; without them training says so and goes on",
    )
    seed: int = setting(2333, "Seed of the initial weights", ge=0, lt=2**63)
    log_every: int = setting(10, "Interval of the log", unit="steps", ge=1)
    profile_steps: StepRange | None = setting(
        None,
        "From which step to which the first process is profiled, such as 10:13 for three of them; the trace goes to "
        "logs/ of the run; null: none",
    )
    resume: str = setting(
        "auto",
        "auto: from the run's newest good checkpoint, if any; never: from step 0, once for each job of a scheduler; or "
        "the URL of a checkpoint, where the run begins",
    )
    max_time: Duration | None = setting(
        None, "Longest time of one start, such as 3h50m: by then it has saved and stopped; null: no limit"
    )
    stop_file: str | None = setting(
        None, "Where this file or object is, the run stops: a path or a URL; null: none", min_length=1
    )
    max_attempts_without_progress: int = setting(
        3, "Starts without one new checkpoint, after which the next one gives up (exit 70)", ge=1
    )
    max_skipped_steps: int = setting(
        10, "Steps in a row whose loss or gradient blew up, after which the run gives up (exit 70)", unit="steps", ge=1
    )
    spike_factor: float | None = setting(
        None, "Skip a step whose gradient norm is this many times the running median; null: only if not finite", gt=1
    )
    node_timeout: Duration = setting("15m", "Longest wait for the other nodes when a run starts on several")
    hang_timeout: Duration = setting(
        "10m", "Longest time without a sign of life from a process, after which the run ends and names it"
    )

    def compiles(self, on_gpu: bool) -> bool:
        """Whether the training step is to be compiled."""
        return on_gpu if self.compile is None else self.compile


class Checkpoint(Section):
    """When a run is saved, and how many of its checkpoints are kept."""

    every: int = setting(500, "Interval of the checkpoints", unit="steps", ge=1)
    every_minutes: float | None = setting(
        None, "Longest time between two checkpoints as well; null: steps alone decide", unit="minutes", gt=0, le=525_600
    )
    keep: int = setting(10, "Checkpoints kept, the newest ones", ge=1)
    keep_every: int | None = setting(
        None, "Besides, one checkpoint of every so many steps is kept for ever; null: none", unit="steps", ge=1
    )
    stop_deadline: Duration = setting("5m", "Longest wait for the last checkpoint when the run is asked to stop")
    scratch_dir: str | None = setting(
        None, "Folder where a checkpoint is put when it is loaded; null: WIKILLM_SCRATCH, else the temporary folder"
    )


class Evaluate(Section):
    """Held-out loss."""

    every: int = setting(500, "Interval of the evaluations during training", unit="steps", ge=1)
    max_windows: int | None = setting(
        None, "Windows evaluated during training, spread over the held-out shards; null: all", unit="sequences", ge=1
    )
    batch_size: int = setting(32, "Windows in one forward pass", unit="sequences", ge=1, le=_LARGEST_BATCH)
    model: str | None = setting(
        None, "What `job evaluate` evaluates: a run, a checkpoint or a model folder; null: run.output"
    )


class Generate(Section):
    """Continuations of prompts, during training and by `job generate`."""

    model: str | None = setting(
        None, "What `job generate` continues with: a run, a checkpoint or a model folder; null: run.output"
    )
    prompts: list[str] = setting(["人工智能", "牛顿", "北京市", "亚洲历史"], "Texts to continue", min_length=1)
    max_new_tokens: int = setting(200, "Longest continuation", unit="tokens", ge=1, le=2**24)
    temperature: float = setting(0.8, "Divides the logits before sampling; 0: always the likeliest token", ge=0)
    top_p: float = setting(0.95, "Sample among the likeliest tokens that hold this much probability", gt=0, le=1)
    seed: int = setting(2333, "Seed of the sampling", ge=0, lt=2**63)


class Tracking(Section):
    """SwanLab, where a run is watched."""

    mode: Literal["auto", "cloud", "local", "offline", "disabled"] = setting(
        "auto",
        "cloud: needs an API key; local: for `swanlab watch`; offline: for `swanlab sync`; disabled: metrics.jsonl "
        "only; auto: cloud if there is a key, else local if the dashboard is installed, else offline",
    )
    project: str = setting("WikiLLM", "Project in SwanLab", pattern=r"^[0-9a-zA-Z_\-+.]{1,100}$")
    workspace: str | None = setting(
        None, "Workspace (user or team) in SwanLab; null: the key's own", pattern=r"^[0-9a-zA-Z_\-]{1,25}$"
    )
    log_dir: str | None = setting(
        None, "Folder for what SwanLab keeps on this machine; null: swanlog, in WIKILLM_SCRATCH where that is set"
    )


class Config(Section):
    """All settings of WikiLLM."""

    run: Run = Run()
    store: Store = Store()
    data: Data = Data()
    tokenizer: Tokenizer = Tokenizer()
    model: Model = Model()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    generate: Generate = Generate()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _know_the_secrets_in_urls(self) -> "Config":
        learn_urls(*(value for _, group in self for _, value in group if isinstance(value, str)))
        return self


@dataclass(frozen=True)
class Setting:
    """One leaf of the tree, as the help shows it."""

    name: str
    kind: str
    meaning: str
    default: str
    unit: str


@cache
def settings() -> tuple[Setting, ...]:
    """Every setting of the tree, in order."""
    return tuple(_settings())


def _settings() -> Iterator[Setting]:
    for section, group in _sections():
        for key, field in group.model_fields.items():
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            yield Setting(
                f"{section}.{key}",
                _kind(field),
                field.description or "",
                _shown(field.default),
                str(extra.get("unit", "")),
            )


def load(
    path: str | None,
    overrides: Sequence[tuple[str, str]] = (),
    named_by: str = "--config",
    options: Sequence[str] = (),
) -> Config:
    """The settings of a file with overrides applied.

    Args:
        path: a YAML file, or None for the defaults alone.
        overrides: pairs of a dotted name and its value as typed on a command line.
        named_by: the option or variable that names the file, for errors.
        options: what else may have been meant on the command line, as ``--place``.

    Raises:
        UserError: the file cannot be read, a key is unknown, or a value is of the wrong type or out of range; one
            error names all such keys, or all such values.
    """
    tree = _read_settings(path, named_by) if path is not None else {}
    names = {one.name for one in settings()}
    typed = (unknown_setting(name, options=options) for name, _ in overrides if name not in names)
    refuse(chain(_unknown_keys(tree), typed))
    for name, text in overrides:
        section, _, key = name.partition(".")
        values = tree.setdefault(section, {})
        if values is None:
            values = tree[section] = {}
        values[key] = _parse(name, text)
    return build(tree)


def build(tree: dict[str, Any]) -> Config:
    """The settings of a plain nested dict; errors as in `load`."""
    refuse(_unknown_keys(tree))
    try:
        return Config.model_validate({section: values or {} for section, values in tree.items()})
    except ValidationError as error:
        found: dict[str, UserError] = {}
        for one in error.errors(include_url=False):  # several of a setting where its type has alternatives
            name = ".".join(str(part) for part in one["loc"][:2])
            found.setdefault(name, UserError(name, one["input"], _expected(name, one["msg"]), "see --help"))
        refuse(found.values())
        raise


def to_yaml(config: Config) -> str:
    """The settings as a commented YAML file; reading it back gives the same settings."""
    explained = {one.name: one for one in settings()}
    lines: list[str] = []
    for section, group in _sections():
        lines += ([""] if lines else []) + [f"# {group.__doc__}", f"{section}:"]
        for key, value in getattr(config, section):
            one = explained[f"{section}.{key}"]
            about = f"{one.meaning}. ({one.kind}{f', in {one.unit}' if one.unit else ''}; default {one.default})"
            lines += textwrap.wrap(about, 116, initial_indent="  # ", subsequent_indent="  #   ")
            lines += [f"  {key}: {_shown(value)}"]
    return "\n".join(lines) + "\n"


def to_dict(config: Config) -> dict[str, Any]:
    """The settings as plain values without secrets, for the run's record and the tracker.

    Those of two starts are equal where a URL was only signed anew.
    """
    tree: dict[str, Any] = redacted_tree(config.model_dump(mode="json"))
    return tree


def _sections() -> Iterator[tuple[str, type[Section]]]:
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        yield name, field.annotation


def _kind(field: FieldInfo) -> str:
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", ByteSize: "size",
             Duration: "length of time", StepRange: "range of steps", list[str]: "list of texts",
             type(None): "null"}  # fmt: skip
    kinds = [
        " | ".join(map(str, get_args(one))) if get_origin(one) is Literal else names[one]
        for one in members(field.annotation)
    ]
    return " or ".join(kinds)


def _shown(value: Any) -> str:
    """A value as a person would write it in YAML."""
    if isinstance(value, ByteSize):
        power = next((power for power in (3, 2, 1) if value and value % 2 ** (10 * power) == 0), 0)
        return f"{value // 2 ** (10 * power)}{('', 'KiB', 'MiB', 'GiB')[power]}"
    if isinstance(value, str):
        plain = yaml.safe_dump(str(value), allow_unicode=True, width=10**6).removesuffix("...\n").strip()
        return plain if "\n" not in plain else _json(value)
    return _json(value)


def _json(value: Any) -> str:
    """A value as JSON that is YAML as well: characters that break a line there, or may not stand there, are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _read_settings(path: str, named_by: str) -> dict[str, Any]:
    tree = read_yaml_file(Path(path), named_by, "presets are in configs/")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(named_by, path, f"expected sections with settings, found {type(tree).__name__}")
    return tree


def _unknown_keys(tree: dict[str, Any]) -> Iterator[UserError]:
    """An error for each key that is no section and no setting, and for each section that holds no settings."""
    sections = dict(_sections())
    for section, values in tree.items():
        if section not in sections:
            yield _unknown_section(str(section), values, list(sections))
        elif not isinstance(values, dict | None):
            yield UserError(section, values, "expected settings under it (key: value)", "see configs/demo.yaml")
        else:
            known = sections[section].model_fields
            for key in [key for key in values or {} if key not in known]:
                yield unknown_setting(f"{section}.{key}", (values or {})[key])


def _unknown_section(name: str, values: Any, sections: list[str]) -> UserError:
    if not isinstance(values, dict | None):  # a setting that stands outside of any section
        return unknown_setting(name, values)
    close = difflib.get_close_matches(name, sections, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"sections are {', '.join(sections)}"
    return UserError(name, None, "unknown section of settings", remedy)


def unknown_setting(name: str, value: Any = None, options: Sequence[str] = ()) -> UserError:
    """The error for a setting that does not exist, with the one, or the option, that may have been meant."""
    remedy = hint(name, [one.name for one in settings()])
    if close := difflib.get_close_matches(f"--{name}", options, n=1, cutoff=_LIKENESS_OF_OPTION):
        remedy = f"did you mean {close[0]}?"
    return UserError(name, value, "unknown setting", remedy or "see --help for all of them")


def _parse(name: str, text: str) -> Any:
    """What was typed for a setting, as the value that YAML would have given."""
    section, _, key = name.partition(".")
    kinds = members(dict(_sections())[section].model_fields[key].annotation)
    if type(None) in kinds and text.lower() in ("null", "none", ""):
        return None
    if list[str] in kinds:
        try:
            return read_yaml(text)
        except ValueError:
            raise UserError(name, text, "expected a list", 'for example \'["一", "二"]\'') from None
    return text


def _expected(name: str, message: str) -> str:
    one = next((one for one in settings() if one.name == name), None)
    if one is None:
        return message
    reason = message.removeprefix("Input ").removeprefix("Value error, ")[:_LONGEST_REASON]
    return f"expected {one.kind}{f' in {one.unit}' if one.unit else ''}: {reason}"
