// Maximum pooling: the maximum, its tap, and the value at a tap.
#pragma once

#include <cstdint>
#include <limits>
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
  static constexpr bool kBackward = false, kSeparable = true, kRounds = false, kHalfKey = std::is_same_v<T, Half>;
  template <int N>
  struct State {
    Vec<K, N> best;
    Vec<K, N> raw;  // halves only: the key that still tells -0 from +0
    Vec<Index, N> tap;
    Vec<K, N> Raw() const { return kHalfKey ? raw : best; }
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
    const Vec<K, N> raw = Raw<N>(from);
    const Vec<K, N> value = Compared<N>(raw);
    auto wins = value > state.best;
    if constexpr (kFloating<T>) wins |= (value != value) & (state.best == state.best);
    Take(state, wins, raw, Broadcast<Index, N>(static_cast<Index>(tap)));
  }
  // -0 equals +0.
  template <int N>
  static Vec<K, N> Compared(Vec<K, N> raw) {
    if constexpr (kHalfKey) return raw - (raw == -1);
    return raw;
  }
  template <int N, class Mask>
  static void Take(State<N>& state, Mask wins, Vec<K, N> raw, Vec<Index, N> tap) {
    state.best = wins ? Compared<N>(raw) : state.best;
    if constexpr (kHalfKey) state.raw = wins ? raw : state.raw;
    state.tap = wins ? tap : state.tap;
  }
  template <int N>
  void Finish(Int<N>, const State<N>& state, int64_t to) const {
    if (target != nullptr) {
      const Vec<K, N> key = state.Raw();
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

  // With maxima whose taps are no later ones: of equal maxima the one with the first tap wins.
  template <int N>
  static void Merge(State<N>& state, Vec<K, N> raw, Vec<Index, N> tap) {
    const auto value = Compared<N>(raw);
    auto wins = (value > state.best) | ((value == state.best) & (tap < state.tap));
    if constexpr (kFloating<T>) wins |= (value != value) & ((state.best == state.best) | (tap < state.tap));
    Take(state, wins, raw, tap);
  }
  template <int N>
  State<N> Nothing() const {
    return Begin(Int<N>(), 0, std::numeric_limits<Index>::max());
  }
  // Reduces adjacent sources to one target. Operation `Op` is this one, or that from scratch.
  template <class Op>
  static void FoldRow(const Op& op, int64_t source, int64_t count, int64_t target, int64_t tap) {
    if (count < kLanes) {
      State<1> state = op.template Nothing<1>();
      for (int64_t i = 0; i < count; ++i) op.Adjacent(Int<1>(), state, source + i, tap + i);
      return op.Finish(Int<1>(), state, target);
    }
    State<kLanes> state = op.template Nothing<kLanes>();
    for (int64_t i = 0; i + kLanes <= count; i += kLanes) op.Adjacent(Int<kLanes>(), state, source + i, tap + i);
    // What is left, and some taps once more.
    op.Adjacent(Int<kLanes>(), state, source + count - kLanes, tap + count - kLanes);
    FoldLanes(op, state, target);
  }
  template <class Op, int N>
  static void FoldLanes(const Op& op, const State<N>& state, int64_t target) {
    if constexpr (N == 1) {
      op.Finish(Int<1>(), state, target);
    } else {
      K raw[N];
      Index tap[N];
      StoreRaw<N>(raw, state.Raw());
      StoreRaw<N>(tap, state.tap);
      State<N / 2> half = op.template Nothing<N / 2>();
      Merge<N / 2>(half, LoadRaw<K, N / 2>(raw), LoadRaw<Index, N / 2>(tap));
      Merge<N / 2>(half, LoadRaw<K, N / 2>(raw + N / 2), LoadRaw<Index, N / 2>(tap + N / 2));
      FoldLanes(op, half, target);
    }
  }
  // Adjacent taps, one in every lane.
  template <int N>
  void Adjacent(Int<N>, State<N>& state, int64_t from, int64_t tap) const {
    Merge<N>(state, Raw<N>(from), static_cast<Index>(tap) + Count<Index, N>());
  }
  template <int N>
  Vec<K, N> Raw(int64_t from) const {
    const Vec<Key<T>, N> loaded = order.template Load<N>(source + from);
    if constexpr (std::is_same_v<K, Key<T>>) return loaded;
    return Convert<K, N>(loaded);
  }

  // The maxima of columns and, a plane further, their taps.
  struct OfColumns;
  MaxTap Stage(const Plan& plan, const Piece& piece, K* row) const {
    ReduceRows(plan, piece, OfColumns(*this, row, plan.span * plan.block));
    return *this;
  }
};

template <class T, class K>
constexpr int kPlanes<MaxTap<T, K>> = 2;

template <class T, class K>
struct MaxTap<T, K>::OfColumns : MaxTap<T, K> {
  K* maxima;
  int64_t plane;
  OfColumns(const MaxTap<T, K>& op, K* maxima, int64_t plane) : MaxTap<T, K>(op), maxima(maxima), plane(plane) {}
  const OfColumns& At(int64_t) const { return *this; }
  template <int N>
  void Finish(Int<N>, const State<N>& state, int64_t to) const {
    StoreRaw<N>(maxima + to, state.Raw());
    StoreRaw<N>(reinterpret_cast<Index*>(maxima + plane) + to, state.tap);
  }
};

template <class T, class K>
struct FromScratch<MaxTap<T, K>> : MaxTap<T, K> {
  using Base = MaxTap<T, K>;
  using Index = typename Base::Index;
  template <int N>
  using State = typename Base::template State<N>;
  const K* maxima;
  int64_t plane;
  FromScratch(const Base& op, const K* maxima, int64_t plane) : Base(op), maxima(maxima), plane(plane) {}
  const FromScratch& At(int64_t) const { return *this; }
  template <int N>
  State<N> Begin(Int<N>, int64_t, int64_t) const {
    return Base::template Nothing<N>();
  }
  template <int N>
  void Tap(Int<N>, State<N>& state, int64_t from, int64_t tap) const {
    Base::template Merge<N>(state, LoadRaw<K, N>(maxima + from), TapOfColumn<N>(from) + static_cast<Index>(tap));
  }
  template <int N>
  void Adjacent(Int<N>, State<N>& state, int64_t from, int64_t tap) const {
    const auto here = TapOfColumn<N>(from) + static_cast<Index>(tap) + Count<Index, N>();
    Base::template Merge<N>(state, LoadRaw<K, N>(maxima + from), here);
  }
  template <int N>
  Vec<Index, N> TapOfColumn(int64_t from) const {
    return LoadRaw<Index, N>(reinterpret_cast<const Index*>(maxima + plane) + from);
  }
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
