#include "conv/geometry.h"

#include <algorithm>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

namespace jax_mps {
namespace {

// Cuts `all` where its targets begin to read other taps. reach(u) are the taps of target u; with u, its ends move in one
// direction only, so equal ends mean equal in between.
template <class Reach>
void Cut(const Segment& all, const Reach& reach, std::vector<Segment>& segments) {
  for (int64_t u = 0; u < all.count;) {
    const Range taps = reach(u);
    int64_t same = u, other = all.count;
    while (other - same > 1) {
      const int64_t middle = same + (other - same) / 2;
      const Range there = reach(middle);
      (there.begin == taps.begin && there.end == taps.end ? same : other) = middle;
    }
    Segment part = all;
    part.target += all.step * u;
    part.count = other - u;
    part.source += all.source_step * u + all.tap_source * taps.begin;
    part.tap += all.tap_step * taps.begin;
    part.taps = taps.end - taps.begin;
    segments.push_back(part);
    u = other;
  }
}

Range Clamp(int64_t begin, int64_t end, int64_t limit) {
  begin = std::clamp<int64_t>(begin, 0, limit);
  return {begin, std::clamp<int64_t>(end, begin, limit)};
}

// Pixels of one phase read windows through every tap_step-th tap.
void CutPixels(const Axis& axis, bool whole, std::vector<Segment>& segments) {
  const int64_t common = std::gcd(axis.stride, axis.dilation);
  const int64_t tap_step = axis.stride / common, back = axis.dilation / common;
  const int64_t phases = std::min(axis.stride, axis.size);
  std::vector<int64_t> first(phases, -1);
  for (int64_t k = 0; k < std::min(axis.taps, tap_step); ++k) {
    const int64_t pixel = axis.dilation * k - axis.low;
    const int64_t phase = pixel - FloorDiv(pixel, axis.stride) * axis.stride;
    if (phase < phases) first[phase] = k;
  }
  for (int64_t phase = 0; phase < phases; ++phase) {
    Segment all = {phase, axis.stride, (axis.size - phase - 1) / axis.stride + 1, 0, 1, 0, 0, tap_step, -back};
    if (first[phase] < 0) {
      segments.push_back(all);
      continue;
    }
    all.tap = first[phase];
    all.source = FloorDiv(phase + axis.low - axis.dilation * all.tap, axis.stride);
    const int64_t taps = (axis.taps - all.tap - 1) / tap_step + 1;
    if (whole) {
      all.taps = taps;
      segments.push_back(all);
      continue;
    }
    Cut(
        all,
        [&](int64_t u) {
          const int64_t window = all.source + u;
          return Clamp(CeilDiv(window - axis.windows + 1, back), FloorDiv(window, back) + 1, taps);
        },
        segments);
  }
}

void CutWindows(const Axis& axis, bool whole, std::vector<Segment>& segments) {
  const Segment all = {0, 1, axis.windows, -axis.low, axis.stride, 0, whole ? axis.taps : 0, 1, axis.dilation};
  if (whole) return segments.push_back(all);
  Cut(
      all,
      [&](int64_t window) {
        const int64_t first = axis.stride * window - axis.low;
        return Clamp(CeilDiv(-first, axis.dilation), CeilDiv(axis.size - first, axis.dilation), axis.taps);
      },
      segments);
}

bool IsPlain(const Axis& axis) {
  return axis.taps == 1 && axis.low == 0 && axis.size == axis.windows && (axis.stride == 1 || axis.size == 1);
}

Axis Plain(int64_t size) {
  Axis axis;
  axis.size = axis.windows = size;
  return axis;
}

}  // namespace

ConvProblem Folded(const ConvProblem& problem) {
  ConvProblem p = problem;
  Axis* const axis = p.axis;
  for (int n = 0; n < 2 && IsPlain(axis[2]) && axis[2].size == 1; ++n) {
    axis[2] = axis[1], axis[1] = axis[0], axis[0] = Axis();
  }
  for (int a = 0; a < 2 && IsPlain(axis[a]); ++a) {
    if (p.channels_last) {
      p.batch *= axis[a].size;
    } else if (IsPlain(axis[a + 1])) {
      axis[a + 1] = Plain(axis[a].size * axis[a + 1].size);
    } else {
      break;
    }
    axis[a] = Axis();
  }
  if (p.channels_last && IsPlain(axis[0]) && IsPlain(axis[1]) && IsPlain(axis[2])) {
    axis[2] = Plain(p.batch * axis[2].size);
    p.batch = 1;
  }
  return p;
}

Range SourcesOf(const Axis& axis, bool forward, Range targets) {
  const int64_t reach = axis.dilation * (axis.taps - 1);
  if (forward) {
    return Clamp(CeilDiv(targets.begin + axis.low - reach, axis.stride),
                 FloorDiv(targets.end - 1 + axis.low, axis.stride) + 1, axis.windows);
  }
  return Clamp(axis.stride * targets.begin - axis.low, axis.stride * (targets.end - 1) - axis.low + reach + 1, axis.size);
}

int64_t MostSources(const Axis& axis, bool forward, int64_t targets) {
  const int64_t reach = axis.dilation * (axis.taps - 1);
  return forward ? std::min(axis.windows, (targets - 1 + reach) / axis.stride + 1)
                 : std::min(axis.size, axis.stride * (targets - 1) + reach + 1);
}

struct GatherPlan::Storage {
  std::vector<Segment> segments[3];
};

GatherPlan::GatherPlan(const ConvProblem& problem, int64_t pixels, bool compact, bool whole) {
  const bool forward = problem.op == ConvOp::kForward;
  auto storage = std::make_unique<Storage>();  // freed where one of its vectors finds no memory
  storage_ = storage.get();
  targets[0] = sources[0] = problem.batch;
  int64_t phases[4] = {1, 1, 1, 1};
  for (int a = 0; a < 3; ++a) {
    const Axis& axis = problem.axis[a];
    (forward ? CutPixels : CutWindows)(axis, whole, storage_->segments[a]);
    segment[a] = storage_->segments[a].data();
    segments[a] = storage_->segments[a].size();
    targets[a + 1] = forward ? axis.size : axis.windows;
    sources[a + 1] = forward ? axis.windows : axis.size;
    if (forward) phases[a + 1] = axis.stride;
  }
  // From the last axis on: whole axes while they fit, then a piece; compact boxes are about as long in two axes. Pieces have
  // as many targets of every phase.
  for (int a = 3; a >= 0; --a) {
    int64_t length = std::max<int64_t>(1, pixels);
    if (compact && a > 0 && targets[a] > 1) {
      int64_t before = 1;
      for (int b = a - 1; b > 0; --b) before *= targets[b];
      while (length > 4 * phases[a] && length * length > pixels && before > pixels / length) length /= 2;
    }
    length = std::min(targets[a], CeilDiv(length, phases[a]) * phases[a]);
    const int64_t pieces = CeilDiv(targets[a], std::max<int64_t>(length, 1));
    length = CeilDiv(CeilDiv(targets[a], std::max<int64_t>(pieces, 1)), phases[a]) * phases[a];
    box[a] = std::max<int64_t>(1, std::min(length, targets[a]));
    boxes[a] = CeilDiv(targets[a], box[a]);
    pixels /= box[a];
  }
  storage_ = storage.release();
}

GatherPlan::~GatherPlan() { delete storage_; }

Buffer::Buffer(int64_t bytes) {
  data_ = bytes < 0 ? nullptr : operator new(static_cast<size_t>(bytes) + 64, std::align_val_t(64), std::nothrow);
}

Buffer::~Buffer() { operator delete(data_, std::align_val_t(64)); }

}  // namespace jax_mps
