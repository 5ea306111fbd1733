"""Prints the tables of docs/verification.md: `python tests/verification.py`."""

import machine_code
import test_planted_bugs
import traffic

TABLES = {
    "Planted bugs": (lambda: None, test_planted_bugs.table),
    "Machine code": (machine_code.missing, machine_code.table),
    "Bytes and launches": (traffic.missing, lambda: traffic.table(traffic.rows())),
}


def main() -> None:
    for title, (missing, table) in TABLES.items():
        print(f"{title}\n\n{missing() or table()}\n")


if __name__ == "__main__":
    main()
