// attnrec._C: facts about the build and the processor for Python. This file is the only one that knows
// Python: everything else is linked into a library of its own, libattnrec_ops.so, which this one needs. The
// torch ops register themselves when that is loaded, be it by Python with this module or by a C++ program
// alone.

// The copy of pybind11 in torch 2.11 refuses a file that is restricted to the stable ABI. Nothing here is of
// that ABI.
#undef TORCH_TARGET_VERSION

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <stdexcept>
#include <string>

#include "attnrec_build.h"  // written by setup.py
#include "cpu/probes.h"
#include "cpu/tiers.h"

namespace py = pybind11;
namespace cpu = attnrec::cpu;

namespace {

void check_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
}

double probe_flops(const std::string& dtype, int threads) {
  check_threads(threads);
  if (dtype != "float32" && dtype != "float64") {
    throw std::invalid_argument("dtype must be \"float32\" or \"float64\", got \"" + dtype + "\"");
  }
  return cpu::probe_flops(dtype == "float32" ? cpu::Element::kFloat32 : cpu::Element::kFloat64, threads);
}

double probe_read_bandwidth(int64_t bytes, int threads) {
  check_threads(threads);
  if (bytes < 1) throw std::invalid_argument("bytes must be positive, got " + std::to_string(bytes));
  return cpu::probe_read_bandwidth(bytes, threads);
}

double probe_exp(int threads) {
  check_threads(threads);
  return cpu::probe_exp(threads);
}

py::dict build_facts() {
  py::dict build;
  build["compiler"] = __VERSION__;
  build["cxx_standard"] = static_cast<long>(__cplusplus);
  build["torch"] = TORCH_VERSION;
  build["flags"] = ATTNREC_BUILD_FLAGS;
  build["cuda"] = ATTNREC_BUILD_CUDA;
  build["why_no_cuda"] = ATTNREC_BUILD_WHY_NO_CUDA;
  return build;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "attnrec's compiled part: facts about build and processor. Loading it registers the torch ops.";
  m.attr("build") = build_facts();
  m.def("tier_name", &cpu::tier_name,
        "The CPU tier in use. RuntimeError where ATTNREC_CPU_TIER names one that this processor lacks.");
  m.def("tiers_available", &cpu::tiers_available, "The CPU tiers of this processor, the plainest first.");
  m.def("probe_flops", &probe_flops, py::arg("dtype") = "float32", py::arg("threads") = 1, release(),
        "Floating-point operations per second of multiply-adds (two each) on the tier in use.");
  m.def("probe_read_bandwidth", &probe_read_bandwidth, py::arg("bytes"), py::arg("threads") = 1, release(),
        "Bytes per second read from a buffer of `bytes`, shared out among the threads.");
  m.def("probe_exp", &probe_exp, py::arg("threads") = 1, release(),
        "Exponentials per second (2^x in fp32) on the tier in use.");
}
