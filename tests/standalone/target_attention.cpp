// The CPU kernels without torch: target_attention of the tier in use against a few lines in double. `make
// aarch64` builds it for another architecture and runs it in an emulator. Exit status 0 where all is right.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/tiers.h"

using namespace attnrec::cpu;

namespace {

constexpr int kHeads = 2, kUsers = 3;
constexpr int64_t kCandidates[kUsers] = {3, 5, 1}, kEvents[kUsers] = {7, 0, 150};

struct Batch {
  std::vector<int64_t> q_offsets{0}, kv_offsets{0}, visible;
  int64_t rows() const { return q_offsets.back(); }
  int64_t events() const { return kv_offsets.back(); }
};

// The softmax over the first `visible` events, in double; zeros and -inf where there are none.
template <class Real>
double expected(const Batch& batch, int user, int64_t row, int head, int dim, const std::vector<Real>& query,
                const std::vector<Real>& key, const std::vector<Real>& value, std::vector<double>& out) {
  double sum = 0;
  out.assign(static_cast<size_t>(dim), 0.0);
  for (int64_t event = 0; event < batch.visible[row]; event++) {
    const int64_t k = ((batch.kv_offsets[user] + event) * kHeads + head) * dim;
    double score = 0;
    for (int d = 0; d < dim; d++)
      score += double{query[(row * kHeads + head) * dim + d]} * double{key[k + d]};
    const double weight = std::exp(score / std::sqrt(dim));
    sum += weight;
    for (int d = 0; d < dim; d++) out[d] += weight * double{value[k + d]};
  }
  for (double& number : out) number = sum > 0 ? number / sum : 0.0;
  return std::log(sum);
}

template <class Real>
int wrong_numbers(Element element, int dim, double tolerance) {
  std::mt19937 random(static_cast<unsigned>(dim));
  std::normal_distribution<Real> normal;
  Batch batch;
  for (int user = 0; user < kUsers; user++) {
    for (int64_t c = 0; c < kCandidates[user]; c++)
      batch.visible.push_back(std::max<int64_t>(kEvents[user] - c, 0));
    batch.q_offsets.push_back(batch.rows() + kCandidates[user]);
    batch.kv_offsets.push_back(batch.events() + kEvents[user]);
  }
  const auto draw = [&](int64_t rows) {
    std::vector<Real> numbers(static_cast<size_t>(rows * kHeads * dim));
    for (Real& number : numbers) number = normal(random);
    return numbers;
  };
  const std::vector<Real> query = draw(batch.rows()), key = draw(batch.events()),
                          value = draw(batch.events());

  Attention a;
  a.element = element;
  a.head_dim = dim;
  a.heads = a.kv_heads = kHeads;
  a.users = kUsers;
  a.scale = 1 / std::sqrt(dim);
  a.query = {query.data(), kHeads * dim, dim};
  a.key = {key.data(), kHeads * dim, dim};
  a.value = {value.data(), kHeads * dim, dim};
  a.q_offsets = batch.q_offsets.data();
  a.kv_offsets = batch.kv_offsets.data();
  a.visible = batch.visible.data();

  std::vector<Real> out(query.size(), -77), lse(static_cast<size_t>(batch.rows() * kHeads), -77);
  const Kernels& tier = kernels(element);
  std::vector<double> right;
  int wrong = 0;
  for (int user = 0; user < kUsers; user++) {
    for (int head = 0; head < kHeads; head++) {
      Unit unit;
      unit.user = user;
      unit.first = batch.q_offsets[user];
      unit.rows = static_cast<int>(kCandidates[user]);
      unit.head = unit.kv_head = head;
      const int64_t bytes = tier.target_attention(a, unit, nullptr, nullptr, nullptr);
      std::vector<char> memory(static_cast<size_t>(bytes) + 64);
      void* aligned = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
      tier.target_attention(a, unit, aligned, out.data(), lse.data());
    }
    for (int64_t row = batch.q_offsets[user]; row < batch.q_offsets[user + 1]; row++) {
      for (int head = 0; head < kHeads; head++) {
        const double log_sum = expected(batch, user, row, head, dim, query, key, value, right);
        const double got = lse[row * kHeads + head];
        wrong += std::isinf(log_sum) ? got != log_sum : !(std::fabs(got - log_sum) < tolerance);
        for (int d = 0; d < dim; d++) {
          wrong += !(std::fabs(out[(row * kHeads + head) * dim + d] - right[d]) < tolerance);
        }
      }
    }
  }
  std::printf("%s, %zu-byte numbers, head dim %3d: %d of %zu wrong\n", tier.name, sizeof(Real), dim, wrong,
              out.size() + lse.size());
  return wrong;
}

}  // namespace

int main() {
  int wrong = 0;
  for (int dim : {8, 16, 33, 128}) {
    wrong += wrong_numbers<float>(Element::kFloat32, dim, 1e-5);
    wrong += wrong_numbers<double>(Element::kFloat64, dim, 1e-12);
  }
  return wrong ? 1 : 0;
}
