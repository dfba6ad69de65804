// The weight gradient: dW[tap, out, in] = sum over windows of image[pixel(window, tap), out] * source[window, in].
//
// Windows are worked on in blocks. Many windows and few weights are split among tasks, whose partial sums are added in a
// fixed order.
#pragma once

#include <cstdint>
#include <type_traits>

#include "conv/arrays.h"
#include "conv/geometry.h"
#include "conv/panels.h"
#include "conv/weights_across.h"
#include "conv/weights_dense.h"
#include "conv/window_rows.h"
#include "isa.h"
#include "parallel_for.h"
#include "simd.h"
#include "threads.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

// Runs a task, whose units each add up the products of some weights, in parts, over windows that are given to them.
template <class Task, class R>
bool RunTask(const Task& task, const ConvProblem& problem, int64_t windows, R* result) {
  using T = typename Task::Sum;
  constexpr int64_t kPartials = 4 << 20;  // numbers
  const int64_t units = task.units(), parts = task.parts(), size = parts * task.part_size();
  const int64_t wanted = Least((16 + units - 1) / units, windows / (2 * kBlock));
  const int64_t splits = Most(1, Least(wanted, kPartials / Most(1, units * size)));
  const Buffer sums(splits == 1 ? 0 : splits * units * size * static_cast<int64_t>(sizeof(T)));
  if (sums.data() == nullptr) return false;
  T* const all = static_cast<T*>(sums.data());
  const auto add = [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      T* const scratch = static_cast<T*>(Scratch((splits == 1 ? size * sizeof(T) : 0) + task.scratch()));
      if (scratch == nullptr) return false;
      T* const mine = splits == 1 ? scratch : all + unit * size;
      for (int64_t i = 0; i < size; ++i) mine[i] = 0;
      const int64_t n = unit / splits, split = unit % splits;
      task.Work(n, {windows * split / splits, windows * (split + 1) / splits}, mine, splits == 1 ? scratch + size : scratch);
      for (int64_t part = 0; splits == 1 && part < parts; ++part) task.Emit(n, part, mine + part * task.part_size(), result);
    }
    return true;
  };
  const double effort = Effort<T>(problem) / (units * splits);
  if (!ParallelFor(*problem.workers, units * splits, static_cast<int64_t>(effort) + 1, add)) return false;
  if (splits == 1) return true;

  const int64_t count = task.part_size();
  return ParallelFor(*problem.workers, units * parts, count * sizeof(T) * splits, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* const of_part = all + i / parts * splits * size + i % parts * count;
      T* const total = static_cast<T*>(Scratch(count * sizeof(T)));
      if (total == nullptr) return false;
      Sweep<kLanes<T>>(count, [&](auto lanes, auto vectors, int64_t at) {
        constexpr int kN = decltype(lanes)::value;
        for (int v = 0; v < decltype(vectors)::value; ++v, at += kN) {
          auto sum = LoadRaw<T, kN>(of_part + at);
          for (int64_t s = 1; s < splits; ++s) sum += LoadRaw<T, kN>(of_part + at + s * size);
          StoreRaw<kN>(total + at, sum);
        }
      });
      task.Emit(i / parts, i % parts, total, result);
    }
    return true;
  });
}

// A whole array as a tile.
template <class E, class T>
bool StageAll(const ConvProblem& problem, const Array<const E>& from, int64_t pitch, int64_t depth, int64_t narrow, T* to) {
  const int64_t planes = from.size[0], lines = from.size[1], units = problem.batch * planes * lines;
  if (units == 0) return true;
  return ParallelFor(*problem.workers, units, from.size[2] * pitch * sizeof(T), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t j = unit % lines, i = unit / lines % planes, b = unit / lines / planes;
      const Box line = {{{b, b + 1}, {i, i + 1}, {j, j + 1}, {0, from.size[2]}}};
      Stage<E>(from, line, to + unit * from.size[2] * pitch, pitch, depth, narrow);
    }
    return true;
  });
}

// The side that leaves fewer lanes of its vectors empty gets the lanes, and the other side is packed as rows. Where both are
// alike, the rows are the side that is sooner packed: the source once, or the image once a tap. With one tap
// and many channels the lanes are the side whose channels are adjacent in the kernel: its sums need no transposition.
template <class T>
inline bool ImageFillsLanes(const ConvProblem& p, int64_t columns) {
  const int64_t in = p.in / p.groups, out = p.out / p.groups, taps = TapCount(p);
  constexpr int64_t kN = kLanes<T>;
  const int64_t of_image = RoundUp(columns, kN) * in, of_source = RoundUp(in, kN) * columns;
  if (of_image != of_source) return of_image < of_source;
  return taps == 1 && Least(in, out) >= 8 * kN ? !p.transpose_kernel : in < taps * out;
}

template <class E, class R>
bool DenseWeightGradient(const ConvProblem& problem, const Array<const E>& image, const Array<const E>& source,
                         int64_t windows, R* result) {
  using T = Acc<E>;
  const int64_t in = problem.in / problem.groups, out = problem.out / problem.groups, taps = TapCount(problem);
  // With more rows than there are windows in a line, the ends of the lines cost more than packing does; and the image's
  // channels of a block must stay in a level-1 cache, as each tile reads some of them.
  if constexpr (std::is_same_v<E, T>) {
    if (in >= kLanes<T> && out <= 32 && taps * out <= Least(problem.axis[2].windows, 128)) {
      return RunTask(DirectTask<T>(problem, image, source), problem, windows, result);
    }
  }
  // The taps of a row go together where the outputs of one do not fill a vector.
  const bool joins = problem.groups == 1 && problem.axis[2].dilation == 1 && out < kLanes<T>;
  bool unfit = false;
  const auto run = [&](int64_t run_taps) {
    const bool image_lanes = ImageFillsLanes<T>(problem, run_taps * out);
    return RunTask(WeightTask<E, T>(problem, image, source, image_lanes, run_taps, &unfit), problem, windows, result);
  };
  if (!run(joins ? problem.axis[2].taps : 1)) return false;
  return !unfit || run(1);
}

template <class G, class X, class R>
bool WeightGradientOf(const ConvProblem& problem, const Array<const G>& image, const Array<const X>& source, bool across,
                      int64_t pitch) {
  using T = Acc<G>;
  const int64_t in = problem.in / problem.groups, out = problem.out / problem.groups;
  const int64_t windows = problem.batch * source.pixels();
  R* const result = static_cast<R*>(problem.result);
  if (across) {
    const AcrossTask<G, X, T> task = {problem, LayoutOf(problem), image, source, in, pitch, Picks<T>(in, out, problem.out)};
    return RunTask(task, problem, windows, result);
  }
  if constexpr (std::is_same_v<G, X>) return DenseWeightGradient(problem, image, source, windows, result);
  __builtin_unreachable();
}

// Operands that are channels last are read where they are; others are copied first.
template <class E, class R>
bool WeightGradient(const ConvProblem& problem) {
  using T = Acc<E>;
  const int64_t in = problem.in / problem.groups, out = problem.out / problem.groups;
  const Array<const E> image = Image<const E>(problem, const_cast<void*>(problem.operand[0]));
  const Array<const E> source = Windows<const E>(problem, const_cast<void*>(problem.operand[1]));
  const bool across = problem.groups > 1 && 2 * out <= kLanes<T> && in <= kLanes<T>;
  const bool expand = across && (in != 1 || out != 1) && !Picks<T>(in, out, problem.out);
  const int64_t copies = expand ? in : 1, pitch = expand ? problem.out : problem.in;
  if (problem.channels_last && !expand) return WeightGradientOf<E, E, R>(problem, image, source, across, pitch);

  const auto pixels = [&](const Array<const E>& array) { return problem.batch * array.pixels() * int64_t{sizeof(T)}; };
  const Buffer image_copy(problem.channels_last ? 0 : pixels(image) * image.channels);
  const Buffer source_copy(pixels(source) * copies * pitch);
  if (image_copy.data() == nullptr || source_copy.data() == nullptr) return false;
  const auto copied = [](const Array<const E>& array, const Buffer& copy, int64_t channels) {
    return Array<const T>{static_cast<const T*>(copy.data()), {array.size[0], array.size[1], array.size[2]}, channels, true};
  };
  const Array<const T> x = copied(source, source_copy, copies * pitch);
  if (!StageAll<E>(problem, source, copies * pitch, copies, expand ? out : 1, static_cast<T*>(source_copy.data())))
    return false;
  if (problem.channels_last) return WeightGradientOf<E, T, R>(problem, image, x, across, pitch);
  if (!StageAll<E>(problem, image, image.channels, 1, 1, static_cast<T*>(image_copy.data()))) return false;
  return WeightGradientOf<T, T, R>(problem, copied(image, image_copy, image.channels), x, across, pitch);
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
