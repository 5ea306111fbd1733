"""The rank of a quantile in whole numbers, as a GPU computes it, is that of the double-precision code in every bit."""

import subprocess
from pathlib import Path
from shutil import which

import pytest

COMMON = Path(__file__).parents[1] / "csrc" / "common"
PROGRAM = """
#include <cstdio>
#include <random>

#include "quantile.h"

using namespace aml;

int failures = 0;
int64_t cases = 0, fractions = 0;

void compare(float q, int64_t n) {
  if (!(q >= 0 && q <= 1) || n < 1) return;
  for (bool in_fp64 : {false, true}) {
    for (int64_t i = 0; i < 5; ++i) {
      const Rank<float> a = quantile_rank(q, n, Interpolation(i), in_fp64);
      const Rank<float> b = quantile_rank_in_integers(q, n, Interpolation(i), in_fp64);
      const bool same = a.below == b.below && a.above == b.above &&
                        (a.below == a.above || bit_cast<uint32_t>(a.weight) == bit_cast<uint32_t>(b.weight));
      if (!same && ++failures <= 5) {
        std::printf("q %a n %lld interpolation %lld fp64 %d: %lld %lld %a, expected %lld %lld %a\\n", q, (long long)n,
                    (long long)i, in_fp64, (long long)b.below, (long long)b.above, b.weight, (long long)a.below,
                    (long long)a.above, a.weight);
      }
      ++cases, fractions += a.above > a.below;
    }
  }
}

int main() {
  std::mt19937_64 random(1);
  const float known[] = {0.0f, 1.0f, 0.5f, 0.25f, 0.75f, 0.1f, 1.0f / 3, 0.999f, 0.9999999f, 1e-10f, 1e-38f, 1e-45f,
                         3e-42f};
  const int64_t longest = int64_t(1) << 40;
  for (float q : known) {
    for (int64_t n = 1; n <= 3000; ++n) compare(q, n);
    for (int bits = 1; bits <= 40; ++bits) {
      for (int64_t d = -3; d <= 3; ++d) {
        if ((int64_t(1) << bits) + d <= longest) compare(q, (int64_t(1) << bits) + d);
      }
    }
  }
  for (int64_t i = 0; i < 300000; ++i) {
    const int64_t n = 1 + int64_t(random() % uint64_t(longest)) >> random() % 40;
    compare(bit_cast<float>(uint32_t(random() % 0x3F800001u)), n);  // any number in [0, 1], small ones too
    compare(float(random() >> 40) * 0x1p-24f, n);                  // evenly spread
    // Halves: products with a tie, in the rank and in its 53 bits.
    compare(float(random() % 64) / 64, n);
    compare(bit_cast<float>(uint32_t(random() % 0x3F800001u) & ~0xFFFu), n & ~int64_t(0xFFF));
  }
  std::printf("%lld cases, %lld between two places, %d differ\\n", (long long)cases, (long long)fractions, failures);
  return failures > 0;
}
"""


def outcome(folder: Path, common: Path) -> subprocess.CompletedProcess:
    compiler = which("g++") or which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "rank.cpp").write_text(PROGRAM)
    subprocess.run(
        [compiler, "-std=c++17", "-O2", "-ffp-contract=off", f"-I{common}", "rank.cpp", "-o", "rank"],
        cwd=folder, check=True,
    )
    return subprocess.run([folder / "rank"], capture_output=True, text=True)


def test_the_rank_in_integers_is_that_of_doubles(tmp_path):
    run = outcome(tmp_path, COMMON)
    assert run.returncode == 0, run.stdout


# Ties to even of the 53 bits, rounding at all, the tie of `nearest`, subnormal weights.
@pytest.mark.parametrize(
    ("right", "wrong"),
    (
        ("(left == half && (kept & 1))", "left == half"),
        ("spare < 11 &&", "spare < 0 &&"),
        ("(rest == half && (below & 1))", "rest == half"),
        ("uint32_t(1) << (149 - places)", "uint32_t(1) << (148 - places)"),
    ),
)
def test_the_comparison_sees_a_wrong_rank(tmp_path, right, wrong):
    for header in COMMON.glob("*.h"):
        (tmp_path / header.name).write_text(header.read_text())
    source = (tmp_path / "quantile.h").read_text()
    assert source.count(right) == 1, f"quantile.h has no {right!r} to change"
    (tmp_path / "quantile.h").write_text(source.replace(right, wrong))
    assert outcome(tmp_path, tmp_path).returncode == 1
