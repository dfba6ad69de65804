// Windows along one axis as integers: what pooling and convolution share.
#pragma once

#include <cstdint>

namespace jax_mps {

// Window i reads the taps stride * i - low + dilation * k, k = 0 .. taps - 1; taps outside [0, size) are padding. Of a
// transposed convolution the windows are the source's pixels.
struct Axis {
  int64_t size = 1, windows = 1, taps = 1, stride = 1, dilation = 1, low = 0;
  int64_t band_low = 0, band_high = 0;  // padding that an average counts
};

struct Range {
  int64_t begin, end;
};

constexpr int64_t FloorDiv(int64_t a, int64_t b) { return a / b - (a % b < 0); }
constexpr int64_t CeilDiv(int64_t a, int64_t b) { return -FloorDiv(-a, b); }

}  // namespace jax_mps
