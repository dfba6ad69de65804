// The way backward of windows that do not overlap: what every window holds goes to its pixels.
#pragma once

#include <cstdint>

#include "isa.h"
#include "parallel_for.h"
#include "pooling/geometry.h"
#include "pooling/walk.h"
#include "simd.h"
#include "threads.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

// `count` numbers, each of them K times.
template <int K, class Wide>
inline void Repeat(const Wide* numbers, int64_t count, Wide* __restrict to) {
  for (int64_t i = 0; i < count; ++i) {
    for (int k = 0; k < K; ++k) to[K * i + k] = numbers[i];
  }
}

// What the windows of a row hold, at the pixels that they read; 0 at the others.
template <class Wide>
inline void Expand(const Tiles& tiles, Range windows, const Wide* held, Range pixels, Wide* row) {
  const Axis& axis = tiles.axis[2];
  const int64_t inner = tiles.inner;
  int64_t done = pixels.begin;
  const auto zero = [&](int64_t end) {
    for (; done < end; ++done) {
      for (int64_t c = 0; c < inner; ++c) row[(done - pixels.begin) * inner + c] = 0;
    }
  };
  const auto fill = [&](int64_t from, int64_t to) {
    for (int64_t w = from; w < to; ++w) {
      const Range covered = tiles.Covered(2, w);
      const Wide* const value = held + (w - windows.begin) * inner;
      zero(covered.begin < pixels.end ? covered.begin : pixels.end);
      for (; done < covered.end && done < pixels.end; ++done) {
        for (int64_t c = 0; c < inner; ++c) row[(done - pixels.begin) * inner + c] = value[c];
      }
    }
  };
  // Windows that are whole in both the image and the piece.
  const int64_t first = windows.begin + 1 > tiles.whole.begin ? windows.begin + 1 : tiles.whole.begin;
  const int64_t last = windows.end - 1 < tiles.whole.end ? windows.end - 1 : tiles.whole.end;
  if (inner == 1 && axis.taps == axis.stride && axis.taps >= 2 && axis.taps <= 4 && first < last) {
    fill(windows.begin, first);
    const Wide* const from = held + first - windows.begin;
    Wide* const to = row + done - pixels.begin;
    if (axis.taps == 2) Repeat<2>(from, last - first, to);
    if (axis.taps == 3) Repeat<3>(from, last - first, to);
    if (axis.taps == 4) Repeat<4>(from, last - first, to);
    done += axis.taps * (last - first);
    fill(last, windows.end);
  } else {
    fill(windows.begin, windows.end);
  }
  zero(pixels.end);
}

// What every window of a piece holds, at its pixels; see FillTiles(). `row` has room for two rows of pixels and one pixel.
template <class Op>
inline void FillTile(const Tiles& tiles, int64_t unit, const Op& op, typename Op::Wide* row) {
  using Wide = typename Op::Wide;
  const Op shared = op.Shared();
  const Axis* axis = tiles.axis;
  const int64_t inner = tiles.inner;
  Wide* const held = row + tiles.length * inner;
  // Where vectors of one window fill its pixels, it needs no row.
  const bool repeated = inner == 1 && axis[2].taps >= kVector<Op>, direct = repeated || inner >= kVector<Op>;

  const Range pixels = tiles.Pixels(unit % tiles.count), windows = tiles.Windows(pixels);
  const int64_t window_row = unit / tiles.count, window_plane = window_row / axis[1].windows;
  const int64_t outer = window_plane / axis[0].windows, i = window_plane % axis[0].windows, j = window_row % axis[1].windows;

  const int64_t source = (window_row * axis[2].windows + windows.begin) * inner;
  const auto share = [&](int64_t first, int64_t count, int64_t divisor) {
    Sweep<Op::kLanes>(count, [&](auto lanes, auto vectors, int64_t n) __attribute__((always_inline)) {
      constexpr int kN = decltype(lanes)::value;
      n += first;
      for (int v = 0; v < decltype(vectors)::value; ++v, n += kN)
        StoreRaw<kN>(held + n, op.Share(lanes, source + n, divisor));
    });
  };
  if (op.Weighted()) {
    for (int64_t w = windows.begin; w < windows.end; ++w) share((w - windows.begin) * inner, inner, tiles.Counted(i, j, w));
  } else {
    share(0, (windows.end - windows.begin) * inner, 1);
  }
  if (!direct) Expand(tiles, windows, held, pixels, row);

  // To copy costs less than to convert again.
  constexpr bool copies = Op::kAlike && kHalf<typename Op::Element>;
  const auto copy = [&](int64_t to, int64_t from, int64_t count) {
    __builtin_memcpy(op.target + to, op.target + from, count * sizeof(typename Op::Element));
  };
  const auto repeat = [&](Wide value, int64_t target, int64_t count) {
    Sweep<kVector<Op>>(count, [&](auto lanes, auto vectors, int64_t n) __attribute__((always_inline)) {
      constexpr int kN = decltype(lanes)::value;
      for (int v = 0; v < decltype(vectors)::value; ++v, n += kN)
        shared.Finish(lanes, Broadcast<Wide, kN>(value), target + n);
    });
  };
  const auto fill_line = [&](int64_t first) {
    int64_t pixel = pixels.begin;
    const auto give = [&](int64_t to, const Wide* value) {
      if (to > pixels.end) to = pixels.end;
      if (to <= pixel) return;
      if (value == nullptr) {
        repeat(0, (first + pixel) * inner, (to - pixel) * inner);
      } else if (repeated) {
        repeat(*value, first + pixel, to - pixel);
      } else {
        for (int64_t p = pixel; p < to; ++p) {
          const int64_t target = (first + p) * inner;
          if (copies && p > pixel)
            copy(target, target - inner, inner);
          else
            FinishSums(shared, value, target, inner);
        }
      }
      pixel = to;
    };
    for (int64_t w = windows.begin; w < windows.end; ++w) {
      const Range covered = tiles.Covered(2, w);
      give(covered.begin, nullptr);
      give(covered.end, held + (w - windows.begin) * inner);
    }
    give(pixels.end, nullptr);
  };
  const Range planes = tiles.Covered(0, i), lines = tiles.Covered(1, j);
  const Range all_planes = tiles.Period(0, i), all_lines = tiles.Period(1, j);
  const int64_t count = (pixels.end - pixels.begin) * inner;
  int64_t done = -1;  // a line
  for (int64_t p = all_planes.begin; p < all_planes.end; ++p) {
    for (int64_t q = all_lines.begin; q < all_lines.end; ++q) {
      const int64_t first = ((outer * axis[0].size + p) * axis[1].size + q) * axis[2].size;
      const int64_t line = (first + pixels.begin) * inner;
      if (p >= planes.end || q >= lines.end) {
        repeat(0, line, count);
        continue;
      }
      if (copies && done >= 0) {
        copy(line, done, count);
      } else if (direct) {
        fill_line(first);
      } else {
        FinishSums(shared, row, line, count);
      }
      done = line;
    }
  }
}

// What every window holds, at its pixels. Of the operation, Share(lanes, source, divisor) is what a pixel gets from a
// window, Weighted() whether divisors differ, Shared() the operation that finishes it, and kAlike whether all pixels of a
// window are the same then.
template <class Op>
bool FillTiles(const Tiles& tiles, const Workers& workers, const Op& op) {
  using Wide = typename Op::Wide;
  const auto body = [&](int64_t begin, int64_t end) {
    Wide* const row = static_cast<Wide*>(Scratch((2 * tiles.length + 1) * tiles.inner * sizeof(Wide)));
    if (row == nullptr) return false;
    for (int64_t unit = begin; unit < end; ++unit) {
      if constexpr (kNarrows<Op>) {
        const Range windows = tiles.Windows(tiles.Pixels(unit % tiles.count));
        const int64_t first = unit / tiles.count * tiles.axis[2].windows + windows.begin;
        if (op.Ordinary(first * tiles.inner, (windows.end - windows.begin) * tiles.inner)) {
          FillTile(tiles, unit, op.Narrow(), reinterpret_cast<float*>(row));
          continue;
        }
      }
      FillTile(tiles, unit, op, row);
    }
    StreamFence();
    return true;
  };
  const int64_t lines = (tiles.axis[0].size / tiles.axis[0].windows + 1) * (tiles.axis[1].size / tiles.axis[1].windows + 1);
  return ParallelFor(workers, tiles.units(), lines * tiles.length * tiles.inner * sizeof(typename Op::Element), body);
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
