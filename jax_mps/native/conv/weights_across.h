// The weight gradient of groups of few channels.
#pragma once

#include <cstdint>

#include "axis.h"
#include "conv/arrays.h"
#include "conv/geometry.h"
#include "conv/panels.h"
#include "conv/window_rows.h"
#include "isa.h"
#include "simd.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

// Whether the sources of a window's lanes can be picked from one vector: as many inputs as outputs, and whole vectors of
// groups.
template <class T>
inline bool Picks(int64_t in, int64_t out, int64_t lanes) {
  return kPicks && in == out && (in == 2 || in == 4 || in == 8) && in < kLanes<T> && lanes % kLanes<T> == 0;
}

// Groups of few channels: lanes are output channels, of which each meets `depth` copies of the source.
template <class G, class X, class T>
struct AcrossTask {
  const ConvProblem& problem;
  KernelLayout layout;
  Array<const G> image;
  Array<const X> source;  // `depth` copies of `pitch` elements a window; one where they are picked
  int64_t depth, pitch;
  bool picked;
  using Sum = T;

  int64_t units() const { return 1; }
  int64_t parts() const { return TapCount(problem) * depth; }
  int64_t part_size() const { return RoundUp(pitch, 16); }
  int64_t scratch() const { return kBlock * sizeof(WindowRow) + TapCount(problem) * sizeof(TapReach); }

  void Work(int64_t, Range windows, T* sums, void* scratch) const {
    WindowRow* const window_rows = static_cast<WindowRow*>(scratch);
    TapReach* const reaches = reinterpret_cast<TapReach*>(window_rows + kBlock);
    for (int64_t tap = 0; tap < TapCount(problem); ++tap) reaches[tap] = TapReach(problem, tap);
    for (int64_t begin = windows.begin; begin < windows.end; begin += kBlock) {
      const Range block = {begin, Least(begin + kBlock, windows.end)};
      for (const WindowRow& window_row : List<WindowRow>{window_rows, ListWindowRows(problem, block, window_rows)}) {
        for (int64_t tap = 0; tap < TapCount(problem); ++tap) {
          const Span span = reaches[tap].At(problem, image, window_row);
          if (span.count > 0) AddSpan(span, begin + span.at, sums + tap * depth * part_size());
        }
      }
    }
  }

  template <int V>
  void Add(const X* a, int64_t a_step, const G* b, int64_t b_step, int64_t count, T* sums) const {
    constexpr int kN = kLanes<T>;
    Vec<T, kN> sum[V] = {};
    for (int64_t w = 0; w < count; ++w, a += a_step, b += b_step) {
      for (int v = 0; v < V; ++v) sum[v] += Load<T, kN>(a + v * kN) * Load<T, kN>(b + v * kN);
    }
    for (int v = 0; v < V; ++v) StoreRaw<kN>(sums + v * kN, LoadRaw<T, kN>(sums + v * kN) + sum[v]);
  }

  // The sums of D copies from number d on.
  template <int D, int V>
  void AddPicked(const X* a, const G* b, int64_t b_step, int64_t count, int64_t d, T* sums) const {
    constexpr int kN = kLanes<T>;
    PickTable<T> table[D];
    for (int i = 0; i < D; ++i) table[i].Set(depth, depth, d + i);
    Vec<T, kN> sum[D][V] = {};
    for (int64_t w = 0; w < count; ++w, a += source.channels, b += b_step) {
      for (int v = 0; v < V; ++v) {
        const auto x = Load<T, kN>(a + v * kN), g = Load<T, kN>(b + v * kN);
        for (int i = 0; i < D; ++i) sum[i][v] += Pick(x, table[i].lane) * g;
      }
    }
    for (int i = 0; i < D; ++i) {
      for (int v = 0; v < V; ++v) {
        T* to = sums + (d + i) * part_size() + v * kN;
        StoreRaw<kN>(to, LoadRaw<T, kN>(to) + sum[i][v]);
      }
    }
  }
  template <int D>
  void AddPicked(const Span& span, int64_t window, T* sums) const {
    constexpr int kN = kLanes<T>;
    const X* a = source.data + window * source.channels;
    const G* b = image.data + span.pixel;
    const int64_t lanes = image.channels, step = problem.axis[2].stride * lanes;
    for (int64_t d = 0; d < depth; d += D) {
      int64_t l = 0;
      for (; l + 2 * kN <= lanes; l += 2 * kN) AddPicked<D, 2>(a + l, b + l, step, span.count, d, sums + l);
      if (l < lanes) AddPicked<D, 1>(a + l, b + l, step, span.count, d, sums + l);
    }
  }

  void AddSpan(const Span& span, int64_t window, T* sums) const {
    constexpr int kN = kLanes<T>;
    if constexpr (kPicks) {
      if (picked) return depth == 2 ? AddPicked<2>(span, window, sums) : AddPicked<4>(span, window, sums);
    }
    const int64_t lanes = image.channels, step = problem.axis[2].stride * lanes;
    const G* g = image.data + span.pixel;
    for (int64_t d = 0; d < depth; ++d, sums += part_size()) {
      const X* a = source.data + window * source.channels + d * pitch;
      int64_t l = 0;
      for (; l + 4 * kN <= lanes; l += 4 * kN) Add<4>(a + l, source.channels, g + l, step, span.count, sums + l);
      for (; l + kN <= lanes; l += kN) Add<1>(a + l, source.channels, g + l, step, span.count, sums + l);
      for (; l < lanes; ++l) {
        T sum = 0;
        for (int64_t w = 0; w < span.count; ++w)
          sum += Load<T, 1>(a + w * source.channels + l)[0] * Load<T, 1>(g + w * step + l)[0];
        sums[l] += sum;
      }
    }
  }

  template <class R>
  void Emit(int64_t, int64_t part, const T* sums, R* result) const {
    const int64_t out = problem.out / problem.groups;
    R* to = result + layout.base + part / depth * layout.tap + part % depth * layout.in;
    for (int64_t l = 0; l < image.channels; ++l)
      Store<1>(to + l / out * layout.group + l % out * layout.out, Vec<T, 1>{sums[l]});
  }
};

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
