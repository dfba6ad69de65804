// The kernels of transposed convolution, in the namespace JAX_MPS_ISA and for its instruction set. As in kernels.cc, nothing
// here may emit a function that another translation unit could emit too.

#include <limits>
#include <type_traits>
#include <utility>

#include "conv/geometry.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace jax_mps::JAX_MPS_ISA {
namespace {

#include "simd.h"
#include "conv/gather.h"

}  // namespace

bool Execute(const ConvProblem& problem) {
  switch (problem.type) {
    case Type::kF32: return ConvTranspose<float>(problem);
    case Type::kF64: return ConvTranspose<double>(problem);
    case Type::kF16: return ConvTranspose<F16>(problem);
    case Type::kBF16: return ConvTranspose<BF16>(problem);
    default: __builtin_unreachable();
  }
}

}  // namespace jax_mps::JAX_MPS_ISA
