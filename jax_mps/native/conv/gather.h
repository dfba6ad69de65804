// Transposed convolution and its gradient to the data.
//
// Both are sums of products over channels, so both end in one register tile: some rows of the source, read element by
// element, times a panel of vectors of the kernel (tile.h). What differs is what a row is:
//   forward         pixels of one phase that read the same taps; the panel holds output channels. Where the outputs are too
//                   few to fill vectors, windows are multiplied with all taps at once and the products overlap-added.
//   data gradient   windows that read the same taps; the panel holds input channels.
// Groups of few channels have their channels in lanes instead (across.h).
#pragma once

#include <cstdint>
#include <type_traits>

#include "axis.h"
#include "conv/across.h"
#include "conv/arrays.h"
#include "conv/geometry.h"
#include "conv/pack.h"
#include "conv/panels.h"
#include "conv/planes.h"
#include "conv/pointwise.h"
#include "conv/tile.h"
#include "isa.h"
#include "parallel_for.h"
#include "simd.h"
#include "threads.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

// What meets what: an element of the source all lanes of a panel; a lane the same lane; or an element all taps at once,
// whose products are then added to the pixels.
enum class Way { kDense, kAcross, kOverlap };

template <class E, class R>
struct Gather {
  using T = Acc<E>;
  static constexpr int kN = kLanes<T>;

  const ConvProblem& problem;
  const GatherPlan* plan;
  Way way;
  Array<const E> source;
  Array<R> target;
  Weights<T> weights;
  int64_t depth, narrow;                                        // channels of a group of the source, of the target
  bool direct_source = false, direct_target = false;            // arrays that need no tile
  int64_t source_pitch = 0, target_pitch = 0, group_pitch = 0;  // of tiles
  int64_t splits = 1;                                           // of the panels
  int64_t product_room = 0, source_room = 0, target_room = 0;   // elements of scratch
  int64_t row_room = 0, tap_room = 0;                           // rows, taps

  bool forward() const { return problem.op == ConvOp::kForward; }

  Box SourceBox(const Box& box) const {
    Box sources = box;
    for (int a = 0; a < 3; ++a) sources.range[a + 1] = SourcesOf(problem.axis[a], forward(), box.range[a + 1]);
    return sources;
  }

  int64_t steps_of_tap() const { return weights.steps / TapCount(problem); }

  // The taps of a combination of segments, as runs of elements; neighbours join.
  int64_t ListTaps(const Segment* const* segment, const View& view, int64_t joined_step, TapRun* taps) const {
    int64_t count = 0;
    const int64_t size[2] = {problem.axis[1].taps * problem.axis[2].taps, problem.axis[2].taps};
    const int64_t steps = steps_of_tap();
    for (int64_t a = 0; a < segment[0]->taps; ++a) {
      for (int64_t b = 0; b < segment[1]->taps; ++b) {
        for (int64_t c = 0; c < segment[2]->taps; ++c) {
          const int64_t tap = (segment[0]->tap + a * segment[0]->tap_step) * size[0] +
                              (segment[1]->tap + b * segment[1]->tap_step) * size[1] + segment[2]->tap +
                              c * segment[2]->tap_step;
          const int64_t from = a * segment[0]->tap_source * view.stride[1] + b * segment[1]->tap_source * view.stride[2] +
                               c * segment[2]->tap_source * view.stride[3];
          if (joined_step > 0) {
            // Lanes: every copy of the source is a step by itself.
            for (int64_t d = 0; d < steps; ++d) taps[count++] = {from + d * joined_step, tap * steps + d, 1};
          } else if (count > 0 && taps[count - 1].source + taps[count - 1].length == from &&
                     taps[count - 1].step + taps[count - 1].length == tap * steps) {
            taps[count - 1].length += steps;
          } else {
            taps[count++] = {from, tap * steps, steps};
          }
        }
      }
    }
    return count;
  }

  // The targets [first, last) of a segment inside a box.
  static Range Inside(const Segment& segment, Range range) {
    const int64_t begin =
        segment.target >= range.begin ? 0 : (range.begin - segment.target + segment.step - 1) / segment.step;
    const int64_t end = segment.target >= range.end ? 0 : (range.end - segment.target + segment.step - 1) / segment.step;
    return {Least(begin, segment.count), Least(end, segment.count)};
  }

  // multiply(rows, taps) for the targets of a box that read the same taps.
  template <class Multiply>
  void Run(const Box& box, const View& from_view, const View& to_view, Row* rows, TapRun* taps,
           const Multiply& multiply) const {
    const Segment* s[3];
    Range in[3];
    for (int64_t a = 0; a < plan->segments[0]; ++a) {
      s[0] = plan->segment[0] + a;
      in[0] = Inside(*s[0], box.range[1]);
      if (in[0].begin >= in[0].end) continue;
      for (int64_t b = 0; b < plan->segments[1]; ++b) {
        s[1] = plan->segment[1] + b;
        in[1] = Inside(*s[1], box.range[2]);
        if (in[1].begin >= in[1].end) continue;
        for (int64_t c = 0; c < plan->segments[2]; ++c) {
          s[2] = plan->segment[2] + c;
          in[2] = Inside(*s[2], box.range[3]);
          if (in[2].begin >= in[2].end) continue;
          int64_t count = 0;
          const Row step = {s[2]->source_step * from_view.stride[3], s[2]->step * to_view.stride[3]};
          for (int64_t n = box.range[0].begin; n < box.range[0].end; ++n) {
            const auto at = [&](int axis, int64_t u, const Row& row) {
              return Row{row.source + from_view.at(axis + 1, s[axis]->source + s[axis]->source_step * u),
                         row.target + to_view.at(axis + 1, s[axis]->target + s[axis]->step * u)};
            };
            for (int64_t i = in[0].begin; i < in[0].end; ++i) {
              const Row plane = at(0, i, {from_view.at(0, n), to_view.at(0, n)});
              for (int64_t j = in[1].begin; j < in[1].end; ++j) {
                const Row line = at(1, j, plane);
                Row row = at(2, in[2].begin, line);
                for (int64_t k = in[2].begin; k < in[2].end; ++k, row.source += step.source, row.target += step.target) {
                  rows[count++] = row;
                }
              }
            }
          }
          const int64_t tap_count = ListTaps(s, from_view, way == Way::kAcross ? source_pitch / depth : 0, taps);
          multiply(List<Row>{rows, count}, List<TapRun>{taps, tap_count});
        }
      }
    }
  }

  void MultiplyAll(List<Row> rows, const T* from, T* to, int64_t group_pitch, List<TapRun> taps, Range panels) const {
    const Lanes<T>& lanes = weights.lanes;
    int64_t group = panels.begin / lanes.panels(), number = panels.begin % lanes.panels();
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const Panel panel = lanes.panel(number);
      MultiplyPanel<kPanel>(panel.vectors, rows.number, from + group * depth, to + group * group_pitch + panel.start,
                            rows.first, taps.first, taps.number,
                            weights.data + group * weights.group_size() + panel.first * weights.steps * kN);
      if (++number == lanes.panels()) number = 0, ++group;
    }
  }

  // Across groups a row is short work: the channels of few rows, then the next ones. Tiles of rows are of equal height.
  template <class S, class D>
  void RunAcross(const Box& box, const S* from, const View& from_view, D* to, const View& to_view, Range panels, Row* rows,
                 TapRun* taps) const {
    if (panels.begin == panels.end) return;
    const Panel last = weights.lanes.panel(panels.end - 1);
    const Range lanes = {weights.lanes.panel(panels.begin).start, last.start + last.vectors * kN};
    Run(box, from_view, to_view, rows, taps, [&](List<Row> all, List<TapRun> of_all) {
      const int64_t tiles = (all.number + kRows - 1) / kRows;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t begin = all.number * t / tiles, end = all.number * (t + 1) / tiles;
        MultiplyLanes<false>(end - begin, lanes, from, to, all.first + begin, of_all, weights.data, weights.pitch());
      }
    });
  }

  // All windows that touch the box times all taps, a row at a time; the products are added to the box.
  void Overlap(const Box& box, T* to, const View& to_view, T* stage, T* products, Row* rows) const {
    const Box sources = SourceBox(box);
    const Axis* axis = problem.axis;
    const int64_t width = sources.length(3), group_width = weights.lanes.padded(), pitch = group_width * problem.groups;
    const int64_t narrow = this->narrow;
    for (int64_t b = box.range[0].begin; b < box.range[0].end; ++b) {
      for (int64_t i = box.range[1].begin; i < box.range[1].end; ++i) {
        for (int64_t j = box.range[2].begin; j < box.range[2].end; ++j) {
          T* row = to + to_view.at(0, b) + to_view.at(1, i) + to_view.at(2, j) + to_view.at(3, box.range[3].begin);
          for (int64_t e = 0; e < box.length(3) * to_view.stride[3]; ++e) row[e] = 0;
        }
      }
      if (width == 0) continue;
      for (int64_t i = sources.range[1].begin; i < sources.range[1].end; ++i) {
        for (int64_t j = sources.range[2].begin; j < sources.range[2].end; ++j) {
          const Box line = {{{b, b + 1}, {i, i + 1}, {j, j + 1}, sources.range[3]}};
          const T* from = stage;
          if (direct_source) {
            from = reinterpret_cast<const T*>(source.data + source.row(b, i, j) + line.range[3].begin * source.channels);
          } else {
            Stage<E>(source, line, stage, source_pitch, 1, 1);
          }
          for (int64_t w = 0; w < width; ++w) rows[w] = {w * source.channels, w * pitch};
          const TapRun all = {0, 0, depth};
          MultiplyAll({rows, width}, from, products, group_width, {&all, 1}, {0, weights.panels()});
          for (int64_t k0 = 0; k0 < axis[0].taps; ++k0) {
            const int64_t plane = axis[0].stride * i - axis[0].low + axis[0].dilation * k0;
            if (plane < box.range[1].begin || plane >= box.range[1].end) continue;
            for (int64_t k1 = 0; k1 < axis[1].taps; ++k1) {
              const int64_t height = axis[1].stride * j - axis[1].low + axis[1].dilation * k1;
              if (height < box.range[2].begin || height >= box.range[2].end) continue;
              T* row = to + to_view.at(0, b) + to_view.at(1, plane) + to_view.at(2, height);
              const T* taps = products + (k0 * axis[1].taps + k1) * axis[2].taps * narrow;
              AddRow(row, taps, line.range[3], pitch, group_width, box.range[3], to_view);
            }
          }
        }
      }
    }
  }

  void AddRow(T* row, const T* products, Range windows, int64_t pitch, int64_t group_width, Range pixels,
              const View& view) const {
    const Axis& axis = problem.axis[2];
    // One group and adjacent taps: the products of a window are one run.
    const bool joined = axis.dilation == 1 && problem.groups == 1 && view.stride[3] == narrow;
    const int64_t taps = joined ? 1 : axis.taps, pixels_of_run = joined ? axis.taps : 1;
    for (int64_t w = windows.begin; w < windows.end; ++w, products += pitch) {
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t first = axis.stride * w - axis.low + axis.dilation * k;
        const int64_t begin = Most(first, pixels.begin), end = Least(first + pixels_of_run, pixels.end);
        if (begin >= end) continue;
        for (int64_t g = 0; g < problem.groups; ++g) {
          const T* from = products + g * group_width + (k + begin - first) * narrow;
          T* to = row + view.at(3, begin) + g * group_pitch;
          for (int64_t e = 0; e < (end - begin) * narrow; ++e) to[e] += from[e];
        }
      }
    }
  }

  // A panel that overlaps the one before it stays with it, so that no two tasks write to the same place.
  int64_t FirstPanel(int64_t split) const {
    const int64_t panels = weights.lanes.panels(), first = weights.panels() * split / splits;
    const bool overlaps = weights.lanes.count % kN != 0 && panels > 1 && first % panels == panels - 1;
    return first + (overlaps ? 1 : 0);
  }

  bool Work(const Box& box, Range panels) const {
    const int64_t numbers = product_room + source_room + target_room;
    T* products = static_cast<T*>(Scratch(numbers * sizeof(T) + row_room * sizeof(Row) + tap_room * sizeof(TapRun)));
    if (products == nullptr) return false;
    T* stage = products + product_room;
    T* tile = stage + source_room;
    Row* rows = reinterpret_cast<Row*>(tile + target_room);
    TapRun* taps = reinterpret_cast<TapRun*>(rows + row_room);

    View to_view;
    T* to = tile;
    if (direct_target) {
      to = reinterpret_cast<T*>(target.data);
      to_view = ViewOf(Whole(target, problem.batch), target.channels);
    } else {
      to_view = ViewOf(box, target_pitch);
    }
    if (way == Way::kOverlap) {
      Overlap(box, to, to_view, stage, products, rows);
    } else {
      const Box sources = SourceBox(box);
      View from_view = ViewOf(sources, source_pitch);
      if (direct_source) {
        from_view = ViewOf(Whole(source, problem.batch), source.channels);
      } else {
        Stage<E>(source, sources, stage, source_pitch, way == Way::kAcross ? depth : 1, way == Way::kAcross ? narrow : 1);
      }
      const T* const same = direct_source ? reinterpret_cast<const T*>(source.data) : stage;
      if (way == Way::kDense) {
        Run(box, from_view, to_view, rows, taps,
            [&](List<Row> all, List<TapRun> of_all) { MultiplyAll(all, same, to, group_pitch, of_all, panels); });
      } else if (direct_source) {
        RunAcross(box, source.data, from_view, target.data, to_view, panels, rows, taps);
      } else {
        RunAcross(box, same, from_view, to, to_view, panels, rows, taps);
      }
    }
    if (!direct_target) EmitPanels(box, tile, panels);
    return true;
  }

  void EmitPanels(const Box& box, const T* tile, Range panels) const {
    const Lanes<T>& lanes = weights.lanes;
    if (way == Way::kOverlap || panels.end - panels.begin == weights.panels()) {
      const int64_t groups = target_pitch / group_pitch;
      if (group_pitch * groups == target.channels) return Emit(tile, target_pitch, target, box, {0, target.channels});
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t count = target.channels / groups;
        Emit(tile + g * group_pitch, target_pitch, target, box, {g * count, (g + 1) * count});
      }
      return;
    }
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const int64_t group = p / lanes.panels();
      const Panel panel = lanes.panel(p % lanes.panels());
      const int64_t begin = panel.start, end = Least(begin + panel.vectors * kN, lanes.count);
      Emit(tile + group * group_pitch + begin, target_pitch, target, box,
           {group * lanes.count + begin, group * lanes.count + end});
    }
  }
};

// Lanes are few outputs of many groups, or few outputs are left to the products of all taps, where that takes less time.
template <class E>
inline Way WayOf(const ConvProblem& problem, int64_t depth, int64_t narrow) {
  constexpr int64_t kN = kLanes<Acc<E>>;
  if (problem.groups > 1 && 2 * narrow <= kN && depth > 0 && depth <= kN) return Way::kAcross;
  // Overlapping saves the products of empty lanes, and adds every product to a pixel, which takes about as long as four
  // vectors.
  const bool saves = depth * (kN - narrow) >= 4 * kN * narrow;
  return problem.op == ConvOp::kForward && saves ? Way::kOverlap : Way::kDense;
}

// Where the kernel's entries lie for these lanes.
inline KernelStrides StridesOf(const ConvProblem& problem, Way way, int64_t narrow, int64_t lanes) {
  const KernelLayout layout = LayoutOf(problem);
  const bool forward = problem.op == ConvOp::kForward;
  KernelStrides strides = {
      layout.base, layout.group, layout.tap, forward ? layout.in : layout.out, forward ? layout.out : layout.in, lanes, 0};
  if (way == Way::kAcross && narrow == 1) strides.lane = layout.group;
  if (way == Way::kAcross && narrow > 1) strides.inner = narrow, strides.outer = layout.group;
  if (way == Way::kOverlap) strides.inner = narrow, strides.outer = layout.tap;
  return strides;
}

// Pitches of the tiles, and whether the arrays can stand for them.
template <class E, class R>
void LayTiles(Gather<E, R>& gather) {
  using T = Acc<E>;
  constexpr int kN = kLanes<T>;
  const bool last = gather.problem.channels_last, across = gather.way == Way::kAcross, overlap = gather.way == Way::kOverlap;
  const Lanes<T>& lanes = gather.weights.lanes;
  const bool depthwise = gather.depth == 1 && gather.narrow == 1 && gather.source.channels >= kN;
  gather.direct_source = last && (across ? depthwise : std::is_same_v<E, T>);
  gather.direct_target =
      (across && gather.direct_source) || (last && std::is_same_v<R, T> && (overlap || lanes.count >= kN));
  gather.source_pitch = across ? gather.depth * lanes.padded() : gather.source.channels;
  gather.group_pitch = overlap ? gather.narrow : lanes.padded();
  gather.target_pitch = gather.group_pitch * gather.weights.groups;
}

// Boxes so large that their two sides stay in the cache.
template <class E, class R>
int64_t PixelsOfBox(const Gather<E, R>& gather) {
  double ratio = 1;
  for (const Axis& axis : gather.problem.axis) ratio *= axis.stride;
  const double sources_a_target = gather.way == Way::kOverlap ? 0 : gather.forward() ? 1 / ratio : ratio;
  const double bytes = (gather.target_pitch + gather.source_pitch * sources_a_target) * sizeof(Acc<E>);
  return static_cast<int64_t>(kCacheBytes / bytes) + 1;
}

// Scratch of a box, and into how many tasks its panels are split.
template <class E, class R>
void SetRooms(Gather<E, R>& gather, const GatherPlan& plan) {
  const bool overlap = gather.way == Way::kOverlap, across = gather.way == Way::kAcross;
  int64_t sources = overlap ? 1 : plan.box[0], targets = plan.box[0];
  for (int a = 0; a < 3; ++a) {
    // Overlapping works on one row of sources at a time.
    if (!overlap || a == 2) sources *= MostSources(gather.problem.axis[a], gather.forward(), plan.box[a + 1]);
    targets *= plan.box[a + 1];
  }
  const Weights<Acc<E>>& weights = gather.weights;
  const int64_t boxes = plan.box_count();
  if (!overlap) gather.splits = Most(1, Least(weights.panels(), (32 + boxes - 1) / boxes));
  if (overlap) gather.product_room = RoundUp(sources * weights.lanes.padded() * gather.problem.groups, 16);
  if (!gather.direct_source) gather.source_room = RoundUp(sources * gather.source_pitch, 16);
  if (!gather.direct_target) gather.target_room = RoundUp(targets * gather.target_pitch, 16);
  gather.row_room = overlap ? sources : targets;
  gather.tap_room = overlap ? 0 : TapCount(gather.problem) * (across ? gather.depth : 1);
}

template <class E, class R>
bool GatherPlanes(const ConvProblem& problem, const GatherPlan& plan, const Array<const E>& source, const Array<R>& target,
                  int64_t depth, int64_t narrow) {
  const Planes<E, R> planes = {problem, plan, source, target, depth, narrow};
  const int64_t units = plan.box_count() * problem.groups;
  return ParallelFor(*problem.workers, units, static_cast<int64_t>(Effort<E>(problem) / units) + 1,
                     [&](int64_t begin, int64_t end) { return planes.Work({begin, end}); });
}

template <class E, class R>
bool GatherAll(const ConvProblem& problem) {
  using T = Acc<E>;
  const bool forward = problem.op == ConvOp::kForward;
  const int64_t groups = problem.groups, in = problem.in / groups, out = problem.out / groups;
  const int64_t depth = forward ? in : out, narrow = forward ? out : in, taps = TapCount(problem);
  void* const operand = const_cast<void*>(problem.operand[0]);
  const Array<const E> source = forward ? Windows<const E>(problem, operand) : Image<const E>(problem, operand);
  const Array<R> target = forward ? Image<R>(problem, problem.result) : Windows<R>(problem, problem.result);

  const E* const kernel = static_cast<const E*>(problem.operand[1]);
  const Way way = WayOf<E>(problem, depth, narrow);
  const bool across = way == Way::kAcross, overlap = way == Way::kOverlap;
  if constexpr (std::is_same_v<E, T> && std::is_same_v<R, T>) {
    if (!across && IsPointwise<T>(problem)) return MultiplyPixels<T>(problem, source.data, target.data, depth, narrow);
  }
  if (across && !problem.channels_last) {
    const GatherPlan plan(problem, kCacheBytes / (4 * sizeof(T)), false, true);
    if (PlanesFit(problem, plan, kernel)) return GatherPlanes(problem, plan, source, target, depth, narrow);
  }
  Weights<T> weights = {{across    ? groups * narrow
                         : overlap ? taps * narrow
                                   : narrow},
                        across ? 1 : groups,
                        overlap ? depth : taps * depth,
                        across,
                        nullptr};
  const Buffer packed(weights.groups * weights.group_size() * static_cast<int64_t>(sizeof(T)));
  if (packed.data() == nullptr) return false;
  weights.data = static_cast<const T*>(packed.data());
  if (!PackKernel(*problem.workers, kernel, StridesOf(problem, way, narrow, weights.lanes.count), overlap ? 1 : taps, depth,
                  weights, static_cast<T*>(packed.data()))) {
    return false;
  }

  Gather<E, R> gather = {problem, nullptr, way, source, target, weights, depth, narrow};
  LayTiles(gather);
  const GatherPlan plan(problem, PixelsOfBox(gather), overlap, false);
  gather.plan = &plan;
  SetRooms(gather, plan);
  const int64_t units = plan.box_count() * gather.splits;
  return ParallelFor(*problem.workers, units, static_cast<int64_t>(Effort<E>(problem) / units) + 1,
                     [&](int64_t begin, int64_t end) {
                       for (int64_t unit = begin, next; unit < end; unit = next) {
                         const int64_t box = unit / gather.splits, first = box * gather.splits;
                         next = Least(end, first + gather.splits);  // adjacent panels of a box go together
                         const Range panels = {gather.FirstPanel(unit - first), gather.FirstPanel(next - first)};
                         if (!gather.Work(BoxOf(plan, box), panels)) return false;
                       }
                       return true;
                     });
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
