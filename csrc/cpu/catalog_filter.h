// A filter in front of a catalogue: its rows rounded to bf16 or int8, in panels, and how much the rounding
// may change a score.
//
// For any user u and its rounded û, |u·e - û·ê| <= |û|·|e - ê| + |u - û|·|e|. The filter holds |e - ê| and
// |e| of each item and a call computes the users' side, so that every score is known within a bound before a
// single row of the catalogue is read.
#pragma once

#include "cpu/arguments.h"

namespace attnrec::cpu {

constexpr int kPanelItems = 32;
constexpr int kFilterSpan = 16;             // panels that all rows meet while they are in L1 or L2
constexpr int kEarlyRun = 8 * kFilterSpan;  // panels that are read in a row
constexpr int kEarly = 4;                   // of so many runs one goes first

enum class Code : int { kBFloat16, kInt8 };

inline int codes_together(Code code) { return code == Code::kInt8 ? 4 : 2; }

struct CatalogFilter {
  Code code = Code::kBFloat16;
  int head_dim = 0;
  int64_t items = 0;
  const uint32_t* codes =
      nullptr;                   // [panels][depth][kPanelItems], each 2 bf16 numbers or 4 bytes (code + 128)
  const float* scale = nullptr;  // [items], of int8
  const BFloat16* error = nullptr;  // [items][2]: |e - ê|, |e|; inf: not bounded
  const void* bias = nullptr;       // [items], or null
  Element bias_element = Element::kFloat32;
  int64_t bias_stride = 0;

  int depth() const { return (head_dim + codes_together(code) - 1) / codes_together(code); }
  int64_t panels() const { return (items + kPanelItems - 1) / kPanelItems; }
};

// A user is rounded in two parts, the second one what the first one lost, in bytes of so much of the first
// one's step. Its second part makes a score's error that of the item's rounding, and takes as long again.
constexpr int kUserParts = 2;
constexpr float kFineStep = 1.0f / 254;

// The users' side, each [users]. A score is unit · (codes · codes) + bias within `reach`, which is
// per_error · |e - ê| + per_norm · |e| and what rounding in fp32 may add.
struct FilterUsers {
  const uint32_t* codes = nullptr;  // [users][kUserParts][depth]
  const int32_t* start = nullptr;   // likewise, of int8: what takes back the 128 in the items' codes
  const float *unit = nullptr, *per_error = nullptr;
  const float* per_norm = nullptr;  // of as many parts as the unit takes
  const float* floor = nullptr;     // k items or more score at least as much; inf: find nothing
  // As TopkOptions'.
  const int64_t *excluded = nullptr, *exclude_offsets = nullptr;
};

// Some users against some panels.
struct FilterUnit {
  int rows = 0, parts = 1;
  const int64_t* users = nullptr;  // the row's, or null: row r is user r
  int64_t first_panel = 0, last_panel = 0;
  const int64_t* listed = nullptr;  // panels, rising: the unit's are then listed[first_panel], ...
  // Or of panels in a row one run in kEarly (they start at whole spans), or the others.
  enum class Spans { kAll, kEarly, kLate } spans = Spans::kAll;

  int64_t user(int row) const { return users ? users[row] : row; }
};

// An item that may be among the best: its score lies within `reach` of `score`.
struct Candidate {
  float score, reach;
  int64_t id;

  // What it scores at least. (That the difference is rounded, `reach` has room for.)
  float sure() const { return score - reach; }
};

// Where a row's candidates go, some at a time. `take` returns from where on a score counts from now on.
struct CandidateSink {
  void* context = nullptr;
  float (*take)(void* context, int row, const Candidate* candidates, int n) = nullptr;
};

// What a scan finds beside candidates.
struct FilterSums {
  double* sum = nullptr;      // [rows]: exp(score - floor) of all other items
  double* reach = nullptr;    // [rows], of users in two parts: that sum with each one's reach as its weight
  float error = 0, norm = 0;  // the largest that are finite
};

}  // namespace attnrec::cpu
