// Roofline probes: what this processor does at best, on the tier that the kernels use. A probe takes about a
// quarter of a second. Seen from outside the library: csrc/module.cpp, in another one, calls them.
#pragma once

#include <cstdint>

#include "cpu/element.h"

namespace attnrec::cpu {

// Multiply-adds per second, each counted as two operations, over `threads` threads.
[[gnu::visibility("default")]] double probe_flops(Element element, int threads);

// Bytes read per second by `threads` threads from a buffer of `bytes` in all, which each goes through
// repeatedly.
[[gnu::visibility("default")]] double probe_read_bandwidth(int64_t bytes, int threads);

// Exponentials (2^x, fp32) per second over `threads` threads.
[[gnu::visibility("default")]] double probe_exp(int threads);

}  // namespace attnrec::cpu
