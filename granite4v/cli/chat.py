"""`granite4v chat`: a conversation about pages on a terminal; otherwise one question from standard input."""

from __future__ import annotations

import sys
from dataclasses import asdict

from granite4v.cli import options
from granite4v.cli.loading import ModelOptions, SamplingOptions, grouped
from granite4v.cli.progress import Progress
from granite4v.cli.verbosity import note


@grouped
def chat(
    *,
    files: options.ChatFilesArgument = None,
    loading: ModelOptions,
    lora: options.LoraOption = None,
    system: options.SystemOption = None,
    max_tokens: options.AnswerTokensOption = None,
    sampling: SamplingOptions,
    page_store: options.PageStoreOption = True,
    password: options.PasswordOption = None,
    frames: options.FramesOption = None,
    fps: options.FpsOption = None,
) -> None:
    """Chat about images, PDF pages and, if the model takes them, videos.

    On a terminal, answers are streamed and rendered. A page is processed only once, no matter how many questions are
    asked about it, even if the chat is started again. /help lists the commands: attach and detach pages, use task tags
    and schemas, take back a question or answer it again, save and load, copy tables. Alt-Enter, or a backslash at the
    end of a line, starts another line of a question.

    If standard input is a pipe or a file, it is the question, and only the answer goes to stdout.
    """
    from granite4v.cli import chat_display
    from granite4v.runtime import GenerationOptions
    from granite4v.runtime.chat import Chat, handle
    from granite4v.runtime.extract.schema import load_schema

    options.check_sampling(frames, fps)
    is_interactive = sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())
    question = "" if is_interactive else chat_display.question_from_stdin()
    path = loading.find()
    with Progress() as progress:
        loaded = loading.load(path, progress, page_store=page_store)
    with loaded:
        talk = Chat(
            loaded,
            system=system,
            options=GenerationOptions(**asdict(sampling), lora=lora),
            max_tokens=max_tokens,
            password=password,
            load_schema=lambda source: load_schema(source, note),
            frames=frames,
            fps=fps,
        )
        if is_interactive:
            from granite4v.cli.chat_terminal import converse

            converse(talk, files or [])
            return
        with chat_display.PlainDisplay() as display:
            for file in files or []:
                chat_display.attach(talk, file, display)
            handle(talk, question, display)
