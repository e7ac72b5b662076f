// The stand-in for AMX's tile instructions: its answers are those that the manual's description gives by
// hand, and, where the processor has the instructions, theirs bit for bit. Exit status 0 where all is right.

#include <random>
#include <vector>

#include "cpu/tiers/tiles_emulated.h"
#include "cpu/tiers/tiles_here.h"

using namespace attnrec::cpu;

namespace {

struct Shape {
  int rows, pairs, columns;
};

// to[rows][16] += a[rows][16 pairs] · b[pairs][16 pairs].
template <class Instructions>
void multiply(const Shape& shape, const uint32_t* a, const uint32_t* b, float* to) {
  TileConfig config;
  const auto set = [&](int tile, int rows, int columns) {
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.row_bytes[tile] = static_cast<uint16_t>(4 * columns);
  };
  set(0, shape.rows, shape.columns);
  set(1, shape.rows, shape.pairs);
  set(2, shape.pairs, shape.columns);
  Instructions::tile_configure(config);
  Instructions::template tile_load<0>(to, 64);
  Instructions::template tile_load<1>(a, 64);
  Instructions::template tile_load<2>(b, 64);
  Instructions::template tile_dot<0, 1, 2>();
  Instructions::template tile_store<0>(to, 64);
  Instructions::tile_release();
}

uint32_t pair(float first, float second) {
  return uint32_t{to_bfloat16(first).bits} | uint32_t{to_bfloat16(second).bits} << 16;
}

// Of one element: what was there, and pairs to multiply.
float dot(float start, const std::vector<uint32_t>& a, const std::vector<uint32_t>& b) {
  uint32_t of_a[16] = {}, of_b[16 * 16] = {};
  float to[16] = {start};
  for (size_t k = 0; k < a.size(); k++) {
    of_a[k] = a[k];
    of_b[16 * k] = b[k];
  }
  multiply<EmulatedTileInstructions>({1, static_cast<int>(a.size()), 1}, of_a, of_b, to);
  return to[0];
}

int check(const char* what, float got, float right) {
  if (bits_from_float(got) == bits_from_float(right)) return 0;
  std::printf("%s: %a, must be %a\n", what, static_cast<double>(got), static_cast<double>(right));
  return 1;
}

int by_hand() {
  const uint32_t one = pair(1, 1), ones = pair(1, 0);
  const float infinity = std::numeric_limits<float>::infinity();
  int wrong = 0;
  wrong += check("a product", dot(1, {pair(3, 5)}, {pair(7, 11)}), 77);
  // 2^24 + 1 rounds to 2^24. In two chains 1 + 1 survives; in one, or added to the start, it would not.
  wrong += check("two chains", dot(0, {pair(0x1p24f, 1), pair(0, 1)}, {one, one}), 0x1p24f + 2);
  wrong += check("a chain", dot(0, {pair(0x1p24f, 0), pair(1, 0), pair(1, 0)}, {one, one, one}), 0x1p24f);
  wrong += check("the start comes last", dot(0x1p24f, {pair(1, 0), pair(1, 0)}, {one, one}), 0x1p24f + 2);
  wrong +=
      check("ties to even", dot(0, {pair(0x1p24f + 0x1p17f, 0), pair(1, 0)}, {one, one}), 0x1p24f + 0x1p17f);
  wrong += check("a denormal factor", dot(0, {0x0001u}, {pair(0x1p100f, 0)}), 0);
  wrong += check("a denormal start", dot(0x1p-130f, {ones}, {0}), 0);
  wrong += check("a denormal result", dot(0, {pair(0x1p-70f, 0)}, {pair(0x1p-70f, 0)}), 0);
  wrong +=
      check("a denormal product", dot(0, {pair(0x1p-126f, 0), pair(0x1p-70f, 0)}, {one, pair(0x1p-79f, 0)}),
            0x1p-126f + 0x1p-149f);
  wrong += check("a denormal result keeps its sign",
                 dot(-0.0f, {pair(-0x1p-70f, -0x1p-70f)}, {pair(0x1p-70f, 0x1p-70f)}), -0.0f);
  wrong += check("infinity", dot(0, {ones}, {pair(infinity, 0)}), infinity);
  const float nan = dot(0, {0}, {pair(infinity, 0)});
  wrong += check("0 times infinity is NaN", nan == nan ? 0 : 1, 1);

  // Rows and columns beyond the shape are neither read nor written.
  std::vector<uint32_t> a(16 * 16, pair(1, 2)), b(16 * 16, pair(1, 1));
  std::vector<float> to(16 * 16, -1);
  multiply<EmulatedTileInstructions>({3, 5, 7}, a.data(), b.data(), to.data());
  for (int i = 0; i < 16 * 16; i++)
    wrong += check("a shape", to[static_cast<size_t>(i)], i / 16 < 3 && i % 16 < 7 ? 5 * 3 - 1 : -1);
  return wrong;
}

// Random bits: every kind of number, and denormal ones often.
int against_the_processor() {
  std::mt19937 random(1);
  int wrong = 0;
  for (int trial = 0; trial < 2000; trial++) {
    const auto size = [&] { return 1 + static_cast<int>(random() % 16); };
    const Shape shape{size(), size(), size()};
    const uint32_t exponents = trial % 2 ? 0x3f803f80u : 0;  // of numbers near 1, or any
    std::vector<uint32_t> a(16 * 16), b(16 * 16);
    for (uint32_t& x : a) x = exponents ? (random() & 0x807f807fu) | exponents : random();
    for (uint32_t& x : b) x = exponents ? (random() & 0x807f807fu) | exponents : random();
    std::vector<float> ours(16 * 16);
    for (float& x : ours) x = exponents ? 0.5f : float_from_bits(random());
    std::vector<float> theirs = ours;
    multiply<EmulatedTileInstructions>(shape, a.data(), b.data(), ours.data());
    multiply<TileInstructions>(shape, a.data(), b.data(), theirs.data());
    for (size_t i = 0; i < ours.size(); i++) {
      const bool both_nan = ours[i] != ours[i] && theirs[i] != theirs[i];
      if (!both_nan) wrong += check("stand-in", ours[i], theirs[i]);
    }
  }
  return wrong;
}

}  // namespace

int main() {
  int wrong = by_hand();
  if (tiles_here()) {
    wrong += against_the_processor();
    std::puts("tile instructions: the stand-in held against the processor's");
  } else {
    std::puts("tile instructions: the stand-in held against the manual; this processor has none");
  }
  return wrong != 0;
}
