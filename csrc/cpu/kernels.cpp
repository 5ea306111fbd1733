// Which instruction set this processor runs.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace aml::cpu {

extern const Kernels kernels_base;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
extern const Kernels kernels_v3, kernels_v4;
#endif

namespace {

struct Choice {
  const Kernels* kernels;
  const char* name;
};

Choice choose() {
  const char* wanted = std::getenv("AML_KERNELS_ISA");  // to test the others on a new processor
  const auto allowed = [&](const char* name) { return !wanted || !*wanted || std::strcmp(wanted, name) == 0; };
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (allowed("x86-64-v4") && __builtin_cpu_supports("x86-64-v4")) return {&kernels_v4, "x86-64-v4"};
  if (allowed("x86-64-v3") && __builtin_cpu_supports("x86-64-v3")) return {&kernels_v3, "x86-64-v3"};
#endif
  (void)allowed;
  return {&kernels_base, "base"};
}

const Choice choice = choose();

}  // namespace

const Kernels& kernels() { return *choice.kernels; }
const char* instruction_set() { return choice.name; }

}  // namespace aml::cpu
