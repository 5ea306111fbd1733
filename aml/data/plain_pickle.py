"""Read pickles of plain containers, text and numbers without running anything they hold."""

import io
import pickle
from typing import Any


class _PlainUnpickler(pickle.Unpickler):
    """Containers, text and numbers need no global names in a pickle, so every global is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_plain_pickle(content: bytes, name: str) -> Any:
    """Unpickle lists, tuples, dicts, sets, text, bytes and numbers; run nothing.

    Text that Python 2 pickled as byte strings is read as UTF-8, else as Latin-1. `name` is for messages.

    Raises:
        pickle.UnpicklingError: the pickle asks for a class or function, or is damaged. Nothing was run.
    """
    try:
        try:
            return _PlainUnpickler(io.BytesIO(content), encoding="utf-8").load()
        except UnicodeDecodeError:
            return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises nearly any type
        raise pickle.UnpicklingError(
            f"{name} was not read: {str(error) or type(error).__name__}. Annotations hold only lists, dicts,"
            " text and numbers; a file with anything else could run code: get it from a source you trust"
        ) from error
