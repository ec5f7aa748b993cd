"""The sections of a report on the settings of its runs, and on the commands that train them again."""

from collections.abc import Iterator, Sequence

from job.run_report.blocks import Block, Code, Note, Table
from job.run_report.preset import Origin, reproduction
from job.run_report.run_facts import RunFacts
from job.run_report.tables import by_run, cut, ends, heading, note_of_ends
from job.run_report.wording import NO_VALUE, Both, Text, count, phrase
from job.runs.setting_changes import shown

_DECIDING = ("data.", "model.", "tokenizer.", "train.")
"""Sections whose settings may change what is computed."""
_MOST_SETTINGS = 60
"""Rows of a table of settings."""
_MOST_CHANGES = 40
"""Changes between the attempts of a run that are listed: the first ones and the last ones."""
_MOST_CHARACTERS = 400
"""Characters of a value that are shown."""


def settings_blocks(runs: Sequence[RunFacts], names: Sequence[str], origins: Sequence[Origin]) -> Iterator[Block]:
    """Yield how the settings of each run differ from a preset, from those of its earlier attempts, and of other runs.

    Args:
        runs: the runs.
        names: name of each run.
        origins: the preset that each run is nearest to.
    """
    for run, name, origin in zip(runs, names, origins, strict=True):
        yield from heading(runs, name)
        if origin.preset:
            text = phrase(
                "Settings that differ from the nearest preset, {preset}:",
                "与最接近的预设 {preset} 不同的设置：",
                preset=origin.preset,
            )
        else:
            text = Both("Settings that differ from the defaults:", "与默认值不同的设置：")
        yield Note(text)
        header = [Both("setting", "设置"), Both("preset", "预设"), Both("this run", "本次运行")]
        rows = [[change.name, _value(change.before), _value(change.now)] for change in origin.differences]
        yield Table(header, rows[:_MOST_SETTINGS])
        yield from _left_out(len(rows))
        yield from _changes(run)
    if len(runs) > 1:
        yield Note(Both("Settings that differ between these runs:", "这些运行之间不同的设置："))
        different = list(_different(runs))
        yield by_run(names, different[:_MOST_SETTINGS])
        yield from _left_out(len(different))


def reproduction_blocks(
    runs: Sequence[RunFacts], names: Sequence[str], origins: Sequence[Origin], unpublished: Sequence[Sequence[str]]
) -> Iterator[Block]:
    """Yield the commands that train each run again.

    Args:
        runs: the runs.
        names: name of each run.
        origins: the preset that each run is nearest to.
        unpublished: of each run, the settings that the commands lack because their values are not published.
    """
    yield Note(
        Both(
            "With the same code, data set and number of processes. Set data.source, data.shards and run.output to your "
            "own places.",
            "使用相同的代码、数据集和进程数；把 data.source、data.shards 和 run.output 换成你自己的位置。",
        )
    )
    for run, name, origin, lacking in zip(runs, names, origins, unpublished, strict=True):
        yield from heading(runs, name)
        if lacking:
            yield Note(
                phrase(
                    "The commands do not name what only this run had, so add your own: {english}.",
                    "命令里没有写出只有该运行才有的内容，请补上你自己的：{chinese}。",
                    english=", ".join(f"--{setting}" for setting in lacking),
                    chinese="、".join(f"--{setting}" for setting in lacking),
                )
            )
        if any(name.startswith(_DECIDING) for span in run.attempts[1:] for name in span.record.changed or {}):
            yield Note(
                Both(
                    "The settings of this run were changed between its attempts. The command has the last ones from "
                    "its first step on, so its numbers may differ.",
                    "该运行的设置在各次启动之间改过。这条命令从第一步起就使用最后的设置，因此数字可能不同。",
                )
            )
        revision = run.record.code_version.partition("+")[2].removesuffix("-dirty")
        lines = [*([f"git checkout {revision}"] if revision else [])]
        yield Code("\n".join([*lines, *reproduction(origin)]))


def _changes(run: RunFacts) -> Iterator[Note]:
    """Yield the changes of the settings between the attempts of a run."""
    changes = [
        (span.record.number, setting, values)
        for span in run.attempts[1:]
        for setting, values in (span.record.changed or {}).items()
        if len(values) == 2  # The value before and the one since then; anything else is damaged.
    ]
    yield from note_of_ends(
        "The first and the last of {all} changes between attempts; {hidden} are left out.",
        "各次启动之间共有 {all} 处改动，仅列出最初和最后的，略去 {hidden} 处。",
        len(changes),
        _MOST_CHANGES,
    )
    for number, setting, (before, now) in ends(changes, _MOST_CHANGES):
        yield Note(
            phrase(
                "Changed at attempt {number}: {setting}: {before} → {now}",
                "第 {number} 次启动时改动：{setting}：{before} → {now}",
                number=str(number),
                setting=setting,
                before=_value(before),
                now=_value(now),
            )
        )


def _different(runs: Sequence[RunFacts]) -> Iterator[tuple[Text, list[Text]]]:
    sections = dict.fromkeys(section for run in runs for section in run.config)
    for section in sections:
        for key in dict.fromkeys(key for run in runs for key in run.section(section)):
            values = [run.section(section) for run in runs]
            found = [_value(value[key]) if key in value else NO_VALUE for value in values]
            if len(set(found)) > 1:
                yield f"{section}.{key}", list(found)


def _left_out(rows: int) -> list[Note]:
    if rows <= _MOST_SETTINGS:
        return []
    return [
        Note(
            phrase(
                "The first {shown} of {all} settings; the others are left out.",
                "共 {all} 项设置，仅列出前 {shown} 项，其余略去。",
                shown=count(_MOST_SETTINGS),
                all=count(rows),
            )
        )
    ]


def _value(value: object) -> str:
    return cut(shown(value), _MOST_CHARACTERS)
