"""The CUDA operators move hardly more bytes than they have to, in the launches that they are said to take."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import traffic
from traffic import builds

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "verification.md"


class Expected(NamedTuple):
    launches: list[str]
    once: set[str]  #: inputs that are read once, and no byte twice
    most: float  #: bytes in all, of the least
    moved: float = 1.05  #: different bytes, of the least


SAME, QUARTER = "`aml_loss`, logits of the target's size", "`aml_loss`, logits at a quarter"
ODD = "`aml_loss`, features of 15 x 15"
EXPECTED = {
    f"{SAME}, forward": Expected(["aml_loss_forward"], {"logits", "target", "visual"}, 2.0),
    f"{SAME}, backward": Expected(["masked_loss_backward_pixels"], {"logits", "target"}, 1.9),
    f"{QUARTER}, forward": Expected(["aml_loss_forward"], {"target", "visual"}, 3.5),
    f"{QUARTER}, backward": Expected(["masked_loss_backward_gather"], set(), 11),
    f"{ODD}, forward": Expected(["aml_loss_forward"], {"logits", "target"}, 2.1),
    f"{ODD}, backward": Expected(["masked_loss_backward_pixels"], {"logits", "target"}, 1.9),
    "`masked_loss`, forward": Expected(["masked_loss_forward"], {"logits", "target"}, 2.0),
    "`masked_loss`, backward": Expected(["masked_loss_backward_pixels"], {"logits", "target"}, 1.6),
    # 64 channels, 20 words: each of the 8 tiles of a sample reads the words, all but one out of the cache.
    "`pixel_text_similarity`, forward": Expected(["similarity_forward"], {"visual"}, 1.5),
    "`pixel_text_similarity`, backward": Expected(["similarity_coefficients", "similarity_gradients"], set(), 2.7, 1.4),
    "`sample_quantile`, short, forward": Expected(["quantile_by_block"], set(), 3.01),
    "`sample_quantile`, long, forward": Expected(["quantile_by_team"], set(), 4.4, 1.4),
    "`filter_regions`, forward": Expected(["filter_image_regions"], {"image"}, 1.2),
}


@pytest.fixture(scope="module")
def rows(conditions):
    if reason := traffic.missing():
        pytest.skip(reason)
    return traffic.rows()


def test_launches(rows):
    assert {row.case: row.launches for row in rows} == {case: each.launches for case, each in EXPECTED.items()}


def test_what_is_large_is_read_once(rows):
    for row in rows:
        once = {name for name, times in row.read.items() if times == 1}
        assert once >= EXPECTED[row.case].once, f"{row.case}: {row.read}"


def test_features_are_read_once_per_launch_and_values_once_per_digit(rows):
    read = {row.case: row.read for row in rows}
    assert read["`pixel_text_similarity`, backward"]["visual"] == 2
    assert {read[f"`sample_quantile`, {length}, forward"]["values"] for length in ("short", "long")} == {3}
    assert read[f"{QUARTER}, backward"]["target"] < 1.2  # pixels between two tiles of logits are computed for both


def test_rows_that_begin_within_16_bytes_are_read_from_there_on(rows):
    """What packs hold of the cells beside a tile is read again: 7 features with each of the 8 tiles of 225 cells."""
    visual = next(row.read["visual"] for row in rows if row.case == f"{ODD}, forward")
    assert 1 < visual <= (225 + 8 * 7) / 225


def test_results_are_written_once_and_completely(rows):
    for row in rows:
        assert row.complete and row.written == 1, row.case


def test_bytes_in_all(rows):
    for row in rows:
        assert row.moved <= EXPECTED[row.case].moved and row.total <= EXPECTED[row.case].most, row


def test_the_table_in_the_documentation_is_this(rows):
    document = DOCUMENT.read_text()
    major = int(re.search(r"[Cc]ounted with g\+\+ (\d+)", document)[1])
    if builds.compiler_major() != major:
        pytest.skip(f"the table was counted with g++ {major}; another one may load a small thing more or less often")
    assert traffic.table(rows) in document, "put the output of tests/verification.py into docs/verification.md"
