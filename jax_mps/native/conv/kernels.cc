// The kernels of transposed convolution, in the namespace JAX_MPS_ISA and for its instruction set. As in pooling/kernels.cc,
// nothing here may emit a function that another translation unit could emit too.

#include "conv/gather.h"
#include "conv/geometry.h"
#include "conv/weights.h"
#include "isa.h"
#include "simd.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

template <class E, class R>
bool ConvTranspose(const ConvProblem& problem) {
  return problem.op == ConvOp::kWeightGradient ? WeightGradient<E, R>(problem) : GatherAll<E, R>(problem);
}

template <class E>
bool ConvTranspose(const ConvProblem& problem) {
  return problem.wide ? ConvTranspose<E, Acc<E>>(problem) : ConvTranspose<E, E>(problem);
}

}  // namespace

bool Execute(const ConvProblem& given) {
  const ConvProblem problem = Folded(given);
  switch (problem.type) {
    case Type::kF32:
      return ConvTranspose<float>(problem);
    case Type::kF64:
      return ConvTranspose<double>(problem);
    case Type::kF16:
      return ConvTranspose<F16>(problem);
    case Type::kBF16:
      return ConvTranspose<BF16>(problem);
    default:
      __builtin_unreachable();
  }
}

}  // namespace jax_mps::JAX_MPS_ISA
