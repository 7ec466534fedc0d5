"""The messages and losses that a forked process sends to its parent, as frames in a file.

A frame is a header, with a length and a checksum, and its content. A process may be killed in the middle of a frame,
and any other program that has inherited the file may write to it, so whatever is not a whole frame counts as one lost
event.
"""

from __future__ import annotations

import logging
import pickle
import struct
from typing import Any, NamedTuple
from uuid import UUID
from zlib import crc32

from zenml.logger import get_logger

from composite_logstore.capture.record import NOWHERE
from composite_logstore.event import LogEvent
from composite_logstore.inert import described
from composite_logstore.service import tell

logger = get_logger(__name__)

MOST_BYTES = 64 * 1024 * 1024
"""The size at which a file takes no more events, in bytes: about 160,000 lines of a log."""
LOSSES_BYTES = 8 * 1024 * 1024
"""Further room, in bytes, for losses and ends of streams."""

# Magic, whether it is a message or a loss, the content's length and checksum, the sender, the frame's number.
_HEADER = struct.Struct("<4s?IIQQ")
_MAGIC = b"\xc0LS\x02"
# A stream, a level, whether the events updated a progress bar, and how many they were.
_LOSS = struct.Struct("<16si?I")
_MOST_LOSSES = (1 << 32) - 1


class Message(NamedTuple):
    """An event of a forked process, or the end of a stream.

    Attributes:
        stream: The id of the stream.
        metadata: Its origin's metadata, if the forked process registered it.
        artifact_store_id: Its artifact store, if the forked process registered it and knows it.
        event: An event without numbers, or None where the stream has ended.
    """

    stream: UUID
    metadata: dict[str, Any] | None
    artifact_store_id: UUID | None
    event: LogEvent | None


class Loss(NamedTuple):
    """Events that did not arrive, because the file was full or their frame cannot be read.

    Attributes:
        level: Their level.
        progress: Whether they updated a progress bar.
        events: How many there were.
        stream: The id of their stream, None if unknown.
    """

    level: int
    progress: bool
    events: int = 1
    stream: UUID | None = None


class Frame(NamedTuple):
    """A message or a loss, with its sender and its number among the sender's frames. Sender 0 stands for none."""

    sender: int
    number: int
    content: Message | Loss


# Of an unknown level, so counted for all children: it is better to count a loss too many than to miss one.
UNKNOWN = Frame(0, 0, Loss(logging.CRITICAL, False))
"""Bytes that are no frame."""


def header(is_message: bool, content: bytes, sender: int, number: int) -> bytes:
    """Return the header of a frame."""
    return _HEADER.pack(_MAGIC, is_message, len(content), crc32(content, number), sender, number)


def frame_bytes(data: bytes) -> int:
    """Return how many bytes the frame has that begins here, if one begins here."""
    length: int = _HEADER.unpack_from(data)[2]
    return _HEADER.size + length


def parse(data: bytes) -> tuple[list[Frame], int]:
    """Return the frames in the data, and how many bytes of it they take. An incomplete last frame is left for later."""
    frames: list[Frame] = []
    place = 0
    while place + _HEADER.size <= len(data):
        magic, is_message, length, checksum, sender, number = _HEADER.unpack_from(data, place)
        begin = place + _HEADER.size
        end = begin + length
        is_frame = magic == _MAGIC and length <= MOST_BYTES
        if is_frame and end <= len(data):
            content = data[begin:end]
            if crc32(content, number) == checksum:
                frames.append(Frame(sender, number, decode(is_message, content)))
                place = end
                continue
        # Its writer was killed in the middle of it, or it is another program's. Where a later frame begins, the rest
        # of this one will not follow.
        found = data.find(_MAGIC, place + 1)
        if found < 0:
            if is_frame and end > len(data):
                break
            found = max(place + 1, len(data) - len(_MAGIC) + 1)
        place = found
        frames.append(UNKNOWN)
    return frames, place


def encode_message(message: Message) -> bytes:
    """Return a message as the content of a frame.

    Raises:
        Exception: A value in it cannot be pickled.
    """
    # Plain tuples and bytes take a fifth of the time that named tuples and UUIDs take, on both ends.
    stream, metadata, store, event = message
    return pickle.dumps((stream.bytes, metadata, store and store.bytes, event and event[4:]), pickle.HIGHEST_PROTOCOL)


def encode_loss(stream: UUID, level: int, progress: bool, events: int) -> bytes:
    """Return a loss as the content of a frame."""
    return _LOSS.pack(stream.bytes, level, progress, min(events, _MOST_LOSSES))


def decode(is_message: bool, content: bytes) -> Message | Loss:
    """Return what the content of a frame says; a loss if it cannot be read."""
    try:
        if not is_message:
            id, level, progress, events = _LOSS.unpack(content)
            return Loss(level, progress, events, UUID(bytes=id))
        id, metadata, store, fields = pickle.loads(content)
        event = LogEvent(NOWHERE, "", 0, 0, *fields) if fields else None
        return Message(UUID(bytes=id), metadata, store and UUID(bytes=store), event)
    except Exception as error:
        tell(logger.debug, "A frame of a forked process cannot be read: %s", described(error))
    return UNKNOWN.content
