// The windows of a weight gradient in blocks, row by row, and what a tap meets of them.
#pragma once

#include <cstdint>

#include "axis.h"
#include "conv/arrays.h"
#include "conv/geometry.h"
#include "conv/panels.h"
#include "isa.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

constexpr int64_t kBlock = 256;  // windows

// Windows [begin, begin + count) of the row (plane, line) of image `batch`; the first of them is number `at` of its block.
struct WindowRow {
  int64_t batch, plane, line, begin, count, at;
};

// Lists the rows that a range of windows lies in; as many as there are windows at most.
inline int64_t ListWindowRows(const ConvProblem& p, Range windows, WindowRow* window_rows) {
  const int64_t width = p.axis[2].windows;
  int64_t number = 0;
  for (int64_t w = windows.begin; w < windows.end; ++number) {
    const int64_t line = w / width, begin = w % width;
    const int64_t count = Least(width - begin, windows.end - w);
    window_rows[number] = {line / p.axis[1].windows / p.axis[0].windows,
                           line / p.axis[1].windows % p.axis[0].windows,
                           line % p.axis[1].windows,
                           begin,
                           count,
                           w - windows.begin};
    w += count;
  }
  return number;
}

// `count` windows of a block from number `at` on, whose pixels for a tap are in one row of the images: the first one's
// begins with element `pixel`.
struct Span {
  int64_t at, count, pixel, row;
};

// The windows of an axis that a tap meets inside the image.
inline Range Reached(const Axis& axis, int64_t tap) {
  const int64_t first = axis.dilation * tap - axis.low;
  const int64_t begin = first >= 0 ? 0 : Least(axis.windows, (axis.stride - 1 - first) / axis.stride);
  return {begin, first >= axis.size ? begin : Most(begin, Least(axis.windows, (axis.size - 1 - first) / axis.stride + 1))};
}

// Where a tap meets the image: the windows of each axis, and the pixels of window 0.
struct TapReach {
  Range windows[3];
  int64_t pixel[3];

  TapReach(const ConvProblem& p, int64_t tap) {
    for (int a = 2; a >= 0; --a) {
      const int64_t k = tap % p.axis[a].taps;
      tap /= p.axis[a].taps;
      windows[a] = Reached(p.axis[a], k);
      pixel[a] = p.axis[a].dilation * k - p.axis[a].low;
    }
  }

  bool MeetsLine(const WindowRow& row) const {
    return row.plane >= windows[0].begin && row.plane < windows[0].end && row.line >= windows[1].begin &&
           row.line < windows[1].end;
  }

  // The element of the image that the first window of a row would meet.
  template <class E>
  int64_t Pixel(const ConvProblem& p, const Array<const E>& image, const WindowRow& row) const {
    const int64_t plane = row.batch * image.size[0] + p.axis[0].stride * row.plane + pixel[0];
    const int64_t line = plane * image.size[1] + p.axis[1].stride * row.line + pixel[1];
    return (line * image.size[2] + p.axis[2].stride * row.begin + pixel[2]) * image.channels;
  }

  template <class E>
  Span At(const ConvProblem& p, const Array<const E>& image, const WindowRow& window_row) const {
    const int64_t i = window_row.plane, j = window_row.line;
    const int64_t begin = Most(window_row.begin, windows[2].begin),
                  end = Least(window_row.begin + window_row.count, windows[2].end);
    if (begin >= end || i < windows[0].begin || i >= windows[0].end || j < windows[1].begin || j >= windows[1].end)
      return {0, 0, 0, 0};
    const int64_t plane = window_row.batch * image.size[0] + p.axis[0].stride * i + pixel[0];
    const int64_t row = plane * image.size[1] + p.axis[1].stride * j + pixel[1];
    const int64_t first = row * image.size[2] + p.axis[2].stride * begin + pixel[2];
    return {window_row.at + begin - window_row.begin, end - begin, first * image.channels, row};
  }
};

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
