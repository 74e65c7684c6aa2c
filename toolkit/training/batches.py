"""The micro-batches of each step, made in a thread ahead of their use."""

import queue
import threading
from collections.abc import Iterator

from toolkit.shards.order import Data, MicroBatch, micro_batches

Step = tuple[list[list[int]], list[MicroBatch]]


def steps(data: Data, seed: int, split: tuple[int, int], rank: int, world: int, cursor: int, count: int) -> Iterator[Step]:
    """For each of `count` steps from position `cursor`: the sample indices of this rank's micro-batches, and these.

    split: (rows per micro-batch, micro-batches per step).
    """
    micro, accumulation = split[0] * data.samples_per_row, split[1]
    for _ in range(count):
        parts = micro_batches(cursor, micro, accumulation, rank, world)
        samples = [[data.at(seed, position) for position in part] for part in parts]
        yield [[index for _, index in part] for part in samples], [data.batch(part) for part in samples]
        cursor += micro * accumulation * world


def prefetch(source: Iterator, depth: int = 2) -> Iterator:
    """The same items, made in a thread; an error in it is raised here."""
    ready: queue.Queue = queue.Queue(depth)

    def fill():
        try:
            for item in source:
                ready.put((item, None))
        except BaseException as error:  # handed over, not swallowed
            ready.put((None, error))

    threading.Thread(target=fill, daemon=True).start()
    while True:
        item, error = ready.get()
        if error is not None:
            raise error
        yield item
