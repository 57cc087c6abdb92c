// module.cpp: the Python module fdpg_fast._C. Importing it registers the ops (library.cpp,
// cpu.cpp); its functions are facts: how it was built, and the lists that kernels and Python share.
//
// Nothing of torch is used here but its copy of pybind11, which torch 2.11 refuses to whoever asks
// for the stable ABI.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "fdpg/baseline.h"
#include "fdpg/cpu.h"
#include "fdpg/divergence.h"
#include "fdpg/statistics.h"
#include "fdpg_build_config.h"  // written by setup.py

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = FDPG_BUILD_VERSION;
  info["source_hash"] = FDPG_BUILD_SOURCE_HASH;
  info["torch"] = FDPG_BUILD_TORCH_VERSION;
  info["torch_abi"] = "2.11";  // TORCH_TARGET in setup.py: the oldest torch this can be loaded in
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["cuda"] = static_cast<bool>(FDPG_BUILD_CUDA);
  info["cuda_reason"] = FDPG_BUILD_CUDA_REASON;
  info["cuda_archs"] = FDPG_BUILD_CUDA_ARCHS;
  return info;
}

py::list divergences() {
  py::list rows;
  for (const fdpg::DivergenceInfo& info : fdpg::kDivergenceInfo) {
    rows.append(py::dict("name"_a = info.name, "takes_param"_a = info.takes_param,
                         "default"_a = info.default_param, "low"_a = info.low, "high"_a = info.high,
                         "meaning"_a = info.meaning));
  }
  return rows;
}

py::list baselines() {
  py::list rows;
  for (const fdpg::BaselineInfo& info : fdpg::kBaselineInfo) {
    rows.append(py::dict("name"_a = info.name, "takes_param"_a = info.takes_param,
                         "default"_a = info.default_param, "low"_a = info.low, "high"_a = info.high,
                         "keeps_state"_a = info.scope == fdpg::Scope::kEarlierBatches,
                         "meaning"_a = info.meaning));
  }
  return rows;
}

py::dict divergence_limits(int32_t id, double param) {
  py::dict limits;
  if (!fdpg::valid_divergence(id, param)) throw py::value_error("no such divergence");
  fdpg::visit_divergence<double>(id, param, [&](auto divergence) {
    limits["f_zero"] = divergence.f_zero();
    limits["f_prime_inf"] = divergence.f_prime_inf();
  });
  return limits;
}

std::vector<std::string> statistics() {
  return {
#define FDPG_STATISTIC_NAME(name) #name,
      FDPG_STATISTICS(FDPG_STATISTIC_NAME)
#undef FDPG_STATISTIC_NAME
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled half of fdpg_fast: registers torch.ops.fdpg.* and states facts.";
  m.def("build_info", &build_info, "How this module was built.");
  m.def("divergences", &divergences,
        "The f-divergences in the order of their ids: name, takes_param, default, low, high (open "
        "interval of the parameter), meaning.");
  m.def("divergence_limits", &divergence_limits, py::arg("id"), py::arg("param"),
        "f(0) and f'(inf) of a divergence; inf where infinite.");
  m.def("baselines", &baselines,
        "The baselines in the order of their ids: as the divergences, and keeps_state.");
  m.def("statistics", &statistics, "Names of the statistics of fdiv_weights, in order.");
  m.def("cpu_isa", &fdpg::cpu::isa,
        "The instruction set in use: amx, avx512bf16, avx512, avx2 or portable.");
  m.def("cpu_vendor", &fdpg::cpu::vendor, "Who made the CPU: amd, intel or other.");
  m.def("has_packed_products", &fdpg::cpu::has_packed_products,
        "Whether that has instructions for products of bf16.");
  m.def("set_cpu_isa", &fdpg::cpu::set_isa, py::arg("name"),
        "Chooses an instruction set; False if this CPU lacks it or the name is unknown.");
}
