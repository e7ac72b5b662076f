// The instruction sets that the kernels are compiled for, and which of them runs here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/catalog_cross_entropy.h"
#include "cpu/catalog_filter.h"
#include "cpu/catalog_topk.h"
#include "cpu/softmax_score.h"
#include "cpu/target_attention_backward.h"

namespace attnrec::cpu {

// One tier's kernels: a row an op. A kernel runs one unit in `memory`; called with memory = nullptr it only
// says how many bytes of it such a unit needs.
struct Kernels {
  const char* name;
  double (*probe_fma)(int64_t rounds, double* sink);  // the probes: see probes-inl.h
  double (*probe_read)(const void* memory, int64_t bytes, double* sink);
  double (*probe_exp2)(int64_t rounds, double* sink);
  int64_t (*target_attention)(const Attention&, const Unit&, void* memory, void* out, void* lse);
  int64_t (*target_attention_backward)(const Attention&, const Unit&, void* memory, const AttentionGradients&,
                                       const GradQuery&);
  void (*target_attention_backward_add)(const void* parts, int64_t count, int64_t stride, int64_t n, Element,
                                        void* out);
  int64_t (*target_attention_weights)(const Attention&, const Unit&, void* memory, const int64_t* offsets,
                                      void* weights);
  int64_t (*target_attention_top)(const Attention&, const Unit&, void* memory, int64_t top, void* weights,
                                  int64_t* events);
  int64_t (*softmax_score)(const Attention&, const Unit&, void* memory, void* logits, double* maximum,
                           double* sum);
  void (*softmax_score_normalize)(const void* logits, int64_t n, double maximum, double sum, Element,
                                  void* out);
  int64_t (*softmax_score_backward)(const Attention&, const Unit&, void* memory, const SoftmaxScoreGradient&);
  int64_t (*catalog_cross_entropy)(const Attention&, const Unit&, void* memory, const CrossEntropyRows&,
                                   const CrossEntropyParts&);
  void (*catalog_cross_entropy_target_logits)(const Attention&, const Vectors& items, const double* bias,
                                              int64_t first, int64_t n, void* memory, double* logits);
  int64_t (*catalog_cross_entropy_backward)(const Attention&, const Unit&, void* memory,
                                            const CrossEntropyRows&, const CrossEntropyGradient&);
  int64_t (*catalog_topk)(const Attention&, const Unit&, void* memory, const TopkOptions&, const TopkParts&);
  int64_t (*catalog_topk_rescore)(const Attention&, void* memory, const TopkOptions&, int64_t user,
                                  const int64_t* ids, int64_t count, double* scores);
  // Null where the tier has no products of codes: a filter is then not used.
  int64_t (*catalog_filter_sample)(const CatalogFilter&, const FilterUsers&, const FilterUnit&, void* memory,
                                   float* best, int64_t stride, int64_t groups);
  int64_t (*catalog_filter_scan)(const CatalogFilter&, const FilterUsers&, const FilterUnit&, void* memory,
                                 const CandidateSink&, FilterSums&);
};

// Best tier of this processor, or the one that ATTNREC_CPU_TIER names. Throws std::runtime_error where the
// variable names a tier that is unknown or that the processor lacks. `Element::kFloat64` has the baseline
// tier in double only.
const Kernels& kernels(Element element);

const char* tier_name();
std::vector<std::string> tiers_available();

}  // namespace attnrec::cpu
