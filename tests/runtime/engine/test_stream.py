"""Tests of a stream and its channel: bounded, ended once, and never blocking the engine."""

from __future__ import annotations

import contextlib
import gc
import threading

import pytest

from granite4v.runtime.answer import Answer
from granite4v.runtime.engine.stream import Channel, Stream


class Wakes:
    def __init__(self) -> None:
        self.n = 0
        self.blocking: set[bool] = set()

    def __call__(self, *, blocking: bool = True) -> None:
        self.blocking.add(blocking)
        self.n += 1


def made(size: int = 4) -> tuple[Channel, Wakes]:
    wakes = Wakes()
    return Channel(Answer(), wakes, size=size), wakes


def finish_when_cancelled(channel: Channel) -> threading.Thread:
    """Finishes a channel soon after it is cancelled, as the engine does."""

    def watch() -> None:
        while not channel.is_cancelled:
            pass
        channel.finish()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_pieces_come_in_order_and_end() -> None:
    channel, _ = made()
    for piece in ("a", "", "b"):
        channel.put(piece)
    channel.finish()
    assert list(Stream(channel)) == ["a", "b"]
    assert list(Stream(channel)) == []


def test_the_producer_is_woken_when_a_full_queue_is_read() -> None:
    channel, wakes = made(size=2)
    channel.put("a")
    assert not channel.is_full
    channel.put("b")
    channel.put("c")  # the pieces of one step are never refused
    assert channel.is_full and wakes.n == 0
    stream = Stream(channel)
    assert [next(stream), next(stream), next(stream)] == ["a", "b", "c"]
    assert wakes.n == 2 and not channel.is_full


def test_an_error_comes_after_the_pieces_and_once() -> None:
    channel, _ = made()
    channel.put("a")
    channel.finish(ZeroDivisionError("by zero"))
    stream = Stream(channel)
    assert next(stream) == "a"
    with pytest.raises(ZeroDivisionError, match="by zero"):
        next(stream)
    assert list(stream) == []


def test_progress_reaches_the_reader_in_its_own_thread_and_only_the_latest() -> None:
    channel, _ = made()
    seen: list[tuple[str, int, int, int]] = []
    stream = Stream(channel, progress=lambda *what: seen.append((*what, threading.get_ident())))
    channel.report("prefill", 1, 9)
    channel.report("prefill", 5, 9)
    channel.put("a")
    assert next(stream) == "a"
    assert seen == [("prefill", 5, 9, threading.get_ident())]


@pytest.mark.parametrize("callback", ["progress", "cancel"])
def test_an_error_of_a_callback_cancels_the_answer_and_goes_up(callback: str) -> None:
    channel, _ = made()
    channel.report("load", 0, 1)
    engine = finish_when_cancelled(channel)

    def broken(*args: object) -> bool:
        raise KeyboardInterrupt

    stream = Stream(channel, **{callback: broken})  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert channel.is_cancelled and channel.is_done
    engine.join()


@pytest.mark.parametrize("callback", ["progress", "cancel"])
def test_a_callback_cannot_pass_for_the_end_of_the_answer(callback: str) -> None:
    channel, _ = made()
    channel.report("load", 0, 1)
    engine = finish_when_cancelled(channel)

    def broken(*args: object) -> bool:
        raise StopIteration

    with pytest.raises(RuntimeError, match="a callback raised StopIteration"):
        Stream(channel, **{callback: broken}).result()  # type: ignore[arg-type]
    engine.join()


def test_cancel_leaves_what_was_generated_and_close_does_not() -> None:
    for close in (False, True):
        channel, wakes = made()
        channel.put("a")
        engine = finish_when_cancelled(channel)
        stream = Stream(channel)
        if close:
            stream.close()
        else:
            stream.cancel()
        engine.join()
        assert wakes.n == 1
        assert list(stream) == ([] if close else ["a"])


def test_a_stream_that_nobody_holds_is_cancelled_without_waiting_for_a_lock() -> None:
    """The garbage collector may find it in a thread that holds any lock, here the channel's own."""
    channel, wakes = made()
    stream = Stream(channel)
    locked, found = threading.Event(), threading.Event()

    def reads() -> None:
        with contextlib.suppress(StopIteration):
            locked.set()
            channel.take(30)
        found.set()

    reader = threading.Thread(target=reads)
    reader.start()
    locked.wait()
    del stream
    gc.collect()
    assert channel.is_cancelled and wakes.blocking == {False}
    channel.finish()
    reader.join()
    assert found.is_set()


def test_a_result_is_waited_for_without_keeping_pieces() -> None:
    channel, _ = made(size=2)

    def produce() -> None:
        for i in range(100):
            while channel.is_full:
                pass
            channel.answer.text += str(i % 10)
            channel.put(str(i % 10))
        channel.finish()

    thread = threading.Thread(target=produce)
    thread.start()
    assert Stream(channel).result().text == "0123456789" * 10
    thread.join()


def test_an_end_that_came_with_progress_is_seen_at_once() -> None:
    """A caller that is notified only once of both looks only once."""
    told: list[tuple[str, int, int]] = []
    channel, _ = made()
    stream = Stream(channel, progress=lambda *progress: told.append(progress))
    stream.let_run()
    channel.report("prefill", 1, 2)
    channel.put("a piece")
    channel.finish()
    assert stream.poll() and told == [("prefill", 1, 2)]


def test_one_thread_follows_several_answers() -> None:
    news, told = threading.Event(), list[tuple[str, int, int]]()
    channels = [Channel(Answer(), Wakes(), size=1, listener=news.set) for _ in range(3)]
    streams = [Stream(channel, progress=lambda *report: told.append(report)) for channel in channels]
    for stream in streams:
        stream.let_run()
    assert [stream.poll() for stream in streams] == [False] * 3 and not news.is_set()
    for step in (
        lambda: channels[0].report("prefill", 1, 2),
        lambda: channels[1].put("a"),
        lambda: channels[1].finish(),
        lambda: channels[2].finish(ValueError("lost")),
    ):
        step()
        assert news.is_set()
        news.clear()
    channels[0].put("never read")
    assert not channels[0].is_full
    assert not streams[0].poll() and told == [("prefill", 1, 2)]
    assert streams[1].poll() and streams[1].poll()
    with pytest.raises(ValueError, match="lost"):
        streams[2].poll()
