// The register tile of groups of few channels: lanes are the channels of many groups, and a row is read in vectors.
#pragma once

#include <cstdint>

#include "conv/panels.h"
#include "conv/tile.h"
#include "isa.h"
#include "simd.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

// Few rows take many vectors each: a register tile has about as many sums whatever its shape.
constexpr int kShortRows = 8;  // of one vector each
constexpr int AcrossVectors(int rows) {
  const int vectors = kRows * kPanel / rows;
  return vectors < 4 * kPanel ? vectors : 4 * kPanel;
}

// target[row][lane] = sum over taps, for lanes [begin, end), as many of them as fill V vectors; returns the first of the
// others. A step of the weights has `pitch` numbers, or one for all lanes.
template <bool same, int R, int V, class S, class D, class T>
__attribute__((noinline, flatten)) int64_t MultiplyAcross(int64_t begin, int64_t end, const S* source, D* target,
                                                          const Row* rows, List<TapRun> taps, const T* weights,
                                                          int64_t pitch) {
  constexpr int kN = kLanes<T>;
  const S* from[R];
  Unroll<R>([&](int r) { from[r] = source + rows[r].source; });
  for (; begin + V * kN <= end; begin += V * kN) {
    Vec<T, kN> sum[R][V];
    Unroll<R * V>([&](int i) { sum[i / V][i % V] = Vec<T, kN>{}; });
    for (const TapRun& tap : taps) {
      const T* step = weights + tap.step * pitch + (same ? 0 : begin);
      const int64_t at = tap.source + begin;
      Unroll<V>([&](int v) {
        const auto weight = same ? Broadcast<T, kN>(*step) : LoadRaw<T, kN>(same ? step : step + v * kN);
        Unroll<R>([&](int r) { sum[r][v] += Load<T, kN>(from[r] + at + v * kN) * weight; });
      });
    }
    Unroll<R>([&](int r) {
      D* const to = target + rows[r].target + begin;
      Unroll<V>([&](int v) { Store<kN>(to + v * kN, sum[r][v]); });
    });
  }
  return begin;
}

// Tiles of as many vectors as there are, V at most. A last one that is not whole overlaps the one before it.
template <bool same, int R, int V = AcrossVectors(R), class S, class D, class T>
inline void MultiplyLanes(Range lanes, const S* source, D* target, const Row* rows, List<TapRun> taps, const T* weights,
                          int64_t pitch) {
  constexpr int kN = kLanes<T>;
  if (lanes.end - lanes.begin >= V * kN) {
    lanes.begin = MultiplyAcross<same, R, V>(lanes.begin, lanes.end, source, target, rows, taps, weights, pitch);
  }
  if constexpr (V > 1) {
    MultiplyLanes<same, R, V - 1>(lanes, source, target, rows, taps, weights, pitch);
  } else if (lanes.begin < lanes.end) {
    MultiplyAcross<same, R, 1>(lanes.end - kN, lanes.end, source, target, rows, taps, weights, pitch);
  }
}

template <bool same, int R = kRows, class S, class D, class T>
inline void MultiplyLanes(int64_t count, Range lanes, const S* source, D* target, const Row* rows, List<TapRun> taps,
                          const T* weights, int64_t pitch) {
  if constexpr (R > 1) {
    if (count < R) return MultiplyLanes<same, R - 1>(count, lanes, source, target, rows, taps, weights, pitch);
  }
  MultiplyLanes<same, R>(lanes, source, target, rows, taps, weights, pitch);
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
