"""The opponent: the tutorial's recipe as its author would run it, neither favoured nor handicapped.

    python -m benchmarks.tutorial --corpus wiki.json --tokenizer FOLDER [--precision fp32] [--max-steps 5] [...]

`load_dataset` → `map` (cut into windows, keep only full ones) → `Trainer`, full logits, nothing compiled; then it saves
the model and continues four prompts. It runs as it is on a CPU and on a GPU. A report in JSON says when what was done.

To time its training step alone, on tokens made up on the spot (torch, transformers and accelerate are enough for that):

    model = build_model(vocab_size, TutorialSize())
    clock = StepClock()
    trainer = tutorial_trainer(model, random_windows(vocab_size, 512, windows), stand_in_tokenizer(), folder,
                               precision="bf16", per_device_train_batch_size=32, gradient_accumulation_steps=8,
                               max_steps=10, callbacks=[clock])
    trainer.train()
    seconds = clock.step_seconds()
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from benchmarks.machine import peak_bytes

HELD_OUT, SEED = 0.1, 2333
PROMPTS = ("人工智能", "牛顿", "北京市", "亚洲历史")


@dataclass(frozen=True)
class TutorialSize:
    """Qwen2-0.5B's configuration, shrunk; the key-value heads are what it leaves of it."""

    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    intermediate_size: int = 2048


# ---- Data ----


def load_windows(corpus: str, tokenizer: PreTrainedTokenizerBase, context_length: int, num_proc: int | None) -> Any:
    """The corpus as a `DatasetDict` of ``train`` and ``test``, full windows alone; made once, then from the cache."""
    import datasets

    documents = datasets.load_dataset("json", data_files=corpus, split="train")
    splits = documents.train_test_split(test_size=HELD_OUT, seed=SEED)
    return splits.map(
        full_windows,
        fn_kwargs={"tokenizer": tokenizer, "context_length": context_length},
        batched=True,
        remove_columns=documents.column_names,
        num_proc=num_proc,
    )


def full_windows(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, context_length: int
) -> dict[str, list[list[int]]]:
    """Every article cut into windows from its start; the last one of each, where it is shorter, is thrown away."""
    cut = tokenizer(
        batch["text"],
        truncation=True,
        max_length=context_length,
        return_overflowing_tokens=True,
        return_length=True,
    )
    lengths_and_windows = zip(cut["length"], cut["input_ids"], strict=True)
    return {"input_ids": [window for length, window in lengths_and_windows if length == context_length]}


def random_windows(vocab_size: int, context_length: int, windows: int, seed: int = SEED) -> list[dict[str, list[int]]]:
    """Windows of random tokens, none of them the padding of `stand_in_tokenizer`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab_size, (windows, context_length), generator=generator)
    return [{"input_ids": window} for window in tokens.tolist()]


def stand_in_tokenizer() -> PreTrainedTokenizerFast:
    """For the collator, which asks a tokenizer to put windows into a batch; it knows its padding, token 0, alone."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


# ---- Model and training ----


def build_model(vocab_size: int, size: TutorialSize, context_length: int = 512) -> Qwen2ForCausalLM:
    """The network with random weights in fp32, its embedding tied to its head."""
    config = Qwen2Config(
        vocab_size=vocab_size,
        max_position_embeddings=context_length,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=None,
        **{field.name: getattr(size, field.name) for field in fields(size)},
    )
    return Qwen2ForCausalLM(config)


def tutorial_trainer(
    model: Qwen2ForCausalLM,
    train_dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path | str,
    *,
    eval_dataset: Any = None,
    precision: str = "bf16",
    per_device_train_batch_size: int = 32,
    per_device_eval_batch_size: int = 32,
    gradient_accumulation_steps: int = 8,
    max_steps: int = -1,
    eval_steps: int = 500,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """The Trainer with the tutorial's arguments.

    Args:
        train_dataset: rows of ``input_ids``, `[context_length]` each: a data set or a list.
        tokenizer: puts them into batches.
        eval_dataset: evaluated whole every `eval_steps` steps; None: there is no evaluation.
        precision: ``bf16`` (autocast, as the tutorial has it) or ``fp32``.
        max_steps: optimizer steps; -1: 2 epochs.
    """
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=per_device_train_batch_size,
        per_device_eval_batch_size=per_device_eval_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        num_train_epochs=2,
        max_steps=max_steps,
        learning_rate=5e-4,
        weight_decay=0.1,
        warmup_steps=200,
        lr_scheduler_type="cosine",
        bf16=precision == "bf16",
        eval_strategy="no" if eval_dataset is None else "steps",
        eval_steps=eval_steps,
        save_steps=500,
        save_total_limit=10,
        logging_steps=50,
        seed=SEED,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


class StepClock(TrainerCallback):
    """When the first optimizer step began, and when each ended: in seconds since 1970, the GPU being done with it."""

    def __init__(self) -> None:
        self.first_began: float | None = None
        self.ended: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer."""
        if self.first_began is None:
            self.first_began = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer."""
        self.ended.append(self._now())

    def step_seconds(self) -> list[float]:
        """How long each step took, with the collation of its batch, but for the first, which is longer than others."""
        return [after - before for before, after in itertools.pairwise(self.ended)]

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.time()


# ---- The whole of it ----


def main(words: Sequence[str] | None = None) -> None:
    """Runs the recipe, or its beginning, and writes the report."""
    arguments = _parser().parse_args(words)
    stages = {"its libraries are imported": time.time()}
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    splits = load_windows(arguments.corpus, tokenizer, arguments.context_length, arguments.num_proc)
    stages["its windows are there"] = time.time()
    report: dict[str, Any] = {"windows": {name: len(split) for name, split in splits.items()}, "stages": stages}
    if arguments.until != "data":
        report |= _train(arguments, tokenizer, splits)
    report |= {"peak_bytes": peak_bytes(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        report["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.report:
        arguments.report.write_text(text + "\n")


def _train(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, splits: Any) -> dict[str, Any]:
    tokenizer.pad_token = tokenizer.eos_token
    size = TutorialSize(**{field.name: getattr(arguments, field.name) for field in fields(TutorialSize)})
    model = build_model(len(tokenizer), size, arguments.context_length)
    clock = StepClock()
    trainer = tutorial_trainer(
        model,
        splits["train"],
        tokenizer,
        arguments.output / "checkpoints",
        eval_dataset=splits["test"] if len(splits["test"]) else None,
        precision=arguments.precision,
        per_device_train_batch_size=arguments.batch,
        per_device_eval_batch_size=arguments.eval_batch or arguments.batch,
        gradient_accumulation_steps=arguments.accumulation,
        max_steps=arguments.max_steps,
        callbacks=[clock],
    )
    report: dict[str, Any] = {"parameters": model.num_parameters()}
    if arguments.until == "evaluated":  # of a model that has learned nothing, which is as fast as any other
        held_out = splits["test"].select(
            range(min(arguments.evaluated_windows or len(splits["test"]), len(splits["test"])))
        )
        began = time.perf_counter()
        report["eval_loss"] = trainer.evaluate(held_out)["eval_loss"]
        return report | {"evaluated_windows": len(held_out), "evaluate_seconds": time.perf_counter() - began}
    trainer.train()
    report |= {
        "tokens_per_step": arguments.batch * arguments.accumulation * arguments.context_length,
        "first_step_began": clock.first_began,
        "steps_ended": clock.ended,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }
    if arguments.until == "all":
        trainer.save_model(str(arguments.output / "model"))
        write = cast(Any, pipeline)("text-generation", model=trainer.model, tokenizer=tokenizer)
        report["texts"] = [write(prompt)[0]["generated_text"] for prompt in PROMPTS]
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="a JSON array or JSON lines, of records with a text")
    parser.add_argument("--tokenizer", required=True, help="Qwen2's: a folder, or a name on the hub")
    parser.add_argument("--output", type=Path, default=Path("tutorial-output"))
    parser.add_argument("--until", choices=("data", "trained", "evaluated", "all"), default="all", help="where it ends")
    parser.add_argument("--num-proc", type=int, help="of map; the tutorial leaves it out")
    parser.add_argument("--context-length", type=int, default=512)
    for field in fields(TutorialSize):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch", type=int, default=32, help="windows of a forward pass")
    parser.add_argument("--eval-batch", type=int, help="the same in evaluation; as --batch where left out")
    parser.add_argument("--evaluated-windows", type=int, help="of `--until evaluated`; all where left out")
    parser.add_argument("--accumulation", type=int, default=8, help="forward passes of an optimizer step")
    parser.add_argument("--max-steps", type=int, default=-1, help="optimizer steps; -1: 2 epochs")
    parser.add_argument("--report", type=Path, help="a file for what is printed at the end")
    return parser


if __name__ == "__main__":
    main()
