"""Measure how much faster the recommended recipe reaches the quality of the tutorial's: `make speedrun`.

    python -m benchmarks.speedrun --corpus URL [--only 1 2 3 4 levers rates] [--json FILE] [--plot FILE] [--device cuda]

Quality is bits per byte (BPB) of held-out text, which does not depend on the vocabulary. Each run is planned for its
length: a point in the middle of a longer run would have a learning rate that is still high.

1. Both sides have the same vocabulary and tokens. The opponent is the tutorial's optimizer and schedule in this
   program, at the best of three learning rates: 5e-4 scaled to the width, half of it and twice of it.
2. The opponent has the tutorial's vocabulary. We have our own, and as many tokens as give the same FLOPs in the
   presets, where the head is a smaller part of the model than at the size of the benchmark.
3. The same, but we have half of the opponent's FLOPs, as they are at this size.
4. Wall-clock time until the tutorial's BPB is reached. The opponent is `benchmarks.tutorial`, as its author would run
   it with a scaled learning rate. Start-up and evaluation are in neither time.

Then each part of the recipe is left out alone, at the size of row 1. With `--only rates`, half and twice of each of the
recipe's two learning rates are tried there; `--width 256` does it with another width.

Without `--corpus` the bundled sample is used, which is too small for conclusions.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.articles import SAMPLE
from benchmarks.comparison import multiplies_bf16
from benchmarks.machine import cpu_name
from benchmarks.speedrun_runs import (
    CPU,
    CUDA,
    NEW,
    TINY,
    Lab,
    Trained,
    next_length,
    tutorial_recipe,
)
from job.model.flops import flops_per_token

ROWS = ("1", "2", "3", "4", "levers", "rates")
_PRESET_VOCABULARIES = (151_646, 16_384)


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str
    opponent: str
    ours: str
    theirs_value: float
    our_value: float
    unit: str
    is_time: bool
    """True: the result is their value divided by ours; False: the change from their value to ours in percent."""
    bar: float
    """Least result: a factor, or a change in percent."""
    note: str = ""

    @property
    def result(self) -> float:
        """The factor by which we are faster, or the change in percent."""
        if self.is_time:
            return self.theirs_value / self.our_value
        return 100 * (self.our_value / self.theirs_value - 1)

    @property
    def is_met(self) -> bool:
        """True if the result is as good as the bar."""
        return self.result >= self.bar if self.is_time else self.result <= self.bar

    def __str__(self) -> str:
        form = "÷ {:.1f}" if self.is_time else "{:+.1f} %"
        met = "yes" if self.is_met else "**no**"
        values = (f"{value:.{1 if self.is_time else 4}f}" for value in (self.theirs_value, self.our_value))
        cells = self.name, self.opponent, self.ours, *values, self.unit, form.format(self.result)
        return f"| {' | '.join((*cells, form.format(self.bar), met, self.note))} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the rows, and print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="URL or path of JSON lines with the field text (default: the bundled sample)")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS[:-1]), metavar="ROW")
    parser.add_argument("--width", type=int, help="another width of the model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), help="of both sides (default: bf16, or fp32 on a CPU without bf16)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of rows 1 to 3 with different seeds (default: 1)")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--json", type=Path, help="file for all measurements")
    parser.add_argument("--plot", type=Path, help="file for the plot of BPB against time, such as speedrun.png")
    settings = parser.parse_args(arguments)
    size = TINY if settings.tiny else CUDA if settings.device == "cuda" else CPU
    if settings.width:
        size = size.with_width(settings.width)
    with tempfile.TemporaryDirectory(prefix="speedrun-") as folder:
        has_bf16 = size.device == "cuda" or multiplies_bf16()
        precision = settings.precision or ("bf16" if has_bf16 else "fp32")
        lab = Lab(size, settings.corpus or str(SAMPLE), Path(folder), precision)
        print(_machine(lab), flush=True)
        rows = [row for name in ROWS if name in settings.only for row in _MEASURES[name](lab, settings.seeds)]
        report = _report(lab, rows, is_sample=settings.corpus is None)
        print(report)
        if settings.json:
            measured = {
                "machine": _machine(lab),
                "rows": [asdict(row) | {"result": row.result, "is_met": row.is_met} for row in rows],
                "runs": [asdict(one) for one in lab.runs],
                "prepare_seconds": lab.prepare_seconds,
            }
            settings.json.write_text(json.dumps(measured, indent=2, ensure_ascii=False) + "\n")
        if settings.plot:
            draw(lab, settings.plot)


# ---- The rows ----


def same_vocabulary(lab: Lab, seeds: int) -> Iterator[Row]:
    """Yield row 1."""
    tokenizer, tokens = lab.own_tokenizer(lab.size.same_vocabulary), lab.size.same_tokens
    theirs = _best_adamw(lab, tokenizer, tokens, seeds)
    ours = [lab.train(NEW, tokenizer, tokens, seed) for seed in range(seeds)]
    yield _quality_row("1. same vocabulary, same tokens", theirs, ours, -8.0)


def preset_ratio(lab: Lab, seeds: int) -> Iterator[Row]:
    """Yield row 2."""
    theirs = _best_adamw(lab, lab.tutorial_tokenizer(), lab.size.tutorial_tokens, seeds)
    large, small = (flops_per_token(CUDA.spec, entries, CUDA.context_length).total for entries in _PRESET_VOCABULARIES)
    tokens = round(lab.size.tutorial_tokens * large / small)
    ours = [lab.train(NEW, lab.own_tokenizer(lab.size.own_vocabulary), tokens, seed) for seed in range(seeds)]
    name = f"2. own vocabulary, {large / 1e6:.0f} : {small / 1e6:.0f} tokens as in the presets"
    yield _quality_row(name, theirs, ours, -4.0)


def half_the_flops(lab: Lab, seeds: int) -> Iterator[Row]:
    """Yield row 3."""
    theirs = _best_adamw(lab, lab.tutorial_tokenizer(), lab.size.tutorial_tokens, seeds)
    tokenizer = lab.own_tokenizer(lab.size.own_vocabulary)
    per_token = lab.size.flops(lab.size.own_vocabulary, 1)
    step = lab.size.tokens_per_step
    tokens = max(step, int(theirs[0].flops / 2 / per_token) // step * step)
    ours = [lab.train(NEW, tokenizer, tokens, seed) for seed in range(seeds)]
    yield _quality_row("3. own vocabulary, half of the FLOPs", theirs, ours, -6.0)


def time_to_quality(lab: Lab, seeds: int) -> Iterator[Row]:
    """Yield row 4."""
    swept = _best_adamw(lab, lab.tutorial_tokenizer(), lab.size.tutorial_tokens, 1)
    theirs = lab.train_tutorial(_rate_of(swept[0]))
    tokenizer, step = lab.own_tokenizer(lab.size.own_vocabulary), lab.size.tokens_per_step
    tried: dict[int, bool] = {}
    runs: list[Trained] = []
    first = max(step, round(lab.size.tutorial_tokens / 2 / step) * step)
    while len(tried) < lab.size.searched_lengths and (length := next_length(tried, first, step)) is not None:
        runs.append(lab.train(NEW, tokenizer, length))
        tried[length] = runs[-1].bits_per_byte <= theirs.bits_per_byte
    reached = [run for run in runs if run.bits_per_byte <= theirs.bits_per_byte]
    if not reached:
        print(f"row 4: no run of at most {max(tried):,} tokens reached {theirs.bits_per_byte:.4f} bits per byte")
        return
    ours = min(reached, key=lambda one: one.seconds)
    yield Row(
        f"4. time to {theirs.bits_per_byte:.3f} BPB",
        theirs.recipe,
        f"{NEW.name}, {ours.tokens:,} tokens",
        theirs.seconds,
        ours.seconds,
        "s",
        is_time=True,
        bar=6.0,
        note=f"ours ends at {ours.bits_per_byte:.3f} BPB; with start-up and evaluation "
        f"{theirs.seconds + theirs.other_seconds:.0f} s and {ours.seconds + ours.other_seconds:.0f} s",
    )


def levers(lab: Lab, seeds: int) -> Iterator[Row]:
    """Yield a row for each part of the recipe, which the opponent does not have."""
    size = lab.size
    tokenizer, tokens = lab.own_tokenizer(size.same_vocabulary), size.same_tokens
    ours = [lab.train(NEW, tokenizer, tokens, seed) for seed in range(seeds)]
    for name, recipe in (
        ("Muon", NEW.without("without Muon", optimizer="adamw")),
        ("zero projections", NEW.without("without zero projections", "default")),
        ("linear decay", NEW.without("cosine", schedule="cosine")),
    ):
        theirs = [lab.train(recipe, tokenizer, tokens, seed) for seed in range(seeds)]
        yield _quality_row(f"lever: {name}", theirs, ours, 0.0)
    others = lab.tutorial_tokenizer()
    same_text = round(tokens * lab.train_tokens(others) / lab.train_tokens(tokenizer))
    theirs = [lab.train(NEW.without("tutorial's vocabulary"), others, same_text, seed) for seed in range(seeds)]
    yield _quality_row("lever: vocabulary", theirs, ours, 0.0)


def rates(lab: Lab, seeds: int) -> Iterator[Row]:
    """Yield a row for each learning rate of the recipe, halved and doubled; the opponent is the recipe as it is."""
    tokenizer, tokens = lab.own_tokenizer(lab.size.same_vocabulary), lab.size.same_tokens
    recipe = [lab.train(NEW, tokenizer, tokens, seed) for seed in range(seeds)]
    for name in ("muon_learning_rate", "learning_rate"):
        for factor in (0.5, 2.0):
            rate = f"{factor * float(NEW.train[name]):g}"
            changed = NEW.without(f"{name} {rate}", **{name: rate})
            others = [lab.train(changed, tokenizer, tokens, seed) for seed in range(seeds)]
            yield _quality_row(f"rate: {changed.name}", recipe, others, 0.0)


_MEASURES = {
    "1": same_vocabulary,
    "2": preset_ratio,
    "3": half_the_flops,
    "4": time_to_quality,
    "levers": levers,
    "rates": rates,
}


def _best_adamw(lab: Lab, tokenizer: Path, tokens: int, seeds: int) -> list[Trained]:
    """Return the opponent's runs at the rate that is best with the first seed."""
    recipes = [tutorial_recipe(rate) for rate in lab.size.adamw_rates]
    best = min(recipes, key=lambda recipe: lab.train(recipe, tokenizer, tokens).bits_per_byte)
    return [lab.train(best, tokenizer, tokens, seed) for seed in range(seeds)]


def _rate_of(trained: Trained) -> float:
    return float(trained.recipe.split()[-1])


def _quality_row(name: str, theirs: list[Trained], ours: list[Trained], bar: float) -> Row:
    spread = ""
    if len(ours) > 1:
        errors = [statistics.stdev(one.bits_per_byte for one in side) for side in (theirs, ours)]
        spread = f"± {errors[0]:.3f} and ± {errors[1]:.3f} over {len(ours)} seeds; "
    flops = theirs[0].flops / ours[0].flops
    sides = ("they", theirs[0]), ("we", ours[0])
    repeats = [f"{who} repeat text ({one.epochs:.1f} epochs)" for who, one in sides if one.epochs > 1]
    note = f"{spread}{theirs[0].flops / 1e12:.2g} and {ours[0].flops / 1e12:.2g} TFLOP (÷ {flops:.1f})"
    return Row(
        name,
        f"{theirs[0].recipe}, {theirs[0].vocab_size:,} entries, {theirs[0].tokens:,} tokens",
        f"{ours[0].recipe}, {ours[0].vocab_size:,} entries, {ours[0].tokens:,} tokens",
        statistics.mean(one.bits_per_byte for one in theirs),
        statistics.mean(one.bits_per_byte for one in ours),
        "BPB",
        is_time=False,
        bar=bar,
        note="; ".join((note, *repeats)),
    )


# ---- The report ----


def _machine(lab: Lab) -> str:
    """Return one line that describes machine, versions and size."""
    import torch

    spec, size = lab.size.spec, lab.size
    device = torch.cuda.get_device_name() if size.device == "cuda" else cpu_name()
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    return (
        f"{device}, {len(os.sched_getaffinity(0))} threads, torch {torch.__version__}, {datetime.date.today()}, commit "
        f"{commit or 'unknown'}: {spec.num_hidden_layers} x {spec.hidden_size}, {lab.precision}, "
        f"{size.global_batch_size} x {size.context_length} tokens a step, {lab.text_bytes / 1e6:.2f} MB of text"
    )


def _report(lab: Lab, rows: Sequence[Row], is_sample: bool) -> str:
    """Return the table, and what was not part of the times."""
    lines = [
        "",
        "| row | opponent | ours | theirs | ours | | result | bar | met | |",
        "|" + "---|" * 10,
        *map(str, rows),
    ]
    made = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in lab.prepare_seconds.items())
    total = sum(one.seconds + one.other_seconds for one in lab.runs)
    cpu_total = sum(one.cpu_seconds for one in lab.runs)
    lines += [
        "",
        f"In no time above: {made}.",
        f"All {len(lab.runs)} runs: {total:.0f} s, {cpu_total:.0f} s of CPU time.",
    ]
    if is_sample:
        lines += [
            "",
            f"The bundled sample ({lab.text_bytes / 1e3:.0f} kB) is too small to conclude from: set --corpus.",
        ]
    return "\n".join(lines)


def draw(lab: Lab, path: Path) -> None:
    """Draw the BPB of each run of rows 2 to 4 against the seconds of its steps; every point is a whole run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    new = [one for one in lab.runs if one.recipe == NEW.name and one.vocab_size == lab.size.own_vocabulary]
    opponents = {
        "the tutorial's script": [one for one in lab.runs if one.recipe.startswith("tutorial ")],
        "its recipe in this program": [
            one for one in lab.runs if one.recipe.startswith("AdamW") and one.vocab_size != lab.size.same_vocabulary
        ],
        "the recommended recipe": sorted(new, key=lambda one: one.seconds),
    }
    for (label, runs), style in zip(opponents.items(), ("s", "^", "o-"), strict=True):
        if runs:
            axes.plot([one.seconds for one in runs], [one.bits_per_byte for one in runs], style, label=label)
    axes.set(xscale="log", xlabel="seconds of training", ylabel="bits per byte of held-out text")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
