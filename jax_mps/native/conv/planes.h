// The gathers of groups of few channels whose pixels are adjacent: lanes are neighbours of a line, which all meet one
// weight.
//
// The lines that a box of targets reads are copied with zeros around them, so that all targets of a phase read the same
// taps. Where windows are `step` apart, a line becomes `step` lines of every `step`-th pixel: then neighbours read
// neighbours.
#pragma once

#include <cstdint>
#include <utility>

#include "axis.h"
#include "conv/across.h"
#include "conv/arrays.h"
#include "conv/geometry.h"
#include "conv/panels.h"
#include "conv/tile.h"
#include "isa.h"
#include "parallel_for.h"
#include "simd.h"
#include "threads.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

// body(n, pixel) for n pairs of adjacent pixels, n = kN, 4 or 1; returns the first pixel that is left.
template <int kN, class Body>
JAX_MPS_INLINE int64_t ForPairs(Range pixels, const Body& body) {
  int64_t x = pixels.begin;
  for (; x + 2 * kN <= pixels.end; x += 2 * kN) body(Int<kN>(), x);
  if constexpr (kN > 4) {
    for (; x + 8 <= pixels.end; x += 8) body(Int<4>(), x);
  }
  for (; x + 2 <= pixels.end; x += 2) body(Int<1>(), x);
  return x;
}

// Pixel x of a line goes to place x / step of part x % step.
template <class E, class T>
inline void SplitLine(const E* from, Range pixels, int64_t step, T* to, int64_t part) {
  constexpr int kN = kLanes<T>;
  if (step == 1) {
    return Sweep<kN>(pixels.end - pixels.begin, [&](auto n, auto vectors, int64_t at) {
      constexpr int kSome = decltype(n)::value;
      for (int v = 0; v < decltype(vectors)::value; ++v, at += kSome) {
        StoreRaw<kSome>(to + pixels.begin + at, Load<T, kSome>(from + at));
      }
    });
  }
  from -= pixels.begin;
  if (step == 2) {
    if (pixels.begin % 2 != 0 && pixels.begin < pixels.end) {
      to[part + pixels.begin / 2] = Load<T, 1>(from + pixels.begin)[0];
      ++pixels.begin;
    }
    pixels.begin = ForPairs<kN>(pixels, [&](auto n, int64_t x) {
      constexpr int kSome = decltype(n)::value;
      const auto a = Load<T, kSome>(from + x), b = Load<T, kSome>(from + x + kSome);
      if constexpr (kSome == 1) {
        to[x / 2] = a[0], to[part + x / 2] = b[0];
      } else {
        StoreRaw<kSome>(to + x / 2, EverySecond<false>(a, b, std::make_integer_sequence<int, kSome>()));
        StoreRaw<kSome>(to + part + x / 2, EverySecond<true>(a, b, std::make_integer_sequence<int, kSome>()));
      }
    });
  }
  T* place = to + pixels.begin / step;
  int64_t p = pixels.begin % step;
  for (int64_t x = pixels.begin; x < pixels.end; ++x) {
    place[p * part] = Load<T, 1>(from + x)[0];
    if (++p == step) p = 0, ++place;
  }
}

// The reverse, of `pixels` pixels in all.
template <class T, class R>
inline void JoinLine(const T* from, int64_t part, int64_t pixels, int64_t step, R* to) {
  constexpr int kN = kLanes<T>;
  if (step == 1) {
    return Sweep<kN>(pixels, [&](auto n, auto vectors, int64_t at) {
      constexpr int kSome = decltype(n)::value;
      for (int v = 0; v < decltype(vectors)::value; ++v, at += kSome) {
        Store<kSome>(to + at, LoadRaw<T, kSome>(from + at));
      }
    });
  }
  int64_t begin = 0;
  if (step == 2) {
    begin = ForPairs<kN>({0, pixels}, [&](auto n, int64_t x) {
      constexpr int kSome = decltype(n)::value;
      const auto a = LoadRaw<T, kSome>(from + x / 2), b = LoadRaw<T, kSome>(from + part + x / 2);
      if constexpr (kSome == 1) {
        Store<1>(to + x, a), Store<1>(to + x + 1, b);
      } else {
        Store<kSome>(to + x, Interleaved<false>(a, b, std::make_integer_sequence<int, kSome>()));
        Store<kSome>(to + x + kSome, Interleaved<true>(a, b, std::make_integer_sequence<int, kSome>()));
      }
    });
  }
  const T* place = from + begin / step;
  int64_t p = 0;
  for (int64_t x = begin; x < pixels; ++x) {
    Store<1>(to + x, LoadRaw<T, 1>(place + p * part));
    if (++p == step) p = 0, ++place;
  }
}

// The most sources, in the array or not, that `targets` adjacent targets read.
inline int64_t MostReached(const Axis& axis, bool forward, int64_t targets) {
  const int64_t reach = axis.dilation * (axis.taps - 1);
  return forward ? (targets - 1 + reach) / axis.stride + 2 : axis.stride * (targets - 1) + reach + 1;
}

template <class E, class R>
struct Planes {
  using T = Acc<E>;
  static constexpr int kN = kLanes<T>;

  const ConvProblem& problem;
  const GatherPlan& plan;
  Array<const E> source;
  Array<R> target;
  int64_t depth, narrow;  // channels of a group of the source, of the target

  bool forward() const { return problem.op == ConvOp::kForward; }
  int64_t steps() const { return TapCount(problem) * depth; }
  int64_t source_step() const { return forward() ? 1 : problem.axis[2].stride; }
  int64_t target_step() const { return forward() ? problem.axis[2].stride : 1; }

  // Some lines of a phase, and the taps that they read.
  struct Job {
    const Row* rows;
    int64_t number, lanes, to;
    List<TapRun> taps;
  };

  // What is done for every plane of a box.
  struct Layout {
    Box box;
    Range reached[3];                 // the sources that targets read, in the array or not
    Range pixels;                     // of a line of the source that are read, in the copy
    int64_t part, line, plane, copy;  // elements between neighbours of each kind in the copy
    int64_t tile_line;
    bool direct;         // targets need no tile
    List<Row> in, rows;  // lines of the source and of the copy; of the copy and of the target or the tile
    const int64_t* out;  // lines of the target
    List<Job> jobs;
  };

  struct Room {
    T *copies, *tile, *of_channel;
    TapRun* taps;
    Job* jobs;
    Row *in, *rows;
    int64_t* out;
  };

  // The sources that targets read, in the array or not.
  Range Reached(int a, Range targets) const {
    const Axis& axis = problem.axis[a];
    const int64_t reach = axis.dilation * (axis.taps - 1);
    if (!forward()) return {axis.stride * targets.begin - axis.low, axis.stride * (targets.end - 1) - axis.low + reach + 1};
    return {CeilDiv(targets.begin + axis.low - reach, axis.stride), FloorDiv(targets.end - 1 + axis.low, axis.stride) + 1};
  }

  // The targets of a whole phase in a box.
  static Range Inside(const Segment& s, Range range) {
    return {Least(s.count, CeilDiv(Most(0, range.begin - s.target), s.step)),
            Least(s.count, CeilDiv(Most(0, range.end - s.target), s.step))};
  }

  Layout Prepare(const Box& box, const Room& room) const {
    Layout l = {};
    l.box = box;
    ListCopies(l, room);
    const int64_t width = CeilDiv(box.length(3), target_step());
    l.direct = target_step() == 1 && width >= kN;
    l.tile_line = RoundUp(width, kN);
    l.rows = {room.rows, 0}, l.out = room.out, l.jobs = {room.jobs, 0};
    TapRun* taps = room.taps;
    for (int64_t a = 0; a < plan.segments[0]; ++a) {
      for (int64_t b = 0; b < plan.segments[1]; ++b) {
        const int64_t begin = l.rows.number;
        ListLines(l, plan.segment[0][a], plan.segment[1][b], room);
        for (int64_t c = 0; c < plan.segments[2]; ++c) {
          const Segment& along = plan.segment[2][c];
          const Range in_line = Inside(along, box.range[3]);
          const List<TapRun> all = ListTaps(l, plan.segment[0][a], plan.segment[1][b], along, in_line.begin, taps);
          taps += all.number;
          if (in_line.begin < in_line.end) {
            const int64_t lanes = l.direct ? width : RoundUp(in_line.end - in_line.begin, kN);
            ListJobs(l, {begin, l.rows.number}, lanes, l.direct ? 0 : along.target * l.tile_line, all, room.jobs);
          }
        }
      }
    }
    return l;
  }

  // Where the copies of lines lie; what is not of a line is zero for all planes.
  void ListCopies(Layout& l, const Room& room) const {
    const Box& box = l.box;
    Range* const reached = l.reached;
    Range inside[3];
    for (int a = 0; a < 3; ++a) {
      reached[a] = Reached(a, box.range[a + 1]);
      inside[a] = SourcesOf(problem.axis[a], forward(), box.range[a + 1]);
    }
    l.part = (reached[2].end - reached[2].begin) / source_step() + 1 + kN;  // the last vector may be partial
    l.line = l.part * source_step();
    l.plane = l.line * (reached[1].end - reached[1].begin);
    l.copy = l.plane * (reached[0].end - reached[0].begin);
    l.pixels = {inside[2].begin - reached[2].begin, inside[2].end - reached[2].begin};
    for (int64_t e = 0; e < depth * l.copy; ++e) room.copies[e] = 0;
    int64_t number = 0;
    for (int64_t i = inside[0].begin; i < inside[0].end; ++i) {
      for (int64_t j = inside[1].begin; j < inside[1].end; ++j) {
        room.in[number++] = {(i * source.size[1] + j) * source.size[2] + inside[2].begin,
                             (i - reached[0].begin) * l.plane + (j - reached[1].begin) * l.line};
      }
    }
    l.in = {room.in, number};
  }

  // The lines of a phase.
  void ListLines(Layout& l, const Segment& a, const Segment& b, const Room& room) const {
    const Range planes = Inside(a, l.box.range[1]), lines = Inside(b, l.box.range[2]);
    for (int64_t i = planes.begin; i < planes.end; ++i) {
      for (int64_t j = lines.begin; j < lines.end; ++j) {
        const int64_t n = l.rows.number++;
        room.out[n] =
            ((a.target + a.step * i) * target.size[1] + b.target + b.step * j) * target.size[2] + l.box.range[3].begin;
        room.rows[n] = {(a.source + a.source_step * i - l.reached[0].begin) * l.plane +
                            (b.source + b.source_step * j - l.reached[1].begin) * l.line,
                        l.direct ? room.out[n] : n * target_step() * l.tile_line};
      }
    }
  }

  // The taps of a phase, whose first target in a line is number u.
  List<TapRun> ListTaps(const Layout& l, const Segment& a, const Segment& b, const Segment& c, int64_t u,
                        TapRun* taps) const {
    int64_t number = 0;
    for (int64_t i = 0; i < a.taps; ++i) {
      for (int64_t j = 0; j < b.taps; ++j) {
        for (int64_t k = 0; k < c.taps; ++k) {
          const int64_t row = (a.tap + i * a.tap_step) * problem.axis[1].taps + b.tap + j * b.tap_step;
          const int64_t tap = row * problem.axis[2].taps + c.tap + k * c.tap_step;
          const int64_t x = c.source + c.source_step * u + c.tap_source * k - l.reached[2].begin;
          const int64_t at =
              i * a.tap_source * l.plane + j * b.tap_source * l.line + x % source_step() * l.part + x / source_step();
          for (int64_t d = 0; d < depth; ++d) taps[number++] = {at + d * l.copy, tap * depth + d, 1};
        }
      }
    }
    return {taps, number};
  }

  // Few lines at a time; where a line is one vector, more of them.
  static void ListJobs(Layout& l, Range rows, int64_t lanes, int64_t to, List<TapRun> taps, Job* jobs) {
    const int64_t number = rows.end - rows.begin, most = lanes < 2 * kN ? kShortRows : kRows;
    const int64_t tiles = (number + most - 1) / most;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = number * t / tiles, end = number * (t + 1) / tiles;
      jobs[l.jobs.number++] = {l.rows.first + rows.begin + begin, end - begin, lanes, to, taps};
    }
  }

  void Work(const Layout& l, const Room& room, int64_t n, int64_t group) const {
    const E* from = source.data + (n * source.channels + group * depth) * source.pixels();
    for (int64_t d = 0; d < depth; ++d, from += source.pixels()) {
      T* const copy = room.copies + d * l.copy;
      const Range pixels = l.pixels;
      const int64_t step = source_step(), part = l.part;
      for (const Row& row : l.in) SplitLine(from + row.source, pixels, step, copy + row.target, part);
    }
    R* to = target.data + (n * target.channels + group * narrow) * target.pixels();
    for (int64_t r = 0; r < narrow; ++r, to += target.pixels()) {
      const int64_t step = target_step(), length = l.box.length(3), tile_line = l.tile_line;
      LoadWeights(group, r, room.of_channel);
      for (const Job& job : l.jobs) {
        const Range lanes = {0, job.lanes};
        if (l.direct) {
          MultiplyLanes<true, kShortRows>(job.number, lanes, room.copies, to, job.rows, job.taps, room.of_channel, 1);
        } else {
          MultiplyLanes<true, kShortRows>(job.number, lanes, room.copies, room.tile + job.to, job.rows, job.taps,
                                          room.of_channel, 1);
        }
      }
      const T* line = room.tile;
      for (int64_t i = 0; !l.direct && i < l.rows.number; ++i, line += step * tile_line) {
        JoinLine(line, tile_line, length, step, to + l.out[i]);
      }
    }
  }

  void LoadWeights(int64_t group, int64_t channel, T* to) const {
    const KernelLayout layout = LayoutOf(problem);
    const E* from = static_cast<const E*>(problem.operand[1]) + layout.base + group * layout.group +
                    channel * (forward() ? layout.out : layout.in);
    const int64_t step = forward() ? layout.in : layout.out, taps = TapCount(problem), all = depth;
    for (int64_t tap = 0; tap < taps; ++tap, from += layout.tap) {
      for (int64_t d = 0; d < all; ++d) *to++ = Load<T, 1>(from + d * step)[0];
    }
  }

  // Units are groups of boxes.
  bool Work(Range units) const {
    int64_t lines = plan.box[1] * plan.box[2], copied = depth, in = 1;
    for (int a = 0; a < 2; ++a) {
      copied *= MostReached(problem.axis[a], forward(), plan.box[a + 1]);
      in *= MostSources(problem.axis[a], forward(), plan.box[a + 1]);
    }
    copied = RoundUp(copied * (MostReached(problem.axis[2], forward(), plan.box[3]) + source_step() * (1 + kN)), 16);
    const int64_t tile = lines * target_step() * RoundUp(CeilDiv(plan.box[3], target_step()), kN);
    const int64_t numbers = copied + RoundUp(tile, 16) + RoundUp(steps(), 16), jobs = lines * plan.segments[2];
    T* const scratch = static_cast<T*>(Scratch(numbers * sizeof(T) + steps() * sizeof(TapRun) + jobs * sizeof(Job) +
                                               (in + lines) * sizeof(Row) + lines * sizeof(int64_t)));
    if (scratch == nullptr) return false;
    Room room = {};
    room.copies = scratch;
    room.tile = scratch + copied;
    room.of_channel = room.tile + RoundUp(tile, 16);
    room.taps = reinterpret_cast<TapRun*>(scratch + numbers);
    room.jobs = reinterpret_cast<Job*>(room.taps + steps());
    room.in = reinterpret_cast<Row*>(room.jobs + jobs);
    room.rows = room.in + in;
    room.out = reinterpret_cast<int64_t*>(room.rows + lines);
    for (int64_t unit = units.begin, next; unit < units.end; unit = next) {
      const int64_t box = unit / problem.groups, first = box * problem.groups;
      next = Least(units.end, first + problem.groups);
      const Layout l = Prepare(BoxOf(plan, box), room);
      for (int64_t group = unit - first; group < next - first; ++group) {
        for (int64_t n = l.box.range[0].begin; n < l.box.range[0].end; ++n) Work(l, room, n, group);
      }
    }
    return true;
  }
};

// Whether planes are the way: a line fills much of a vector, and copies are not mostly padding.
template <class E>
inline bool PlanesFit(const ConvProblem& problem, const GatherPlan& plan, const E* kernel) {
  const bool forward = problem.op == ConvOp::kForward;
  double reached = 1, sources = 1, targets = 1;
  for (int a = 0; a < 3; ++a) {
    reached *= MostReached(problem.axis[a], forward, plan.targets[a + 1]);
    sources *= plan.sources[a + 1], targets *= plan.targets[a + 1];
  }
  const int64_t width = plan.targets[3] / (forward ? problem.axis[2].stride : 1);
  return 3 * width >= kLanes<Acc<E>> && reached <= 2 * (sources + targets) &&
         Finite(kernel, TapCount(problem) * (problem.in / problem.groups) * problem.out);
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
