"""Tests of the settings that may be `auto`: strategy, precision, micro-batch and device, by hardware and by record."""

from dataclasses import replace
from typing import Any

import pytest

from job.config import Train
from job.errors import UserError
from job.model.memory import process_memory
from job.model.spec import ModelSpec
from job.runs.attempts import Attempt
from job.runs.choices import Choices, Hardware, choose, largest_micro_batch, precision_without_run

CPU = Hardware("cpu")
H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", (9, 0), 79 * 2**30)
A100 = Hardware("cuda", "NVIDIA A100-SXM4-80GB", (8, 0), 79 * 2**30)
T4 = Hardware("cuda", "Tesla T4", (7, 5), 14 * 2**30)
UNKNOWN_GPU = Hardware("cuda")


def chosen(
    hardware: Hardware, world_size: int = 1, newest: Attempt | None = None, fits: int = 64, **train: Any
) -> Choices:
    return choose(Train(**train), 151_646, world_size, hardware, lambda strategy, precision: fits, newest)


def refusal(hardware: Hardware, world_size: int = 1, newest: Attempt | None = None, **train: Any) -> UserError:
    with pytest.raises(UserError) as raised:
        chosen(hardware, world_size, newest, **train)
    return raised.value


def attempt(choices: dict[str, str] | None = None, recorded: int | None = None, **train: Any) -> Attempt:
    """Return the record of attempt 3 with these settings of training."""
    return Attempt(
        3, "run", "start", None, "host", 1, "2026-01-01T00:00:00+00:00", "auto",
        config={"train": train} if train else None, micro_batch_size=recorded, choices=choices,
    )  # fmt: skip


RECORD = {"strategy": "ddp", "precision": "bf16", "device": "cuda"}


# ---- A new run ----


@pytest.mark.parametrize(
    ("hardware", "world_size", "strategy", "precision", "micro_batch_size"),
    [
        (CPU, 1, "ddp", "bf16", 32),
        (CPU, 2, "zero2", "bf16", 32),
        (H100, 1, "ddp", "bf16", 64),
        (A100, 8, "zero2", "bf16", 32),
        (T4, 1, "ddp", "fp16", 64),
        (T4, 2, "ddp", "fp16", 64),
        (UNKNOWN_GPU, 1, "ddp", "bf16", 64),
    ],
)
def test_auto_depends_on_processes_and_gpu(
    hardware: Hardware, world_size: int, strategy: str, precision: str, micro_batch_size: int
) -> None:
    found = chosen(hardware, world_size)
    assert (found.strategy.value, found.precision.value) == (strategy, precision)
    assert found.cut.micro_batch_size == micro_batch_size
    assert found.strategy.reason and found.precision.reason and found.cut.reason, "each says why"
    assert found.may_shrink == (hardware.device == "cuda")


def test_set_values_hold_without_a_reason() -> None:
    found = chosen(T4, 2, strategy="zero2", precision="fp32", micro_batch_size=8, device="cuda")
    assert [str(choice) for choice in (found.strategy, found.precision, found.device)] == ["zero2", "fp32", "cuda"]
    assert (found.cut.micro_batch_size, found.cut.reason, found.may_shrink) == (8, "", False)


@pytest.mark.parametrize(
    ("hardware", "train", "setting", "words"),
    [
        (T4, {"precision": "bf16"}, "train.precision", ("Tesla T4", "7.5", "8.0", "fp16")),
        (T4, {"precision": "tf32"}, "train.precision", ("Tesla T4", "7.5", "8.0", "fp32")),
        (
            CPU,
            {"precision": "tf32"},
            "train.precision",
            ("the CPU has no tf32, which needs a GPU", "bf16 here", "fp32"),
        ),
        (H100, {"precision": "fp16", "strategy": "zero2"}, "train.strategy", ("fp16", "ddp")),
        (T4, {"strategy": "zero2"}, "train.strategy", ("Tesla T4", "no bf16", "fp16", "ddp", "fp32")),
        (CPU, {"precision": "fp16", "strategy": "zero2"}, "train.strategy", ("fp16", "ddp")),
    ],
)
def test_what_cannot_be_computed_is_refused(
    hardware: Hardware, train: dict[str, str], setting: str, words: tuple[str, ...]
) -> None:
    error = refusal(hardware, **train)
    assert error.setting == setting
    assert all(word in str(error) for word in words), str(error)


def test_command_without_a_run_has_the_precision_of_the_hardware() -> None:
    found = [precision_without_run(Train(), hardware) for hardware in (CPU, A100, T4)]
    assert found == ["bf16", "bf16", "fp16"]
    assert precision_without_run(Train(precision="fp32"), T4) == "fp32"


# ---- A run that is continued ----


def test_record_of_the_run_decides_over_the_hardware() -> None:
    fp16 = RECORD | {"precision": "fp16"}
    found = chosen(H100, 4, attempt(fp16, 16))
    assert [choice.value for choice in (found.strategy, found.precision)] == ["ddp", "fp16"]
    assert (found.cut.micro_batch_size, found.may_shrink) == (16, False)
    assert "attempt 3" in found.precision.reason and "attempt 3" in found.cut.reason
    assert chosen(H100, 1, attempt(RECORD | {"strategy": "zero2"})).strategy.value == "zero2"


def test_bf16_sums_of_an_earlier_run_end_with_its_precision() -> None:
    earlier = attempt(strategy="zero2", precision="bf16")
    assert chosen(CPU, 2, earlier).gradient_sum == "bf16"
    assert chosen(CPU, 2, earlier, precision="fp32").gradient_sum == "fp32"
    assert chosen(A100, 2, attempt(strategy="zero2", precision="tf32")).gradient_sum == "fp32"


@pytest.mark.parametrize("hardware", [CPU, T4], ids=["CPU", "T4"])
def test_run_in_tf32_does_not_go_on_where_there_is_none(hardware: Hardware) -> None:
    in_tf32 = attempt(RECORD | {"precision": "tf32"})
    said = str(refusal(hardware, 1, in_tf32, device=hardware.device))
    assert f"the run has used tf32 so far (as in attempt 3), but {hardware.description} has none" in said
    assert "set train.precision fp32" in said
    assert chosen(hardware, 1, in_tf32, device=hardware.device, precision="fp32").precision.value == "fp32"


def test_settings_of_an_attempt_without_its_record_say_nothing() -> None:
    lost = attempt(strategy="auto", precision="auto", micro_batch_size=8)
    assert chosen(T4, 1, lost).precision.value == "fp16"


def test_set_value_decides_over_the_record() -> None:
    found = chosen(H100, 2, attempt(RECORD, 16), strategy="zero2", precision="fp32", micro_batch_size=8)
    assert [choice.value for choice in (found.strategy, found.precision)] == ["zero2", "fp32"]
    assert found.cut.micro_batch_size == 8


@pytest.mark.parametrize(
    ("hardware", "record", "setting", "words"),
    [
        (T4, RECORD, "train.precision", ("bf16", "attempt 3", "Tesla T4", "set train.precision fp16")),
        (CPU, RECORD, "train.device", ("cuda", "attempt 3", "set train.device cpu")),
        (H100, RECORD | {"device": "cpu"}, "train.device", ("cpu", "attempt 3", "set train.device cuda")),
    ],
)
def test_other_hardware_than_the_records_asks_the_user(
    hardware: Hardware, record: dict[str, str], setting: str, words: tuple[str, ...]
) -> None:
    error = refusal(hardware, newest=attempt(record))
    assert error.setting == setting
    assert all(word in str(error) for word in words), str(error)
    answered = {setting.removeprefix("train."): "fp16" if setting == "train.precision" else hardware.device}
    chosen(hardware, newest=attempt(record), **answered)


@pytest.mark.parametrize(
    ("newest", "strategy", "precision", "micro_batch_size"),
    [
        (attempt(), "zero2", "bf16", 32),
        (attempt(strategy="zero2", precision="bf16", micro_batch_size=4), "zero2", "bf16", 4),
        (attempt(None, 2, strategy="ddp", precision="fp32", micro_batch_size=4), "ddp", "fp32", 2),
    ],
)
def test_run_without_a_record_keeps_the_defaults_of_its_time(
    newest: Attempt, strategy: str, precision: str, micro_batch_size: int
) -> None:
    found = chosen(CPU, 1, newest)
    assert (found.strategy.value, found.precision.value) == (strategy, precision)
    assert found.cut.micro_batch_size == micro_batch_size
    assert chosen(H100, 1, newest).device.value == "cuda", "the device was never recorded"
    assert found.gradient_sum == precision, "as zero2 has summed gradients until then"
    assert chosen(CPU).gradient_sum == chosen(CPU, 1, attempt(RECORD | {"device": "cpu"})).gradient_sum == "fp32"


# ---- The chunk of the loss ----


@pytest.mark.parametrize(
    ("hardware", "tokens"), [(CPU, 256), (UNKNOWN_GPU, 2048), (replace(H100, memory_bytes=79 * 2**30), 8192)]
)
def test_chunk_fits_the_device_until_a_record_or_a_setting_decides(hardware: Hardware, tokens: int) -> None:
    found = chosen(hardware).chunk_tokens
    assert (found.value, bool(found.reason)) == (str(tokens), True)
    recorded = attempt(RECORD | {"device": hardware.device, "loss_chunk_tokens": "512"})
    assert str(chosen(hardware, newest=recorded).chunk_tokens) == "512 (as in attempt 3)"
    assert str(chosen(hardware, newest=recorded, loss_chunk_tokens=64).chunk_tokens) == "64"
    assert chosen(hardware, newest=attempt(RECORD | {"device": hardware.device})).chunk_tokens == found
    assert chosen(hardware).record()["loss_chunk_tokens"] == str(tokens)


def test_chunk_of_another_device_is_not_kept() -> None:
    recorded = attempt(RECORD | {"loss_chunk_tokens": "8192"})
    assert chosen(CPU, newest=recorded, device="cpu").chunk_tokens.value == "256"


# ---- The micro-batch ----


def test_set_micro_batch_keeps_the_size_of_the_last_attempt() -> None:
    found = chosen(CPU, 8, attempt(None, 16, micro_batch_size=32), global_batch_size=256, micro_batch_size=32).cut
    assert (found.gradient_accumulation_steps, found.micro_batch_size) == (2, 16)
    assert found.reason == "as in attempt 3; train.micro_batch_size is 32"


@pytest.mark.parametrize(
    ("world_size", "newest", "micro_batch_size"),
    [
        (8, None, 32),
        (32, attempt(None, 16, micro_batch_size=32), 8),
        (8, attempt(None, 16, micro_batch_size=16), 32),
        (8, attempt(None, None, micro_batch_size=32), 32),
    ],
)
def test_recorded_micro_batch_is_ignored_if_it_no_longer_applies(
    world_size: int, newest: Attempt | None, micro_batch_size: int
) -> None:
    found = chosen(CPU, world_size, newest, global_batch_size=256, micro_batch_size=32)
    assert found.cut.micro_batch_size == micro_batch_size


def test_recorded_micro_batch_becomes_smaller_with_the_share() -> None:
    found = chosen(H100, 8, attempt(RECORD, 64), global_batch_size=256).cut
    assert (found.micro_batch_size, found.reason) == (32, "at most the 64 sequences in attempt 3")


def test_estimate_takes_the_largest_divisor_that_fits() -> None:
    spec, train = ModelSpec(512, 12, 8, 2, 2048), Train(global_batch_size=240)

    def needed(micro_batch_size: int) -> int:
        return process_memory(
            spec, 1000, optimizer="adamw", strategy="ddp", precision="bf16", micro_batch_size=micro_batch_size,
            context_length=512, loss_chunk_tokens=None, world_size=2,
        ).total  # fmt: skip

    def largest(free_bytes: int | None) -> int:
        return largest_micro_batch(train, spec, 1000, 2, replace(H100, free_bytes=free_bytes), "ddp", "bf16")

    assert [largest(needed(size)) for size in (40, 60, 120)] == [40, 60, 120]
    assert largest(needed(60) - 1) == 40, "60, 40 and 30 divide the 120 sequences of a process"
    assert largest(needed(120) * 9) == 120, "no more than the share of a process"
    assert largest(0) == 0
    assert chosen(H100, fits=0).cut.reason == "by the estimate not even one fits into 79 GiB"
    assert largest(None) == 32
