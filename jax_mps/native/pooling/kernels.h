// The border between the calls of XLA and the kernels, which are compiled once for every instruction set.
#pragma once

#include <cstdint>

#include "pooling/geometry.h"
#include "threads.h"
#include "types.h"

namespace jax_mps {

enum class Op {
  kMaxPool,
  kMaxPoolTapIndex,
  kMaxPoolSelectedTapIndex,
  kMaxPoolTake,
  kMaxPoolPut,
  kAvgPool,
  kAvgPoolGradient,
  kL2Pool,
  kL2PoolTangent,
  kL2PoolGradient,
  kMaxUnpool,
  kMaxUnpoolTake,
};

// A checked call. kMaxPoolTapIndex writes the maxima to result[0], unless null, and the taps to result[1].
struct Problem {
  Op op;
  Type type;
  Type second;  // of the taps, or of the norms, their tangent or their cotangent
  Geometry geometry;
  const void* operand[3];
  void* result[2];
  bool with_padding;  // kMaxPoolSelectedTapIndex: whether padding takes part
  bool stream;        // whether the result is too large for the caches
  const Workers* workers;
};

// Runs it; false if there was no memory for scratch.

#if defined(__x86_64__) || defined(_M_X64)
namespace x86_64_v2 {
bool Execute(const Problem& problem);
}
namespace x86_64_v3 {
bool Execute(const Problem& problem);
}
namespace x86_64_v4 {
bool Execute(const Problem& problem);
}
#else
namespace baseline {
bool Execute(const Problem& problem);
}
#endif

}  // namespace jax_mps
