"""Which cases of the common tests run in Triton's interpreter, which takes milliseconds for each operation.

Every test runs, and every value of each of its parameters: every type, layout, size and option. Left out are
combinations of them. The other back ends run all, and so does this one on a GPU.
"""

import pytest


def left_out(items: list[pytest.Item]) -> set[pytest.Item]:
    """The cases of the fixture `backend` with "triton" that show no value of a parameter for the first time."""
    tests: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("backend") == "triton" and not hasattr(item.module, "backend"):
            tests.setdefault((item.path, item.originalname), []).append(item)
    return {item for cases in tests.values() for item in set(cases) - set(covering(cases))}


def covering(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Few cases that have every value of every parameter: always the one with the most new values next."""
    values = {case: {(name, id(value)) for name, value in case.callspec.params.items()} for case in cases}
    missing, chosen = set().union(*values.values()), []
    while missing:
        best = max(cases, key=lambda case: len(values[case] & missing))
        chosen.append(best)
        missing -= values[best]
    return chosen
