"""A conversation about pages: its questions and answers, its attached pages, and the commands that change it.

Knows nothing about terminals: a `Display` shows what happens.
"""

from granite4v.runtime.chat.chat import Chat, ContextFull, Reply
from granite4v.runtime.chat.commands import Display, attach, handle
from granite4v.runtime.chat.completion import Completion, complete
from granite4v.runtime.chat.conversation import ChatError, Conversation, Question, Turn
from granite4v.runtime.chat.pages import ChatPage
from granite4v.runtime.chat.values import tables_in, value_of

__all__ = [
    "Chat",
    "ChatError",
    "ChatPage",
    "Completion",
    "ContextFull",
    "Conversation",
    "Display",
    "Question",
    "Reply",
    "Turn",
    "attach",
    "complete",
    "handle",
    "tables_in",
    "value_of",
]
