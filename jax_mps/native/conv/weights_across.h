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
  static constexpr int kTaps = 7;  // two vectors of each leave two of 16 registers

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
        if (picked) {
          AddPicked(window_row, begin, reaches, sums);
        } else {
          AddRow(window_row, begin, reaches, sums);
        }
      }
    }
  }

  // Neighbouring taps of a row of windows: which windows each tap meets, and which all of them do.
  struct TapTile {
    const X* a;
    int64_t a_step;
    const G* b;
    int64_t b_step, tap_step;
    Range all, common, of_tap[kTaps];
    int64_t taps;
  };

  // Adds the products of M taps and V vectors of lanes from number l on; returns the first lane that is left. A window's
  // source is read once for all taps.
  template <int M, int V>
  int64_t AddTaps(const TapTile& tile, int64_t l, int64_t lanes, T* sums) const {
    constexpr int kN = kLanes<T>;
    for (; l + V * kN <= lanes; l += V * kN) {
      Vec<T, kN> sum[M][V];
      Unroll<M * V>([&](int i) { sum[i / V][i % V] = Vec<T, kN>{}; });
      const auto add_some = [&](Range windows) {
        for (int64_t w = windows.begin; w < windows.end; ++w) {
          const X* a = tile.a + w * tile.a_step + l;
          const G* b = tile.b + w * tile.b_step + l;
          Unroll<M>([&](int m) {
            if (w < tile.of_tap[m].begin || w >= tile.of_tap[m].end) return;
            Unroll<V>([&](int v) { sum[m][v] += Load<T, kN>(a + v * kN) * Load<T, kN>(b + m * tile.tap_step + v * kN); });
          });
        }
      };
      add_some({tile.all.begin, tile.common.begin});
      const X* a = tile.a + tile.common.begin * tile.a_step + l;
      const G* b = tile.b + tile.common.begin * tile.b_step + l;
      for (int64_t w = tile.common.begin; w < tile.common.end; ++w, a += tile.a_step, b += tile.b_step) {
        Unroll<V>([&](int v) {
          const auto x = Load<T, kN>(a + v * kN);
          Unroll<M>([&](int m) { sum[m][v] += x * Load<T, kN>(b + m * tile.tap_step + v * kN); });
        });
      }
      add_some({tile.common.end, tile.all.end});
      Unroll<M>([&](int m) {
        T* to = sums + m * depth * part_size() + l;
        Unroll<V>([&](int v) { StoreRaw<kN>(to + v * kN, LoadRaw<T, kN>(to + v * kN) + sum[m][v]); });
      });
    }
    return l;
  }

  template <int M>
  __attribute__((noinline, flatten)) void AddTile(const TapTile& tile, T* sums) const {
    constexpr int kWide = kTaps * kPanel / M < 2 * kPanel ? kTaps * kPanel / M : 2 * kPanel;
    int64_t l = AddTaps<M, kWide>(tile, 0, image.channels, sums);
    if constexpr (kWide > 2) l = AddTaps<M, 2>(tile, l, image.channels, sums);
    l = AddTaps<M, 1>(tile, l, image.channels, sums);
    for (; l < image.channels; ++l) {
      for (int m = 0; m < M; ++m) {
        T sum = 0;
        for (int64_t w = tile.of_tap[m].begin; w < tile.of_tap[m].end; ++w) {
          sum +=
              Load<T, 1>(tile.a + w * tile.a_step + l)[0] * Load<T, 1>(tile.b + w * tile.b_step + m * tile.tap_step + l)[0];
        }
        sums[m * depth * part_size() + l] += sum;
      }
    }
  }

  template <int M = kTaps>
  void AddTile(int64_t taps, const TapTile& tile, T* sums) const {
    if constexpr (M > 1) {
      if (taps < M) return AddTile<M - 1>(taps, tile, sums);
    }
    AddTile<M>(tile, sums);
  }

  // The windows of a row, `first` of which is the first one of its block, and all taps.
  void AddRow(const WindowRow& row, int64_t first, const TapReach* reaches, T* sums) const {
    const Axis& axis = problem.axis[2];
    const int64_t tiles = (axis.taps + kTaps - 1) / kTaps, lines = problem.axis[0].taps * problem.axis[1].taps;
    TapTile tile;
    tile.a_step = source.channels, tile.b_step = axis.stride * image.channels,
    tile.tap_step = axis.dilation * image.channels;
    for (int64_t n = 0; n < lines * tiles; ++n) {
      const int64_t begin = axis.taps * (n % tiles) / tiles, end = axis.taps * (n % tiles + 1) / tiles;
      const TapReach* const reach = reaches + n / tiles * axis.taps + begin;
      if (!reach->MeetsLine(row)) continue;
      tile.all = {row.count, 0}, tile.common = {0, row.count};
      for (int64_t m = 0; m < end - begin; ++m) {
        const Range windows = {Most(0, reach[m].windows[2].begin - row.begin),
                               Least(row.count, reach[m].windows[2].end - row.begin)};
        tile.of_tap[m] = windows;
        if (windows.begin < windows.end) {
          tile.all = {Least(tile.all.begin, windows.begin), Most(tile.all.end, windows.end)};
        }
        tile.common = {Most(tile.common.begin, windows.begin), Least(tile.common.end, windows.end)};
      }
      if (tile.all.begin >= tile.all.end) continue;
      if (tile.common.begin >= tile.common.end) tile.common = {tile.all.end, tile.all.end};
      tile.b = image.data + reach->Pixel(problem, image, row);
      for (int64_t d = 0; d < depth; ++d) {
        tile.a = source.data + (first + row.at) * source.channels + d * pitch;
        AddTile(end - begin, tile, sums + ((n / tiles * axis.taps + begin) * depth + d) * part_size());
      }
    }
  }

  void AddPicked(const WindowRow& row, int64_t first, const TapReach* reaches, T* sums) const {
    if constexpr (kPicks) {
      for (int64_t tap = 0; tap < TapCount(problem); ++tap, sums += depth * part_size()) {
        const Span span = reaches[tap].At(problem, image, row);
        if (span.count == 0) continue;
        depth == 2 ? AddPicked<2>(span, first + span.at, sums) : AddPicked<4>(span, first + span.at, sums);
      }
    }
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

  template <class R>
  void Emit(int64_t, int64_t part, const T* sums, R* result) const {
    const int64_t out = problem.out / problem.groups;
    R* to = result + layout.base + part / depth * layout.tap + part % depth * layout.in;
    if (out == 1) return CopyMatrix<T>(1, image.channels, sums, 0, 1, to, 0, layout.group);
    for (int64_t g = 0; g < problem.groups; ++g, to += layout.group) {
      for (int64_t c = 0; c < out; ++c, ++sums) Store<1>(to + c * layout.out, Vec<T, 1>{*sums});
    }
  }
};

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
