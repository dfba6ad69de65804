// Planes as lanes: where the rows of a plane are too short to fill vectors, these hold one pixel of many planes. Planes are
// turned around into scratch, as many as the caches hold, and what is computed there is turned back.
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "parallel_for.h"
#include "pooling/geometry.h"
#include "pooling/kernels.h"
#include "simd.h"
#include "threads.h"
#include "types.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

constexpr int64_t kLaneBytes = 64 << 10;   // of the planes that are turned around together, if a vector has no more
constexpr int64_t kMostBytes = 384 << 10;  // of those of one vector: in a level-2 cache
constexpr int64_t kAlign = 64;
constexpr int64_t kShortRow = 128;  // elements; longer rows fill vectors by themselves

// An array of a call: whether it has the image's pixels, or one element a window; bytes of an element.
struct ArrayOf {
  bool image;
  int bytes;
};

struct Arrays {
  ArrayOf operand[3], result[2];
};

inline int BytesOf(Type type) {
  switch (type) {
    case Type::kF64:
      return 8;
    case Type::kF32:
    case Type::kS32:
    case Type::kU32:
      return 4;
    case Type::kS8:
    case Type::kU8:
      return 1;
    default:
      return 2;
  }
}

inline Arrays ArraysOf(const Problem& problem) {
  const int type = BytesOf(problem.type), second = BytesOf(problem.second), sum = problem.type == Type::kF64 ? 8 : 4;
  const ArrayOf image = {true, type}, pooled = {false, type}, other = {false, second}, norm = {false, sum};
  switch (problem.op) {
    case Op::kMaxPoolTapIndex:
      return {{image}, {pooled, other}};
    case Op::kMaxPoolSelectedTapIndex:
    case Op::kL2Pool:
      return {{image}, {other}};
    case Op::kMaxPoolTake:
      return {{image, other}, {pooled}};
    case Op::kMaxPoolPut:
      return {{pooled, other}, {image}};
    case Op::kAvgPoolGradient:
      return {{pooled}, {image}};
    case Op::kL2PoolTangent:
      return {{image, image, norm}, {other}};
    case Op::kL2PoolGradient:
      return {{other, image, norm}, {image}};
    default:
      return {{image}, {pooled}};
  }
}

template <int kBytes>
struct Unsigned;
template <>
struct Unsigned<1> {
  using type = uint8_t;
};
template <>
struct Unsigned<2> {
  using type = uint16_t;
};
template <>
struct Unsigned<4> {
  using type = uint32_t;
};
template <>
struct Unsigned<8> {
  using type = uint64_t;
};

// to[column * to_pitch + row] = from[row * from_pitch + column], of kBytes each. Square tiles pass through a copy: the rows
// of a plane whose size is a power of two compete for few sets of the cache, so each line is read once.
template <int kBytes>
inline void TurnUnits(const char* from, int64_t from_pitch, char* to, int64_t to_pitch, int64_t rows, int64_t columns) {
  constexpr int64_t kTile = 16;
  for (int64_t row = 0; row < rows; row += kTile) {
    const int64_t height = row + kTile < rows ? kTile : rows - row;
    for (int64_t column = 0; column < columns; column += kTile) {
      const int64_t width = column + kTile < columns ? kTile : columns - column;
      const char* const source = from + (row * from_pitch + column) * kBytes;
      char* const target = to + (column * to_pitch + row) * kBytes;
      if (height < kTile || width < kTile) {
        for (int64_t c = 0; c < width; ++c) {
          for (int64_t r = 0; r < height; ++r) {
            __builtin_memcpy(target + (c * to_pitch + r) * kBytes, source + (r * from_pitch + c) * kBytes, kBytes);
          }
        }
        continue;
      }
      char tile[kTile][kTile * kBytes];
      for (int64_t r = 0; r < kTile; ++r) __builtin_memcpy(tile[r], source + r * from_pitch * kBytes, kTile * kBytes);
      if constexpr (kBytes <= 8) {
        using V = Vec<typename Unsigned<kBytes>::type, 4>;
        for (int64_t c = 0; c < kTile; c += 4) {
          for (int64_t r = 0; r < kTile; r += 4) {
            V m[4];
            for (int i = 0; i < 4; ++i) __builtin_memcpy(&m[i], tile[r + i] + c * kBytes, sizeof(V));
            Transpose(m);
            for (int i = 0; i < 4; ++i) __builtin_memcpy(target + ((c + i) * to_pitch + r) * kBytes, &m[i], sizeof(V));
          }
        }
      } else {
        for (int64_t c = 0; c < kTile; ++c) {
          for (int64_t r = 0; r < kTile; ++r) {
            __builtin_memcpy(target + (c * to_pitch + r) * kBytes, tile[r] + c * kBytes, kBytes);
          }
        }
      }
    }
  }
}

// Of units that have no size of their own: as many pieces as a unit has.
template <int kBytes>
inline void TurnPieces(const char* from, int64_t from_pitch, char* to, int64_t to_pitch, int64_t rows, int64_t columns,
                       int64_t count) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const char* const source = from + (row * from_pitch + column) * count * kBytes;
      char* const target = to + (column * to_pitch + row) * count * kBytes;
      for (int64_t i = 0; i < count; ++i) __builtin_memcpy(target + i * kBytes, source + i * kBytes, kBytes);
    }
  }
}

inline void Turn(const char* from, int64_t from_pitch, char* to, int64_t to_pitch, int64_t rows, int64_t columns,
                 int64_t bytes) {
  switch (bytes) {
    case 1:
      return TurnUnits<1>(from, from_pitch, to, to_pitch, rows, columns);
    case 2:
      return TurnUnits<2>(from, from_pitch, to, to_pitch, rows, columns);
    case 4:
      return TurnUnits<4>(from, from_pitch, to, to_pitch, rows, columns);
    case 8:
      return TurnUnits<8>(from, from_pitch, to, to_pitch, rows, columns);
    case 12:
      return TurnUnits<12>(from, from_pitch, to, to_pitch, rows, columns);
    case 16:
      return TurnUnits<16>(from, from_pitch, to, to_pitch, rows, columns);
    default:
      if (bytes % 4 == 0) return TurnPieces<4>(from, from_pitch, to, to_pitch, rows, columns, bytes / 4);
      return TurnPieces<1>(from, from_pitch, to, to_pitch, rows, columns, bytes);
  }
}

// How the planes of a call are worked on together.
struct Lanes {
  Arrays arrays;
  int64_t pixels, windows;
  int64_t plane_bytes;  // of all arrays
  int64_t planes;       // together; 0 if rows are better
  int64_t fewest;       // those of one vector
  explicit Lanes(const Problem& problem);
  int64_t Count(const ArrayOf& array) const { return array.image ? pixels : windows; }
};

inline Lanes::Lanes(const Problem& problem)
    : arrays(ArraysOf(problem)), pixels(1), windows(1), plane_bytes(0), planes(0), fewest(0) {
  const Geometry& geometry = problem.geometry;
  for (const Axis& axis : geometry.axis) {
    pixels *= axis.size;
    windows *= axis.windows;
  }
  const auto add = [&](const ArrayOf& array) { plane_bytes += Count(array) * geometry.inner * array.bytes; };
  for (const ArrayOf& array : arrays.operand) add(array);
  for (const ArrayOf& array : arrays.result) add(array);
  // Positions of unpooling are numbers in a plane.
  if (problem.op == Op::kMaxUnpool || problem.op == Op::kMaxUnpoolTake) return;
  const int64_t inner = geometry.inner, vector = kVectorBytes / BytesOf(problem.type);
  if (inner >= vector || vector * plane_bytes > kMostBytes * inner) return;
  // Longer rows fill vectors by themselves, unless they would pass through phases element by element.
  const Axis& row = geometry.axis[2];
  const bool sums_back = problem.op == Op::kAvgPoolGradient || problem.op == Op::kL2PoolGradient;
  const bool phases = row.windows > 1 && row.stride > 2 && !(sums_back && Tiles(geometry).possible);
  if (row.size * inner > kShortRow && !phases) return;
  // With few windows a pixel there is little to add, whatever the way.
  if (problem.op == Op::kMaxPoolPut && 2 * windows <= pixels) return;
  // Whatever the number of planes and of threads, a vector is full and a block has the same size: so the bits are the same.
  fewest = CeilDiv(vector, inner);
  planes = fewest * (kLaneBytes / (fewest * plane_bytes) + 1);
}

// Runs a call plane by plane in lanes; `run` computes what it is given, alone.
template <class Run>
bool InLanes(const Problem& problem, const Lanes& lanes, const Run& run) {
  const Geometry& geometry = problem.geometry;
  const auto body = [&](int64_t begin, int64_t end) {
    char* const scratch = static_cast<char*>(Scratch(lanes.planes * lanes.plane_bytes + 5 * kAlign, 1));
    if (scratch == nullptr) return false;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * lanes.planes, left = geometry.outer - first;
      const int64_t planes = left < lanes.planes ? left : lanes.planes;
      const int64_t pitch = planes < lanes.fewest ? lanes.fewest : planes;  // with some that are zero
      Problem part = problem;
      part.geometry.outer = 1;
      part.geometry.inner = pitch * geometry.inner;
      part.stream = false;
      part.workers = &kAlone;
      char* free = scratch;
      const auto place = [&](const ArrayOf& array) {
        const int64_t bytes = pitch * lanes.Count(array) * geometry.inner * array.bytes;
        char* const at = free;
        free += CeilDiv(bytes, kAlign) * kAlign;
        if (pitch > planes) __builtin_memset(at, 0, bytes);
        return at;
      };
      const auto offset = [&](const ArrayOf& array) { return first * lanes.Count(array) * geometry.inner * array.bytes; };
      for (int i = 0; i < 3; ++i) {
        const ArrayOf& array = lanes.arrays.operand[i];
        if (array.bytes == 0) continue;
        char* const at = place(array);
        Turn(static_cast<const char*>(problem.operand[i]) + offset(array), lanes.Count(array), at, pitch, planes,
             lanes.Count(array), geometry.inner * array.bytes);
        part.operand[i] = at;
      }
      for (int i = 0; i < 2; ++i) {
        if (part.result[i] != nullptr) part.result[i] = place(lanes.arrays.result[i]);
      }
      if (!run(part)) return false;
      for (int i = 0; i < 2; ++i) {
        const ArrayOf& array = lanes.arrays.result[i];
        if (part.result[i] == nullptr) continue;
        Turn(static_cast<const char*>(part.result[i]), pitch, static_cast<char*>(problem.result[i]) + offset(array),
             lanes.Count(array), lanes.Count(array), planes, geometry.inner * array.bytes);
      }
    }
    return true;
  };
  return ParallelFor(*problem.workers, CeilDiv(geometry.outer, lanes.planes), lanes.planes * lanes.plane_bytes, body);
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
