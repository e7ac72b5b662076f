#include "cpu/probes.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/tiers.h"

namespace attnrec::cpu {
namespace {

constexpr std::chrono::milliseconds kWarmUp{50}, kMeasured{200};
std::atomic<double> g_sink{0};

// Units of work per second: every thread calls work(thread, &sink), which returns the units that it did,
// again and again. What is done while other threads still start, or have ended, is not counted.
template <class Work>
double rate(int threads, const Work& work) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> rates(static_cast<size_t>(threads));
  const auto run = [&](int thread) {
    double sink = 0, done = 0;
    const auto start = Clock::now();
    auto from = start, now = start;
    while (now < start + kWarmUp + kMeasured) {
      const double units = work(thread, &sink);
      now = Clock::now();
      if (from < start + kWarmUp) {
        from = now;  // the count starts at the end of the last piece of the warm-up
      } else {
        done += units;
      }
    }
    const double seconds = std::chrono::duration<double>(now - from).count();
    rates[static_cast<size_t>(thread)] = seconds > 0 ? done / seconds : 0;
    g_sink = sink;
  };
  {
    std::vector<std::jthread> others;  // waited for at the end, also where one cannot be started
    for (int thread = 1; thread < threads; thread++) others.emplace_back(run, thread);
    run(0);
  }
  double total = 0;
  for (double one : rates) total += one;
  return total;
}

}  // namespace

double probe_flops(Element element, int threads) {
  const Kernels& tier = kernels(element);
  return rate(threads, [&](int, double* sink) { return tier.probe_fma(20000, sink); });
}

double probe_read_bandwidth(int64_t bytes, int threads) {
  const Kernels& tier = kernels(Element::kFloat32);
  const int64_t part = std::max<int64_t>(bytes / threads, 1 << 12);
  std::vector<std::vector<float>> parts(static_cast<size_t>(threads));
  // A vector of numbers, not of zero pages: those would all be one page of memory, in cache.
  for (auto& numbers : parts) numbers.assign(static_cast<size_t>(part) / sizeof(float), 1.0f);
  return rate(threads, [&](int thread, double* sink) {
    return tier.probe_read(parts[static_cast<size_t>(thread)].data(), part, sink);
  });
}

double probe_exp(int threads) {
  const Kernels& tier = kernels(Element::kFloat32);
  return rate(threads, [&](int, double* sink) { return tier.probe_exp2(2000, sink); });
}

}  // namespace attnrec::cpu
