"""Write a data set's pickled refs as JSON, once; from then on no pickle is read."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from aml.data import layout, refs
from aml.files import appearing_whole, flush


def convert(root: str | Path, dataset: str | None = None, out: str | Path | None = None) -> Iterator[str]:
    """Convert the pickles of one data set, or of all under `root`; yields a line about each.

    out: write into <out>/<dataset>/, with a copy of instances.json; default: beside the pickles. A pickle that is not
        read, as JSON from elsewhere lies beside it, is left out.

    All fields are kept. The JSON file appears complete or not at all, after it was read back and found to hold the
    same refs. It remembers its pickle, so that a pickle that is replaced later is noticed.

    Raises:
        FileNotFoundError: there is nothing to convert.
        pickle.UnpicklingError, ValueError: as `aml.data.refs.read_refs`; or a field that JSON cannot hold.
    """
    root = Path(root)
    names = [dataset] if dataset else sorted({name for name, _ in layout.find_data_sets(root)})
    folders = [layout.annotation_folder(root, name) for name in names]
    pickles = [path for folder in folders for path in sorted(folder.glob("refs(*).p"))]
    if not pickles:
        raise FileNotFoundError(f"no file refs(<split_by>).p under {root}" + (f"/{dataset}" if dataset else ""))
    for path in pickles:
        folder = Path(out) / path.parent.name if out is not None else path.parent
        target = (folder / path.name).with_suffix(".json")
        beside = path.with_suffix(".json")
        foreign = next((file for file in (beside, target) if file.exists() and not refs.is_converted(file)), None)
        if foreign is not None:
            yield f"left {foreign} as it is: it is JSON from elsewhere, and read instead of {path.name}"
            continue
        folder.mkdir(parents=True, exist_ok=True)
        count = _convert(path, target)
        yield f"wrote {target}: {count} refs, {target.stat().st_size / 1e6:.1f} MB"
        instances = path.with_name("instances.json")
        if folder.resolve() != path.parent.resolve() and instances.is_file():
            with appearing_whole(folder / instances.name) as copy:
                shutil.copyfile(instances, copy)
                flush(copy)


def _convert(path: Path, target: Path) -> int:
    content = path.read_bytes()
    expected = refs.read_refs(path)
    entries = refs.load_entries(path)
    value = {refs.CONVERTED: refs.FORMAT, "source": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    try:
        text = json.dumps(value | {"refs": entries}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be written as JSON: {error}") from error

    with appearing_whole(target) as file:
        file.write_text(text, encoding="utf-8")
        if refs.read_refs(file) != expected:
            raise ValueError(f"{path}: its JSON does not read back the same; nothing was written")
        flush(file)
    return len(expected)
