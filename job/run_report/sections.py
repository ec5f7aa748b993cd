"""The sections of a report on one or several runs, in the order in which they are read."""

import statistics
from collections.abc import Callable, Iterator, Sequence

from job.data.prepare import describe
from job.model.flops import parameter_counts
from job.model.spec import ModelSpec
from job.run_report.blocks import Block, Cards, Chart, Note, Section, Table
from job.run_report.curves import attempts_charts, learning_charts, speed_charts
from job.run_report.outcomes import outcome
from job.run_report.preset import origin_of
from job.run_report.public import public_facts, unpublished_inputs
from job.run_report.run_facts import AttemptSpan, RunFacts
from job.run_report.setting_sections import reproduction_blocks, settings_blocks
from job.run_report.tables import by_run, cut, ends, heading, note_of_ends, spread
from job.run_report.translations import translated
from job.run_report.wording import NO_VALUE, Both, Text, count, decimal, duration, moment, percent, phrase

_MOST_EVALUATIONS = 12
"""Evaluations of a run that the table of validation shows, spread over its steps."""
_MOST_ATTEMPTS = 40
"""Attempts of a run that the table shows: the first ones and the last ones."""
_MOST_SAMPLES = 6
"""Texts of a prompt that stand side by side, of all runs together."""
_MOST_PROMPTS = 6
_MOST_CHARACTERS = 400
"""Characters of a sample that are shown."""
_LONGEST_CAUSE = 300


def sections_of(runs: Sequence[RunFacts], *, is_public: bool = False) -> list[Section]:
    """Return all sections of the report on `runs`; those for the public leave out charts, machines and places."""
    names = run_names(runs)
    unpublished = [unpublished_inputs(run) if is_public else [] for run in runs]
    runs = [public_facts(run) for run in runs] if is_public else runs
    origins = [origin_of(run.config) for run in runs]

    def charts(draw: Callable[[Sequence[RunFacts]], list[Chart]]) -> list[Chart]:
        return [] if is_public else draw(runs)  # Only Markdown is written for the public, and it shows no charts.

    learnt = [*charts(learning_charts), *_evaluations(runs, names)]
    attempts = [*charts(attempts_charts), *_attempts(runs, names, is_public=is_public)]
    return [
        Section("numbers", Both("In numbers", "主要数字"), [_numbers(runs, names), *_missing(runs, names)]),
        Section("learning", Both("What it has learnt", "学到了什么"), learnt),
        Section("speed", Both("Speed and stalls", "速度与停顿"), charts(speed_charts)),
        Section("attempts", Both("Attempts", "各次启动"), attempts),
        Section("samples", Both("Samples over time", "各阶段的样本"), list(_samples(runs, names))),
        Section("data", Both("Corpus and tokenizer", "语料与分词器"), [_data(runs, names)]),
        Section("settings", Both("Settings", "设置"), list(settings_blocks(runs, names, origins))),
        Section("versions", Both("Versions and hardware", "版本与硬件"), [_versions(runs, names)]),
        Section(
            "again",
            Both("How to reproduce it", "如何复现"),
            list(reproduction_blocks(runs, names, origins, unpublished)),
        ),
    ]


def run_names(runs: Sequence[RunFacts]) -> list[str]:
    """Return a name for each run: its own, with its id if two have the same name."""
    names = [run.record.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({run.record.id})" for name, run in zip(names, runs, strict=True)
    ]


# ---- Numbers ----


def _numbers(runs: Sequence[RunFacts], names: Sequence[str]) -> Table:
    def metric(name: str, write: Callable[[float | None], Text]) -> list[Text]:
        return [write(run.last(name)) for run in runs]

    def middle(name: str, write: Callable[[float | None], Text]) -> list[Text]:
        return [write(statistics.median(run.values(name)) if run.values(name) else None) for run in runs]

    def mean(name: str) -> list[Text]:
        return [percent(statistics.fmean(run.values(name)) if run.values(name) else None) for run in runs]

    hours = [sum(span.seconds for span in run.attempts) or None for run in runs]
    rows: list[tuple[Text, list[Text]]] = [
        (Both("state", "状态"), [_state(run) for run in runs]),
        (Both("parameters", "参数量"), [_parameters(run) for run in runs]),
        (Both("optimizer steps", "优化器步数"), [count(run.steps) for run in runs]),
        (Both("tokens seen", "已训练的 token 数"), [count(run.tokens_seen) for run in runs]),
        (Both("epochs", "epoch"), metric("train/epoch", lambda value: decimal(value, 2))),
        (Both("training loss, nats per token", "训练 loss（nats/token）"), metric("train/loss", decimal)),
        (Both("validation loss, nats per token", "验证 loss（nats/token）"), metric("validation/loss", decimal)),
        (Both("validation bits per byte", "验证集 bits per byte"), metric("validation/bits_per_byte", decimal)),
        (Both("validation bits per character", "验证集每字符比特"), metric("validation/bits_per_character", decimal)),
        (
            Both("time of all attempts, after loading the program", "各次启动的总时间（不含程序加载）"),
            [duration(seconds) for seconds in hours],
        ),
        (Both("tokens per second, median", "每秒 token 数（中位数）"), middle("speed/tokens_per_second", count)),
        (Both("MFU, median", "MFU（中位数）"), middle("speed/mfu", percent)),
        (Both("waiting for data, mean", "等待数据（平均）"), mean("speed/data_wait")),
        (Both("standing still for checkpoints, mean", "为 checkpoint 停顿（平均）"), mean("speed/stall")),
        (
            Both("peak memory of a process, GiB", "单进程内存峰值（GiB）"),
            metric("memory/peak_gib", lambda value: decimal(value, 2)),
        ),
        (Both("skipped steps", "跳过的步数"), metric("train/skipped_steps", count)),
        (Both("attempts", "启动次数"), [count(len(run.attempts)) for run in runs]),
        (Both("checkpoints kept, by step", "保留的 checkpoint（步）"), [_saved(run) for run in runs]),
    ]
    return by_run(names, rows)


def _state(run: RunFacts) -> Text:
    if not run.attempts:
        return Both("unknown: there is no record of an attempt that can be read", "未知：没有可读的启动记录")
    return outcome(run.attempts[-1].record.ended, is_newest=True).words


def _parameters(run: RunFacts) -> Text:
    try:
        spec = ModelSpec(**run.config["model"])
        return count(parameter_counts(spec, run.manifest.vocab_size).total) if run.manifest else NO_VALUE
    except (KeyError, TypeError, ValueError):
        return NO_VALUE  # A record of a version with other settings of the model.


def _saved(run: RunFacts) -> Text:
    last = ", ".join(map(count, run.saved_steps[-4:])) or NO_VALUE
    return last if len(run.saved_steps) <= 4 else f"…, {last}"


def _missing(runs: Sequence[RunFacts], names: Sequence[str]) -> Iterator[Note]:
    for run, name in zip(runs, names, strict=True):
        for sentence in run.missing:
            yield Note(sentence if len(runs) == 1 else phrase("{name}: {it}", "{name}：{it}", name=name, it=sentence))


def _evaluations(runs: Sequence[RunFacts], names: Sequence[str]) -> Iterator[Block]:
    header = [
        Both("step", "步"),
        Both("tokens", "token 数"),
        Both("hours", "小时"),
        Both("loss", "loss"),
        Both("bits per byte", "bits per byte"),
    ]
    for run, name in zip(runs, names, strict=True):
        tokens = run.tokens
        evaluated = [row for row in run.rows if run.value(row, "validation/loss") is not None]
        rows: list[list[Text]] = [
            [
                count(row["step"]),
                count(tokens[row["step"]]),
                decimal(run.hours(row), 2),
                decimal(run.value(row, "validation/loss")),
                decimal(run.value(row, "validation/bits_per_byte")),
            ]
            for row in spread(evaluated, _MOST_EVALUATIONS)
        ]
        if rows:
            yield from heading(runs, name)
            yield Table(header, rows)


# ---- Attempts ----


def _attempts(runs: Sequence[RunFacts], names: Sequence[str], *, is_public: bool) -> Iterator[Block]:
    header = [
        Both("attempt", "启动"),
        Both("began (UTC)", "开始（UTC）"),
        Both("time", "时长"),
        Both("from step", "起始步"),
        Both("how it ended", "如何结束"),
        *([] if is_public else [Both("machine", "机器")]),
    ]
    for run, name in zip(runs, names, strict=True):
        yield from heading(runs, name)
        spans = run.attempts
        yield from note_of_ends(
            "The first and the last of {all} attempts; {hidden} are left out.",
            "共 {all} 次启动，仅列出最初和最后的，略去 {hidden} 次。",
            len(spans),
            _MOST_ATTEMPTS,
        )
        newest = run.attempts[-1].record.number if run.attempts else 0
        yield Table(
            header,
            [
                [
                    str(span.record.number),
                    moment(span.began).removesuffix("Z"),
                    duration(span.seconds or None),
                    count(span.record.from_step),
                    _cause(span, is_newest=span.record.number == newest),
                    *([] if is_public else [span.record.host]),
                ]
                for span in ends(spans, _MOST_ATTEMPTS)
            ],
        )


def _cause(span: AttemptSpan, *, is_newest: bool) -> Text:
    record = span.record
    what = outcome(record.ended, is_newest=is_newest).words
    why = record.error or record.stop_reason
    if not why:
        return what
    lines = [line for line in why.splitlines() if line.strip()]
    short = lines[-1].strip()[:_LONGEST_CAUSE] if lines else ""
    return phrase("{what}: {why}", "{what}：{why}", what=what, why=translated(short))


# ---- Samples ----


def _samples(runs: Sequence[RunFacts], names: Sequence[str]) -> Iterator[Block]:
    prompts = dict.fromkeys(prompt for run in runs for _, texts in run.samples for prompt in texts)
    if not prompts:
        yield Note(Both("There are no samples.", "没有样本。"))
    for prompt in list(prompts)[:_MOST_PROMPTS]:
        cards: list[tuple[Text, str]] = []
        for run, name in zip(runs, names, strict=True):
            texts = [(step, texts[prompt]) for step, texts in run.samples if prompt in texts]
            for step, text in spread(texts, max(1, _MOST_SAMPLES // len(runs))):
                label = phrase("step {step}", "第 {step} 步", step=count(step))
                if len(runs) > 1:
                    label = phrase("{name}, {label}", "{name}，{label}", name=name, label=label)
                cards.append((label, cut(text, _MOST_CHARACTERS)))
        yield Cards(cut(prompt, _MOST_CHARACTERS), cards)


# ---- Data, settings, versions ----


def _data(runs: Sequence[RunFacts], names: Sequence[str]) -> Table:
    columns = [dict(describe(run.manifest)) if run.manifest else {} for run in runs]
    rows: list[tuple[Text, list[Text]]] = [
        (Both("corpus", "语料"), [str(run.section("data").get("source", NO_VALUE)) for run in runs]),
        (Both("tokenizer", "分词器"), [str(run.section("tokenizer").get("source", NO_VALUE)) for run in runs]),
        (Both("vocabulary", "词表大小"), [count(run.manifest.vocab_size if run.manifest else None) for run in runs]),
    ]
    in_chinese = {
        "documents": "文档数",
        "empty, left out": "其中空文档（略过）",
        "bad, left out": "其中坏记录（略过）",
        "train / validation": "训练 / 验证",
        "UTF-8 bytes of text": "文本的 UTF-8 字节数",
        "characters": "字符数",
        "tokens": "token 数",
        "tokens per character": "每字符 token 数",
        "bytes per token": "每 token 字节数",
        "shards": "分片数",
        "tokens dropped": "丢弃的 token 数",
        "documents changed by the tokenizer's normalizer": "被分词器规范化改动的文档数",
    }
    for name in dict.fromkeys(name for column in columns for name in column):
        label = Both(name.strip(), in_chinese.get(name.strip(), name.strip()))
        rows.append((label, [column.get(name, NO_VALUE) for column in columns]))
    return by_run(names, rows)


def _versions(runs: Sequence[RunFacts], names: Sequence[str]) -> Table:
    environments = [
        next((span.record.environment for span in reversed(run.attempts) if span.record.environment), {})
        for run in runs
    ]
    labels = {
        "hardware": Both("hardware", "硬件"),
        "system": Both("system", "系统"),
        "wikillm": Both("WikiLLM", "WikiLLM"),
    }
    choices = [run.attempts[-1].record.choices or {} if run.attempts else {} for run in runs]
    rows: list[tuple[Text, list[Text]]] = [
        (Both("created", "创建时间"), [run.record.created for run in runs]),
        (Both("run id", "运行 id"), [run.record.id for run in runs]),
        (Both("WikiLLM at the first attempt", "首次启动时的 WikiLLM"), [run.record.code_version for run in runs]),
    ]
    for name in dict.fromkeys(name for environment in environments for name in environment):
        values = [translated(environment.get(name, NO_VALUE)) for environment in environments]
        rows.append((labels.get(name, name), values))
    for name in dict.fromkeys(name for chosen in choices for name in chosen):
        rows.append((f"train.{name}", [chosen.get(name, NO_VALUE) for chosen in choices]))
    return by_run(names, rows)
