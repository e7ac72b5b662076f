#include "cpu/tiers.h"

#include <cstdlib>
#include <stdexcept>

#include "cpu/tiers/tiles_here.h"

namespace attnrec::cpu {

extern const Kernels kBaseline, kBaselineDouble, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16;

namespace {

struct Tier {
  const Kernels* kernels;
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && has_avx2();
}
// Every processor with the first has the second; systems and hypervisors may take either away.
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

#if defined(ATTNREC_AMX_EMULATED)
constexpr bool kTilesEmulated = true;
#else
constexpr bool kTilesEmulated = false;
#endif
#endif

// From the plainest to the best. libgcc's check covers both the processor (CPUID) and the system (XGETBV).
const Tier kTiers[] = {
    {&kBaseline, [] { return true; }},
#if defined(__x86_64__)
    {&kAvx2, has_avx2},
    {&kAvx512, has_avx512},
    {&kAvx512Bf16, has_avx512_bf16},
    {&kAmxBf16, [] { return has_avx512_bf16() && (kTilesEmulated || tiles_here()); }},
#endif
};

const Kernels& choose() {
  const char* asked = std::getenv("ATTNREC_CPU_TIER");
  const Kernels* best = nullptr;
  std::string here;
  for (const Tier& tier : kTiers) {
    if (!tier.runs_here()) continue;
    here += (here.empty() ? "" : ", ") + std::string(tier.kernels->name);
    if (!asked || !*asked || asked == std::string(tier.kernels->name)) best = tier.kernels;
  }
  if (!best) {
    throw std::runtime_error("attnrec: ATTNREC_CPU_TIER must name a tier that this processor has (" + here +
                             "), got \"" + asked + "\"");
  }
  return *best;
}

}  // namespace

const Kernels& kernels(Element element) {
  static const Kernels& chosen = choose();
  return element == Element::kFloat64 ? kBaselineDouble : chosen;
}

// Seen from outside the library: csrc/module.cpp, in another one, calls this and the next.
[[gnu::visibility("default")]] const char* tier_name() { return kernels(Element::kFloat32).name; }

[[gnu::visibility("default")]] std::vector<std::string> tiers_available() {
  std::vector<std::string> names;
  for (const Tier& tier : kTiers) {
    if (tier.runs_here()) names.push_back(tier.kernels->name);
  }
  return names;
}

}  // namespace attnrec::cpu
