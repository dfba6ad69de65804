// Which tap of every window stock JAX selects: a tap stays selected while it is >= the next one. So the first of equal
// maxima is selected, and after a NaN the search begins anew. With padding, that takes part as -inf; where it is selected,
// the index is -1. Without, the search begins at -inf before the window, and padding is left out.
#pragma once

#include <cstdint>
#include <limits>

#include "isa.h"
#include "pooling/max_pool.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

template <class T>
struct SelectedTap {
  using Element = T;
  using Wide = Acc<T>;
  using Index = SignedLane<Wide>;
  static constexpr int kLanes = kVectorBytes / sizeof(Wide), kVectors = 4;
  static constexpr bool kBackward = false, kSeparable = false;
  static constexpr Wide kInfinity = std::numeric_limits<Wide>::infinity();
  template <int N>
  struct State {
    Vec<Wide, N> best;
    Vec<Index, N> tap;
    int64_t next;  // the tap after the last one that was looked at
  };

  const T* source;
  void* taps;
  Type tap_type;
  int64_t count;  // taps of a window
  bool with_padding;

  template <int N>
  State<N> Begin(Int<N>, int64_t, int64_t tap) const {
    const bool inside = tap == 0 && with_padding;
    // No tap stays while a NaN is the best one, so the first tap in the image is taken.
    const Wide best = inside ? std::numeric_limits<Wide>::quiet_NaN() : -kInfinity;
    return {Broadcast<Wide, N>(best), Broadcast<Index, N>(Index{-1}), tap};
  }
  template <int N>
  void Tap(Int<N>, State<N>& state, int64_t from, int64_t tap) const {
    if (with_padding && tap != state.next) SelectPadding(state);
    Vec<Wide, N> value;
    Load<N>(source + from, value);
    const auto stays = state.best >= value;
    state.best = stays ? state.best : value;
    state.tap = stays ? state.tap : Broadcast<Index, N>(static_cast<Index>(tap));
    state.next = tap + 1;
  }
  // Taps in the padding lie between: a NaN alone does not stay before them.
  template <int N>
  static void SelectPadding(State<N>& state) {
    const auto nan = state.best != state.best;
    state.best = nan ? Broadcast<Wide, N>(-kInfinity) : state.best;
    state.tap = nan ? Broadcast<Index, N>(Index{-1}) : state.tap;
  }
  template <int N>
  void Finish(Int<N>, const State<N>& state, int64_t to) const {
    State<N> last = state;
    if (with_padding && state.next != count) SelectPadding(last);
    switch (tap_type) {
      case Type::kS8:
        return Store<N>(static_cast<int8_t*>(taps) + to, last.tap);
      case Type::kS16:
        return Store<N>(static_cast<int16_t*>(taps) + to, last.tap);
      default:
        return Store<N>(static_cast<int32_t*>(taps) + to, last.tap);
    }
  }
  const SelectedTap& At(int64_t) const { return *this; }
  SelectedTap From(const T* other) const { return {other, taps, tap_type, count, with_padding}; }
};

template <class T>
bool MaxPoolSelectedTapIndex(const Problem& problem) {
  int64_t count = 1;
  for (const Axis& axis : problem.geometry.axis) count *= axis.taps;
  const SelectedTap<T> op = {static_cast<const T*>(problem.operand[0]), problem.result[0], problem.second, count,
                             problem.with_padding};
  return Walk(problem.geometry, *problem.workers, op);
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
