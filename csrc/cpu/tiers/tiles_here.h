// Whether this process may use tiles of bf16 pairs.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace attnrec::cpu {
namespace {

#if defined(__x86_64__) && defined(__linux__)
// The processor has them, the system saves them at a switch of threads, and lets this process use them: Linux
// wants to be asked, once for all of its threads, because a signal's frame grows by 8 KiB.
inline bool tiles_here() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // CPUID leaf 7, edx
  constexpr unsigned kTileState = 3u << 17;               // of XCR0: configuration and data
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool here = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
    __get_cpuid(1, &a, &b, &c, &d);
    if ((c & bit_OSXSAVE) == 0) return false;
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return here;
}
#else
inline bool tiles_here() { return false; }  // how other systems hand them out is not known here
#endif

}  // namespace
}  // namespace attnrec::cpu
