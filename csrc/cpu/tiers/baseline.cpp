#include "cpu/tiers/prelude.h"
//
#include "cpu/tiers/exp2.h"
#include "cpu/tiers/vector_portable.h"
//
#include "cpu/tiers/all_ops-inl.h"

namespace attnrec::cpu {
extern const Kernels kBaseline, kBaselineDouble;
const Kernels kBaseline = make_kernels<PortableVector<float>>("baseline");
const Kernels kBaselineDouble = make_kernels<PortableVector<double>>("baseline");
}  // namespace attnrec::cpu
