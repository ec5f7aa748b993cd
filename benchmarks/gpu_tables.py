"""Tables that the GPU benchmark prints."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

Result = dict[str, Any]
"""The fields of a case and its measurements, or `why` there are none."""


def _table(title: str, columns: Sequence[str], rows: Iterator[list[str]]) -> Iterator[str]:
    yield f"\n{title}\n"
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield f"| {' | '.join([*row, *[''] * (len(columns) - len(row))])} |"


def tables(results: Sequence[Result], conclusions: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    """Generate the lines of all tables; the most important table comes last.

    Args:
        results: all rows.
        conclusions: question, numbers and advice of each conclusion.
    """

    def of(kind: str) -> Iterator[Result]:
        return (result for result in results if result["kind"] == kind)

    def unmeasured(result: Result) -> list[list[str]]:
        return [[result["name"], result["why"]]] if "why" in result else []

    def rows(kind: str, list_name: str, cells: Callable[[Result], list[str]]) -> Iterator[list[str]]:
        for result in of(kind):
            yield from unmeasured(result)
            for entry in result.get(list_name, []):
                yield [result["name"], *cells(entry)]

    yield from _table(
        "This machine",
        ["", "operation", "measured"],
        rows("machine", "reached", lambda entry: [entry["what"], f"{entry['value']:,.1f} {entry['unit']}"]),
    )
    yield from _table(
        "Correctness: relative errors against fp64, ‖x - x64‖ / ‖x64‖",
        ["", "number", "error", "tolerance", ""],
        rows(
            "check",
            "errors",
            lambda entry: [
                entry["what"],
                f"{entry['error']:.1e}",
                f"{entry['tolerance']:.0e}",
                "right" if entry["is_right"] else "WRONG",
            ],
        ),
    )
    yield from _table(
        "The loss alone: forward and backward of one micro-batch",
        ["loss", "chunk, tokens", "ms", "peak memory in addition to its inputs, GiB"],
        rows(
            "loss",
            "chunks",
            lambda entry: [
                "default" if entry["chunk_tokens"] is None else f"{entry['chunk_tokens']:,}",
                entry.get("why") or f"{1e3 * entry['seconds']:.2f}",
                "" if "why" in entry else f"{entry['peak_bytes'] / 2**30:.2f}",
            ],
        ),
    )
    for result in of("trace"):
        title = f"Trace of one step, {result['name']}, {result['micro_batch_size']} x {result['accumulation_steps']}"
        if "kernels" in result:
            shares = ", ".join(f"{share:.0%} {kind}" for kind, share in result["shares"].items())
            title += (
                f"; the device was busy for {result['busy']:.0%} of {1e3 * result['span_seconds']:.1f} ms: {shares}"
            )
        if "host_seconds" in result:
            title += (
                f"; the host took {1e3 * result['host_seconds']:.1f} ms under the profiler, for {result['launches']} "
                f"kernels and {result['copies']} copies, and waited {result['waits']} times"
            )
        if "why" in result:
            title += f": {result['why']}"
        yield from _table(
            title,
            ["kernel", "kind", "share", "ms", "times"],
            (
                [
                    kernel["name"][:90].replace("|", "/"),
                    kernel["kind"],
                    f"{kernel['share']:.1%}",
                    f"{1e3 * kernel['seconds']:.2f}",
                    str(kernel["times"]),
                ]
                for kernel in result.get("kernels", [])
            ),
        )
    yield from _table("What it decides", ["question", "found", "what to do"], map(list, conclusions))
    yield from _table(
        "Training; times of an optimizer step in ms; our loss includes its gradients and the products of the head",
        [
            "configuration",
            "model",
            "context",
            "batch",
            "tokens/s",
            "÷ tutorial",
            "MFU",
            "peak GiB",
            "step",
            "forward",
            "loss",
            "backward",
            "optimizer",
            "other",
            "step, min-max",
            "first step done after s",
            "compiled in s",
        ],
        (_training_row(result, results) for result in of("train")),
    )


def _training_row(result: Result, results: Sequence[Result]) -> list[str]:
    batch = f"{result['micro_batch_size']} x {result['accumulation_steps']}"
    about = [result["name"], result["model"], f"{result['context_length']:,}", batch]
    if "why" in result:
        return [*about, result["why"]]
    tutorial_rate = next(
        (
            other["tokens_per_second"]
            for other in results
            if other["trainer"] == "tutorial"
            and "tokens_per_second" in other
            and (other["model"], other["context_length"]) == (result["model"], result["context_length"])
        ),
        None,
    )
    phases = result["phase_seconds"]
    steps = [1e3 * seconds for seconds in result["step_seconds"]]
    return [
        *about,
        f"{result['tokens_per_second']:,.0f}",
        f"{result['tokens_per_second'] / tutorial_rate:.2f}" if tutorial_rate else "",
        f"{result['mfu']:.1%}" if result["mfu"] is not None else "",
        f"{result['peak_bytes'] / 2**30:.2f}",
        f"{1e3 * result['median_step_seconds']:.1f}",
        *(f"{1e3 * phases[phase]:.1f}" for phase in ("forward", "loss", "backward", "optimizer", "other")),
        f"{min(steps):.1f}-{max(steps):.1f}",
        f"{result['first_step_seconds']:.1f}",
        f"{result['compile_seconds']:.1f}" if "compile_seconds" in result else "",
    ]
