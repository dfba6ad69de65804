// The kernel as panels of vectors.
#pragma once

#include <cstdint>

#include "conv/arrays.h"
#include "conv/panels.h"
#include "isa.h"
#include "parallel_for.h"
#include "simd.h"
#include "threads.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

// The kernel, packed into panels: [group][panel][tap][depth][vectors]. Joined lanes are one panel.

// Where entry (group, tap, lane, depth) lies. Lanes count `inner` ones of `lane`, then one of `outer`, and so on.
struct KernelStrides {
  int64_t base, group, tap, depth, lane, inner, outer;
};

template <class T>
struct Weights {
  Lanes<T> lanes;
  int64_t groups, steps;  // steps: taps * depth
  bool joined;
  const T* data;

  // Of joined lanes: 16 more, so that the steps do not share sets of the cache.
  int64_t pitch() const { return lanes.vectors() * kLanes<T> + (joined ? 16 : 0); }
  int64_t group_size() const { return pitch() * steps; }
  int64_t panels() const { return groups * lanes.panels(); }
};

template <class E, class T>
bool PackKernel(const Workers& workers, const E* kernel, const KernelStrides& strides, int64_t taps, int64_t depth,
                const Weights<T>& weights, T* packed) {
  constexpr int kN = kLanes<T>;
  const Lanes<T>& lanes = weights.lanes;
  const int64_t panels = weights.joined ? 1 : lanes.panels(), units = weights.groups * panels * taps;
  if (units == 0 || depth == 0) return true;
  const int64_t bytes = weights.group_size() / (panels * taps) * static_cast<int64_t>(sizeof(T));
  return ParallelFor(workers, units, 4 * bytes, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t tap = unit % taps, group = unit / taps / panels;
      const auto [start, vectors, first] = weights.joined ? Panel{0, lanes.vectors(), 0} : lanes.panel(unit / taps % panels);
      const int64_t pitch = weights.joined ? weights.pitch() : vectors * kN;
      T* to = packed + group * weights.group_size() + first * weights.steps * kN + tap * depth * pitch;
      const E* from = kernel + strides.base + group * strides.group + tap * strides.tap;
      const int64_t count = Least(vectors * kN, lanes.count - start);
      for (int64_t d = 0; count < pitch && d < depth; ++d) {
        for (int64_t lane = count; lane < pitch; ++lane) to[d * pitch + lane] = 0;
      }
      // Lanes of one run of `inner` ones are equally far apart.
      for (int64_t lane = 0, next; lane < count; lane = next) {
        const int64_t run = (start + lane) / strides.inner, first_of_run = (start + lane) % strides.inner;
        next = Least(count, lane + strides.inner - first_of_run);
        CopyMatrix<T>(depth, next - lane, from + run * strides.outer + first_of_run * strides.lane, strides.depth,
                      strides.lane, to + lane, pitch, 1);
      }
    }
    return true;
  });
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
