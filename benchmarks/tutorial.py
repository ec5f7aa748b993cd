"""Run the tutorial's recipe exactly as its author would, for comparison with this job.

    python -m benchmarks.tutorial --corpus wiki.json --tokenizer FOLDER [--precision fp32] [--max-steps 5] [...]

The recipe is `load_dataset` → `map` (cut into sequences, keep only full ones) → `Trainer`, with full logits and without
compilation; then it saves the model and continues four prompts. It runs on a CPU and on a GPU without changes. A report
in JSON has the time of each stage.

To time only its training step, on random tokens (this needs only torch, transformers and accelerate):

    model = build_model(vocab_size, TutorialSize())
    clock = StepClock()
    trainer = tutorial_trainer(model, random_sequences(vocab_size, 512, sequences), stand_in_tokenizer(), folder,
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

VALIDATION_FRACTION, SEED = 0.1, 2333
PROMPTS = ("人工智能", "牛顿", "北京市", "亚洲历史")


@dataclass(frozen=True)
class TutorialSize:
    """The tutorial's changes to the configuration of Qwen2-0.5B; the number of key-value heads is unchanged."""

    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    intermediate_size: int = 2048


# ---- Data ----


def load_sequences(corpus: str, tokenizer: PreTrainedTokenizerBase, context_length: int, num_proc: int | None) -> Any:
    """Return the corpus as a `DatasetDict` of ``train`` and ``test`` that has only full sequences.

    The first call prepares it; later calls read it from the cache of `datasets`.
    """
    import datasets

    documents = datasets.load_dataset("json", data_files=corpus, split="train")
    splits = documents.train_test_split(test_size=VALIDATION_FRACTION, seed=SEED)
    return splits.map(
        full_sequences,
        fn_kwargs={"tokenizer": tokenizer, "context_length": context_length},
        batched=True,
        remove_columns=documents.column_names,
        num_proc=num_proc,
    )


def full_sequences(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, context_length: int
) -> dict[str, list[list[int]]]:
    """Cut each article into sequences of `context_length` tokens and drop its last one if it is shorter."""
    cut = tokenizer(
        batch["text"],
        truncation=True,
        max_length=context_length,
        return_overflowing_tokens=True,
        return_length=True,
    )
    lengths_and_sequences = zip(cut["length"], cut["input_ids"], strict=True)
    return {"input_ids": [sequence for length, sequence in lengths_and_sequences if length == context_length]}


def random_sequences(
    vocab_size: int, context_length: int, sequences: int, seed: int = SEED
) -> list[dict[str, list[int]]]:
    """Return sequences of random tokens; token 0 is never among them, as `stand_in_tokenizer` pads with it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab_size, (sequences, context_length), generator=generator)
    return [{"input_ids": sequence} for sequence in tokens.tolist()]


def stand_in_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that has only padding (token 0); the collator needs one to put sequences into a batch."""
    from tokenizers import Tokenizer, models

    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>")


# ---- Model and training ----


def build_model(vocab_size: int, size: TutorialSize, context_length: int = 512) -> Qwen2ForCausalLM:
    """Return the network with random fp32 weights and the embedding tied to the head."""
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
    learning_rate: float = 5e-4,
    warmup_steps: int = 200,
    eval_steps: int = 500,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """Return a `Trainer` with the tutorial's arguments.

    Args:
        train_dataset: A data set or list of rows with ``input_ids`` of shape `[context_length]`.
        tokenizer: The tokenizer that puts the rows into batches.
        eval_dataset: The data set to evaluate every `eval_steps` steps; no evaluation if None.
        precision: ``bf16`` (autocast, as in the tutorial) or ``fp32``.
        max_steps: Number of optimizer steps; -1 trains for 2 epochs.
    """
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=per_device_train_batch_size,
        per_device_eval_batch_size=per_device_eval_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        num_train_epochs=2,
        max_steps=max_steps,
        learning_rate=learning_rate,
        weight_decay=0.1,
        warmup_steps=warmup_steps,
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
    """Callback that records when the first optimizer step began and when each step ended, in seconds since 1970.

    It waits for the GPU before it reads the time.
    """

    def __init__(self) -> None:
        self.first_began: float | None = None
        self.ended: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Record the beginning of the first step; the Trainer calls this."""
        if self.first_began is None:
            self.first_began = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Record the end of a step; the Trainer calls this."""
        self.ended.append(self._now())

    def step_seconds(self) -> list[float]:
        """Return the seconds of each step, collation included, except the first, which is slower than the others."""
        return [after - before for before, after in itertools.pairwise(self.ended)]

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.time()


# ---- The command ----


def main(command_line: Sequence[str] | None = None) -> None:
    """Run the recipe as far as ``--until`` says and print the report."""
    arguments = _parser().parse_args(command_line)
    stages = {"libraries imported": time.time()}
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    splits = load_sequences(arguments.corpus, tokenizer, arguments.context_length, arguments.num_proc)
    stages["sequences cut"] = time.time()
    report: dict[str, Any] = {"sequences": {name: len(split) for name, split in splits.items()}, "stages": stages}
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
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.warmup_steps,
        callbacks=[clock],
    )
    report: dict[str, Any] = {"parameters": model.num_parameters()}
    if arguments.until == "evaluated":  # An untrained model is evaluated as fast as a trained one.
        count = min(arguments.evaluated_sequences or len(splits["test"]), len(splits["test"]))
        validation = splits["test"].select(range(count))
        began = time.perf_counter()
        report["eval_loss"] = trainer.evaluate(validation)["eval_loss"]
        return report | {"evaluated_sequences": len(validation), "evaluate_seconds": time.perf_counter() - began}
    trainer.train()
    report |= {
        "tokens_per_step": arguments.batch * arguments.accumulation * arguments.context_length,
        "first_step_began": clock.first_began,
        "steps_ended": clock.ended,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }
    if arguments.until == "all":
        trainer.save_model(str(arguments.output / "model"))
        generate = cast(Any, pipeline)("text-generation", model=trainer.model, tokenizer=tokenizer)
        report["texts"] = [generate(prompt)[0]["generated_text"] for prompt in PROMPTS]
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="JSON array or JSON lines file of records with the field text")
    parser.add_argument("--tokenizer", required=True, help="Qwen2's tokenizer: a folder or its name on the hub")
    parser.add_argument("--output", type=Path, default=Path("tutorial-output"))
    parser.add_argument(
        "--until", choices=("data", "trained", "evaluated", "all"), default="all", help="stage to stop after"
    )
    parser.add_argument("--num-proc", type=int, help="num_proc of map (default: none, as in the tutorial)")
    parser.add_argument("--context-length", type=int, default=512)
    for field in fields(TutorialSize):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch", type=int, default=32, help="sequences in a forward pass of training")
    parser.add_argument("--eval-batch", type=int, help="sequences in a forward pass of evaluation (default: --batch)")
    parser.add_argument(
        "--evaluated-sequences", type=int, help="sequences to evaluate with --until evaluated (default: all)"
    )
    parser.add_argument("--accumulation", type=int, default=8, help="forward passes in an optimizer step")
    parser.add_argument("--max-steps", type=int, default=-1, help="optimizer steps (default: -1, for 2 epochs)")
    parser.add_argument(
        "--learning-rate", type=float, default=5e-4, help="peak learning rate (default: the tutorial's)"
    )
    parser.add_argument("--warmup-steps", type=int, default=200, help="steps of the warm-up (default: the tutorial's)")
    parser.add_argument("--report", type=Path, help="file to write the printed report to")
    return parser


if __name__ == "__main__":
    main()
