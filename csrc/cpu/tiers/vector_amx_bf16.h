// The vectors of avx512_bf16, and tiles of bf16 pairs (AMX).
#pragma once

#include "cpu/tiers/tiles_emulated.h"
#include "cpu/tiers/vector_avx512_bf16.h"

namespace attnrec::cpu {
namespace {

#if defined(ATTNREC_AMX_EMULATED)
using TileSet = EmulatedTileInstructions;
#else
using TileSet = TileInstructions;
#endif

struct AmxBf16Vector : Avx512Bf16Vector, TileSet {
  static constexpr bool kTiles = true;
};

}  // namespace
}  // namespace attnrec::cpu
