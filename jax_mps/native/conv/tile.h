// The register tile of the gathers: rows of the source, read element by element, times a panel of the kernel.
#pragma once

#include <cstdint>

#include "conv/panels.h"
#include "isa.h"
#include "simd.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

struct Row {
  int64_t source, target;  // elements
};

// `length` consecutive elements of a row meet the steps of a panel from `step` on.
struct TapRun {
  int64_t source, step, length;
};

// target[row][lane] = sum over taps and elements. `weights` is the panel [step][V vectors]. Flattened: calls of the lambdas
// would keep the sums in memory.
template <int R, int V, class T>
__attribute__((noinline, flatten)) void MultiplyTile(const T* source, T* target, const Row* rows, const TapRun* taps,
                                                     int64_t tap_count, const T* weights) {
  constexpr int kN = kLanes<T>;
  Vec<T, kN> sum[R][V];
  const T* from[R];
  Unroll<R>([&](int r) {
    from[r] = source + rows[r].source;
    Unroll<V>([&](int v) { sum[r][v] = Vec<T, kN>{}; });
  });
  for (const TapRun* tap = taps; tap != taps + tap_count; ++tap) {
    const T* panel = weights + tap->step * (V * kN);
    const int64_t end = tap->source + tap->length;
    for (int64_t i = tap->source; i < end; ++i, panel += V * kN) {
      Vec<T, kN> weight[V];
      Unroll<V>([&](int v) { weight[v] = LoadRaw<T, kN>(panel + v * kN); });
      Unroll<R>([&](int r) {
        const auto element = Broadcast<T, kN>(from[r][i]);
        Unroll<V>([&](int v) { sum[r][v] += element * weight[v]; });
      });
    }
  }
  Unroll<R>([&](int r) { Unroll<V>([&](int v) { StoreRaw<kN>(target + rows[r].target + v * kN, sum[r][v]); }); });
}

template <int R, int V, class T>
inline void MultiplyRows(int64_t count, const T* source, T* target, const Row* rows, const TapRun* taps, int64_t tap_count,
                         const T* weights) {
  if constexpr (R > 1) {
    if (count < R) return MultiplyRows<R - 1, V>(count, source, target, rows, taps, tap_count, weights);
  }
  MultiplyTile<R, V>(source, target, rows, taps, tap_count, weights);
}

template <int V, class T>
inline void MultiplyPanel(int64_t vectors, int64_t count, const T* source, T* target, const Row* rows, const TapRun* taps,
                          int64_t tap_count, const T* weights) {
  if constexpr (V > 1) {
    if (vectors < V) {
      return MultiplyPanel<V - 1>(vectors, count, source, target, rows, taps, tap_count, weights);
    }
  }
  constexpr int kMost = ScatteredRows(V);
  if (count <= kMost) return MultiplyRows<kMost, V>(count, source, target, rows, taps, tap_count, weights);
  // Tiles of equal height: 16 rows are 6, 5 and 5.
  const int64_t tiles = (count + kMost - 1) / kMost;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = count * t / tiles, end = count * (t + 1) / tiles;
    MultiplyRows<kMost, V>(end - begin, source, target, rows + begin, taps, tap_count, weights);
  }
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
