"""The C library's memory allocator, for processes that compute with torch on a CPU."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Keep freed blocks of up to 32 MB for the next allocation instead of giving them back to the system. Does nothing where the C library is not glibc.

    Every activation is a block of some MB that is freed a moment later. Given back, it comes again page by page, each with a fault and zeroed: encoding an
    ECG on one core took 14 ms, and 7 ms with this.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the largest glibc takes
    mallopt(M_TRIM_THRESHOLD, 1 << 30)
