"""The plan: what the run computes, and hours and price on GPUs that one may rent."""

from rich.console import Console
from rich.table import Table

from job.config import Config
from job.model.flops import peak_flops
from job.preflight.capacity import Shape, needed_bytes
from job.preflight.existing_run import Earlier
from job.preflight.target import Target
from job.preflight.workload import GPUS, PRICES_AS_OF, TYPICAL_MFU, Gpu, Workload


def show_plan(
    console: Console,
    config: Config,
    shape: Shape,
    work: Workload,
    target: Target,
    earlier: Earlier,
    mfu: float | None,
    price_per_gpu_hour: float | None,
) -> None:
    """Prints it: first what is certain, then what follows from assumptions, which are named."""
    parameters, gpus = shape.parameters, target.world_size
    needed = needed_bytes(config, shape, gpus, config.train.micro_batch_size)
    facts = (
        ("parameters", f"{parameters.total:,}, of which {parameters.embedding:,} embedding"),
        ("FLOPs per token", f"{work.flops_per_token / 1e6:,.1f} M forward and backward"),
        ("training", f"{work.steps:,} steps, {work.tokens:,} tokens, {work.epochs:.2f} epochs"),
        ("evaluation", f"{work.evaluated_tokens:,} tokens, {work.evaluation_share:.0%} of the FLOPs"),
        ("a checkpoint", f"{shape.checkpoint_bytes / 1e9:,.2f} GB, {config.checkpoint.keep} of them are kept"),
        ("GPU memory", f"about {needed / 2**30:.1f} GiB each"),
        *([("done already", f"{earlier.step:,} steps")] if earlier.step else []),
    )
    table = Table(title="\nthe run", title_justify="left", box=None, pad_edge=False, show_header=False)
    for name, value in facts:
        table.add_row(name, value)
    console.print(table)

    left, assumed = max(0.0, 1 - earlier.step / work.steps), mfu or TYPICAL_MFU
    where = f"{target.nodes} x {target.processes} processes" if gpus > 1 else "one process"
    table = Table(title=f"\nwhat is left of it, on {where}", title_justify="left", box=None, pad_edge=False)
    for name in ("GPU", "MFU", "tokens/s", "hours", "$/GPU-hour", "price", "memory"):
        table.add_column(name, justify="left" if name == "GPU" else "right")
    if earlier.tokens_per_second is not None:
        hours = left * work.flops / work.flops_per_token / earlier.tokens_per_second / 3600
        table.add_row("as this run was measured", "", f"{earlier.tokens_per_second:,.0f}", f"{hours:,.2f}", "", "", "")
    known = {gpu.cuda_name: gpu for gpu in GPUS}
    here = known.pop(target.gpu_name, None) or Gpu(target.gpu_name, target.gpu_name, target.gpu_memory_bytes or 0, None)
    for gpu in (here, *known.values()):
        if (peak := peak_flops(gpu.cuda_name)) is None:
            continue
        hours = left * work.hours(peak, assumed, gpus)
        price = gpu.dollars_per_hour if price_per_gpu_hour is None else price_per_gpu_hour
        table.add_row(
            f"{gpu.name} (this machine)" if gpu is here else gpu.name,
            f"{assumed:.0%}",
            f"{peak * assumed * gpus / work.flops_per_token:,.0f}",
            f"{hours:,.2f}",
            "" if price is None else f"{price:.2f}",
            "" if price is None else f"${hours * gpus * price:,.2f}",
            "fits" if needed <= gpu.memory_bytes else "too small",
        )
    console.print(table)
    rate = "--mfu" if mfu else "an assumption, the tutorial's was 11%; --mfu sets another"
    price_said = (
        "--price" if price_per_gpu_hour is not None else (f"{PRICES_AS_OF}, an assumption; --price sets another")
    )
    console.print(f"MFU: {rate}. Price: {price_said}.")
    if config.train.precision != "bf16":
        console.print(
            f"train.precision is {config.train.precision}, these are hours in bf16: expect several times as many."
        )
