"""What a model made of prompts: shown as it comes, shown in their order, or written as lines of JSON; on rank 0."""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from hpcmoe.model.continuations import Continuation
from hpcmoe.model.prompts import Codec, Prompt, PromptText
from hpcmoe.output import print_to_stdout
from hpcmoe.results import one_line_error

_UNKNOWN = "\ufffd"  # stands for a character that is not whole yet
_CONTROLS = {number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160)) if chr(number) not in "\t\n"}


class TextReport:
    """The texts of all ranks' prompts, which come in the order of these."""

    def __init__(self, given: Sequence[PromptText], prompts: Sequence[Prompt], codec: Codec, output: str) -> None:
        """given: the prompts as text; output: the path of a file of JSON lines, "" to show them."""
        self.given, self.prompts, self.codec, self.output = given, prompts, codec, output
        self.num_added, self.started = 0, time.monotonic()
        self.num_shown = 0  # characters of what is shown as it comes

    @property
    def streams(self) -> bool:
        """Return True if the text is shown as it comes: that of one prompt is."""
        return len(self.prompts) == 1 and not self.output

    def start(self) -> None:
        """Start to count the time, and show the prompt whose text is shown as it comes. The model is ready."""
        self.started = time.monotonic()
        if self.streams:
            self.num_shown = len(self.codec.decode(self.prompts[0].tokens))
            print_to_stdout(make_visible(self.given[0].text), end="")

    def show(self, row: Continuation) -> None:
        """Show what has come of a text since the last call, up to its last whole character."""
        text = self.codec.decode([*row.prompt.tokens, *row.added])
        whole = text if row.finish_reason else text.rstrip(_UNKNOWN)
        if len(whole) > self.num_shown or row.finish_reason:
            end = "\n" if row.finish_reason else ""
            print_to_stdout(make_visible(whole[self.num_shown :]), end)
            self.num_shown = len(whole)

    def add(self, rows: Iterable[Continuation]) -> None:
        """Add finished texts, in the order of their prompts. Raises ConfigError where they cannot be written."""
        for row in rows:
            if self.output:
                self.append_line(row)
            elif not self.streams:
                given, text = self.given[row.prompt.number], self.cut_added(row)
                header = f"== {given.where}: {len(row.added)} tokens, {row.finish_reason}"
                print_to_stdout(f"{header}\n{make_visible(given.text + text)}")
            self.num_added += len(row.added)

    def cut_added(self, row: Continuation) -> str:
        """Return the text that was added: a tokenizer may give tokens another text at the beginning of one."""
        before = len(self.codec.decode(row.prompt.tokens))
        return self.codec.decode([*row.prompt.tokens, *row.added])[before:]

    def append_line(self, row: Continuation) -> None:
        """Append a text to the file, which begins anew with the first prompt; what is in it stays after any end."""
        entry = {
            "prompt": self.given[row.prompt.number].text,
            "text": self.cut_added(row),
            "tokens": row.added,
            "finish_reason": row.finish_reason,
        }
        with one_line_error(self.output), Path(self.output).open("a" if row.prompt.number else "w") as file:
            file.write(f"{json.dumps(entry)}\n")

    def summarize(self, num_ranks: int) -> str:
        """Format how many prompts and tokens there were, and how fast."""
        seconds, read = time.monotonic() - self.started, sum(len(prompt.tokens) for prompt in self.prompts)
        rate, several = self.num_added / max(seconds, 1e-9), len(self.prompts) != 1
        return (
            f"{len(self.prompts)} prompt{'s' * several} of {read} tokens, {self.num_added} tokens added in "
            f"{seconds:.2f} s: {rate:.4g} tokens per second on {num_ranks} rank{'s' * (num_ranks != 1)}"
        )


def make_visible(text: str) -> str:
    """Escape control characters but tabs and ends of lines: a model may say what a terminal obeys."""
    return text.translate(_CONTROLS)
