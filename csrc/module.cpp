// attnrec._C: facts about the build for Python. The torch ops sit in the same library and register themselves
// when it is loaded; this file is the only one that knows Python.

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "attnrec_build.h"  // written by setup.py

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "attnrec's compiled part: build facts. Loading it registers the torch ops.";
  py::dict build;
  build["compiler"] = __VERSION__;
  build["cxx_standard"] = static_cast<long>(__cplusplus);
  build["torch"] = TORCH_VERSION;
  build["flags"] = ATTNREC_BUILD_FLAGS;
  build["cuda"] = ATTNREC_BUILD_CUDA;
  build["why_no_cuda"] = ATTNREC_BUILD_WHY_NO_CUDA;
  m.attr("build") = build;
}
