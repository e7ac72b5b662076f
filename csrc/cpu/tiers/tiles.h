// The tile instructions (AMX-TILE, AMX-BF16), all of this project's in this file. Eight tile registers have
// up to 16 rows of 64 bytes each; a configuration says how many of each are in use.
//
// Inline assembly, because GCC's intrinsics are the same without the "memory" clobber, by which the compiler
// knows that memory is read and written here, and take a register's number as a token only.
#pragma once

#include "cpu/tiers/prelude.h"

namespace attnrec::cpu {
namespace {

// As LDTILECFG reads it.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

struct TileInstructions {
  using Config = TileConfig;

  ATTNREC_INLINE void tile_configure(const TileConfig& config) {
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  // Back to no configuration: what a context switch then saves of the tiles is a flag, not 8 KiB.
  ATTNREC_INLINE void tile_release() { asm volatile("tilerelease" : : : "memory"); }
  template <int kTile>
  ATTNREC_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile) : "memory");
  }
  // Rows lie `stride` bytes apart.
  template <int kTile>
  ATTNREC_INLINE void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  ATTNREC_INLINE void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  // kSum[m][n] += Σ_k kA[m][k] · kB[k][n] of bf16 pairs k; see the stand-in for the order.
  template <int kSum, int kA, int kB>
  ATTNREC_INLINE void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB) : "memory");
  }
};

}  // namespace
}  // namespace attnrec::cpu
