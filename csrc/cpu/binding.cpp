#include "cpu/binding.h"

namespace attnrec::cpu {
namespace {

const char* name_of(ScalarType dtype) { return torch::headeronly::toString(dtype); }

}  // namespace

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); i++) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

Element element_of(const char* op, const char* name, const Tensor& tensor) {
  ATTNREC_CHECK(tensor.is_cpu(), op, name, " must be on the CPU, as this kernel is");
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::Double:
      return Element::kFloat64;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    default:
      ATTNREC_CHECK(false, op, name, " must be float32, bfloat16, float16 or float64, got ",
                    name_of(tensor.scalar_type()));
  }
}

void check_tensor(const char* op, const char* name, const Tensor& tensor, int64_t rank, ScalarType dtype) {
  ATTNREC_CHECK(tensor.is_cpu(), op, name, " must be on the CPU, as the other arguments are");
  ATTNREC_CHECK(tensor.dim() == rank, op, name, " must have ", rank, " dimensions, got shape ",
                shape_of(tensor));
  ATTNREC_CHECK(tensor.scalar_type() == dtype, op, name, " must have dtype ", name_of(dtype), ", got ",
                name_of(tensor.scalar_type()));
}

Vectors vectors_of(const Tensor& tensor, std::vector<Tensor>& kept) {
  const int64_t last = tensor.dim() - 1;
  kept.push_back(tensor.stride(last) == 1 || tensor.size(last) == 1 ? tensor
                                                                    : torch::stable::contiguous(tensor));
  const Tensor& read = kept.back();
  return {read.const_data_ptr(), read.stride(0), last == 2 ? read.stride(1) : 0};
}

std::vector<int64_t> integers(const char* op, const char* name, const Tensor& tensor, int64_t count) {
  ATTNREC_CHECK(tensor.is_cpu(), op, name, " must be on the CPU, as the other arguments are");
  ATTNREC_CHECK(tensor.dim() == 1, op, name, " must have 1 dimension, got shape ", shape_of(tensor));
  ATTNREC_CHECK(count < 0 || tensor.size(0) == count, op, name, " must have ", count, " elements, got shape ",
                shape_of(tensor));
  std::vector<int64_t> values(tensor.size(0));
  const int64_t stride = tensor.stride(0);
  if (tensor.scalar_type() == ScalarType::Long) {
    const auto* data = static_cast<const int64_t*>(tensor.const_data_ptr());
    for (size_t i = 0; i < values.size(); i++) values[i] = data[static_cast<int64_t>(i) * stride];
  } else if (tensor.scalar_type() == ScalarType::Int) {
    const auto* data = static_cast<const int32_t*>(tensor.const_data_ptr());
    for (size_t i = 0; i < values.size(); i++) values[i] = data[static_cast<int64_t>(i) * stride];
  } else {
    ATTNREC_CHECK(false, op, name, " must be int32 or int64, got ", name_of(tensor.scalar_type()));
  }
  return values;
}

std::vector<int64_t> offsets_of(const char* op, const char* name, const Tensor& tensor, int64_t total,
                                const char* rows_name) {
  std::vector<int64_t> offsets = integers(op, name, tensor, -1);
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

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> shape, std::optional<ScalarType> dtype) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, dtype);
}

void* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, size));
    STD_TORCH_CHECK(memory, "attnrec: no memory for ", size, " bytes of scratch");
  }
  return memory.get();
}

}  // namespace attnrec::cpu
