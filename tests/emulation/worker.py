"""Calls the operators of one compiled .cu, in a process of its own, where a sanitizer may end it.

Reads requests (operator, arguments, buffers, seed, resident blocks) from standard input and writes a reply to each to
standard output, pickled. It imports neither torch nor numpy: they would run under the sanitizer too.
"""

import ctypes
import os
import pickle
import sys

C = ctypes.CDLL(None)
C.posix_memalign.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t)
C.free.argtypes = (ctypes.c_void_p,)
ELEMENT_BYTES = {0: 1, 3: 4, 4: 8, 5: 2, 6: 4, 7: 8, 11: 1, 15: 2}  # by ScalarType, see operator.h


def allocated(data: bytes) -> int:
    """A copy of `data`, aligned as a GPU's allocations are and not a byte longer."""
    address = ctypes.c_void_p()
    if C.posix_memalign(ctypes.byref(address), 512, max(len(data), 1)):
        raise MemoryError
    ctypes.memmove(address, data, len(data))
    return address.value


class Library:
    def __init__(self, path: str) -> None:
        self._functions = ctypes.CDLL(path)
        self._functions.emulation_call.restype = ctypes.c_char_p
        self._functions.emulation_launches.restype = ctypes.c_char_p
        self._functions.emulation_result.restype = ctypes.c_void_p
        self._functions.emulation_results.restype = ctypes.c_int64
        self._watches = hasattr(self._functions, "emulation_watch")
        if self._watches:
            self._functions.emulation_watched.restype = ctypes.c_int64

    def call(self, operator: str, arguments, buffers: list[bytes], seed: int, resident_blocks: int) -> dict:
        addresses = [allocated(data) for data in buffers]
        self._functions.emulation_start(ctypes.c_uint64(seed), ctypes.c_int(resident_blocks))
        for argument in arguments:
            self._push(argument, addresses)
        if self._watches:
            for address, data in zip(addresses, buffers, strict=True):
                self._functions.emulation_watch(ctypes.c_void_p(address), ctypes.c_int64(len(data)))
        error = self._functions.emulation_call(operator.encode())
        changed = [i for i, data in enumerate(buffers) if ctypes.string_at(addresses[i], len(data)) != data]
        results = [] if error else [self._result(i) for i in range(self._functions.emulation_results())]
        reply = {
            "error": error and error.decode(),
            "results": [result[1:] for result in results],
            "changed": changed,
            "launches": self._functions.emulation_launches().decode().split(),
            "counts": self._counts([result[0] for result in results], len(buffers)) if self._watches else None,
        }
        for address in addresses:
            C.free(address)
        return reply

    def _push(self, argument, addresses: list[int]) -> None:
        f = self._functions
        if argument is None:
            f.emulation_none()
        elif isinstance(argument, bool):
            f.emulation_bool(ctypes.c_bool(argument))
        elif isinstance(argument, int):
            f.emulation_int(ctypes.c_int64(argument))
        elif isinstance(argument, float):
            f.emulation_float(ctypes.c_double(argument))
        elif isinstance(argument, list):
            f.emulation_floats((ctypes.c_double * len(argument))(*argument), ctypes.c_int64(len(argument)))
        else:
            buffer, offset, kind, sizes, strides = argument
            shape = ctypes.c_int64 * len(sizes)
            f.emulation_tensor(
                ctypes.c_void_p(addresses[buffer] + offset), kind, ctypes.c_int64(len(sizes)), shape(*sizes),
                shape(*strides),
            )

    def _result(self, i: int) -> tuple[int, int, list[int], bytes]:
        kind, dims, sizes = ctypes.c_int(), ctypes.c_int64(), (ctypes.c_int64 * 8)()
        data = self._functions.emulation_result(ctypes.c_int64(i), ctypes.byref(kind), ctypes.byref(dims), sizes)
        shape = sizes[: dims.value]
        bytes_ = ELEMENT_BYTES[kind.value]
        for size in shape:
            bytes_ *= size
        return data, kind.value, shape, ctypes.string_at(data, bytes_)

    def _counts(self, results: list[int], inputs: int) -> list[tuple]:
        """(what, bytes, read in all, distinct, written in all, distinct) of each buffer."""
        rows, row = [], (ctypes.c_uint64 * 6)()
        for i in range(self._functions.emulation_watched()):
            self._functions.emulation_counts(ctypes.c_int64(i), row)
            what = i if i < inputs else f"result {results.index(row[0])}" if row[0] in results else "scratch"
            rows.append((what, *row[1:]))
        return rows


def main() -> None:
    library = Library(sys.argv[1])
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what else prints goes to standard error
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(library.call(*request), replies)
        replies.flush()


if __name__ == "__main__":
    main()
