#include "cpu/tiers/prelude.h"

#if defined(__x86_64__)
ATTNREC_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "cpu/tiers/exp2.h"
#include "cpu/tiers/vector_avx512.h"
//
#include "cpu/tiers/all_ops-inl.h"

namespace attnrec::cpu {
extern const Kernels kAvx512;
const Kernels kAvx512 = make_kernels<Avx512Vector>("avx512");
}  // namespace attnrec::cpu
ATTNREC_TARGET_END
#endif
