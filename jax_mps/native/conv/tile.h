// The register tile of the gathers: rows of the source, read element by element, times a panel of the kernel.
#pragma once

#include <cstdint>

#include "conv/panels.h"
#include "isa.h"
#include "simd.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

// What meets what: an element of the source all lanes of a panel; a lane the same lane; or an element all taps at once,
// whose products are then added to the pixels.
enum class Way { kDense, kAcross, kOverlap };

struct Row {
  int64_t source, target;  // elements
};

// `length` consecutive elements of a row meet the steps of a panel from `step` on.
struct TapRun {
  int64_t source, step, length;
};

// target[row][lane] = sum over taps and elements. `weights` is the panel [step][V vectors]. Flattened: calls of the lambdas
// would keep the sums in memory.
template <Way way, int R, int V, class S, class T>
__attribute__((noinline, flatten)) void MultiplyTile(const S* source, T* target, const Row* rows, const TapRun* taps,
                                                     int64_t tap_count, const T* weights) {
  constexpr int kN = kLanes<T>;
  Vec<T, kN> sum[R][V];
  const S* from[R];
  Unroll<R>([&](int r) {
    from[r] = source + rows[r].source;
    Unroll<V>([&](int v) { sum[r][v] = Vec<T, kN>{}; });
  });
  for (const TapRun* tap = taps; tap != taps + tap_count; ++tap) {
    const T* panel = weights + tap->step * (V * kN);
    if constexpr (way == Way::kAcross) {
      Unroll<V>([&](int v) {
        const auto weight = LoadRaw<T, kN>(panel + v * kN);
        Unroll<R>([&](int r) { sum[r][v] += Load<T, kN>(from[r] + tap->source + v * kN) * weight; });
      });
    } else {
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
  }
  Unroll<R>([&](int r) { Unroll<V>([&](int v) { StoreRaw<kN>(target + rows[r].target + v * kN, sum[r][v]); }); });
}

template <Way way, int R, int V, class S, class T>
inline void MultiplyRows(int64_t count, const S* source, T* target, const Row* rows, const TapRun* taps, int64_t tap_count,
                         const T* weights) {
  if constexpr (R > 1) {
    if (count < R) return MultiplyRows<way, R - 1, V>(count, source, target, rows, taps, tap_count, weights);
  }
  MultiplyTile<way, R, V>(source, target, rows, taps, tap_count, weights);
}

template <Way way, int V, class S, class T>
inline void MultiplyPanel(int64_t vectors, int64_t count, const S* source, T* target, const Row* rows, const TapRun* taps,
                          int64_t tap_count, const T* weights) {
  if constexpr (V > 1) {
    if (vectors < V) {
      return MultiplyPanel<way, V - 1>(vectors, count, source, target, rows, taps, tap_count, weights);
    }
  }
  constexpr int kMost = way == Way::kDense ? ScatteredRows(V) : kRows;
  if (count <= kMost) return MultiplyRows<way, kMost, V>(count, source, target, rows, taps, tap_count, weights);
  // Tiles of equal height: 16 rows are 6, 5 and 5.
  const int64_t tiles = (count + kMost - 1) / kMost;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = count * t / tiles, end = count * (t + 1) / tiles;
    MultiplyRows<way, kMost, V>(end - begin, source, target, rows + begin, taps, tap_count, weights);
  }
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
