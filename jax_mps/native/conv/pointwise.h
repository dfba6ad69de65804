// One tap that meets every pixel, channels first: a matrix product of the kernel and the pixels of an image, in their own
// order.
#pragma once

#include <cstdint>

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

template <class T>
struct Pointwise {
  static constexpr int kN = kLanes<T>;

  const ConvProblem& problem;
  const T* source;
  T* target;
  int64_t depth, narrow;  // channels of a group of the source, of the target
  const T* weights;       // [group][channel of the target][channel of the source]
  int64_t splits = 1;     // of the target's channels

  int64_t pixels() const { return problem.axis[2].size; }
  // A last panel that overlaps the one before it goes with it.
  int64_t blocks() const { return Most(1, Lanes<T>{pixels()}.panels() - (pixels() % kN != 0)); }
  int64_t units() const { return problem.batch * problem.groups * blocks() * splits; }

  // Some channels of the target at the pixels of a block.
  bool Work(int64_t block, Range channels) const {
    const Lanes<T> lanes = {pixels()};
    const int64_t count = channels.end - channels.begin, image = block / blocks();
    const int64_t first = block % blocks(), last = first + 1 == blocks() ? lanes.panels() : first + 1;
    T* const panel = static_cast<T*>(Scratch(depth * kPanel * kN * sizeof(T) + count * sizeof(Row)));
    if (panel == nullptr) return false;
    Row* const rows = reinterpret_cast<Row*>(panel + depth * kPanel * kN);
    for (int64_t c = 0; c < count; ++c) rows[c] = {c * depth, c * pixels()};
    const TapRun all = {0, 0, depth};
    for (int64_t p = first; p < last; ++p) {
      const auto [start, vectors, before] = lanes.panel(p);
      CopyMatrix<T>(depth, vectors * kN, source + image * depth * pixels() + start, pixels(), 1, panel, vectors * kN, 1);
      MultiplyPanel<kPanel>(vectors, count, weights + (image % problem.groups * narrow + channels.begin) * depth,
                            target + (image * narrow + channels.begin) * pixels() + start, rows, &all, 1, panel);
    }
    return true;
  }
};

// Few pixels would leave much of their last vector empty.
template <class T>
inline bool IsPointwise(const ConvProblem& p) {
  const Axis& axis = p.axis[2];
  for (int a = 0; a < 2; ++a) {
    if (p.axis[a].size != 1 || p.axis[a].windows != 1 || p.axis[a].taps != 1 || p.axis[a].low != 0) return false;
  }
  return !p.channels_last && axis.taps == 1 && axis.stride == 1 && axis.low == 0 && axis.size == axis.windows &&
         axis.size >= 8 * kLanes<T>;
}

template <class T>
bool MultiplyPixels(const ConvProblem& problem, const T* source, T* target, int64_t depth, int64_t narrow) {
  const KernelLayout layout = LayoutOf(problem);
  const bool forward = problem.op == ConvOp::kForward;
  const Buffer packed(problem.groups * narrow * depth * static_cast<int64_t>(sizeof(T)));
  if (packed.data() == nullptr) return false;
  T* const weights = static_cast<T*>(packed.data());
  const T* const kernel = static_cast<const T*>(problem.operand[1]) + layout.base;
  // Some channels at a time, in all groups.
  constexpr int64_t kSome = 16;
  const int64_t pieces = (narrow + kSome - 1) / kSome;
  ParallelFor(*problem.workers, problem.groups * pieces, kSome * depth * sizeof(T) * 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / pieces, first = i % pieces * kSome;
      const int64_t row = forward ? layout.out : layout.in, column = forward ? layout.in : layout.out;
      CopyMatrix<T>(Least(kSome, narrow - first), depth, kernel + group * layout.group + first * row, row, column,
                    weights + (group * narrow + first) * depth, depth, 1);
    }
    return true;
  });

  Pointwise<T> product = {problem, source, target, depth, narrow, weights};
  const int64_t whole = product.units();
  product.splits = Most(1, Least((narrow + kRows - 1) / kRows, (32 + whole - 1) / Most(1, whole)));
  const int64_t units = product.units(), splits = product.splits;
  return ParallelFor(*problem.workers, units, static_cast<int64_t>(Effort<T>(problem) / Most(1, units)) + 1,
                     [&](int64_t begin, int64_t end) {
                       for (int64_t unit = begin, next; unit < end; unit = next) {
                         const int64_t block = unit / splits, first = block * splits;
                         next = Least(end, first + splits);  // adjacent channels go together
                         const Range channels = {narrow * (unit - first) / splits, narrow * (next - first) / splits};
                         if (!product.Work(block, channels)) return false;
                       }
                       return true;
                     });
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
