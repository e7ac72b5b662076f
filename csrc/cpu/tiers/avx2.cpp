#include "cpu/tiers/prelude.h"

#if defined(__x86_64__)
ATTNREC_TARGET_BEGIN("avx2,fma,f16c")
#include "cpu/tiers/exp2.h"
#include "cpu/tiers/vector_avx2.h"
//
#include "cpu/tiers/all_ops-inl.h"

namespace attnrec::cpu {
extern const Kernels kAvx2;
const Kernels kAvx2 = make_kernels<Avx2Vector>("avx2");
}  // namespace attnrec::cpu
ATTNREC_TARGET_END
#endif
