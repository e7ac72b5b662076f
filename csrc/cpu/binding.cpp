#include "cpu/binding.h"

namespace attnrec::cpu {

Element element_of(const char* op, const char* name, const Tensor& tensor) {
  check_floating(op, name, tensor);
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Element::kFloat64;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    default:
      return Element::kFloat32;
  }
}

std::vector<int64_t> integers(const char* op, const char* name, const Tensor& tensor, int64_t count,
                              const Tensor& like) {
  check_integers(op, name, tensor, count, like);
  std::vector<int64_t> values(tensor.size(0));
  const int64_t stride = tensor.stride(0);
  if (tensor.scalar_type() == ScalarType::Long) {
    const auto* data = static_cast<const int64_t*>(tensor.const_data_ptr());
    for (size_t i = 0; i < values.size(); i++) values[i] = data[static_cast<int64_t>(i) * stride];
  } else {
    const auto* data = static_cast<const int32_t*>(tensor.const_data_ptr());
    for (size_t i = 0; i < values.size(); i++) values[i] = data[static_cast<int64_t>(i) * stride];
  }
  return values;
}

std::vector<int64_t> offsets_of(const char* op, const char* name, const Tensor& tensor, const Tensor& rows,
                                const char* rows_name) {
  const int64_t total = rows.size(0);
  std::vector<int64_t> offsets = integers(op, name, tensor, -1, rows);
  ATTNREC_CHECK(!offsets.empty(), op, name, " must have users + 1 elements, got none");
  ATTNREC_CHECK(offsets.front() == 0, op, name, " must start at 0, got ", offsets.front());
  for (size_t i = 1; i < offsets.size(); i++) {
    ATTNREC_CHECK(offsets[i] >= offsets[i - 1], op, name, " must not fall, got ", offsets[i - 1], " then ",
                  offsets[i], " at user ", i - 1);
  }
  ATTNREC_CHECK(offsets.back() == total, op, name, " must end at ", total, ", the rows of ", rows_name,
                ", got ", offsets.back());
  return offsets;
}

void* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;  // until there is some again: a failed call leaves none, and the next one has to ask
    const int64_t wanted = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, wanted));
    STD_TORCH_CHECK(memory, "attnrec: no memory for ", wanted, " bytes of scratch");
    size = wanted;
  }
  return memory.get();
}

}  // namespace attnrec::cpu
