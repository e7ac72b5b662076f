// What a tier's translation unit compiles: every op over its vectors `V`, listed in the order of `Kernels`.
#pragma once

#include "cpu/probes-inl.h"
#include "cpu/target_attention-inl.h"

namespace attnrec::cpu {
namespace {

template <class V>
constexpr Kernels make_kernels(const char* name) {
  return {name, [] { return V::kRows; }, probe_fma<V>, probe_read<V>, probe_exp2<V>, target_attention_unit<V>};
}

}  // namespace
}  // namespace attnrec::cpu
