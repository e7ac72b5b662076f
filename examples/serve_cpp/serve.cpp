// Ranks a batch of candidates with an exported model, in a process without Python and without a compiler.
//
//   serve libattnrec_ops.so ranking.pt2 batch.pt
//
// The package and the batch are those of export.py. Prints a line a candidate, user by user and the likeliest
// click first: user, rank, item, probability.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Batch = std::map<std::string, at::Tensor>;

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": " + std::strerror(errno));
  return {std::istreambuf_iterator<char>(file), {}};
}

// The ops register themselves with torch when their library is loaded; the package finds them by name.
void load_ops(const std::string& library) {
  if (!dlopen(library.c_str(), RTLD_NOW)) throw std::runtime_error(dlerror());
}

// A dict of tensors as torch.save writes it.
Batch load_batch(const std::string& path) {
  const std::string wanted = path + ": want a dict of tensors, as torch.save writes it";
  c10::IValue saved;
  try {
    saved = torch::jit::pickle_load(read(path));
  } catch (const c10::Error& error) {
    throw std::runtime_error(wanted + "; " + error.what_without_backtrace());
  }
  if (!saved.isGenericDict()) throw std::runtime_error(wanted);
  Batch batch;
  for (const auto& entry : saved.toGenericDict()) {
    if (!entry.key().isString() || !entry.value().isTensor()) throw std::runtime_error(wanted);
    batch[entry.key().toStringRef()] = entry.value().toTensor().contiguous();
  }
  return batch;
}

std::string describe(const at::Tensor& tensor) {
  std::ostringstream words;
  words << c10::getDtypeNames(tensor.scalar_type()).first << " " << tensor.sizes();
  return words.str();
}

// The batch in the order that the model takes it. Compiled code reads memory by the dtypes and shapes that it
// was compiled for, and through ids, so they are checked first; offsets the ops check themselves. `inputs`
// has a line for each, "statistics float32 candidates 7" or "items int64 candidates below 1682": a word is a
// size that all lines have in common.
std::vector<at::Tensor> in_order(const std::string& inputs, const Batch& batch) {
  std::vector<at::Tensor> ordered;
  std::map<std::string, int64_t> sizes;
  std::istringstream lines(inputs);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string name, dtype;
    words >> name >> dtype;
    std::vector<std::string> shape(std::istream_iterator<std::string>(words), {});
    int64_t below = -1;
    if (shape.size() > 2 && shape[shape.size() - 2] == "below") {
      below = std::stoll(shape.back());
      shape.resize(shape.size() - 2);
    }
    const auto found = batch.find(name);
    if (found == batch.end()) throw std::runtime_error("the batch has no \"" + name + "\"");
    const at::Tensor& tensor = found->second;
    bool fits = c10::getDtypeNames(tensor.scalar_type()).first == dtype &&
                tensor.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; fits && i < shape.size(); i++) {
      const int64_t size = tensor.size(static_cast<int64_t>(i));
      const bool fixed = std::isdigit(static_cast<unsigned char>(shape[i][0]));
      fits = size == (fixed ? std::stoll(shape[i]) : sizes.try_emplace(shape[i], size).first->second);
    }
    if (!fits) {
      std::string known;
      for (const auto& [word, size] : sizes) known += ", " + word + " = " + std::to_string(size);
      throw std::runtime_error("the batch's " + name + " is " + describe(tensor) + ", the model takes \"" +
                               line + "\"" + known);
    }
    if (below >= 0 && tensor.numel() > 0) {
      const int64_t least = tensor.min().item<int64_t>(), most = tensor.max().item<int64_t>();
      if (least < 0 || most >= below) {
        throw std::runtime_error("the batch's " + name + " are from " + std::to_string(least) + " to " +
                                 std::to_string(most) + ", the model takes \"" + line + "\"");
      }
    }
    ordered.push_back(tensor);
  }
  return ordered;
}

void print_ranked(const Batch& batch, const at::Tensor& probabilities) {
  const int64_t* users = batch.at("users").const_data_ptr<int64_t>();
  const int64_t* items = batch.at("items").const_data_ptr<int64_t>();
  const int64_t* offsets = batch.at("offsets").const_data_ptr<int64_t>();
  const float* score = probabilities.const_data_ptr<float>();
  for (int64_t user = 0; user + 1 < batch.at("offsets").numel(); user++) {
    std::vector<int64_t> rows(static_cast<size_t>(offsets[user + 1] - offsets[user]));
    std::iota(rows.begin(), rows.end(), offsets[user]);
    std::stable_sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) { return score[a] > score[b]; });
    for (size_t rank = 0; rank < rows.size(); rank++) {
      const int64_t row = rows[rank];
      std::printf("%lld\t%zu\t%lld\t%.9g\n", static_cast<long long>(users[row]), rank + 1,
                  static_cast<long long>(items[row]), static_cast<double>(score[row]));
    }
  }
}

void serve(const std::string& library, const std::string& package, const std::string& batch_file) {
  c10::InferenceMode inference;
  load_ops(library);
  if (std::ifstream file(package); !file) throw std::runtime_error(package + ": " + std::strerror(errno));
  torch::inductor::AOTIModelPackageLoader model(package);  // a server does this once, ...
  const auto metadata = model.get_metadata();
  const auto inputs = metadata.find("inputs");
  if (inputs == metadata.end()) throw std::runtime_error(package + ": export.py did not write it");
  const Batch batch = load_batch(batch_file);  // ... and this for each request
  print_ranked(batch, model.run(in_order(inputs->second, batch)).at(0));
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) {
    std::fprintf(stderr, "usage: %s libattnrec_ops.so ranking.pt2 batch.pt\n", words[0]);
    return 2;
  }
  try {
    serve(words[1], words[2], words[3]);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "serve: %s\n", error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "serve: %s\n", error.what());
    return 1;
  }
}
