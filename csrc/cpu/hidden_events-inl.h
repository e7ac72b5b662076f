// Events that single rows do not see: a user's seen items, accidental hits among negatives.
#pragma once

#include "cpu/tiers/prelude.h"

namespace attnrec::cpu {
namespace {

// Hides those of the sorted events `first … last` that lie among the n events from `event` on.
template <class Real>
void hide_listed(const int64_t* first, const int64_t* last, int64_t event, int n, Real* scores) {
  if (first == last) return;
  int64_t low = 0, high = last - first;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (first[middle] < event) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  for (const int64_t* e = first + low; e != last && *e < event + n; e++) {
    scores[*e - event] = -std::numeric_limits<Real>::infinity();
  }
}

}  // namespace
}  // namespace attnrec::cpu
