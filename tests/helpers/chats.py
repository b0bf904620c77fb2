"""What tests of the chat share: a display that keeps what it is shown, and a page with known contents."""

from __future__ import annotations

from pathlib import Path

from granite4v.runtime.chat import Chat, ChatError, Reply, handle

INVOICE = Path(__file__).parents[1] / "data" / "invoice.png"


class Kept:
    """A `Display` that keeps everything. `stop_after`: pieces of an answer after which it is cancelled."""

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
    """Everything that comes of some lines."""
    kept = Kept()
    for line in lines:
        assert handle(chat, line, kept)
    return kept
