// The gradient of maximum pooling: a pixel adds up the windows whose tap it is. Gathered like every other operation, or band by band
// (see `Bands`).
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "parallel_for.h"
#include "pooling/geometry.h"
#include "pooling/kernels.h"
#include "pooling/walk.h"
#include "simd.h"
#include "threads.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

template <class T, class I>
struct PutTap {
  using Element = T;
  using Wide = Acc<T>;
  static constexpr bool kInHalves = kHalf<T> && sizeof(I) < 4;
  static constexpr int kLanes = kVectorBytes / (kInHalves ? sizeof(T) : sizeof(Wide)), kVectors = 4;
  static constexpr bool kBackward = true, kSeparable = false;
  template <int N>
  using State = std::conditional_t<kInHalves && (N > 2), Halves<T, N>, Vec<Wide, N>>;

  const T* source;
  const I* taps;
  T* target;
  bool stream;

  template <int N>
  State<N> Begin(Int<N>, int64_t, int64_t) const {
    return State<N>{};
  }
  template <int N, class V>
  void Tap(Int<N>, V& sum, int64_t from, int64_t tap) const {
    AddWhere<N>(sum, source + from, taps + from, tap);
  }
  template <int N, class V>
  void Finish(Int<N>, V sum, int64_t to) const {
    if (stream) return Stream<N>(target + to, sum);
    Store<N>(target + to, sum);
  }
  const PutTap& At(int64_t) const { return *this; }
};

// Adds what some windows of a row hold: window w to sums[position + w * step + its tap]. If not `whole`, taps may lie outside the
// band, whose pixels are counted from the first tap of window 0.
template <bool whole, class T, class I>
inline void AddWindows(const Bands& bands, Range windows, const T* source, const I* taps, const Range* band, int64_t position,
                       int64_t step, int64_t pixel_step, Acc<T>* sums) {
  const int64_t inner = bands.inner;
  const uint64_t count = bands.tap_count;
  const Bands::Tap* const list = bands.taps;
  for (int64_t w = windows.begin; w < windows.end; ++w) {
    const T* const values = source + w * inner;
    const I* const numbers = taps + w * inner;
    Acc<T>* const to = sums + position + w * step;
    for (int64_t c = 0; c < inner; ++c) {
      const uint64_t number = numbers[c];
      if (number >= count) continue;  // names none
      const Bands::Tap& tap = list[number];
      if constexpr (!whole) {
        const auto in = [&](int a, int64_t pixel) { return pixel >= band[a].begin && pixel < band[a].end; };
        if (!in(0, tap.pixel[0]) || !in(1, tap.pixel[1]) || !in(2, w * pixel_step + tap.pixel[2])) continue;
      }
      to[c + tap.element] += Load<Acc<T>, 1>(values + c)[0];
    }
  }
}

// All that reaches the pixels of a band.
template <class T, class I>
inline void PutBand(const Bands& bands, const PutTap<T, I>& op, int64_t unit, void* scratch) {
  const Line* line = bands.line;
  const int64_t outer = unit / bands.count, first = unit % bands.count * bands.length;
  Range band[3], windows[3];
  for (int a = 0; a < 3; ++a) {
    const int64_t size = line[a].targets();
    band[a] = {0, size};
    if (a == bands.axis) band[a] = {first, first + bands.length < size ? first + bands.length : size};
    windows[a] = line[a].Sources(band[a].begin, band[a].end);
  }
  const int64_t elements = (band[bands.axis].end - first) * bands.pitch;
  T* const target = op.target + (outer * line[bands.axis].targets() + first) * bands.pitch;
  Acc<T>* sums = static_cast<Acc<T>*>(scratch);
  if constexpr (std::is_same_v<T, Acc<T>>) sums = target;
  __builtin_memset(sums, 0, elements * sizeof(Acc<T>));

  const Axis& row = line[2].axis;
  const Range whole = line[2].Whole(band[2]);
  for (int64_t i = windows[0].begin; i < windows[0].end; ++i) {
    for (int64_t j = windows[1].begin; j < windows[1].end; ++j) {
      const int64_t at[2] = {line[0].axis.stride * i - line[0].axis.low, line[1].axis.stride * j - line[1].axis.low};
      bool inside = true;
      Range rest[3] = {{}, {}, {band[2].begin + row.low, band[2].end + row.low}};
      for (int a = 0; a < 2; ++a) {
        rest[a] = {band[a].begin - at[a], band[a].end - at[a]};
        inside &= rest[a].begin <= 0 && line[a].axis.dilation * (line[a].axis.taps - 1) < rest[a].end;
      }
      const int64_t source = ((outer * line[0].sources() + i) * line[1].sources() + j) * line[2].sources() * bands.inner;
      const int64_t position =
          ((-rest[0].begin * line[1].targets() - rest[1].begin) * line[2].targets() - rest[2].begin) * bands.inner;
      const Range clear = inside ? whole : Range{windows[2].end, windows[2].end};
      const auto add = [&](auto all, int64_t begin, int64_t end) {
        AddWindows<decltype(all)::value>(bands, {begin, end}, op.source + source, op.taps + source, rest, position,
                                         row.stride * bands.inner, row.stride, sums);
      };
      add(std::false_type(), windows[2].begin, clear.begin);
      add(std::true_type(), clear.begin, clear.end);
      add(std::false_type(), clear.end, windows[2].end);
    }
  }
  if constexpr (!std::is_same_v<T, Acc<T>>) FinishSums(op, sums, target - op.target, elements);
}

template <class T, class I>
bool MaxPoolPut(const Problem& problem) {
  const PutTap<T, I> op = {static_cast<const T*>(problem.operand[0]), static_cast<const I*>(problem.operand[1]),
                           static_cast<T*>(problem.result[0]), problem.stream};
  const Bands bands(problem.geometry, PutTap<T, I>::kLanes, sizeof(Acc<T>));
  if (!bands.worthwhile) return Walk(problem.geometry, *problem.workers, op);
  const int64_t scratch_bytes = std::is_same_v<T, Acc<T>> ? 0 : bands.size() * static_cast<int64_t>(sizeof(Acc<T>));
  const int64_t bytes = bands.size() * static_cast<int64_t>(sizeof(T) + sizeof(I));
  return ParallelFor(*problem.workers, bands.units(), bytes, [&](int64_t begin, int64_t end) {
    void* scratch = Scratch(scratch_bytes);
    if (scratch == nullptr && scratch_bytes > 0) return false;
    for (int64_t unit = begin; unit < end; ++unit) PutBand(bands, op, unit, scratch);
    return true;
  });
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
