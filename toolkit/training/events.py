"""TensorBoard's event files, written at once: what was logged before a checkpoint is there after a kill, and a full disk is noticed where it happens.

torch's SummaryWriter keeps up to two minutes of events in memory, and a thread of its own dies of a full disk.
"""

import struct
import time
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from toolkit.files import whole_file

VERSION = "brain.Event:2"
HEADER, FOOTER = 12, 4  # bytes around an event: its length and a checksum of that, a checksum of the event


class EventFile:
    """A new event file in `folder`, after all events beyond `first_step` are taken out of the ones that are there. Raises OSError."""

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.first_step, self.known = first_step, set().union(*[trim(path, first_step) for path in folder.glob("events.out.tfevents.*")])
        self.path = folder / f"events.out.tfevents.{time.time():.6f}.heartspeed"  # read in order of the names
        self._file = open(self.path, "xb")
        self._records = RecordWriter(self._file)
        self._write(file_version=VERSION)
        # for a TensorBoard that is running and has read the events beyond already
        self._write(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, summary: Summary, step: int) -> None:
        """Write a summary, unless it was written at this step before the run was resumed: the end of a run comes again if it was cut off."""
        if step > self.first_step or not {value.tag for value in summary.value} <= self.known:
            self._write(step=step, summary=summary)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, **what) -> None:
        self._records.write(Event(wall_time=time.time(), **what).SerializeToString())


def trim(path: Path, last_step: int) -> set[str]:
    """Take the events after `last_step`, and half an event at the end, out of a file; returns the tags of those at `last_step`.

    `purge_step` alone leaves texts in some readers and half an event in all of them, behind which they read no further.
    """
    records = list(read_records(path))
    kept = [raw for raw, event in records if event.step <= last_step]
    if sum(map(len, kept)) < path.stat().st_size:
        with whole_file(path) as file:
            file.writelines(kept)
    return {value.tag for _, event in records if event.step == last_step for value in event.summary.value}


def read_records(path: Path) -> Iterator[tuple[bytes, Event]]:
    """(bytes as they stand in the file, event) of an event file up to its end or its first damage."""
    data, at = path.read_bytes(), 0
    while at + HEADER <= len(data):
        length, checksum = struct.unpack_from("<QI", data, at)
        end = at + HEADER + length + FOOTER
        if end > len(data) or checksum != masked_crc32c(data[at : at + 8]):
            return
        try:
            event = Event.FromString(data[at + HEADER : end - FOOTER])
        except DecodeError:
            return
        yield data[at:end], event
        at = end
