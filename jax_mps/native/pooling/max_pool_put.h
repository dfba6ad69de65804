// The gradient of maximum pooling: a pixel adds up the windows whose tap it is. Gathered like every other operation, or in
// one of the two ways that `Bands` and `Strips` describe.
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

// As memcpy(), which for a few vectors takes longer to begin than to copy.
inline void CopyRow(const void* row, int64_t bytes, void* copy) {
  const auto from = static_cast<const uint8_t*>(row);
  const auto to = static_cast<uint8_t*>(copy);
  Sweep<kVectorBytes, 4, kVectorBytes / 2>(bytes, [&](auto lanes, auto vectors, int64_t i) __attribute__((always_inline)) {
    constexpr int kN = decltype(lanes)::value;
    for (int v = 0; v < decltype(vectors)::value; ++v, i += kN) StoreRaw<kN>(to + i, LoadRaw<uint8_t, kN>(from + i));
  });
}

// Two vectors at a time and no more: all that it needs stays in registers.
template <class T, class I>
struct PutRow : PutTap<T, I> {
  static constexpr int kVectors = 2;
  explicit PutRow(const PutTap<T, I>& op) : PutTap<T, I>(op) {}
};

// A strip of planes of short rows.
template <class T, class I>
inline void PutUnit(const Strips& strips, const PutTap<T, I>& op, int64_t unit, void* scratch) {
  using Wide = Acc<T>;
  constexpr int kLanes = PutTap<T, I>::kLanes;
  const Line* line = strips.line;
  const int64_t pitch = strips.pitch(), inner = strips.inner;
  const int64_t begin = unit % strips.count * strips.rows;
  const int64_t height = line[1].targets(), width = line[2].targets() * inner;
  const int64_t end = begin + strips.rows < height ? begin + strips.rows : height;
  const int64_t outer = unit / strips.count / line[0].targets(), plane = unit / strips.count % line[0].targets();
  const Reach planes = line[0].At(plane);
  const Range rows = line[1].Sources(begin, end);
  const int64_t plane_pitch = (rows.end - rows.begin) * pitch;

  int64_t* const offset = static_cast<int64_t*>(scratch);
  Wide* const sums = reinterpret_cast<Wide*>(offset + strips.taps);
  Wide* const row = sums + strips.sums();
  T* const values = reinterpret_cast<T*>(row + width);
  I* const keys = reinterpret_cast<I*>(values + strips.copied());
  for (int64_t i = 0; i < strips.taps; ++i) offset[i] = i * line[2].source_step * inner;
  // What a window that is not there holds does not count. But left as other work had it, it made all of this up to twice as
  // slow.
  __builtin_memset(values, 0, planes.count * plane_pitch * sizeof(T));
  __builtin_memset(keys, -1, planes.count * plane_pitch * sizeof(I));
  for (int64_t a = 0; a < planes.count; ++a) {
    const int64_t first = (outer * strips.windows[0] + planes.source + a * line[0].source_step) * strips.windows[1];
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t i = r - strips.before[1], count = strips.windows[2] * inner;
      if (i < 0 || i >= strips.windows[1]) continue;
      const int64_t to = a * plane_pitch + (r - rows.begin) * pitch + strips.before[2] * inner;
      CopyRow(op.source + (first + i) * count, count * sizeof(T), values + to);
      CopyRow(op.taps + (first + i) * count, count * sizeof(I), keys + to);
    }
  }

  // All targets of a phase lie a pitch or one position apart, in the copies as in their sums: they are one run.
  const PutTap<T, I> put = {values, keys, op.target, op.stream};
  const ToScratch<PutTap<T, I>> sum(put, sums);
  const int64_t stride = line[2].axis.stride, taps = line[2].axis.taps;
  int64_t target = (outer * line[0].targets() + plane) * height * width;
  for (int64_t t = begin; t < begin + line[1].axis.stride && t < end; ++t) {
    const int64_t count = (end - t - 1) / line[1].axis.stride + 1;
    const Reach down = line[1].At(t);
    const int64_t length = count * pitch;
    for (int64_t phase = 0; phase < stride && phase * inner < width; ++phase) {
      const Reach along = line[2].At(phase);
      const int64_t targets = (line[2].targets() - phase - 1) / stride + 1;
      Reads reads;
      reads.rows[0] = planes.count;
      reads.rows[1] = down.count;
      reads.row_step[0] = plane_pitch;
      reads.row_step[1] = line[1].source_step * pitch;
      reads.row_tap_step[0] = line[0].tap_step * line[1].axis.taps * taps;
      reads.row_tap_step[1] = line[1].tap_step * taps;
      reads.offset = offset;
      reads.count = along.count;
      reads.tap = (planes.tap * line[1].axis.taps + down.tap) * taps + along.tap;
      reads.tap_step = line[2].tap_step;
      const int64_t source = (down.source - rows.begin) * pitch + along.source * inner;
      const TapList list(reads);
      if (stride == 1 && width >= kLanes) {
        for (int64_t j = 0; j < count; ++j) {
          Gather(PutRow<T, I>(put), list, source + j * pitch, target + (t + j * line[1].axis.stride) * width, width);
        }
      } else {
        Gather(sum, list, source, phase * length, (count - 1) * pitch + targets * inner);
      }
    }
    if (stride == 1 && width >= kLanes) continue;
    for (int64_t j = 0; j < count; ++j) {
      MovePhases<false>(row, sums + j * pitch, 0, line[2].targets(), stride, length / inner, inner);
      FinishSums(put, row, target + (t + j * line[1].axis.stride) * width, width);
    }
  }
}

// Adds what some windows of a row hold: window w to sums[position + w * step + its tap]. If not `whole`, taps may lie
// outside the band, whose pixels are counted from the first tap of window 0.
template <bool whole, class T, class I>
inline void AddWindows(const Bands& bands, Range windows, const T* source, const I* taps, const Range* band,
                       int64_t position, int64_t step, int64_t pixel_step, Acc<T>* sums) {
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
inline void PutUnit(const Bands& bands, const PutTap<T, I>& op, int64_t unit, void* scratch) {
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

template <class Way, class T, class I>
bool PutUnits(const Problem& problem, const Way& way, const PutTap<T, I>& op, int64_t scratch_bytes,
              int64_t bytes_per_unit) {
  return ParallelFor(*problem.workers, way.units(), bytes_per_unit, [&](int64_t begin, int64_t end) {
    void* scratch = Scratch(scratch_bytes);
    if (scratch == nullptr && scratch_bytes > 0) return false;
    for (int64_t unit = begin; unit < end; ++unit) PutUnit(way, op, unit, scratch);
    StreamFence();
    return true;
  });
}

template <class T, class I>
bool MaxPoolPut(const Problem& problem) {
  constexpr int64_t kSum = sizeof(Acc<T>), kWindow = sizeof(T) + sizeof(I);
  constexpr int kLanes = PutTap<T, I>::kLanes;
  const PutTap<T, I> op = {static_cast<const T*>(problem.operand[0]), static_cast<const I*>(problem.operand[1]),
                           static_cast<T*>(problem.result[0]), problem.stream};
  constexpr int64_t kScratch = std::is_same_v<T, Acc<T>> ? 0 : kSum;
  const Bands bands(problem.geometry, kLanes, kScratch);
  if (bands.worthwhile) {
    return PutUnits(problem, bands, op, bands.size() * kScratch, bands.size() * kWindow);
  }
  const Strips strips(problem.geometry, kLanes, kWindow, kSum);
  if (!strips.worthwhile) return Walk(problem.geometry, *problem.workers, op);
  const int64_t row = strips.line[2].targets() * strips.inner;
  const int64_t scratch_bytes = strips.taps * sizeof(int64_t) + strips.copied() * kWindow + (strips.sums() + row) * kSum;
  return PutUnits(problem, strips, op, scratch_bytes, strips.copied() * kWindow);
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
