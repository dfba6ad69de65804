// Maximum unpooling by flat positions of a plane, and its transpose. The last of equal positions wins, so a plane is the
// work of one thread; where there are many channels, of one thread a block of them.
#pragma once

#include <cstdint>

#include "isa.h"
#include "parallel_for.h"
#include "pooling/geometry.h"
#include "pooling/kernels.h"
#include "threads.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

struct Planes {
  int64_t outer, image, pooled, inner;  // `image` and `pooled`: positions of a plane
};

constexpr int64_t kUnpoolBlock = 64;  // channels

// body(first element of the image, first of the pooled array, channels) for every outer index and block of channels.
template <class Body>
bool ForEachPlane(const Problem& problem, int64_t element, const Body& body) {
  const Geometry& geometry = problem.geometry;
  Planes planes = {geometry.outer, 1, 1, geometry.inner};
  for (const Axis& axis : geometry.axis) {
    planes.image *= axis.size;
    planes.pooled *= axis.windows;
  }
  const int64_t blocks = (planes.inner + kUnpoolBlock - 1) / kUnpoolBlock;
  const int64_t channels = planes.inner < kUnpoolBlock ? planes.inner : kUnpoolBlock;
  const int64_t bytes = channels * (planes.image * element + planes.pooled * (element + 4));
  return ParallelFor(*problem.workers, planes.outer * blocks, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t outer = unit / blocks, channel = unit % blocks * kUnpoolBlock;
      const int64_t rest = planes.inner - channel;
      if (!body(planes, outer * planes.image * planes.inner + channel, outer * planes.pooled * planes.inner + channel,
                rest < kUnpoolBlock ? rest : kUnpoolBlock)) {
        return false;
      }
    }
    return true;
  });
}

template <class T>
bool MaxUnpool(const Problem& problem) {
  const T* source = static_cast<const T*>(problem.operand[0]);
  const int32_t* index = static_cast<const int32_t*>(problem.operand[1]);
  T* target = static_cast<T*>(problem.result[0]);
  return ForEachPlane(problem, sizeof(T), [=](const Planes& planes, int64_t image, int64_t pooled, int64_t channels) {
    for (int64_t p = 0; p < planes.image; ++p) {
      __builtin_memset(target + image + p * planes.inner, 0, channels * sizeof(T));
    }
    for (int64_t p = 0; p < planes.pooled; ++p) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t from = pooled + p * planes.inner + c;
        const int64_t position = index[from];
        if (position >= 0 && position < planes.image) target[image + position * planes.inner + c] = source[from];
      }
    }
    return true;
  });
}

// A position's winner is the last entry that names it: found by walking the entries backwards over a map of taken positions.
template <class T>
bool MaxUnpoolTake(const Problem& problem) {
  const T* source = static_cast<const T*>(problem.operand[0]);
  const int32_t* index = static_cast<const int32_t*>(problem.operand[1]);
  T* target = static_cast<T*>(problem.result[0]);
  return ForEachPlane(problem, sizeof(T), [=](const Planes& planes, int64_t image, int64_t pooled, int64_t channels) {
    // Positions beyond 32 bits cannot be named.
    const int64_t named = planes.image < (int64_t{1} << 31) ? planes.image : int64_t{1} << 31;
    bool* taken = static_cast<bool*>(Scratch(named * channels));
    if (taken == nullptr) return false;
    __builtin_memset(taken, 0, named * channels);
    for (int64_t p = planes.pooled - 1; p >= 0; --p) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t to = pooled + p * planes.inner + c;
        const int64_t position = index[to];
        const bool wins = position >= 0 && position < named && !taken[position * channels + c];
        target[to] = wins ? source[image + position * planes.inner + c] : T{};
        if (wins) taken[position * channels + c] = true;
      }
    }
    return true;
  });
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
