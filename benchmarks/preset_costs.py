"""Compute the costs in the presets' first lines and in the README: `python -m benchmarks.preset_costs`.

It is computed as `job check` computes its plan: FLOPs of the model, and an assumed share of each GPU's peak. Nothing of
it is measured.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from job import config as settings
from job.config import Config
from job.data.batching import optimizer_steps
from job.model.flops import flops_per_token, parameter_counts
from job.model.gpu_table import GPUS
from job.model.memory import process_memory
from job.model.spec import ModelSpec
from job.preflight.assumed_data import WIKIPEDIA_BYTES_PER_TOKEN, WIKIPEDIA_TOKENS
from job.preflight.assumed_mfu import assumed_mfu
from job.preflight.gpu_prices import DOLLARS_PER_HOUR

PRESETS = ("wiki-54m", "wiki-110m", "wiki-123m")
_FOLDER = Path(__file__).parent.parent / "configs"
_SHOWN_GPUS = ("T4", "RTX 3090", "RTX 4090", "A100", "H100")


@dataclass(frozen=True)
class Cost:
    """The computed cost of a preset's run on the tutorial's corpus with one GPU."""

    parameters: int
    flops_per_token: float
    tokens: float
    """Training tokens of one epoch."""
    text_bytes: float
    epochs: int
    flops: float
    """FLOPs of the whole training."""
    hours: dict[str, float]
    """Hours by the name of the GPU."""
    memory_bytes: int
    """GPU memory with a micro-batch of 32 sequences, in bf16."""


def cost_of(config: Config) -> Cost:
    """Compute the cost of a preset's run."""
    spec, train = ModelSpec(**config.model.model_dump()), config.train
    entries = 151_646 if config.tokenizer.source.startswith("Qwen/") else config.tokenizer.vocab_size
    text_bytes = WIKIPEDIA_TOKENS * WIKIPEDIA_BYTES_PER_TOKEN[151_646]
    tokens = text_bytes / WIKIPEDIA_BYTES_PER_TOKEN[entries] * (1 - config.data.validation_fraction)
    steps, _ = optimizer_steps(
        train.epochs * int(tokens / train.context_length), train.global_batch_size, train.max_steps
    )
    flops = flops_per_token(spec, entries, train.context_length).total
    total = flops * steps * train.global_batch_size * train.context_length
    hours = {}
    for gpu in GPUS:
        name = next((name for name in _SHOWN_GPUS if gpu.is_in_plan and gpu.name.split(" SXM")[0] == name), None)
        if name is not None:
            _, peak = gpu.used_precision("bf16")
            hours[name] = total / peak / assumed_mfu(flops, gpu, peak) / 3600
    memory = process_memory(
        spec, entries, optimizer=train.optimizer, strategy="ddp", precision="bf16", micro_batch_size=32,
        context_length=train.context_length, loss_chunk_tokens=train.loss_chunk_tokens, world_size=1,
    )  # fmt: skip
    parameters = parameter_counts(spec, entries).total
    return Cost(parameters, flops, tokens, text_bytes, train.epochs, total, hours, memory.total)


def cost_lines(config: Config) -> list[str]:
    """Return the comment about the cost that a preset has in its first lines."""
    cost = cost_of(config)
    hours = ", ".join(f"{name} {value:.1f}" for name, value in cost.hours.items())
    text = (
        f"Cost, computed and not measured: {cost.parameters / 1e6:.1f} M parameters, {cost.flops_per_token / 1e6:.0f} "
        f"MFLOP a token; {cost.flops / 1e18:.2f} EFLOP for {cost.epochs} epochs of Chinese Wikipedia "
        f"({cost.text_bytes / 1e9:.2f} GB of text, about {cost.tokens / 1e6:.0f} M training tokens); hours on one GPU: "
        f"{hours}."
    )
    return textwrap.wrap(text, 118, initial_indent="# ", subsequent_indent="# ")


def table_rows() -> list[str]:
    """Return the rows of the README's table: parameters, memory, hours and price on each GPU, and the measured BPB."""
    rows = []
    for name in PRESETS:
        cost = cost_of(preset(name))
        times = [
            f"{hours:.1f} h" + (f", ${hours * DOLLARS_PER_HOUR[gpu]:.2f}" if gpu in DOLLARS_PER_HOUR else "")
            for gpu, hours in cost.hours.items()
        ]
        cells = [f"`configs/{name}.yaml`", f"{cost.parameters / 1e6:.0f} M", f"{cost.memory_bytes / 2**30:.1f} GiB"]
        rows.append(f"| {' | '.join(cells + times)} | – |")
    return rows


def preset(name: str) -> Config:
    """Return the settings of a preset."""
    return settings.load(str(_FOLDER / f"{name}.yaml"))


def main() -> None:
    """Print the lines of all presets, and the rows of the README's table."""
    for name in PRESETS:
        print(f"{name}\n" + "\n".join(cost_lines(preset(name))))
    print("\n".join(table_rows()))


if __name__ == "__main__":
    main()
