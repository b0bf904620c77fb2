"""Shared by the chat tests: a display that records what it is given, and a page with known contents."""

from __future__ import annotations

from pathlib import Path

from granite4v.runtime.chat import Chat, ChatError, Reply, handle

INVOICE = Path(__file__).parents[1] / "data" / "invoice.png"


class Kept:
    """A `Display` that records everything. `stop_after`: the number of pieces after which an answer is cancelled."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.listed: list[tuple[str, str]] = []
        self.answers: list[str] = []
        self.copied: list[str] = []
        self.stop_after: int | None = None
        self.has_clipboard = True

    def say(self, text: str) -> None:
        self.said.append(text)

    def note(self, text: str) -> None:
        self.said.append(text)

    def listing(self, rows: list[tuple[str, str]]) -> None:
        self.listed = rows

    def progress(self, stage: str, done: int, total: int) -> None:
        pass

    def answer(self, reply: Reply) -> None:
        if self.stop_after == 0:
            reply.cancel()
        pieces = []
        for piece in reply:
            pieces.append(piece)
            if len(pieces) == self.stop_after:
                reply.cancel()
        self.answers.append("".join(pieces))

    def copy(self, text: str) -> None:
        if not self.has_clipboard:
            raise ChatError("no clipboard")
        self.copied.append(text)


def ask(chat: Chat, *lines: str) -> Kept:
    """Feeds lines to a chat and returns the display with everything that was shown."""
    kept = Kept()
    for line in lines:
        assert handle(chat, line, kept)
    return kept
