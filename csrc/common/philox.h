// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once

#include "platform.h"

namespace aml {

// The first word for counter (block, sample, 0, 0) and key `seed`: the same on every back end.
AML_INLINE uint32_t philox_key(uint64_t seed, uint32_t sample, uint32_t block) {
  uint32_t x0 = block, x1 = sample, x2 = 0, x3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(x0) * 0xD2511F53u, product1 = uint64_t(x2) * 0xCD9E8D57u;
    x0 = static_cast<uint32_t>(product1 >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(product1);
    x2 = static_cast<uint32_t>(product0 >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return x0;
}

}  // namespace aml
