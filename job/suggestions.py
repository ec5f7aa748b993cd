"""Suggests the setting that a user probably meant by an unknown name.

Users of transformers' Trainer, nanoGPT and Megatron know many settings by other names. A table maps these names to our
settings, and says so if our setting has another unit. A second table explains why some settings do not exist here.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import TypeVar

from job.errors import UserError

Entry = TypeVar("Entry")

_PRECISION = "train.precision, which is auto, bf16, fp16, tf32 or fp32"
_SHAPE_OF_BATCH = "train.micro_batch_size (one forward pass) or train.global_batch_size (one optimizer step)"
_WHOLE_BATCH = "train.global_batch_size, which is train.micro_batch_size x processes x gradient accumulation steps"
_SHARE_OF_STEPS = "train.warmup_steps, which counts steps: this is a share of them"
_OPTIMIZER = "train.optimizer, which is adamw or muon"
_SCHEDULE = "train.schedule, which is cosine, linear or wsd"
_SEEDS = "train.seed (initial weights) or data.seed (split and order)"
_CORPUS = "data.source (documents) or data.shards (what `prepare` has made of them)"
_LAYERS, _HEADS, _WIDTH = "model.num_hidden_layers", "model.num_attention_heads", "model.hidden_size"
_CONTEXT, _STEPS, _OUTPUT, _RESUME = "train.context_length", "train.max_steps", "run.output", "train.resume"
_SAVE, _EVALUATE, _LOG, _CLIPPING = "checkpoint.every", "evaluate.every", "train.log_every", "train.gradient_clipping"
_STRATEGY, _TRACKING, _TOKENIZER = "train.strategy, which is auto, zero2 or ddp", "tracking.mode", "tokenizer.source"
_ARCHITECTURE = "model.architecture, which is qwen2 (with biases) or qwen3 (with QK-norm and without biases)"
_TIME, _DEVICE = "train.max_time, such as 3h50m", "train.device, which is auto, cuda or cpu"

FAMILIAR = {
    # Names of transformers' Trainer, and of many training scripts.
    "seq_len": _CONTEXT, "max_seq_len": _CONTEXT, "max_seq_length": _CONTEXT, "max_length": _CONTEXT,
    "sequence_length": _CONTEXT, "context": _CONTEXT, "context_size": _CONTEXT, "window": _CONTEXT, "n_ctx": _CONTEXT,
    "batch_size": _SHAPE_OF_BATCH, "bs": _SHAPE_OF_BATCH, "train_batch_size": _SHAPE_OF_BATCH,
    "per_device_train_batch_size": "train.micro_batch_size", "per_gpu_train_batch_size": "train.micro_batch_size",
    "per_device_eval_batch_size": "evaluate.batch_size", "eval_batch_size": "evaluate.batch_size",
    "gradient_accumulation_steps": _WHOLE_BATCH, "grad_accum": _WHOLE_BATCH,
    "num_train_epochs": "train.epochs", "num_epochs": "train.epochs", "n_epochs": "train.epochs",
    "lr": "train.learning_rate", "peak_lr": "train.learning_rate", "max_lr": "train.learning_rate",
    "lr_scheduler_type": _SCHEDULE, "lr_scheduler": _SCHEDULE, "scheduler": _SCHEDULE,
    "decay_lr": _SCHEDULE, "lr_decay_style": _SCHEDULE, "num_decay_steps": "train.decay_steps",
    "warmup": "train.warmup_steps", "num_warmup_steps": "train.warmup_steps", "warmup_ratio": _SHARE_OF_STEPS,
    "optim": _OPTIMIZER, "optimizer": _OPTIMIZER, "muon_lr": "train.muon_learning_rate",
    "matrix_lr": "train.muon_learning_rate",
    "wd": "train.weight_decay", "max_grad_norm": _CLIPPING, "clip": _CLIPPING, "gradient_clip_val": _CLIPPING,
    "adam_beta1": "train.beta1", "adam_beta2": "train.beta2", "adam_epsilon": "train.epsilon", "eps": "train.epsilon",
    "fp16": _PRECISION, "bf16": _PRECISION, "tf32": _PRECISION, "mixed_precision": _PRECISION,
    "amp": _PRECISION, "torch_dtype": _PRECISION, "dtype": _PRECISION, "half": _PRECISION,
    "save_steps": _SAVE, "save_strategy": _SAVE, "save_freq": _SAVE, "checkpointing_steps": _SAVE,
    "save_total_limit": "checkpoint.keep", "eval_steps": _EVALUATE, "evaluation_strategy": _EVALUATE,
    "eval_strategy": _EVALUATE, "eval_every": _EVALUATE, "logging_steps": _LOG, "log_interval": _LOG, "log_freq": _LOG,
    "output_dir": _OUTPUT, "save_dir": _OUTPUT, "logging_dir": "tracking.log_dir", "run_name": "run.name",
    "report_to": "tracking.to", "resume_from_checkpoint": _RESUME, "resume_from": _RESUME, "ckpt_path": _RESUME,
    "deepspeed": _STRATEGY, "fsdp": _STRATEGY, "zero_stage": _STRATEGY, "torch_compile": "train.compile",
    "device": _DEVICE, "gpu": _DEVICE, "gpus": _DEVICE, "cuda": _DEVICE, "use_cuda": _DEVICE, "no_cuda": _DEVICE,
    "use_cpu": _DEVICE, "device_map": _DEVICE,
    "num_gpus": "train.processes", "n_gpu": "train.processes", "nproc_per_node": "train.processes",
    "dataloader_num_workers": "data.loader_workers, which are threads", "num_workers": "data.loader_workers, threads",
    "num_proc": "data.processes", "preprocessing_num_workers": "data.processes", "dataset_name": "data.source",
    "dataset": _CORPUS, "data.path": _CORPUS, "data_path": _CORPUS, "data_dir": _CORPUS, "path": _CORPUS,
    "train_file": "data.source", "text_column": "data.text_field", "content_field": "data.text_field",
    "tokenizer_name": _TOKENIZER, "tokenizer_path": _TOKENIZER, "tokenizer_name_or_path": _TOKENIZER,
    "val_split": "data.validation_fraction", "test_size": "data.validation_fraction",
    "validation_split_percentage": "data.validation_fraction, which is a share from 0 to 1",
    "seed": _SEEDS, "data_seed": "data.seed", "max_tokens": "generate.max_new_tokens",
    "num_return_sequences": "generate.samples", "num_samples": "generate.samples",
    "model_name_or_path": "generate.model, evaluate.model or tokenizer.source",
    # Names of nanoGPT.
    "block_size": _CONTEXT, "n_layer": _LAYERS, "n_layers": _LAYERS, "n_head": _HEADS, "n_heads": _HEADS,
    "n_kv_heads": "model.num_key_value_heads", "n_embd": _WIDTH, "d_model": _WIDTH, "dim": _WIDTH, "max_iters": _STEPS,
    "lr_decay_iters": f"{_STEPS}: the schedule ends with the run", "warmup_iters": "train.warmup_steps",
    "min_lr": "train.min_learning_rate", "grad_clip": _CLIPPING, "eval_interval": _EVALUATE, "out_dir": _OUTPUT,
    "eval_iters": "evaluate.max_windows, which counts sequences, not batches", "init_from": _RESUME,
    "always_save_checkpoint": _SAVE, "wandb_log": _TRACKING, "wandb_project": "tracking.project",
    "wandb_run_name": "run.name",
    # Names of Megatron.
    "seq_length": _CONTEXT, "max_position_embeddings": _CONTEXT, "num_layers": _LAYERS,
    "num_query_groups": "model.num_key_value_heads", "ffn_hidden_size": "model.intermediate_size",
    "train_iters": _STEPS, "lr_wsd_decay_iters": "train.decay_steps",
    "train_samples": f"{_STEPS}, which counts optimizer steps", "lr_warmup_iters": "train.warmup_steps",
    "lr_warmup_fraction": _SHARE_OF_STEPS, "clip_grad": _CLIPPING, "save": _OUTPUT, "load": _RESUME,
    "save_interval": _SAVE, "exit_duration_in_mins": _TIME, "max_train_time": _TIME, "time_limit": _TIME,
    "split": "data.validation_fraction", "tokenizer_model": _TOKENIZER, "vocab_file": _TOKENIZER,
    "norm_epsilon": "model.rms_norm_eps", "layer_norm_eps": "model.rms_norm_eps", "rotary_base": "model.rope_theta",
    "init_method_std": "model.initializer_range", "init_std": "model.initializer_range",
    "untie_embeddings_and_output_weights": "model.tie_word_embeddings, which says the opposite",
    "bias": _ARCHITECTURE, "disable_bias_linear": _ARCHITECTURE, "qk_norm": _ARCHITECTURE,
    "qk_layernorm": _ARCHITECTURE, "use_distributed_optimizer": _STRATEGY,
    "reset_attention_mask": "train.document_masking",
}  # fmt: skip
"""Our setting, and how it differs, for each name that another program uses."""

NOT_A_SETTING = {
    **dict.fromkeys(
        ("backend", "local_rank", "world_size", "master_port", "ddp_backend"),
        "there is no such setting: the processes find each other alone, or through torchrun, Slurm or Kubernetes",
    ),
    **dict.fromkeys(
        ("dropout", "attention_dropout", "hidden_dropout", "activation", "hidden_act"),
        "there is no such setting: the architectures are those of Qwen2 and Qwen3, with SwiGLU and without dropout",
    ),
    **dict.fromkeys(
        ("tensor_model_parallel_size", "pipeline_model_parallel_size", "tp", "pp", "context_parallel_size"),
        "there is no such setting: each process holds the whole model",
    ),
    **dict.fromkeys(
        ("gradient_checkpointing", "recompute_activations", "activation_checkpointing"),
        "there is no such setting: a smaller train.micro_batch_size takes less memory",
    ),
    **dict.fromkeys(
        ("overwrite_output_dir", "do_train", "do_eval", "do_predict", "push_to_hub"),
        "there is no such setting: the first word of the command line is the command, see --help",
    ),
}  # fmt: skip
"""The reason why a setting of another program does not exist here, by its name."""

_COMMANDS = {
    **dict.fromkeys(("export", "convert", "save"), "`train` writes the model to final/ in run.output"),
    **dict.fromkeys(("resume", "continue", "restart"), "`train` again: it continues the run in run.output"),
    **dict.fromkeys(("pretrain", "run", "start"), "did you mean train?"),
    **dict.fromkeys(("chat", "infer", "inference", "predict", "sample", "complete"), "did you mean generate?"),
    **dict.fromkeys(("preprocess", "tokenize", "data", "dataset", "shard"), "did you mean prepare?"),
    **dict.fromkeys(("validate", "test", "eval", "perplexity", "ppl"), "did you mean evaluate?"),
    **dict.fromkeys(("plan", "doctor", "estimate", "dry-run"), "did you mean check?"),
    **dict.fromkeys(("plot", "curves", "compare", "summary"), "did you mean report?"),
}
"""What to type for a command that does not exist here, by its name."""
_LEAST_LIKENESS = 0.65


def command_hint(name: str, known: Collection[str]) -> str:
    """Return what to type for the unknown command `name`."""
    if name.lower() in _COMMANDS:
        return _COMMANDS[name.lower()]
    similar = difflib.get_close_matches(name.lower(), known, n=1)
    return f"did you mean {similar[0]}?" if similar else f"commands are {', '.join(known)}"


def hint(name: str, known: Collection[str]) -> str:
    """Return what to do about the unknown setting `name`; empty if no setting has a similar name."""
    full = name.lower().replace("-", "_")
    section, _, key = full.rpartition(".")
    if full in known:
        return f"did you mean {full}?"
    for other in (full, key):
        if other in FAMILIAR:
            return f"did you mean {FAMILIAR[other]}?"
        if other in NOT_A_SETTING:
            return NOT_A_SETTING[other]
    best = max(known, key=lambda known_name: _likeness(section, key, known_name))
    return f"did you mean {best}?" if _likeness(section, key, best) >= _LEAST_LIKENESS else ""


def find_entry(setting: str, name: str, table: Mapping[str, Entry]) -> Entry:
    """Return the entry of a table, by the name that a setting gives.

    Args:
        setting: the dotted name of the setting.
        name: its value.
        table: what can be chosen, by name.

    Raises:
        UserError: the table has no such name; it lists the names and, if one is similar, suggests it.
    """
    if name in table:
        return table[name]
    similar = difflib.get_close_matches(name.lower(), table, n=1)
    raise UserError(
        setting, name, f"expected one of {', '.join(table)}", f"did you mean {similar[0]}?" if similar else ""
    )


def _likeness(section: str, key: str, known: str) -> float:
    """Return how similar the setting `known` is to a section and key, from 0 to 1. The key counts most."""
    known_section, _, known_key = known.partition(".")
    initials = "".join(word[0] for word in known_key.split("_"))
    same_key = 1.0 if key == initials else difflib.SequenceMatcher(None, key, known_key).ratio()
    same_section = difflib.SequenceMatcher(None, section, known_section).ratio() if section else same_key
    return 0.7 * same_key + 0.3 * same_section
