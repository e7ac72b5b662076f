// A stand-in for the tile instructions, in portable C++, from their description in Intel's manual (Software
// Developer's Manual, volume 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBF16PS). Only a build for
// tests uses it (ATTNREC_AMX=emulated): it does what the processor does, number for number, and ends the
// process where that would raise an exception.
#pragma once

#include "cpu/tiers/tiles.h"

namespace attnrec::cpu {
namespace {

struct EmulatedTileInstructions {
  using Config = TileConfig;
  static constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;

  static void tile_configure(const TileConfig& config) {
    demand(config.palette == 1, "palette 1");
    for (int i = 0; i < 14; i++) demand(config.reserved[i] == 0, "zeros in what is reserved");
    for (int i = 0; i < 16; i++) {
      demand(config.rows[i] <= (i < kTiles ? kMostRows : 0), "at most 16 rows, of 8 tiles");
      demand(config.row_bytes[i] <= (i < kTiles ? kMostBytes : 0), "at most 64 bytes a row, of 8 tiles");
      demand((config.rows[i] == 0) == (config.row_bytes[i] == 0), "rows and bytes, or neither");
    }
    State& s = state();
    s = State();
    s.config = config;
    s.configured = true;
  }

  static void tile_release() { state() = State(); }

  template <int kTile>
  static void tile_zero() {
    std::memset(in_use(kTile).tile[kTile], 0, sizeof(Tile));
  }

  template <int kTile>
  static void tile_load(const void* from, int64_t stride) {
    State& s = in_use(kTile);
    std::memset(s.tile[kTile], 0, sizeof(Tile));
    for (int m = 0; m < s.config.rows[kTile]; m++) {
      std::memcpy(s.tile[kTile][m], static_cast<const char*>(from) + m * stride, s.config.row_bytes[kTile]);
    }
  }

  template <int kTile>
  static void tile_store(void* to, int64_t stride) {
    State& s = in_use(kTile);
    for (int m = 0; m < s.config.rows[kTile]; m++) {
      std::memcpy(static_cast<char*>(to) + m * stride, s.tile[kTile][m], s.config.row_bytes[kTile]);
    }
  }

  // The first numbers of all pairs in one chain of fused multiply-adds from 0, the second ones in another;
  // then their sum, added to what is there.
  template <int kSum, int kA, int kB>
  static void tile_dot() {
    State& s = in_use(kSum);
    in_use(kA);
    in_use(kB);
    const TileConfig& c = s.config;
    demand(kSum != kA && kSum != kB && kA != kB, "three different tiles");
    demand(c.row_bytes[kSum] == c.row_bytes[kB] && c.row_bytes[kA] == 4 * c.rows[kB] &&
               c.rows[kSum] == c.rows[kA] && c.row_bytes[kSum] % 4 == 0,
           "shapes that fit");
    for (int m = 0; m < c.rows[kSum]; m++) {
      constexpr int kNumbers = kMostBytes / 4;  // beyond the shape's there are zeros
      float first[kNumbers] = {}, second[kNumbers] = {}, sum[kNumbers];
      for (int k = 0; k < c.rows[kB]; k++) {
        uint32_t pair, pairs[kNumbers];
        std::memcpy(&pair, s.tile[kA][m] + 4 * k, sizeof pair);
        std::memcpy(pairs, s.tile[kB][k], sizeof pairs);
        for (int n = 0; n < kNumbers; n++) {
          first[n] = flushed(std::fma(number(pair << 16), number(pairs[n] << 16), first[n]));
          second[n] =
              flushed(std::fma(number(pair & 0xffff0000u), number(pairs[n] & 0xffff0000u), second[n]));
        }
      }
      std::memcpy(sum, s.tile[kSum][m], sizeof sum);
      for (int n = 0; n < kNumbers; n++) sum[n] = flushed(flushed(sum[n]) + flushed(first[n] + second[n]));
      std::memset(s.tile[kSum][m], 0, kMostBytes);
      std::memcpy(s.tile[kSum][m], sum, c.row_bytes[kSum]);
    }
  }

 private:
  using Tile = unsigned char[kMostRows][kMostBytes];
  struct State {
    bool configured = false;
    TileConfig config;
    Tile tile[kTiles] = {};
  };

  static State& state() {
    static thread_local State of_thread;
    return of_thread;
  }
  static State& in_use(int tile) {
    State& s = state();
    demand(s.configured && s.config.rows[tile] > 0, "a configured tile");
    return s;
  }
  static void demand(bool met, const char* what) {
    if (met) return;
    std::fprintf(stderr, "attnrec: a tile instruction demands %s\n", what);
    std::abort();
  }

  // Denormal numbers, read or written, count as zeros. (What rounds up to the smallest normal number stays;
  // the manual leaves open whether it does.)
  static ATTNREC_MEMBER float flushed(float x) {
    return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
  }
  static ATTNREC_MEMBER float number(uint32_t bits) { return flushed(float_from_bits(bits)); }
};

}  // namespace
}  // namespace attnrec::cpu
