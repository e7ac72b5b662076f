#include "cpu/tiers/prelude.h"

#if defined(__x86_64__)
ATTNREC_TARGET_BEGIN(
    "amx-tile,amx-bf16,avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "cpu/tiers/exp2.h"
#include "cpu/tiers/vector_amx_bf16.h"
//
#include "cpu/tiers/all_ops-inl.h"

namespace attnrec::cpu {
extern const Kernels kAmxBf16;
const Kernels kAmxBf16 = make_kernels<AmxBf16Vector>("amx_bf16");
}  // namespace attnrec::cpu
ATTNREC_TARGET_END
#endif
