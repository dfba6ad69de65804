// Vectors of N lanes (GNU vector extensions) and the element types: how each is loaded, compared, converted and stored.
//
// All in the namespace of one instruction set and without a name outside its translation unit, so that no inline function is
// shared between two instruction sets.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "isa.h"
#include "types.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

// For loops whose body is a function object. A called body would read what it captured from memory again after every store,
// because the compiler must assume that the store changed it.
#define JAX_MPS_INLINE inline __attribute__((always_inline))

template <class T, int N>
struct VecOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
// A single lane rides in a vector of four: one-lane vectors would be computed outside the vector registers.
template <class T>
struct VecOf<T, 1> : VecOf<T, 4> {};
template <class T, int N>
using Vec = typename VecOf<T, N>::type;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int N>
inline Vec<T, N> LoadRaw(const T* from) {
  if constexpr (N == 1) return Vec<T, N>{*from};
  Vec<T, N> v;
  __builtin_memcpy(&v, from, N * sizeof(T));
  return v;
}

template <class To, class V>
inline To Bits(const V& v) {
  static_assert(sizeof(To) == sizeof(V));
  To to;
  __builtin_memcpy(&to, &v, sizeof v);
  return to;
}

template <int N, class T, class V>
inline void StoreRaw(T* to, V v) {
#if defined(__aarch64__)
  // A copy of 16 bytes would go through two general registers.
  if constexpr (N * sizeof(T) == 16 && sizeof(V) == 16) return vst1q_u8(reinterpret_cast<uint8_t*>(to), Bits<uint8x16_t>(v));
#endif
  __builtin_memcpy(to, &v, N * sizeof(T));
}

// Lanes of two vectors, counted through both.
template <int... lane, class V>
inline V Shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, lane...);
#else
  constexpr int kN = sizeof...(lane);
  return V{(lane < kN ? a[lane % kN] : b[lane % kN])...};
#endif
}

// The lanes of two vectors in turn: the first or the second half of them.
template <bool second, class V, int... i>
inline V Interleaved(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int kN = sizeof...(i), kFirst = second ? kN / 2 : 0;
  return Shuffle<(kFirst + i / 2 + i % 2 * kN)...>(a, b);
}

// Four vectors of four lanes as the columns of what they were the rows of.
template <class V>
inline void Transpose(V (&m)[4]) {
  const V a = Shuffle<0, 4, 1, 5>(m[0], m[1]), b = Shuffle<2, 6, 3, 7>(m[0], m[1]);
  const V c = Shuffle<0, 4, 1, 5>(m[2], m[3]), d = Shuffle<2, 6, 3, 7>(m[2], m[3]);
  m[0] = Shuffle<0, 1, 4, 5>(a, c);
  m[1] = Shuffle<2, 3, 6, 7>(a, c);
  m[2] = Shuffle<0, 1, 4, 5>(b, d);
  m[3] = Shuffle<2, 3, 6, 7>(b, d);
}

// Every second lane of two vectors, from the first or the second one on.
template <bool second, class V, int... i>
inline V EverySecond(V a, V b, std::integer_sequence<int, i...>) {
  return Shuffle<(2 * i + second)...>(a, b);
}

// Whether the lanes of a whole vector of floats or doubles can be picked by a table.
#if defined(__AVX2__)
constexpr bool kPicks = true;
#else
constexpr bool kPicks = false;
#endif

// v[table[0]], v[table[1]] and so on, of 4-byte lanes.
template <class V>
inline V Pick(V v, const int32_t (&table)[kVectorBytes / 4]) {
#if defined(__AVX512F__)
  return Bits<V>(_mm512_maskz_permutexvar_epi32(0xffff, Bits<__m512i>(table), Bits<__m512i>(v)));
#elif defined(__AVX2__)
  return Bits<V>(_mm256_permutevar8x32_epi32(Bits<__m256i>(v), Bits<__m256i>(table)));
#else
  return static_cast<void>(table), v;
#endif
}

template <class T, int N>
inline Vec<T, N> Broadcast(T value) {
  return value - Vec<T, N>{};
}

template <class T, int... i>
inline auto CountTo(std::integer_sequence<int, i...>) {
  return Vec<T, sizeof...(i)>{static_cast<T>(i)...};
}

// 0, 1, 2, ...
template <class T, int N>
inline Vec<T, N> Count() {
  return CountTo<T>(std::make_integer_sequence<int, N>());
}

// Integers of another width, where the compiler has one instruction but builds it from many: `Resize` returns false where
// there is none.
template <class To, class From, int N>
inline bool Resize([[maybe_unused]] Vec<From, N> v, [[maybe_unused]] Vec<To, N>& to) {
  [[maybe_unused]] constexpr int kFrom = sizeof(From), kTo = sizeof(To);
  [[maybe_unused]] constexpr bool kSigned = std::is_signed_v<From>;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (N == 16 && kTo == 4) {
    if constexpr (kFrom == 1) {
      const __m128i x = Bits<__m128i>(v);
      to = Bits<Vec<To, N>>(kSigned ? _mm512_maskz_cvtepi8_epi32(0xffff, x) : _mm512_maskz_cvtepu8_epi32(0xffff, x));
      return true;
    }
    if constexpr (kFrom == 2) {
      const __m256i x = Bits<__m256i>(v);
      to = Bits<Vec<To, N>>(kSigned ? _mm512_maskz_cvtepi16_epi32(0xffff, x) : _mm512_maskz_cvtepu16_epi32(0xffff, x));
      return true;
    }
  }
  if constexpr (N == 16 && kFrom == 4) {
    if constexpr (kTo == 1) return to = Bits<Vec<To, N>>(_mm512_maskz_cvtepi32_epi8(0xffff, Bits<__m512i>(v))), true;
    if constexpr (kTo == 2) return to = Bits<Vec<To, N>>(_mm512_maskz_cvtepi32_epi16(0xffff, Bits<__m512i>(v))), true;
  }
  if constexpr (N == 32 && kFrom == 1 && kTo == 2) {
    const __m256i x = Bits<__m256i>(v);
    to = Bits<Vec<To, N>>(kSigned ? _mm512_maskz_cvtepi8_epi16(0xffffffff, x) : _mm512_maskz_cvtepu8_epi16(0xffffffff, x));
    return true;
  }
  if constexpr (N == 32 && kFrom == 2 && kTo == 1) {
    return to = Bits<Vec<To, N>>(_mm512_maskz_cvtepi16_epi8(0xffffffff, Bits<__m512i>(v))), true;
  }
#endif
#if defined(__AVX2__)
  if constexpr (N == 8 && kTo == 4) {
    if constexpr (kFrom == 1) {
      const __m128i x = _mm_cvtsi64_si128(Bits<int64_t>(v));
      to = Bits<Vec<To, N>>(kSigned ? _mm256_cvtepi8_epi32(x) : _mm256_cvtepu8_epi32(x));
      return true;
    }
    if constexpr (kFrom == 2) {
      const __m128i x = Bits<__m128i>(v);
      to = Bits<Vec<To, N>>(kSigned ? _mm256_cvtepi16_epi32(x) : _mm256_cvtepu16_epi32(x));
      return true;
    }
  }
  if constexpr (N == 16 && kFrom == 1 && kTo == 2) {
    const __m128i x = Bits<__m128i>(v);
    to = Bits<Vec<To, N>>(kSigned ? _mm256_cvtepi8_epi16(x) : _mm256_cvtepu8_epi16(x));
    return true;
  }
  // Packing saturates, so the bits that do not count go first; half a register at a time keeps the lanes in order.
  if constexpr (N == 8 && kFrom == 4 && kTo <= 2) {
    const __m256i x = _mm256_and_si256(Bits<__m256i>(v), _mm256_set1_epi32(kTo == 1 ? 0xff : 0xffff));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    if constexpr (kTo == 2) to = Bits<Vec<To, N>>(words);
    if constexpr (kTo == 1) to = Bits<Vec<To, N>>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
    return true;
  }
  if constexpr (N == 16 && kFrom == 2 && kTo == 1) {
    const __m256i x = _mm256_and_si256(Bits<__m256i>(v), _mm256_set1_epi16(0xff));
    to = Bits<Vec<To, N>>(_mm_packus_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
    return true;
  }
#endif
#if defined(__aarch64__)
  // Steps of two; a narrow side of four bytes rides in eight.
  constexpr int kNarrow = sizeof v < sizeof to ? sizeof v : sizeof to;
  if constexpr ((kNarrow == 4 || kNarrow == 8) && kTo == 2 * kFrom) {
    const auto x = [&] {
      if constexpr (sizeof v == 4)
        return vdup_n_u32(Bits<uint32_t>(v));
      else
        return Bits<uint32x2_t>(v);
    }();
    const auto wide = [&] {
      if constexpr (kFrom == 1 && kSigned) return vmovl_s8(Bits<int8x8_t>(x));
      if constexpr (kFrom == 1 && !kSigned) return vmovl_u8(Bits<uint8x8_t>(x));
      if constexpr (kFrom == 2 && kSigned) return vmovl_s16(Bits<int16x4_t>(x));
      if constexpr (kFrom == 2 && !kSigned) return vmovl_u16(Bits<uint16x4_t>(x));
      if constexpr (kFrom == 4 && kSigned) return vmovl_s32(Bits<int32x2_t>(x));
      if constexpr (kFrom == 4 && !kSigned) return vmovl_u32(Bits<uint32x2_t>(x));
    }();
    __builtin_memcpy(&to, &wide, sizeof to);
    return true;
  }
  if constexpr ((kNarrow == 4 || kNarrow == 8) && kFrom == 2 * kTo) {
    const auto x = [&] {
      if constexpr (sizeof v == 8)
        return vcombine_u32(Bits<uint32x2_t>(v), Bits<uint32x2_t>(v));
      else
        return Bits<uint32x4_t>(v);
    }();
    const auto narrow = [&] {
      if constexpr (kTo == 1) return vmovn_u16(Bits<uint16x8_t>(x));
      if constexpr (kTo == 2) return vmovn_u32(Bits<uint32x4_t>(x));
      if constexpr (kTo == 4) return vmovn_u64(Bits<uint64x2_t>(x));
    }();
    __builtin_memcpy(&to, &narrow, sizeof to);
    return true;
  }
#endif
  return false;
}

// Elsewhere integers change their width in steps of two: for more at once the compiler goes through scalars.
template <class To, int N, class V>
inline Vec<To, N> Convert(V v) {
  using From = std::decay_t<decltype(v[0])>;
  if constexpr (std::is_integral_v<To> && std::is_integral_v<From> && sizeof(To) != sizeof(From)) {
    Vec<To, N> to;
    if (Resize<To, From, N>(v, to)) return to;
  }
  // The compiler would convert halves of a vector and put them together.
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, double>) {
#if defined(__AVX512F__)
    if constexpr (N == 8) return Bits<Vec<To, N>>(_mm512_maskz_cvtps_pd(0xff, Bits<__m256>(v)));
#endif
#if defined(__AVX__)
    if constexpr (N == 4) return Bits<Vec<To, N>>(_mm256_cvtps_pd(Bits<__m128>(v)));
#endif
#if defined(__SSE2__)
    if constexpr (N == 2) return Bits<Vec<To, N>>(_mm_cvtps_pd(_mm_castsi128_ps(_mm_cvtsi64_si128(Bits<int64_t>(v)))));
#elif defined(__aarch64__)
    if constexpr (N == 2) return Bits<Vec<To, N>>(vcvt_f64_f32(Bits<float32x2_t>(v)));
#endif
  }
#if defined(__aarch64__)
  if constexpr (N == 2 && std::is_same_v<From, double> && std::is_same_v<To, float>) {
    return Bits<Vec<To, N>>(vcvt_f32_f64(Bits<float64x2_t>(v)));
  }
#endif
  if constexpr (std::is_integral_v<To> && std::is_integral_v<From> && sizeof(To) > 2 * sizeof(From)) {
    using Middle = std::conditional_t<sizeof(From) == 1, int16_t, int32_t>;
    return Convert<To, N>(Convert<std::conditional_t<std::is_signed_v<From>, Middle, std::make_unsigned_t<Middle>>, N>(v));
  } else if constexpr (std::is_integral_v<To> && std::is_integral_v<From> && 2 * sizeof(To) < sizeof(From)) {
    return Convert<To, N>(Convert<std::conditional_t<sizeof(From) == 8, int32_t, int16_t>, N>(v));
  } else {
    return __builtin_convertvector(v, Vec<To, N>);
  }
}

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

template <class T>
constexpr bool kHalf = std::is_same_v<T, F16> || std::is_same_v<T, BF16>;

// The type that sums are accumulated in.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ---- Conversions of half precision: one instruction where there is one, else arithmetic on the bits.

// Both take the bits of N halves.
template <int N>
inline Vec<float, N> Widen(F16, Vec<uint16_t, N> bits) {
#if defined(__F16C__)
  if constexpr (N == 4) return Bits<Vec<float, N>>(_mm_cvtph_ps(_mm_cvtsi64_si128(Bits<int64_t>(bits))));
  if constexpr (N == 8) return Bits<Vec<float, N>>(_mm256_cvtph_ps(Bits<__m128i>(bits)));
#endif
#if defined(__AVX512F__)
  if constexpr (N == 16) return Bits<Vec<float, N>>(_mm512_maskz_cvtph_ps(0xffff, Bits<__m256i>(bits)));
#endif
#if defined(__aarch64__)
  if constexpr (N == 4 || N == 1) return Bits<Vec<float, N>>(vcvt_f32_f16(Bits<float16x4_t>(bits)));
  if constexpr (N == 2) {
    return Bits<Vec<float, N>>(vget_low_f32(vcvt_f32_f16(vreinterpret_f16_u32(vdup_n_u32(Bits<uint32_t>(bits))))));
  }
#endif
  using U = Vec<uint32_t, N>;
  const U half = Convert<uint32_t, N>(bits);
  const U magnitude = (half & 0x7fff) << 13;
  // A multiplication moves the exponent and normalises subnormals.
  const U finite = Bits<U>(Bits<Vec<float, N>>(magnitude) * Bits<Vec<float, N>>(Broadcast<uint32_t, N>(0x77800000)));
  const U special = magnitude | 0x7f800000;
  return Bits<Vec<float, N>>((magnitude < 0x0f800000 ? finite : special) | ((half & 0x8000) << 16));
}

template <int N>
inline Vec<float, N> Widen(BF16, Vec<uint16_t, N> bits) {
#if defined(__AVX2__)
  // One shuffle, and a load that fills both halves, instead of two instructions.
  if constexpr (N == 8) {
    const __m256i high = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                          -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    return Bits<Vec<float, N>>(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(Bits<__m128i>(bits)), high));
  }
#endif
  return Bits<Vec<float, N>>(Convert<uint32_t, N>(bits) << 16);
}

template <int N>
inline void Narrow(F16* to, Vec<float, N> v) {
#if defined(__F16C__)
  if constexpr (N == 4) {
    return _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_cvtps_ph(Bits<__m128>(v), _MM_FROUND_TO_NEAREST_INT));
  }
  if constexpr (N == 8) return StoreRaw<N>(&to->bits, _mm256_cvtps_ph(Bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__AVX512F__)
  if constexpr (N == 16)
    return StoreRaw<N>(&to->bits, _mm512_maskz_cvtps_ph(0xffff, Bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__aarch64__)
  if constexpr (N == 4 || N == 1) return StoreRaw<N>(&to->bits, vcvt_f16_f32(Bits<float32x4_t>(v)));
  if constexpr (N == 2)
    return StoreRaw<N>(&to->bits, vcvt_f16_f32(vcombine_f32(Bits<float32x2_t>(v), Bits<float32x2_t>(v))));
#endif
  using U = Vec<uint32_t, N>;
  const U bits = Bits<U>(v);
  const U magnitude = bits & 0x7fffffff;
  const U normal = (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13;
  // Adding a half lets the addition round a subnormal result.
  const U subnormal = Bits<U>(Bits<Vec<float, N>>(magnitude) + 0.5f) - 0x3f000000;
  const U infinite = magnitude > 0x7f800000 ? Broadcast<uint32_t, N>(0x7e00) : Broadcast<uint32_t, N>(0x7c00);
  const U result = magnitude >= 0x47800000 ? infinite : (magnitude < 0x38800000 ? subnormal : normal);
  StoreRaw<N>(&to->bits, Convert<uint16_t, N>(result | (bits >> 16 & 0x8000)));
}

// To bfloat16, whose bits are the high half of the result's. Half of a unit is added, less one bit where the last digit that
// stays is even. Of a NaN the low half must be empty, as it is in all that comes of bfloat16 alone.
template <int N>
inline Vec<uint32_t, N> Rounded(Vec<float, N> v) {
  const auto bits = Bits<Vec<uint32_t, N>>(v);
#if defined(__AVX512F__)
  return (bits & 0x10000) != 0 ? bits + 0x8000 : bits + 0x7fff;
#else
  return bits + 0x7fff + (bits >> 16 & 1);
#endif
}

template <int N>
inline void Narrow(BF16* to, Vec<float, N> v) {
  const auto bits = Bits<Vec<uint32_t, N>>(v);
  const Vec<uint32_t, N> result = v != v ? bits | 0x400000 : Rounded<N>(v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (N == 8) {
    const __m256i high = _mm256_setr_epi16(1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15);
    return StoreRaw<N>(&to->bits, _mm256_castsi256_si128(_mm256_permutexvar_epi16(high, Bits<__m256i>(result))));
  }
#elif defined(__AVX2__)
  if constexpr (N == 8) {
    const __m256i high = _mm256_srli_epi32(Bits<__m256i>(result), 16);
    return StoreRaw<N>(&to->bits, _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
  }
#endif
  StoreRaw<N>(&to->bits, Convert<uint16_t, N>(result >> 16));
}

// ---- Numbers in memory as T, in registers as Lane.

template <class Lane, int N, class T>
inline Vec<Lane, N> Load(const T* from) {
  if constexpr (std::is_same_v<T, Lane>) {
    return LoadRaw<T, N>(from);
  } else if constexpr (kHalf<T>) {
    const auto wide = Widen<N>(T(), LoadRaw<uint16_t, N>(&from->bits));
    if constexpr (std::is_same_v<Lane, float>) {
      return wide;
    } else {
      return Convert<Lane, N>(wide);
    }
  } else {
    return Convert<Lane, N>(LoadRaw<T, N>(from));
  }
}

template <int N, class T, class V>
inline void Store(T* to, V v) {
  if constexpr (std::is_same_v<T, std::decay_t<decltype(v[0])>>) {
    StoreRaw<N>(to, v);
  } else if constexpr (kHalf<T>) {
    Narrow<N>(to, Convert<float, N>(v));
  } else {
    StoreRaw<N>(to, Convert<T, N>(v));
  }
}

// N numbers or sums of half precision in two vectors, cut as costs least: bfloat16 into even and odd lanes, where a float
// starts or ends with a half's bits and nothing is shuffled, float16 into the lower and the upper ones.
template <class T, int N, class Lane = float>
struct Halves {
  Vec<Lane, (N + 1) / 2> first, second;

  void operator+=(const Halves& other) { first += other.first, second += other.second; }
  Halves operator*(const Halves& other) const { return {first * other.first, second * other.second}; }
  Halves operator/(Lane divisor) const { return {first / divisor, second / divisor}; }
};

// N sums of numbers T in memory; as many as fill two vectors are cut, if T is bfloat16.
template <class T>
constexpr int kSumVectors = std::is_same_v<T, BF16> ? 2 : 1;
template <class T, class Lane>
constexpr int kSumLanes = kSumVectors<T> * kVectorBytes / sizeof(Lane);
template <class T, class Lane, int N>
using Sums = std::conditional_t<std::is_same_v<T, BF16> && N == kSumLanes<T, Lane>, Halves<T, N, Lane>, Vec<Lane, N>>;

// Adds to a sum, and with it what the last addition lost by rounding, which `lost` holds (Knuth's two-sum). Nothing is lost
// where the sum is infinite or not a number.
template <class V>
inline void AddKeeping(V& sum, V& lost, V part) {
  part += lost;
  const V before = sum;
  sum += part;
  const V added = sum - before;
  lost = (before - (sum - added)) + (part - added);
  lost = lost == lost ? lost : V{};
}

template <class T, int N, class Lane>
inline void AddKeeping(Halves<T, N, Lane>& sum, Halves<T, N, Lane>& lost, const Halves<T, N, Lane>& part) {
  AddKeeping(sum.first, lost.first, part.first);
  AddKeeping(sum.second, lost.second, part.second);
}

template <int N>
inline Halves<BF16, N> Cut(BF16, Vec<uint16_t, N> bits) {
  const auto pairs = Bits<Vec<uint32_t, N / 2>>(bits);
  return {Bits<Vec<float, N / 2>>(pairs << 16), Bits<Vec<float, N / 2>>(pairs & 0xffff0000)};
}

template <int N>
inline Halves<F16, N> Cut(F16, Vec<uint16_t, N> bits) {
  struct {
    Vec<uint16_t, N / 2> first, second;
  } cut;
  __builtin_memcpy(&cut, &bits, sizeof cut);
  return {Widen<N / 2>(F16(), cut.first), Widen<N / 2>(F16(), cut.second)};
}

template <class To, class T, int N, class From>
inline Halves<T, N, To> Convert(const Halves<T, N, From>& v) {
  return {Convert<To, N / 2>(v.first), Convert<To, N / 2>(v.second)};
}

template <int N, class V, class T>
inline void Load(const T* from, V& v) {
  v = Load<std::decay_t<decltype(v[0])>, N>(from);
}

template <int N, class Lane>
inline void Load(const BF16* from, Halves<BF16, N, Lane>& v) {
  v = Convert<Lane>(Cut<N>(BF16(), LoadRaw<uint16_t, N>(&from->bits)));
}

template <int N>
inline void Store(BF16* to, const Halves<BF16, N>& v) {
  const auto bits = (Rounded<N / 2>(v.first) >> 16) | (Rounded<N / 2>(v.second) & 0xffff0000);
  StoreRaw<N>(&to->bits, Bits<Vec<uint16_t, N>>(bits));
}

template <int N>
inline void Store(F16* to, const Halves<F16, N>& v) {
  Narrow<N / 2>(to, v.first);
  Narrow<N / 2>(to + N / 2, v.second);
}

// In scratch all numbers are in order.
template <int N, class Lane>
inline void StoreRaw(Lane* to, const Halves<BF16, N, Lane>& v) {
  const auto lanes = std::make_integer_sequence<int, N / 2>();
  StoreRaw<N / 2>(to, Interleaved<false>(v.first, v.second, lanes));
  StoreRaw<N / 2>(to + N / 2, Interleaved<true>(v.first, v.second, lanes));
}

template <int N>
inline void StoreRaw(float* to, const Halves<F16, N>& v) {
  StoreRaw<N / 2>(to, v.first);
  StoreRaw<N / 2>(to + N / 2, v.second);
}

template <int N>
inline void Store(float* to, const Halves<BF16, N>& v) {
  StoreRaw<N>(to, v);
}

template <int N, class R>
inline void Store(R* to, const Halves<BF16, N, double>& v) {
  Store<N>(to, Convert<float>(v));
}

// The bits of N halves, 0 where key[i] != wanted.
template <int N, class T, class I>
inline Vec<uint16_t, N> BitsWhere(const T* value, const I* key, int64_t wanted) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  // Compared in their own width: the mask has a bit a lane whatever the width.
  if constexpr (N == 32 && sizeof(I) == 1) {
    const __mmask32 here =
        _mm256_cmpeq_epi8_mask(Bits<__m256i>(LoadRaw<I, N>(key)), _mm256_set1_epi8(static_cast<int8_t>(wanted)));
    return Bits<Vec<uint16_t, N>>(_mm512_maskz_loadu_epi16(here, value));
  }
#endif
  const auto here = Load<int16_t, N>(key) == static_cast<int16_t>(wanted);
  return here ? LoadRaw<uint16_t, N>(&value->bits) : Vec<uint16_t, N>{};
}

// sum += value[i] where key[i] == wanted. Halves are compared and masked before they are widened.
template <int N, class T, class I>
inline void AddWhere(Halves<T, N>& sum, const T* value, const I* key, int64_t wanted) {
  sum += Cut<N>(T(), BitsWhere<N>(value, key, wanted));
}

template <int N, class V, class T, class I>
inline void AddWhere(V& sum, const T* value, const I* key, int64_t wanted) {
  using Lane = std::decay_t<decltype(sum[0])>;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (N == 16 && std::is_same_v<T, float> && sizeof(I) < 4) {
    __mmask16 here;
    if constexpr (sizeof(I) == 1) {
      here = _mm_cmpeq_epi8_mask(Bits<__m128i>(LoadRaw<I, 16>(key)), _mm_set1_epi8(static_cast<int8_t>(wanted)));
    } else {
      here = _mm256_cmpeq_epi16_mask(Bits<__m256i>(LoadRaw<I, 16>(key)), _mm256_set1_epi16(static_cast<int16_t>(wanted)));
    }
    sum = Bits<Vec<Lane, N>>(
        _mm512_mask_add_ps(Bits<__m512>(sum), here, Bits<__m512>(sum), Bits<__m512>(LoadRaw<float, 16>(value))));
    return;
  }
#endif
  using Signed = std::conditional_t<sizeof(Lane) == 8, int64_t, int32_t>;
  const auto here = Load<Signed, N>(key) == static_cast<Signed>(wanted);
  sum += here ? Load<Lane, N>(value) : Vec<Lane, N>{};
}

// Stores past the caches, where the result is too large to stay in them: the lines need not be read first. Stores of half
// precision, of run ends and off the vectors' alignment go the usual way. StreamFence() before another thread reads.
template <int N, class T, class V>
inline void Stream(T* to, V v) {
#if defined(__x86_64__) || defined(_M_X64)
  if constexpr (!kHalf<T> && N * sizeof(T) == kVectorBytes) {
    if (reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0) {
#if defined(__AVX512F__)
      return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), Bits<__m512i>(v));
#elif defined(__AVX__)
      return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), Bits<__m256i>(v));
#else
      return _mm_stream_si128(reinterpret_cast<__m128i*>(to), Bits<__m128i>(v));
#endif
    }
  }
#endif
  Store<N>(to, v);
}

inline void StreamFence() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_sfence();
#endif
}

template <int N>
inline Vec<double, N> Sqrt(Vec<double, N> v) {
#if defined(__AVX512F__)
  if constexpr (N == 8) return Bits<Vec<double, N>>(_mm512_maskz_sqrt_pd(0xff, Bits<__m512d>(v)));
#endif
#if defined(__AVX__)
  if constexpr (N == 4) return Bits<Vec<double, N>>(_mm256_sqrt_pd(Bits<__m256d>(v)));
#endif
#if defined(__SSE2__)
  if constexpr (N == 2) return Bits<Vec<double, N>>(_mm_sqrt_pd(Bits<__m128d>(v)));
#elif defined(__aarch64__)
  if constexpr (N == 2) return Bits<Vec<double, N>>(vsqrtq_f64(Bits<float64x2_t>(v)));
#endif
  Vec<double, N> root = v;
  for (int lane = 0; lane < N; ++lane) root[lane] = __builtin_sqrt(v[lane]);
  return root;
}

template <int N>
inline Vec<float, N> Sqrt(Vec<float, N> v) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return Bits<Vec<float, N>>(_mm512_maskz_sqrt_ps(0xffff, Bits<__m512>(v)));
#endif
#if defined(__AVX__)
  if constexpr (N == 8) return Bits<Vec<float, N>>(_mm256_sqrt_ps(Bits<__m256>(v)));
#endif
#if defined(__SSE2__)
  if constexpr (N == 4) return Bits<Vec<float, N>>(_mm_sqrt_ps(Bits<__m128>(v)));
#elif defined(__aarch64__)
  if constexpr (N == 4) return Bits<Vec<float, N>>(vsqrtq_f32(Bits<float32x4_t>(v)));
#endif
  Vec<float, N> root = v;
  for (int lane = 0; lane < N; ++lane) root[lane] = __builtin_sqrtf(v[lane]);
  return root;
}

template <int N, class T, class Lane>
inline Halves<T, N, Lane> Sqrt(const Halves<T, N, Lane>& v) {
  return {Sqrt<N / 2>(v.first), Sqrt<N / 2>(v.second)};
}

// ---- Keys: numbers that compare as their elements do.

// Either half precision, where that makes no difference but for a constant.
struct Half {
  uint16_t bits;
};

template <class T>
struct KeyOf {
  using type = std::conditional_t<sizeof(T) == 1 || std::is_same_v<T, Half>, int16_t, T>;
};
template <class T>
using Key = typename KeyOf<T>::type;

template <class T>
constexpr bool kFloating = std::is_floating_point_v<T>;

// From elements to keys and back. `T` is a float, a signed integer, which stands for the unsigned one of its size too, or
// Half.
template <class T>
struct Order {
  Key<T> constant;  // Half: the bits of infinity; integers: the bits to flip

  explicit Order(Type type) : constant(0) {
    if constexpr (std::is_same_v<T, Half>) constant = type == Type::kF16 ? 0x7c00 : 0x7f80;
    if constexpr (std::is_integral_v<T>) {
      const bool is_unsigned = type == Type::kU8 || type == Type::kU16 || type == Type::kU32;
      if (is_unsigned) constant = std::numeric_limits<T>::lowest();
    }
  }

  // The least key: what a window without taps holds.
  Key<T> Lowest() const {
    if constexpr (kFloating<T>)
      return -std::numeric_limits<T>::infinity();
    else if constexpr (std::is_integral_v<T>)
      return std::numeric_limits<T>::lowest();
    else
      return static_cast<Key<T>>(~constant);
  }

  // A half's bits, read as a sign and a magnitude, are in order but for NaN, which loses its sign to become the greatest.
  // The map is its own inverse on numbers, and -0 comes just below +0.
  template <int N>
  Vec<Key<T>, N> Load(const T* from) const {
    if constexpr (std::is_same_v<T, Half>) {
      const auto bits = Bits<Vec<int16_t, N>>(LoadRaw<uint16_t, N>(&from->bits));
      const Vec<int16_t, N> magnitude = bits & 0x7fff;
      return magnitude > constant ? magnitude : bits ^ (bits >> 15 & 0x7fff);
    } else if constexpr (kFloating<T>) {
      return LoadRaw<T, N>(from);
    } else {
      return Convert<Key<T>, N>(LoadRaw<T, N>(from) ^ static_cast<T>(constant));
    }
  }

  template <int N>
  void Store(T* to, Vec<Key<T>, N> key) const {
    if constexpr (std::is_same_v<T, Half>) {
      StoreRaw<N>(&to->bits, key ^ (key >> 15 & 0x7fff));
    } else if constexpr (kFloating<T>) {
      StoreRaw<N>(to, key);
    } else {
      StoreRaw<N>(to, Convert<T, N>(key) ^ static_cast<T>(constant));
    }
  }
};

// ---- Sweeping a run of n elements: `most` vectors at a time (16, 8, 4 or 2), then eight, four and one. The last group
// overlaps the one before it; a run shorter than a vector takes `fewer` lanes. body(lanes, vectors, position), the first two
// as types.

template <int N>
using Int = std::integral_constant<int, N>;

template <int N, int most = 4, int fewer = (N == 16 ? 4 : N / 2), class Body>
JAX_MPS_INLINE void Sweep(int64_t n, const Body& body) {
  if (n >= N) {
    int64_t i = 0;
    if constexpr (most >= 16) {
      for (; i + 16 * N <= n; i += 16 * N) body(Int<N>(), Int<16>(), i);
    }
    if constexpr (most >= 8) {
      for (; i + 8 * N <= n; i += 8 * N) body(Int<N>(), Int<8>(), i);
    }
    if constexpr (most >= 4) {
      for (; i < n; i += 4 * N) {
        if (i + 4 * N > n) {
          // Four vectors once more cost less than two of them one after the other.
          if (n < 4 * N || i + N >= n) break;
          i = n - 4 * N;
        }
        body(Int<N>(), Int<4>(), i);
      }
    }
    if constexpr (most == 2) {
      for (; i + 2 * N <= n; i += 2 * N) body(Int<N>(), Int<2>(), i);
    }
    for (; i < n; i += N) body(Int<N>(), Int<1>(), i + N <= n ? i : n - N);
  } else if constexpr (N > 1) {
    Sweep<fewer, 1>(n, body);
  }
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
