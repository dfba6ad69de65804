// How channels fill registers: a register tile is some rows times a panel of vectors.
#pragma once

#include <cstdint>

#include "isa.h"
#include "simd.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

constexpr int kRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanel = 4;  // 32 registers
#else
constexpr int kPanel = 2;
#endif

// The rows of a tile: as many sums as there are registers for.
constexpr int TileRows(int vectors) {
  const int rows = kRows * kPanel / vectors;
  return rows < 12 ? rows : 12;
}

// The same where rows lie anywhere.
constexpr int ScatteredRows(int vectors) {
#if defined(__x86_64__) || defined(_M_X64)
  // The panel's vectors and an element of a row need a register each, too. With one vector each product takes a load, and no
  // load can be spared for the addresses of more rows than there are registers for.
  return vectors == 1 ? 9 : ((kPanel == 4 ? 32 : 16) - 1 - vectors) / vectors;
#else
  return TileRows(vectors);
#endif
}

constexpr int64_t kCacheBytes = 256 << 10;  // what a task may keep: half a level-2 cache

inline int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t Most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t RoundUp(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

template <class Item>
struct List {
  const Item* first;
  int64_t number;
  const Item* begin() const { return first; }
  const Item* end() const { return first + number; }
};

// Lanes are cut into panels of adjacent vectors. Where a part of a vector is left, a panel of one vector ends with the last
// lane and overlaps its neighbour, so that no vector is partial unless there is no other.
struct Panel {
  int64_t start, vectors, first;  // lane; vectors before it
  // Lanes that the neighbour has, too, and stores: another thread may do so at the same time.
  int64_t shared(int64_t lanes) const { return first * lanes - start; }
};

template <class T>
struct Lanes {
  int64_t count;
  int64_t whole() const { return count / kLanes<T>; }
  int64_t vectors() const { return (count + kLanes<T> - 1) / kLanes<T>; }
  int64_t panels() const { return (whole() + kPanel - 1) / kPanel + vectors() - whole(); }
  int64_t padded() const { return Most(count, kLanes<T>); }
  Panel panel(int64_t p) const {
    const int64_t first = p * kPanel;
    if (first < whole()) return {first * kLanes<T>, Least(kPanel, whole() - first), first};
    return {Most(0, count - kLanes<T>), 1, whole()};
  }
};

// body(0), ..., body(N - 1) written out: GCC would make a loop that zeroes registers one that fills memory.
template <int N, class Body>
__attribute__((always_inline)) inline void Unroll(const Body& body) {
  if constexpr (N > 1) Unroll<N - 1>(body);
  body(N - 1);
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
