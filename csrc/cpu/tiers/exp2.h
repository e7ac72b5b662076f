// 2^f on [-1/2, 1/2], minimax in relative error with the constant term fixed at 1 (Lawson iteration): 2e-9
// before rounding, 8e-8 evaluated in fp32. Highest power first.
#pragma once

namespace attnrec::cpu {
namespace {

constexpr int kExp2Terms = 7;
constexpr float kExp2Coefficients[kExp2Terms] = {1.5353362e-4f,  1.3398875e-3f, 9.6184369e-3f, 5.5503323e-2f,
                                                 2.40226477e-1f, 6.9314718e-1f, 1.0f};
// The same on [0, 1]: 7e-8 evaluated.
constexpr float kExp2UpCoefficients[kExp2Terms] = {
    2.1612915e-4f, 1.2467847e-3f, 9.6754516e-3f, 5.5485282e-2f, 2.40229309e-1f, 6.9314706e-1f, 1.0f};
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

}  // namespace
}  // namespace attnrec::cpu
