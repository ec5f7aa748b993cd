"""Chinese for the English texts that a run has recorded: why it was asked to stop, and its hardware."""

import re

from job.run_report.wording import Both, Text, in_language

_CHECKPOINT = r", and (\d+) s of it are for the last checkpoint"
_KNOWN = (
    (r"a signal asked for it", "收到停止信号"),
    (
        r"(.+) exists \(train\.stop_file\); as long as it does, every start stops",
        r"\1 存在（train.stop_file）；只要它存在，每次启动都会停止",
    ),
    (rf"train\.max_time is (.+){_CHECKPOINT}", r"train.max_time 为 \1，其中 \2 秒留给最后一个 checkpoint"),
    (rf"the job's limit is (.+){_CHECKPOINT}", r"作业的时限为 \1，其中 \2 秒留给最后一个 checkpoint"),
    (r"CPU \((.+), (\d+) cores a machine\), processes: (\d+)", r"CPU（\1，每台机器 \2 核），进程数：\3"),
)
_MACHINES = re.compile(r"(.+), machines: (\d+)", re.DOTALL)


def translated(text: str) -> Text:
    """Return a recorded text in both languages; a text that is not known stays as it is."""
    if match := _MACHINES.fullmatch(text):
        return Both(text, f"{in_language(translated(match[1]), 'zh')}，机器数：{match[2]}")
    for pattern, chinese in _KNOWN:
        if match := re.fullmatch(pattern, text, re.DOTALL):
            return Both(text, match.expand(chinese))
    return text
