// What catalog_topk keeps of a pass through a filter.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/catalog_arguments.h"
#include "cpu/catalog_filter.h"

namespace attnrec::cpu {

constexpr double kExpError = 0.03;     // of exp2_rough
constexpr double kCloseError = 0.002;  // of what a unit adds up of users in two parts, rounding included
constexpr double kInf = std::numeric_limits<double>::infinity();

// 2^x to 3 % for an x up to 127, 0 below -127: the tiers' exp2_rough.
inline float exp2_rough(float x) {
  const float steps = std::max((x + 127 - 0.0437f) * 0x1p23f, 0.0f);
  const auto bits = static_cast<int32_t>(steps);
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// Σ exp(score - base) to 3 %, base being no lower than any of the scores.
template <class Iterator>
double sum_exp(Iterator first, Iterator last, double base) {
  float sum = 0;
  for (; first != last; ++first)
    sum += exp2_rough(static_cast<float>((first->score - base) * 1.4426950408889634));
  return sum;
}

// A sum of exponentials that is known but for each one's reach, and by how much it may be too small: each one
// by (1 + error)·exp(reach) - 1 at most. That is convex, so that at their mean reach it is, for all of them
// together, no more than what lies on the straight line from a reach of 0 to the largest one.
struct Around {
  SoftmaxParts sum, excess;

  void add(double maximum, double part, double reach) { add(maximum, part, reach, reach, kExpError); }
  void add(double maximum, double part, double reach, double mean, double error) {
    sum.add(maximum, part);
    const double less = std::exp(-reach), share = mean < reach ? mean / reach : 1;
    excess.add(maximum + reach, part * ((1 + error - less) * share + error * less * (1 - share)));
  }
  // By how much the lse of all is off at most: too small rather than too large.
  double lse_error(const SoftmaxParts& exact) const {
    if (!(sum.sum > 0)) return 0;
    SoftmaxParts all = exact;
    all.add(sum.maximum, sum.sum);
    return std::log1p(std::exp(excess.lse() - all.lse()));
  }
};

// What one unit keeps of a row. Grown without bound it would be the catalogue: past `most` what can no longer
// be among the k best is dropped. The user is given up (`lost`) where all units together take too many.
struct Kept {
  std::vector<Candidate> candidates;
  SoftmaxParts dropped;
  float base = 0, floor = 0;
  int64_t k = 0, most = 0, limit = 0;
  std::atomic<int64_t>* taken = nullptr;  // by all units
  bool lost = false;

  float take(const Candidate* first, int n) {
    // Whether it ends above the limit does not depend on who counts first.
    if (lost || taken->fetch_add(n, std::memory_order_relaxed) + n > limit) {
      lost = true;
      candidates.clear();
      return floor = std::numeric_limits<float>::infinity();
    }
    candidates.insert(candidates.end(), first, first + n);
    if (static_cast<int64_t>(candidates.size()) > most) narrow();
    return floor;
  }

  // The k-th best score that is sure: what cannot reach it goes.
  void narrow() {
    const double sure = kth_sure(candidates, k);
    drop_below(sure);
    floor = std::max(floor, below(sure));
    most = std::max(most, 2 * static_cast<int64_t>(candidates.size()));
  }

  static bool reaches(const Candidate& c, double sure) {
    return static_cast<double>(c.score) + c.reach >= sure;
  }

  void drop_below(double sure) {
    size_t n = 0;
    for (const Candidate& c : candidates) {
      if (reaches(c, sure)) {
        candidates[n++] = c;
      } else {
        dropped.add(c.score, 1);
      }
    }
    candidates.resize(n);
  }

  static float below(double x) { return static_cast<float>(x - std::abs(x) * 1e-6); }

  static double kth_sure(const std::vector<Candidate>& candidates, int64_t k) {
    if (static_cast<int64_t>(candidates.size()) < k || k == 0) return -kInf;
    std::vector<float> sure;
    sure.reserve(candidates.size());
    for (const Candidate& c : candidates) sure.push_back(c.sure());
    std::nth_element(sure.begin(), sure.begin() + (k - 1), sure.end(), std::greater<>());
    return sure[k - 1];
  }
};

}  // namespace attnrec::cpu
