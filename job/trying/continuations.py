"""The command `generate`: continues prompts with a trained model, and shows prompt and continuation apart."""

import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from job.config import Config, Generate
from job.errors import EXIT_DONE, UserError
from job.local_dirs import cache_folder, scratch_folder
from job.model.generation import Sampling, continue_text
from job.report import make_console
from job.runs.load_model import LoadedModel, load_model
from job.trying.prompt_sources import find_prompts

_BASE_MODEL = "this is a base model: it continues texts; it does not answer questions or chat"
_HISTORY = "prompts"
"""Name of the file with earlier prompts in the scratch folder, which only this user can read."""
_SEEDS = 10**9
"""Number of seeds that can be drawn: few enough to type one again."""


def try_model(config: Config, words: Sequence[str]) -> int:
    """Continue the prompts, or those that a person types one after the other. Returns the exit code.

    The texts go to standard output, and everything about them to standard error.

    Raises:
        UserError: there is no model, standard input is no text, or all samples would be equal.
    """
    settings = config.generate
    if settings.samples > 1 and settings.temperature == 0:
        expected = "with generate.temperature 0, all continuations of a prompt are equal"
        raise UserError("generate.samples", settings.samples, expected, "set it to 1, or raise the temperature")
    prompts = find_prompts(words, settings.prompts, _say)
    source, setting = (
        (config.run.output, "run.output") if settings.model is None else (settings.model, "generate.model")
    )
    trained = load_model(source, setting, cache_folder(config.data.cache_dir))
    _say(f"model: {trained.source}")
    _say(_BASE_MODEL)
    printer = _Printer(trained, settings)
    if prompts is None:
        _continue_typed(printer)
        return EXIT_DONE
    seed = _seed_of(settings)
    for index, prompt in enumerate(prompts):
        printer.continue_prompt(prompt, seed + index * settings.samples, is_last=index == len(prompts) - 1)
    return EXIT_DONE


def _continue_typed(printer: "_Printer") -> None:
    """Continue the texts that a person types, each with a seed of its own, until Ctrl-D."""
    from job.trying.prompt_line import PromptLine

    _say("type the beginning of a text (generate.prompts is not used here); Ctrl-C stops a continuation, Ctrl-D ends")
    line = PromptLine(scratch_folder()[0] / _HISTORY, _say)
    while (prompt := line.ask()) is not None:
        with _noting_interrupts() as is_interrupted:
            printer.continue_prompt(prompt, _seed_of(printer.settings), should_stop=is_interrupted)


def _seed_of(settings: Generate) -> int:
    """Return `generate.seed`, or a drawn seed, which is printed so that the text can be made again."""
    if settings.seed is not None:
        return settings.seed
    seed = secrets.randbelow(_SEEDS)
    if settings.temperature > 0:
        _say(f"seed {seed}: repeat it with --generate.seed {seed}")
    return seed


class _Printer:
    """Prints continuations: the prompt in bold on a terminal, and in brackets elsewhere."""

    def __init__(self, trained: LoadedModel, settings: Generate) -> None:
        self.settings = settings
        self._trained, self._console = trained, make_console(soft_wrap=True)
        self._has_warned_of_length = False

    def continue_prompt(
        self, prompt: str, seed: int, should_stop: Callable[[], bool] = lambda: False, is_last: bool = True
    ) -> None:
        """Print `generate.samples` continuations, of which each has its own seed; blank lines separate them."""
        trained, settings = self._trained, self.settings
        sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, seed)
        self._warn_of_lengths(prompt, sampling)
        for number in range(settings.samples):
            if should_stop():
                return
            print_prompt(self._console, prompt)
            continue_text(
                trained.model,
                trained.tokenizer,
                prompt,
                sampling.for_prompt(number),
                trained.context_length,
                on_text=_write,
                should_stop=should_stop,
            )
            _write("\n" if is_last and number == settings.samples - 1 else "\n\n")

    def _warn_of_lengths(self, prompt: str, sampling: Sampling) -> None:
        tokens, context_length = len(self._trained.tokenizer.encode([prompt])[0]), self._trained.context_length
        reserved = sampling.reserved_tokens(context_length)
        if tokens > context_length - reserved:
            _say(
                f"the prompt has {tokens:,} tokens, but the model sees {context_length:,}, of which the continuation "
                f"gets {reserved:,}: only the last {context_length - reserved:,} are read"
            )
        most = sampling.most_new_tokens(tokens + 1, context_length)  # The end-of-document token comes first.
        if most < sampling.max_new_tokens and not self._has_warned_of_length:
            self._has_warned_of_length = True
            _say(
                f"the continuation gets at most {most:,} of the {sampling.max_new_tokens:,} tokens asked for "
                f"(generate.max_new_tokens): the model sees {context_length:,}, the prompt included"
            )


def print_prompt(console: Console, prompt: str) -> None:
    """Print a prompt without a line end: in bold if the console is a terminal, else in brackets."""
    if console.color_system is None:  # no terminal, or one that has no bold letters
        console.print(f"[{prompt}]", end="")
    else:
        console.print(Text(prompt, style="bold cyan"), end="")


@contextmanager
def _noting_interrupts() -> Iterator[Callable[[], bool]]:
    """Give the block a function that returns True once Ctrl-C was pressed, instead of ending the program."""
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
