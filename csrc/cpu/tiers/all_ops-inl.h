// What a tier's translation unit compiles: every op over its vectors `V`, listed in the order of `Kernels`.
#pragma once

#include "cpu/catalog_cross_entropy-inl.h"
#include "cpu/catalog_filter-inl.h"
#include "cpu/catalog_topk-inl.h"
#include "cpu/probes-inl.h"
#include "cpu/softmax_score-inl.h"
#include "cpu/target_attention-inl.h"
#include "cpu/target_attention_backward-inl.h"
#include "cpu/target_attention_top-inl.h"
#include "cpu/target_attention_weights-inl.h"

namespace attnrec::cpu {
namespace {

template <class V>
constexpr decltype(Kernels::catalog_filter_sample) filter_sample() {
  if constexpr (V::kPairs) return catalog_filter_sample<V>;
  return nullptr;
}

template <class V>
constexpr decltype(Kernels::catalog_filter_scan) filter_scan() {
  if constexpr (V::kPairs) return catalog_filter_scan<V>;
  return nullptr;
}

template <class V>
constexpr Kernels make_kernels(const char* name) {
  return {name,
          probe_fma<V>,
          probe_read<V>,
          probe_exp2<V>,
          target_attention_unit<V>,
          target_attention_backward_unit<V>,
          target_attention_backward_add<V>,
          target_attention_weights_unit<V>,
          target_attention_top_unit<V>,
          softmax_score_unit<V>,
          softmax_score_normalize<V>,
          softmax_score_backward_unit<V>,
          catalog_cross_entropy_unit<V>,
          catalog_cross_entropy_target_logits<V>,
          catalog_cross_entropy_backward_unit<V>,
          catalog_topk_unit<V>,
          catalog_topk_rescore<V>,
          filter_sample<V>(),
          filter_scan<V>()};
}

}  // namespace
}  // namespace attnrec::cpu
