// Maximum pooling: the maximum, its tap, and the value at a tap.
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "pooling/kernels.h"
#include "pooling/walk.h"
#include "simd.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

// ---- The maximum alone.

template <class T>
struct MaxValue {
  using Element = T;
  using Wide = Key<T>;
  static constexpr int kLanes = kVectorBytes / sizeof(Wide), kVectors = 8;
  static constexpr bool kBackward = false, kSeparable = true, kRounds = false;
  template <int N>
  using State = Vec<Wide, N>;

  Order<T> order;
  const T* source;
  T* target;

  template <int N>
  State<N> Begin(Int<N>, int64_t, int64_t) const {
    return Broadcast<Wide, N>(order.Lowest());
  }
  template <int N, class V>
  void Tap(Int<N>, V& best, int64_t from, int64_t) const {
    Merge(best, order.template Load<N>(source + from));
  }
  // A NaN is taken and never given up.
  template <class V>
  static void Merge(V& best, V value) {
#if defined(__aarch64__)
    // Said as for others below, it becomes a comparison that NEON does not have.
    if constexpr (kFloating<T>) {
      const auto wins = (value > best) | (value != value);
      best = wins ? value : best;
      return;
    }
#endif
    best = value > best ? value : best;
    if constexpr (kFloating<T>) best = value != value ? value : best;
  }
  template <int N, class V>
  void Finish(Int<N>, V best, int64_t to) const {
    order.template Store<N>(target + to, best);
  }
  const MaxValue& At(int64_t) const { return *this; }
  MaxValue Stage(const Plan& plan, const Piece& piece, Wide* row) const {
    ReduceRows(plan, piece, ToScratch<MaxValue>(*this, row));
    return *this;
  }
};

// ---- The tap of the maximum, and the maximum with it.

template <class V>
using SignedLane =
    std::make_signed_t<std::conditional_t<sizeof(V) == 8, int64_t, std::conditional_t<sizeof(V) == 4, int32_t, int16_t>>>;

// `K` is the type the keys are compared in: Key<T>, or 32 bits wide where 16 could not count the taps.
template <class T, class K>
struct MaxTap {
  using Element = T;
  using Wide = K;
  using Index = SignedLane<K>;
  static constexpr int kLanes = kVectorBytes / sizeof(K), kVectors = 4;
  static constexpr bool kBackward = false, kSeparable = false, kHalfKey = std::is_same_v<T, Half>;
  template <int N>
  struct State {
    Vec<K, N> best;
    Vec<K, N> raw;  // halves only: the key that still tells -0 from +0
    Vec<Index, N> tap;
  };

  Order<T> order;
  const T* source;
  T* target;  // null if only the tap is asked for
  void* taps;
  Type tap_type;

  template <int N>
  State<N> Begin(Int<N>, int64_t, int64_t tap) const {
    const auto lowest = Broadcast<K, N>(order.Lowest());
    return {lowest, lowest, Broadcast<Index, N>(static_cast<Index>(tap))};
  }
  template <int N>
  void Tap(Int<N>, State<N>& state, int64_t from, int64_t tap) const {
    const Vec<Key<T>, N> loaded = order.template Load<N>(source + from);
    Vec<K, N> raw;
    if constexpr (std::is_same_v<K, Key<T>>) {
      raw = loaded;
    } else {
      raw = Convert<K, N>(loaded);
    }
    Vec<K, N> value = raw;
    if constexpr (kHalfKey) value -= raw == -1;  // -0 equals +0
    auto wins = value > state.best;
    if constexpr (kFloating<T>) wins |= (value != value) & (state.best == state.best);
    state.best = wins ? value : state.best;
    if constexpr (kHalfKey) state.raw = wins ? raw : state.raw;
    state.tap = wins ? Broadcast<Index, N>(static_cast<Index>(tap)) : state.tap;
  }
  template <int N>
  void Finish(Int<N>, const State<N>& state, int64_t to) const {
    if (target != nullptr) {
      const Vec<K, N> key = kHalfKey ? state.raw : state.best;
      if constexpr (std::is_same_v<K, Key<T>>) {
        order.template Store<N>(target + to, key);
      } else {
        order.template Store<N>(target + to, Convert<Key<T>, N>(key));
      }
    }
    switch (tap_type) {
      case Type::kS8:
        return Store<N>(static_cast<int8_t*>(taps) + to, state.tap);
      case Type::kS16:
        return Store<N>(static_cast<int16_t*>(taps) + to, state.tap);
      default:
        return Store<N>(static_cast<int32_t*>(taps) + to, state.tap);
    }
  }
  const MaxTap& At(int64_t) const { return *this; }
  MaxTap From(const T* other) const { return {order, other, target, taps, tap_type}; }
};

// ---- The value at the tap. Every tap inside the image is looked at, so an index that names none of them gives 0. `T` is an
// unsigned integer, for elements are only moved.

template <class T>
struct TakeTap {
  using Element = T;
  using Wide = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  using Index = SignedLane<Wide>;
  static constexpr int kLanes = kVectorBytes / sizeof(Wide), kVectors = 4;
  static constexpr bool kBackward = false, kSeparable = false;
  template <int N>
  struct State {
    Vec<Wide, N> value;
    Vec<Index, N> tap;
  };

  const T* source;
  const void* taps;
  Type tap_type;
  T* target;

  template <int N>
  State<N> Begin(Int<N>, int64_t to, int64_t) const {
    switch (tap_type) {
      case Type::kS8:
        return {Vec<Wide, N>{}, Load<Index, N>(static_cast<const int8_t*>(taps) + to)};
      case Type::kS16:
        return {Vec<Wide, N>{}, Load<Index, N>(static_cast<const int16_t*>(taps) + to)};
      default:
        return {Vec<Wide, N>{}, Load<Index, N>(static_cast<const int32_t*>(taps) + to)};
    }
  }
  template <int N>
  void Tap(Int<N>, State<N>& state, int64_t from, int64_t tap) const {
    const auto here = state.tap == static_cast<Index>(tap);
    state.value = here ? Load<Wide, N>(source + from) : state.value;
  }
  template <int N>
  void Finish(Int<N>, const State<N>& state, int64_t to) const {
    Store<N>(target + to, state.value);
  }
  const TakeTap& At(int64_t) const { return *this; }
  TakeTap From(const T* other) const { return {other, taps, tap_type, target}; }
};

template <class T>
bool MaxPool(const Problem& problem) {
  const MaxValue<T> op = {Order<T>(problem.type), static_cast<const T*>(problem.operand[0]),
                          static_cast<T*>(problem.result[0])};
  return Walk(problem.geometry, *problem.workers, op);
}

template <class T, class K>
bool MaxPoolTap(const Problem& problem) {
  const MaxTap<T, K> op = {Order<T>(problem.type), static_cast<const T*>(problem.operand[0]),
                           static_cast<T*>(problem.result[0]), problem.result[1], problem.second};
  return Walk(problem.geometry, *problem.workers, op);
}

template <class T>
bool MaxPoolTapIndex(const Problem& problem) {
  if constexpr (sizeof(Key<T>) == 2) {
    if (problem.second == Type::kS32) return MaxPoolTap<T, int32_t>(problem);
  }
  return MaxPoolTap<T, Key<T>>(problem);
}

template <class T>
bool MaxPoolTake(const Problem& problem) {
  const TakeTap<T> op = {static_cast<const T*>(problem.operand[0]), problem.operand[1], problem.second,
                         static_cast<T*>(problem.result[0])};
  return Walk(problem.geometry, *problem.workers, op);
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
